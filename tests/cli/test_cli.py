"""The command line: results, streams, exit status, and nothing written where a check did not hold."""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from helpers.cli_cases import NETS, SHAPE
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.conversion import export as exporting
from manifold_nets.errors import OutputFileError
from manifold_nets.symmetry import SymmetryReport


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="manifold-nets")


def document(result: Result) -> dict[str, Any]:
    """The one JSON document on standard output."""
    data = json.loads(result.stdout)
    assert {"command", "model", "ok", "failures"} <= data.keys()
    assert data["ok"] == (result.exit_code == 0)
    assert data["ok"] == (not data["failures"])
    assert data["command"] in ("diagnose", "convert", "export")
    return data


def check_failed(result: Result, message: str, folder: Path) -> None:
    """A failure: status 1, said on standard error alone, without a traceback, and no file left behind."""
    assert result.exit_code == 1, result.output
    assert message in result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.output
    files = sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")
    assert files == ["nets.py"]


def test_the_checks_of_a_failure_can_fail(folder: Path) -> None:
    failed = run("diagnose", "nets.py:Nte", *SHAPE)
    check_failed(failed, "no attribute 'Nte'", folder)
    with pytest.raises(AssertionError):
        check_failed(failed, "some other message", folder)
    with pytest.raises(AssertionError):
        check_failed(run("diagnose", "nets.py:Net", *SHAPE), "", folder)
    (folder / "left.tmp").touch()
    with pytest.raises(AssertionError):
        check_failed(failed, "no attribute 'Nte'", folder)


# ---- diagnose --------------------------------------------------------------------------------------------------------


def test_diagnose_prints_a_table(folder: Path) -> None:
    result = run("diagnose", "nets.py:Net", *SHAPE)
    assert result.exit_code == 0
    assert result.stderr == ""
    rows = {line.split()[0]: line for line in result.stdout.splitlines() if line}
    assert "invariant" in rows["0.weight"]
    assert "4 filters of 18" in rows["0.weight"]
    assert "1 (batch_norm)" in rows["0.weight"]
    assert "not invariant" in rows["4.weight"]
    assert "1 of 2 weights are scale-invariant." in result.stdout


def test_diagnose_prints_one_document(folder: Path) -> None:
    result = run("diagnose", "nets.py:Net", *SHAPE, "--kwargs", '{"width": 6}', "--json")
    data = document(result)
    assert result.stderr == ""
    assert data["model"] == "nets.py:Net"
    report = data["report"]
    assert [weight["status"] for weight in report["weights"]] == ["invariant", "not invariant"]
    assert report["weights"][0]["groups"] == 6
    assert run("diagnose", "nets.py:Net", *SHAPE, "--kwargs", '{"width": 6}', "--json").stdout == result.stdout


def test_another_seed_draws_another_network(folder: Path) -> None:
    same, other = ((run("diagnose", "nets.py:Net", *SHAPE, "--seed", seed, "--json")).stdout for seed in "01")
    assert same != other


@pytest.mark.parametrize(
    ("arguments", "invariant"),
    [
        (("nets.py:Tokens", "--input-shape", "7", "--token-ids", "10"), {"embedding.weight", "linear.weight"}),
        (("nets.py:Two", "--input-shape", "3", "--input-shape", "4", "--batch-size", "8"), set()),
        (("nets.py:Net", *SHAPE, "--dtype", "float64"), {"0.weight"}),
        (("nets.py:Net", *SHAPE, "--dtype", "bfloat16"), {"0.weight"}),
    ],
)
def test_inputs_of_every_kind(folder: Path, arguments: tuple[str, ...], invariant: set[str]) -> None:
    report = document(run("diagnose", *arguments, "--json"))["report"]
    assert {weight["name"] for weight in report["weights"] if weight["status"] == "invariant"} == invariant


