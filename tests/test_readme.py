"""What the README shows runs as it stands."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text, language):
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run_python(text):
    """Run all Python blocks one after another, as a reader would type them; return what they defined."""
    found = blocks(text, "python")
    assert len(found) >= 5
    names = {"__name__": "readme"}
    for number, block in enumerate(found):
        exec(compile(block, f"README block {number}", "exec"), names)
    return names


def test_python_blocks_run_and_do_what_the_text_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = run_python(README)
    report = names["report"]
    assert str(report["0.weight"].partition) == "16 filters of 27"
    assert report["3.weight"].partition.n_groups == 4
    assert report["3.weight"].filters_per_group == 8
    assert report["0.weight"].moves_along == ("0.bias", "1.running_mean", "1.running_var")
    assert {type(p) for p in names["plain"].parameters()} == {nn.Parameter}
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    assert "16 filters of 27" in capsys.readouterr().out


def test_sabotage_a_wrong_readme_is_noticed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError):
        run_python(README.replace("eval_difference == 0", "eval_difference > 0"))
    with pytest.raises(AttributeError):
        run_python(README.replace("mn.diagnose", "mn.diagnoze"))


def test_before_and_after_both_train(capsys):
    (diff,) = blocks(README, "diff")
    lines = diff.splitlines()
    assert len(lines) == 8
    for removed, kind in (("-", mn.optim.RiemannianSGD), ("+", torch.optim.SGD)):
        torch.manual_seed(0)
        trained = []
        names = {
            "torch": torch,
            "model": nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2)),
            "example_inputs": torch.randn(16, 4),
            "train": lambda model, optimizer, trained=trained: trained.append((model, optimizer)),
        }
        exec("\n".join(line[1:] for line in lines if line[0] != removed), names)
        ((model, optimizer),) = trained
        assert type(optimizer) is kind
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        assert {type(p) for p in names["model"].parameters()} == {nn.Parameter}


def test_commands_run(tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^\$ manifold-nets (.*)$", README, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["diagnose", "convert", "export"]
    for command in commands:
        assert not main(shlex.split(command), standalone_mode=False), capsys.readouterr().err
    assert {"converted.safetensors", "plain.safetensors"} <= {file.name for file in tmp_path.iterdir()}


def test_first_screen_names_two_commands_and_links_lead_somewhere():
    first_screen = README.partition("\n## ")[0]
    assert blocks(first_screen, "console") == ["make demo\nmake test\n"]
    links = re.findall(r"\]\((?!https?:)([^)]+)\)", README)
    assert links
    anchors = {"#" + heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.+)$", README, re.MULTILINE)}
    assert [link for link in links if link not in anchors and not (ROOT / link).exists()] == []


def test_every_public_name_is_mentioned():
    assert [name for name in mn.__all__ if f"`{name}`" not in README and f"mn.{name}" not in README] == []


def test_table_of_networks_is_the_stored_one():
    stored = (ROOT / "examples" / "results" / "coverage.md").read_text(encoding="utf-8")
    summary = stored.partition("\n## ")[0]
    rows = [line for line in summary.splitlines() if line.startswith("| ")]
    assert len(rows) >= 5
    for row in rows:
        assert row in README
    assert rows[-1].replace("3", "4") not in README


def check_table(name):
    """Every row of a stored table stands in the README."""
    stored = (ROOT / "examples" / "results" / name).read_text(encoding="utf-8")
    rows = [line for line in stored.splitlines() if line.startswith("| ")]
    assert len(rows) > 5
    assert [row for row in rows if row not in README] == []


def test_table_of_invariance_is_the_stored_one(monkeypatch):
    check_table("invariance.md")
    monkeypatch.setitem(globals(), "README", README.replace("9e-16", "8e-16"))
    with pytest.raises(AssertionError):
        check_table("invariance.md")


def test_table_of_optimizers_is_the_stored_one(monkeypatch):
    check_table("comparison.md")
    runs = (ROOT / "examples" / "results" / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert len(runs) == 1 + 8 * 5 * 5
    monkeypatch.setitem(globals(), "README", README.replace("| rsgd |", "| gdsr |"))
    with pytest.raises(AssertionError):
        check_table("comparison.md")


def check_ratios(readme):
    """Every ratio of the sections on costs stands in the stored tables of the benchmarks."""
    section = readme.partition("- **Steps on spheres cost")[2].partition("- **No figure here was measured")[0]
    results = ROOT / "examples" / "results"
    steps = (results / "benchmark_optimizers.md").read_text(encoding="utf-8")
    found = re.findall(r"\d+\.\d\d \(\d+\.\d\d … \d+\.\d\d\)", section)
    assert len(found) == 14
    assert [ratio for ratio in found if ratio not in steps] == []
    ((share, low, high),) = re.findall(r"it adds ([\d.]+) % \(quartiles ([\d.]+) … ([\d.]+)\)", section)
    comparison = (results / "benchmark_comparison.md").read_text(encoding="utf-8")
    assert re.search(rf"\| all together \| [\d.]+ \| {share} \| {low} … {high} \|", comparison)


def test_costs_are_those_of_the_stored_benchmarks():
    check_ratios(README)
    for old, new in (("1.12 (1.06 …", "91.12 (1.06 …"), ("adds 4.5 %", "adds 94.5 %")):
        with pytest.raises(AssertionError):
            check_ratios(README.replace(old, new))
