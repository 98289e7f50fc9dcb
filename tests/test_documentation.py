"""What README and docs show runs as it stands, and their figures are those of the stored results."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, tomllib
from torch import nn

import manifold_nets as mn
from manifold_nets.cli import main

RESULTS = ROOT / "examples" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if not {"_build", "reports"} & set(path.parts)
}
MEASURED = TEXTS["docs/results.md"]
SLOW = {"docs/guides/compare.md"}
SCRIPT = re.compile(r"# (\w+\.py)\n")  # the first line of a block that is a file
NEEDED = {"docs/guides/compare.md": ("sqlalchemy", "sklearn", "matplotlib"), "docs/guides/pymanopt.md": ("pymanopt",)}


def blocks(text, language):
    """Return the fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def pages_with(pattern):
    """Parameters for each page in which a pattern is found."""
    found = [name for name, text in TEXTS.items() if re.search(pattern, text, re.MULTILINE)]
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in found]


def require(page):
    for package in NEEDED.get(page, ()):
        pytest.importorskip(package)


def run_python(text):
    """Run all Python blocks of a page one after another, as a reader would type them; return what they defined."""
    names = {"__name__": "page"}
    for number, block in enumerate(blocks(text, "python")):
        if SCRIPT.match(block):
            continue
        exec(compile(block, f"block {number}", "exec"), names)
    return names


# ---- what is shown runs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", pages_with("^```python"))
def test_python_blocks_run(page, tmp_path, monkeypatch, capsys):
    require(page)
    monkeypatch.chdir(tmp_path)
    run_python(TEXTS[page])


def test_the_blocks_do_what_the_text_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = run_python(README)
    report = names["report"]
    assert str(report["0.weight"].partition) == "16 filters of 27"
    assert report["3.weight"].filters_per_group == 8
    assert {type(p) for p in names["plain"].parameters()} == {nn.Parameter}
    assert [file.name for file in tmp_path.iterdir()] == ["net.safetensors"]
    guide = TEXTS["docs/guides/diagnose.md"]
    found = run_python(guide)["finding"]
    for name, shown in re.findall(r"print\(finding\.(status|partition|moves_along)\) +# (.+)", guide):
        assert shown == str(getattr(found, name))


def test_sabotage_a_wrong_page_is_noticed(tmp_path, monkeypatch):
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
            "train": lambda *given, epochs, trained=trained: trained.append(given),
        }
        exec("\n".join(line[1:] for line in lines if line[0] != removed), names)
        first, (model, optimizer, scheduler) = trained
        assert type(first[1]) is torch.optim.SGD
        assert type(optimizer) is kind
        assert scheduler.optimizer is optimizer
        assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
        assert {type(p) for p in names["model"].parameters()} == {nn.Parameter}


def losses_on_processes(text):
    """Write the scripts of the page, run its commands on processes in their order, and return what they print."""
    for block in blocks(text, "python"):
        if script := SCRIPT.match(block):
            Path(script[1]).write_text(block)
    printed = []
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in re.findall(r"^\$ torchrun (.*)$", text, re.MULTILINE):
        words = [sys.executable, "-m", "torch.distributed.run", *shlex.split(command)]
        ended = subprocess.run(words, capture_output=True, text=True, env=variables)
        assert ended.returncode == 0, f"{command}\n{ended.stderr}"
        printed.append(ended.stdout)
    return printed


@pytest.mark.slow
def test_commands_on_several_processes_print_the_same_loss(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = TEXTS["docs/guides/scale-out.md"]
    *found, nothing = losses_on_processes(page)
    assert (len(found), nothing) == (8, "")
    assert len(set(found[:4])) == len(set(found[4:])) == 1
    assert found[0].startswith("loss ")
    assert found[0] != found[4]
    # Sabotage: all processes see the same part of the batch.
    first = "\n".join(line for line in page.splitlines() if not re.match(r"\$.*(checkpoint|midrun|fsdp|tp$)", line))
    assert len(set(losses_on_processes(first.replace("chunk(world)[rank]", "chunk(world)[0]")))) == 2


@pytest.mark.parametrize("page", pages_with(r"^\$ manifold-nets"))
def test_commands_run(page, tmp_path, monkeypatch, capsys):
    require(page)
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    for command in re.findall(r"^\$ manifold-nets (.*)$", TEXTS[page], re.MULTILINE):
        words = shlex.split(command)
        assert not main(words, standalone_mode=False), capsys.readouterr().err
        for flag in ("--output", "--html", "--write-plan"):
            assert flag not in words or (tmp_path / words[words.index(flag) + 1]).exists()


def test_commands_that_are_not_run_have_the_options_that_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    options = {name: {o for p in command.params for o in p.opts} for name, command in main.commands.items()}
    for text in TEXTS.values():
        assert set(re.findall(r"\bmake ([a-z-]+)`", text)) <= targets
        assert set(re.findall(r"'\.\[([a-z]+)\]'", text)) <= extras.keys()
        for line in "".join(blocks(text, "console")).splitlines():
            words = line.partition("#")[0].removeprefix("$ ").split()
            if words[0] == "manifold-nets":
                assert {word for word in words if word.startswith("--")} <= options[words[1]]
            else:
                assert words[:2] in (
                    ["pip", "install"],
                    ["make", "demo"],
                    ["make", "test"],
                    ["torchrun", "--standalone"],
                )
        for script, rest in re.findall(r"python (examples/\w+\.py)([^`\n]*)", text):
            source = (ROOT / script).read_text(encoding="utf-8")
            written = {n.value for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Constant)}
            shared = (ROOT / "examples" / "evidence.py").read_text(encoding="utf-8")
            for flag in re.findall(r"--[a-z-]+", rest):
                assert flag in written or flag in shared, f"{script} {flag}"