def test_a_disagreement_is_a_failure(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    diagnose = mn.diagnose

    def disagreeing(*args: Any, **kwargs: Any) -> SymmetryReport:
        report = diagnose(*args, **kwargs)
        first = dataclasses.replace(report.weights[0], status="disagreement", remedy="look closer")
        return dataclasses.replace(report, weights=(first, *report.weights[1:]))

    monkeypatch.setattr("manifold_nets.symmetry.diagnose", disagreeing)
    result = run("diagnose", "nets.py:Net", *SHAPE)
    check_failed(result, "disagree on 0.weight: look closer", folder)
    assert "0.weight" in result.stdout
    assert document(run("diagnose", "nets.py:Net", *SHAPE, "--json"))["failures"]


# ---- convert ---------------------------------------------------------------------------------------------------------


def check_same_function(path: Path, reference: nn.Module, limit: float) -> None:
    """The file, loaded into a freshly made network, computes what the reference computes, and is on spheres."""
    module = importlib.import_module("manifold_nets.sources")
    loaded = module.load_model("nets.py:Net", weights=path)
    assert mn.revert(loaded).state_dict().keys() == reference.state_dict().keys()
    x = torch.randn(8, 2, 6, 6, generator=torch.Generator().manual_seed(3))
    found = mn.verify(reference, loaded, x)
    assert found.eval_difference <= limit
    norms = loaded[0].weight.detach().double().flatten(1).norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-6)


def seeded() -> nn.Module:
    torch.manual_seed(0)
    return mn.sources.load_model("nets.py:Net")


def test_convert_writes_what_it_verified(folder: Path) -> None:
    result = run("convert", "nets.py:Net", *SHAPE, "--output", "net.safetensors")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert "largest relative difference, evaluation mode" in result.stdout
    assert "largest relative difference, training mode" in result.stdout
    assert "net.safetensors" in result.stdout
    check_same_function(folder / "net.safetensors", seeded(), 1e-5)
    # Sabotage: the same network with one filter turned.
    other = seeded()
    with torch.no_grad():
        other[0].weight[0].mul_(-1)
    with pytest.raises(AssertionError):
        check_same_function(folder / "net.safetensors", other, 1e-5)


def test_convert_prints_one_document(folder: Path) -> None:
    data = document(run("convert", "nets.py:Net", *SHAPE, "--output", "net.safetensors", "--json"))
    assert data["output"] == "net.safetensors"
    assert 0 <= data["verification"]["eval_difference"] <= 1e-5
    assert 0 <= data["verification"]["train_difference"] <= 1e-2
    actions = {action["name"]: (action["action"], action["radius"]) for action in data["plan"]["actions"]}
    assert actions == {"0.weight": ("sphere", "unit"), "4.weight": ("leave", None)}


def test_convert_without_an_output_only_shows(folder: Path) -> None:
    result = run("convert", "nets.py:Net", *SHAPE)
    assert result.exit_code == 0
    assert "nothing" in result.stdout
    assert not list(folder.glob("*.safetensors"))


def test_convert_keeps_the_radii_when_told(folder: Path) -> None:
    data = document(run("convert", "nets.py:Net", *SHAPE, "--radius", "keep", "--json"))
    assert data["plan"]["actions"][0]["radius"] == "keep"
    assert data["verification"] == {"eval_difference": 0.0, "train_difference": 0.0}


def test_convert_keeps_the_radii_where_eps_matters(folder: Path) -> None:
    arguments = ("convert", "nets.py:Net", *SHAPE, "--json", "--kwargs", '{"eps": 0.1}')
    assert document(run(*arguments))["plan"]["actions"][0]["radius"] == "keep"
    assert document(run(*arguments, "--train-tolerance", "10"))["plan"]["actions"][0]["radius"] == "unit"


def test_a_training_difference_above_the_limit_writes_nothing(folder: Path) -> None:
    arguments = ("--kwargs", '{"eps": 0.1}', "--train-tolerance", "10", "--max-train-difference", "1e-3")
    result = run("convert", "nets.py:Net", *SHAPE, *arguments, "--output", "net.safetensors")
    check_failed(result, "nothing was written", folder)
    assert "training mode" in result.stdout
    data = document(run("convert", "nets.py:Net", *SHAPE, *arguments, "--output", "net.safetensors", "--json"))
    assert data["output"] is None
    assert data["verification"]["train_difference"] > 1e-3


