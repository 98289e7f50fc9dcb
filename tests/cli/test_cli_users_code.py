"""The command line and the code of a model: it neither ends the command, nor prints into its result."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from torch import nn

from manifold_nets.cli import main, output
from manifold_nets.sources import load_model, load_object

NETS = """
import sys
from torch import nn

print("importing")

def net():
    print("building")
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))

def loud():
    model = net()
    model[0].register_forward_hook(lambda *_: print("running"))
    return model

def leaves(status=0):
    sys.exit(status)

class Leaves(nn.Module):
    def __init__(self, status=0):
        super().__init__()
        self.layer, self.norm, self.status = nn.Linear(4, 5), nn.BatchNorm1d(5), status

    def forward(self, x):
        sys.exit(self.status)

def interrupted():
    raise KeyboardInterrupt

def unfit(input_shape, outputs):
    print("building")
    return nn.Linear(1, 10)
"""
SCRIPT = "import sys\nsys.exit({status})\n"
SHAPE = ("--input-shape", "4")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "script.py").write_text(SCRIPT.format(status=0))
    (tmp_path / "script3.py").write_text(SCRIPT.format(status=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="manifold-nets")


def check_an_error(result: Result, *said: str) -> None:
    assert result.exit_code == 1, result.output
    assert result.stderr.splitlines()[-1].startswith("error: ")
    for text in said:
        assert text in result.stderr


@pytest.mark.parametrize("command", ["diagnose", "convert"])
@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("script.py:net", "importing script.py raised SystemExit: 0"),
        ("script3.py:net", "importing script3.py raised SystemExit: 3"),
        ("script:net", "importing script raised SystemExit: 0"),
        ("nets.py:leaves", "leaves() raised SystemExit: 0"),
        ("nets.py:Leaves", "nets.py:Leaves: its code raised SystemExit: 0 while it ran"),
    ],
)
def test_an_exit_of_the_models_code_is_an_error(command: str, model: str, said: str) -> None:
    check_an_error(run(command, model, *SHAPE), said)
    result = run(command, model, *SHAPE, "--json")
    check_an_error(result, said)
    assert said in json.loads(result.stdout)["failures"][0]


def test_an_exit_with_any_status_or_text_is_the_same_error() -> None:
    for status, said in ((3, "SystemExit: 3"), ("no GPU", "SystemExit: no GPU"), (None, "SystemExit while")):
        kwargs = json.dumps({"status": status})
        check_an_error(run("diagnose", "nets.py:Leaves", *SHAPE, "--kwargs", kwargs), said)


def test_without_the_guard_an_exit_is_the_commands_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "running_code_of", contextlib.nullcontext)
    with pytest.raises(AssertionError):
        check_an_error(run("diagnose", "nets.py:Leaves", *SHAPE))


def test_an_exit_in_python_is_an_error_of_the_package() -> None:
    with pytest.raises(Exception, match=r"raised SystemExit: 0"):
        load_model("nets.py:leaves")
    with pytest.raises(Exception, match=r"leaves\(\) raised SystemExit: 0"):
        load_object("nets.py:leaves")
    with pytest.raises(KeyboardInterrupt):
        load_model("nets.py:interrupted")


def test_an_exit_while_a_comparison_begins_is_an_error(folder: Path) -> None:
    for model in ("script.py:net", "nets.py:leaves", "nets.py:Leaves"):
        result = run("compare", "--model", model, "--epochs", "1", "--output", str(folder / "out"), "--json")
        check_an_error(result, "SystemExit")
        assert json.loads(result.stdout)["ok"] is False


@pytest.mark.parametrize("model", ["nets.py:loud", "nets.py:net"])
@pytest.mark.parametrize("command", ["diagnose", "convert"])
def test_what_the_model_prints_is_no_result(command: str, model: str) -> None:
    result = run(command, model, *SHAPE, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["ok"] is True
    words = ["importing", "building"] + (["running"] if model == "nets.py:loud" else [])
    assert list(dict.fromkeys(result.stderr.split())) == words
    shown = run(command, model, *SHAPE)
    assert not set(words) & set(shown.stdout.split())
    assert set(words) <= set(shown.stderr.split())


def test_without_the_redirection_the_result_is_no_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contextlib, "redirect_stdout", contextlib.nullcontext)
    result = run("diagnose", "nets.py:net", *SHAPE, "--json")
    with pytest.raises(json.JSONDecodeError):
        json.loads(result.stdout)


def test_what_the_model_prints_is_no_result_of_a_comparison(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("compare", "--model", "nets.py:unfit", "--output", str(folder / "out"), "--json")
    result = run(*arguments)
    assert json.loads(result.stdout)["error"] == "TaskSourceError"
    assert "building" in result.stderr
    # Sabotage: without the redirection.
    monkeypatch.setattr(contextlib, "redirect_stdout", contextlib.nullcontext)
    with pytest.raises(json.JSONDecodeError):
        json.loads(run(*arguments).stdout)


# ---- a file without a callable ---------------------------------------------------------------------------------------

TRAIN = """
import torch
from torch import nn