def test_the_guide_names_the_optimizers_that_exist():
    listed = TEXTS["docs/guides/compare.md"].partition("Optimizers by name: ")[2].partition("\n\n")[0]
    assert set(re.findall(r"`([a-z-]+)`", listed)) == set(mn.comparison.OPTIMIZERS)


# ---- README and links ------------------------------------------------------------------------------------------------


def test_readme_is_short_and_begins_with_two_commands():
    assert len(README.splitlines()) <= 180
    assert len(README.split()) <= 2000
    assert blocks(README.partition("\n## ")[0], "console") == ["make demo\nmake test\n"]


def anchors(text):
    return {re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in re.findall(r"^#+ (.+)$", text, re.MULTILINE)}


def broken_links(page, text):
    """The links of a page to files or headings that do not exist."""
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", text):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    assert list(broken_links(page, TEXTS[page])) == []


def test_broken_links_are_found():
    assert list(broken_links("README.md", "[a](gone.md) [b](README.md#install) [c](docs/limits.md#gone)")) == [
        "gone.md",
        "docs/limits.md#gone",
    ]


def test_every_public_name_is_mentioned():
    text = "".join(TEXTS.values())
    assert [name for name in mn.__all__ if f"`{name}`" not in text and f"mn.{name}" not in text] == []


# ---- figures ---------------------------------------------------------------------------------------------------------


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def test_rows_of_the_readme_are_rows_of_the_results():
    # tests/examples/test_stored_results.py compares the latter with the stored runs.
    rows = rows_of(README.partition("\n## Results")[2].partition("\n## ")[0])
    assert len(rows) == 2 + 6
    assert [row for row in rows if row.replace("](examples/", "](../examples/") not in MEASURED] == []


def check_sentences(readme, limits):
    """Counts that stand in sentences are those of the table of all experiments."""
    row = next(row for row in rows_of(MEASURED) if row.startswith("| Is UN better"))
    better = re.search(r"better than batch\s+normalization\s+alone in (\d) of (\d) settings and worse in (\d)", readme)
    assert re.search(r"better in (\d) of (\d), worse in (\d)", row).groups() == better.groups()
    row = next(row for row in rows_of(MEASURED) if row.startswith("| Less tuning? |"))
    wider, all_of, narrower = re.search(r"holds in (\d+) of (\d+) comparisons, fails in (\d+)", row).groups()
    found = re.search(r"wider on\s+spheres in (\w+) of (\d+) comparisons, and narrower in (\d+)", limits)
    assert found.groups() == ({"0": "none"}.get(wider, wider), all_of, narrower)


def test_counts_in_sentences_are_those_of_the_table():
    limits = TEXTS["docs/limits.md"]
    check_sentences(README, limits)
    with pytest.raises(AssertionError):
        check_sentences(README.replace("2 of 4 settings", "3 of 4 settings"), limits)
    with pytest.raises(AssertionError):
        check_sentences(README, limits.replace("narrower in 7", "narrower in 6"))


def check_tables(text):
    """Every row of the stored tables stands in a text."""
    for name, least in (("coverage.md", 5), ("invariance.md", 6), ("comparison.md", 6)):
        stored = (RESULTS / name).read_text(encoding="utf-8").partition("\n## ")[0]
        rows = rows_of(stored)
        assert len(rows) >= least
        assert [row for row in rows if row not in text] == []


def test_tables_are_the_stored_ones():
    check_tables(MEASURED)
    runs = (RESULTS / "comparison.csv").read_text(encoding="utf-8").splitlines()
    assert len(runs) == 1 + 8 * 5 * 5
    last = rows_of((RESULTS / "coverage.md").read_text(encoding="utf-8").partition("\n## ")[0])[-1]
    for old, new in (("9e-16", "8e-16"), ("| rsgd |", "| gdsr |"), (last, last.replace("3", "4"))):
        with pytest.raises(AssertionError):
            check_tables(MEASURED.replace(old, new))


def check_ratios(text):
    """Every ratio of the sections on costs stands in the stored tables of the benchmarks."""
    section = " ".join(text.partition("\n## Cost of a step")[2].partition("\n## Start")[0].split())
    steps = (RESULTS / "benchmark_optimizers.md").read_text(encoding="utf-8")
    found = re.findall(r"\d+\.\d\d \(\d+\.\d\d … \d+\.\d\d\)", section)
    assert len(found) == 14
    assert [ratio for ratio in found if ratio not in steps] == []
    ((share, low, high),) = re.findall(r"adds ([\d.]+) % \(quartiles ([\d.]+) … ([\d.]+)\)", section)
    comparison = (RESULTS / "benchmark_comparison.md").read_text(encoding="utf-8")
    assert re.search(rf"\| all together \| [\d.]+ \| {share} \| {low} … {high} \|", comparison)


def test_costs_are_those_of_the_stored_benchmarks():
    check_ratios(MEASURED)
    for old, new in (("1.12 (1.06 …", "91.12 (1.06 …"), ("adds 4.5", "adds 94.5")):
        with pytest.raises(AssertionError):
            check_ratios(MEASURED.replace(old, new))