def test_a_failure_says_that_the_plan_was_written(folder: Path) -> None:
    arguments = ("--kwargs", '{"eps": 0.1}', "--train-tolerance", "10", "--max-train-difference", "1e-3")
    files = ("--output", "net.safetensors", "--write-plan", "plan.json")
    result = run("convert", "nets.py:Net", *SHAPE, *arguments, *files)
    assert "nothing but the plan, plan.json, was written" in result.stderr
    assert "plan written" in result.stdout
    (folder / "plan.json").unlink()
    check_failed(result, "training mode", folder)


def test_a_failure_leaves_the_file_that_was_there(folder: Path) -> None:
    (folder / "net.safetensors").write_bytes(b"precious")
    arguments = ("--kwargs", '{"eps": 0.1}', "--train-tolerance", "10", "--max-train-difference", "1e-3")
    result = run("convert", "nets.py:Net", *SHAPE, *arguments, "--output", "net.safetensors")
    assert result.exit_code == 1
    assert (folder / "net.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nets.py:Plain", "--input-shape", "4"), "nothing to convert"),
        (("nets.py:Net", *SHAPE, "--kwargs", '{"zero": true}'), "0.weight: group 1 with norm 0"),
        (("nets.py:Net", *SHAPE, "--include", "layer9.*"), "layer9.*"),
        (("nets.py:Net", *SHAPE, "--exclude", "0.weight"), "nothing to convert"),
        (("nets.py:Net", "--input-shape", "3,6,6"), "example_inputs"),
        (("nets.py:Net", *SHAPE, "--kwargs", '{"depth": 3}'), "unexpected keyword argument 'depth'"),
        (("gone.py:Net", *SHAPE), "there is no file gone.py"),
    ],
)
@pytest.mark.parametrize("form", ["text", "json"])
def test_what_failed_is_said_and_nothing_written(
    folder: Path, arguments: tuple[str, ...], message: str, form: str
) -> None:
    options = ("--json",) if form == "json" else ()
    result = run("convert", *arguments, "--output", "net.safetensors", *options)
    check_failed(result, message, folder)
    if form == "json":
        assert message in document(result)["failures"][0]
    else:
        assert result.stdout == ""


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(folder: Path) -> Path:
    assert run("convert", "nets.py:Net", *SHAPE, "--output", "converted.safetensors").exit_code == 0
    return folder / "converted.safetensors"


def outputs_of_file(path: Path, x: torch.Tensor) -> torch.Tensor:
    """What an exported file computes, without this package."""
    if path.suffix == ".onnx":
        runtime = pytest.importorskip("onnxruntime")
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(x)
    net = seeded()
    net.load_state_dict(safetensors.torch.load_file(path))
    return net.eval()(x)