print("reading data")

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer, self.norm = nn.Linear(4, width), nn.BatchNorm1d(width)

    def forward(self, x, scale=1.0):
        return self.norm(self.layer(x)) * scale

class Net(Block):
    def __init__(self{argument}):
        super().__init__(5)
        self.block = Block(2)

if __name__ == "__main__":
    raise RuntimeError("training")
"""


def test_the_one_model_of_a_file_is_taken_and_that_is_said(folder: Path) -> None:
    (folder / "train.py").write_text(TRAIN.format(argument=""))
    result = run("diagnose", "train.py", *SHAPE, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["model"] == "train.py:Net"
    assert [weight["name"] for weight in document["report"]["weights"]] == ["layer.weight", "block.layer.weight"]
    assert "train.py: taking Net" in result.stderr
    assert "importing it runs line 5: print('reading data')" in result.stderr
    named = run("diagnose", "train.py:Net", *SHAPE, "--json")
    assert named.stdout == result.stdout
    assert "taking" not in named.stderr


def test_the_models_of_a_file_are_listed_where_none_can_be_taken(folder: Path) -> None:
    (folder / "train.py").write_text(TRAIN.format(argument=", depth"))
    result = run("diagnose", "train.py", *SHAPE)
    assert result.exit_code == 2
    text = " ".join(result.stderr.replace("│", " ").split())
    assert "it defines Block (class, needs width), Net (class, needs depth)" in text
    assert "train.py:Net, and give depth as keyword arguments (--kwargs" in text
    assert "reading data" not in result.stderr
    assert run("diagnose", "train.py", *SHAPE, "--kwargs", '{"depth": 1}').exit_code == 0


def test_inputs_from_a_file(folder: Path) -> None:
    (folder / "train.py").write_text(TRAIN.format(argument=""))
    np.savez(folder / "inputs.npz", np.random.default_rng(0).normal(size=(6, 4)), scale=np.full((6, 1), 2.0))
    for command in ("diagnose", "convert"):
        assert run(command, "train.py:Net", "--inputs", "inputs.npz").exit_code == 0
    np.savez(folder / "inputs.npz", np.ones((6, 3)))
    check_an_error(run("diagnose", "train.py:Net", "--inputs", "inputs.npz"), "[(6, 3)]")
    for option in (SHAPE, ("--token-ids", "5")):
        refused = run("diagnose", "train.py:Net", "--inputs", "inputs.npz", *option)
        assert refused.exit_code == 2
        assert f"--inputs cannot be used with {option[0]}" in refused.stderr
    missing = run("diagnose", "train.py:Net")
    assert missing.exit_code == 2
    assert "Missing option '--input-shape'" in missing.stderr


def test_the_weights_of_a_checkpoint_are_chosen_by_name(folder: Path) -> None:
    states = [{f"module.{k}": v for k, v in nn.Sequential(nn.Linear(4, 5)).state_dict().items()} for _ in "ab"]
    torch.save({"state_dict": states[0], "state_dict_ema": states[1]}, folder / "net.pth")
    (folder / "small.py").write_text("from torch import nn\nNet = lambda: nn.Sequential(nn.Linear(4, 5))\n")
    arguments = ("diagnose", "small.py:Net", *SHAPE, "--weights", "net.pth")
    check_an_error(run(*arguments), "several keys, state_dict, state_dict_ema", "--key")
    check_an_error(run(*arguments, "--key", "state_dict_ema"), "--prefix module.")
    assert run(*arguments, "--key", "state_dict_ema", "--prefix", "module.").exit_code == 0
    refused = run("diagnose", "small.py:Net", *SHAPE, "--key", "state_dict")
    assert refused.exit_code == 2
    assert "--key can be used only with --weights" in refused.stderr