@pytest.mark.parametrize("suffix", [".safetensors", ".onnx", ".pt2"])
def test_export_gives_an_ordinary_network(converted: Path, suffix: str) -> None:
    if suffix == ".onnx":
        pytest.importorskip("onnxscript")
    path = converted.with_name(f"plain{suffix}")
    data = document(run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", path.name, "--json"))
    assert data["output"] == path.name
    assert data["export"]["format"] == suffix[1:]
    assert data["export"]["reverted"] == 1
    assert data["export"]["verification"] == {"eval_difference": 0.0, "train_difference": 0.0}
    # Other inputs, and another batch, than those that the command used.
    x = torch.randn(9, 2, 6, 6, generator=torch.Generator().manual_seed(5))
    original = seeded().eval()(x)
    assert (outputs_of_file(path, x) - original).abs().max() <= 1e-5 * original.abs().max()


def test_export_prints_a_table(converted: Path) -> None:
    result = run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", "net.bin", "--format", "pt2")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for line in ("weights taken off their spheres", "file read back", "torch.export", "net.bin"):
        assert line in result.stdout


@pytest.mark.parametrize("fault", ["revert", "_write_safetensors"])
def test_a_planted_fault_stops_the_export(converted: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reverting to another function, or writing other weights than those verified, is found, and no file is left."""
    real = getattr(exporting, fault)

    def faulty(model: nn.Module, *args: Any) -> Any:
        damaged = mn.revert(model)
        with torch.no_grad():
            damaged[4].bias.add_(0.1)
        if fault == "revert":
            return damaged
        written = real(damaged, *args)
        outputs = damaged.eval()(args[1][0][0])
        return exporting._difference(model, args[1], [outputs.detach()]), *written[1:]

    monkeypatch.setattr(exporting, fault, faulty)
    result = run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", "plain.safetensors")
    converted.unlink()
    check_failed(result, "would change", converted.parent)


def test_export_without_the_extra_names_it(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    result = run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", "net.onnx")
    converted.unlink()
    check_failed(result, "manifold_nets[onnx]", converted.parent)


def test_export_without_a_runtime_says_so(converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxscript")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    result = run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", "net.onnx", "--json")
    data = document(result)["export"]
    assert data["file_difference"] is None
    assert "onnxruntime is not installed" in data["read_by"]


def test_a_damaged_checkpoint_is_named(converted: Path) -> None:
    converted.write_bytes(converted.read_bytes()[:-8])
    result = run("export", "nets.py:Net", "--weights", converted.name, *SHAPE, "--output", "plain.safetensors")
    converted.unlink()
    check_failed(result, "converted.safetensors", converted.parent)


def test_a_foreign_file_of_weights_is_named_in_the_document(folder: Path) -> None:
    (folder / "net.pt").write_bytes(b"a")
    result = run("convert", "nets.py:Net", *SHAPE, "--weights", "net.pt", "--json")
    (folder / "net.pt").unlink()
    check_failed(result, "net.pt: found a damaged torch file", folder)
    assert "net.pt" in document(result)["failures"][0]


# ---- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("diagnose",),
        ("diagnose", "nets.py:Net"),
        ("diagnose", "resnet18", *SHAPE),
        ("diagnose", "nets.py:Net", "--input-shape", "2,x"),
        ("diagnose", "nets.py:Net", "--input-shape", "2,0"),
        ("diagnose", "nets.py:Net", "--input-shape", ""),
        ("diagnose", "nets.py:Net", *SHAPE, "--kwargs", "{"),
        ("diagnose", "nets.py:Net", *SHAPE, "--kwargs", "[1]"),
        ("diagnose", "nets.py:Net", *SHAPE, "--weights", "gone.safetensors"),
        ("diagnose", "nets.py:Net", *SHAPE, "--weights", "."),
        ("diagnose", "nets.py:Net", *SHAPE, "--batch-size", "0"),
        ("diagnose", "nets.py:Net", *SHAPE, "--dtype", "int8"),
        ("convert", "nets.py:Net", *SHAPE, "--radius", "two"),
        ("convert", "nets.py:Net", *SHAPE, "--train-tolerance", "-1"),
        ("convert", "nets.py:Net", *SHAPE, "--output", "gone/net.safetensors"),
        ("convert", "nets.py:Net", *SHAPE, "--output", "."),
        ("export", "nets.py:Net", *SHAPE),
        ("export", "nets.py:Net", *SHAPE, "--output", "net", "--format", "h5"),
        ("train", "nets.py:Net"),
    ],
)
def test_wrong_usage(folder: Path, arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert "Error:" in result.stderr
    assert [path.name for path in folder.iterdir() if path.name != "__pycache__"] == ["nets.py"]


@pytest.mark.parametrize(
    ("command", "option", "values"),
    [
        ("diagnose", "--tolerance", ["nan", "inf", "0", "-0.5", "small"]),
        ("diagnose", "--seed", ["-1", str(2**32), str(10**30), "1.5"]),
        ("convert", "--seed", ["-1", str(2**64)]),
        ("convert", "--train-tolerance", ["nan", "-1"]),
        ("convert", "--max-train-difference", ["nan", "-1"]),
    ],
)
def test_numbers_without_a_meaning_are_wrong_usage(folder: Path, command: str, option: str, values: list[str]) -> None:
    for value in values:
        result = run(command, "nets.py:Net", *SHAPE, option, value, "--json")
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert f"Invalid value for '{option}'" in result.stderr
        assert value in result.stderr


def test_help_and_version() -> None:
    assert {"diagnose", "convert", "export"} <= set(run("--help").stdout.split())
    assert importlib.metadata.version("manifold_nets") in run("--version").stdout
    for name, command in main.commands.items():
        assert run(name, "--help").exit_code == 0
        for parameter in command.params:
            assert isinstance(parameter, click.Argument) or parameter.help or parameter.name == "batch_size", name


def installed(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(sys.executable).with_name("manifold-nets")
    environment = {**os.environ, "PYTHONWARNINGS": "default", "OMP_NUM_THREADS": "1"}
    return subprocess.run([script, *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_installed_script_prints_one_document(folder: Path) -> None:
    done = installed("diagnose", "nets:Net", *SHAPE, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True


def test_the_installed_script(folder: Path) -> None:
    failed = installed("diagnose", "nets:Nte", *SHAPE)
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.splitlines()[-1].startswith("error: nets:Nte")
    assert installed("diagnose").returncode == 2


CONVERT, EXPORT = ("convert", "nets.py:Net", *SHAPE), ("export", "nets.py:Net", *SHAPE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            (*CONVERT, "--output", "net.onnx"),
            "net.onnx: this command does not write .onnx files. End the name in .safetensors, or",
        ),
        ((*CONVERT, "--output", "net.PT2"), "with manifold-nets export"),
        ((*CONVERT, "--output", "net.pth"), "does not write .pth files"),
        ((*CONVERT, "--output", "net.bin"), "does not write .bin files"),
        ((*CONVERT, "--write-plan", "net.safetensors"), "End the name in .json"),
        ((*CONVERT, "--output", "net/"), "names a folder"),
        ((*CONVERT, "--output", "net/."), "names a folder"),
        ((*CONVERT, "--output", "loop"), "found a loop of symbolic links"),
        ((*EXPORT, "--output", "net.pt"), "End the name in .safetensors or .onnx or .pt2, or name the format"),
        ((*EXPORT, "--output", "net.ONNX", "--format", "safetensors"), "End the name in .safetensors."),
        ((*EXPORT, "--output", "net/"), "names a folder"),
        (("diagnose", "nets.py:Net", *SHAPE, "--html", "page.pdf"), "End the name in .html or .htm"),
        (("compare", "--output", "report.html"), "is named like a file"),
        (("compare", "--output", "nets.py"), "is a file"),
    ],
)
def test_names_of_other_things_are_refused(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "loop").symlink_to("loop")
    before = sorted(path.name for path in folder.iterdir())
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--output", "link"), "--output and MODEL name the same file link"),
        (("--output", "hard"), "--output and MODEL name the same file hard"),
        (
            ("--output", "sub/../net.safetensors", "--weights", "net.safetensors"),
            "--output and --weights name the same file",
        ),
        (("--output", "new", "--write-plan", "sub/../new"), "--write-plan and --output name the same file"),
        (("--output", "sub/to-new", "--write-plan", "new"), "--write-plan and --output name the same file"),
        (("--plan", "plan.json", "--write-plan", "plan.json"), "--write-plan and --plan name the same file"),
    ],
)
def test_a_file_that_is_read_is_not_written(folder: Path, arguments: tuple[str, ...], message: str) -> None:
    (folder / "sub").mkdir()
    (folder / "link").symlink_to("nets.py")
    (folder / "hard").hardlink_to("nets.py")
    (folder / "sub" / "to-new").symlink_to("../new")
    (folder / "plan.json").write_text('{"actions": []}')
    (folder / "net.safetensors").write_bytes(b"weights")
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    result = run(*CONVERT, *arguments)
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_a_loop_of_links_is_no_model(folder: Path) -> None:
    (folder / "loop.py").symlink_to("loop.py")
    result = run("diagnose", "loop.py:Net", *SHAPE)
    assert result.exit_code == 1
    assert "its path is a loop of symbolic links" in result.stderr
    with pytest.raises(OutputFileError, match="loop of symbolic links"):
        mn.compare(output=folder / "loop.py", optimizers=["sgd"], learning_rates=[0.1], seeds=1, epochs=1)
