"""What is stored in examples/results: reports are those of the stored runs, and docs/results.md says what they say."""

import re
import shutil
import sys

import pytest
from helpers import ROOT
from helpers.example_modules import example

RESULTS = ROOT / "examples" / "results"
MEASURED = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
EXPERIMENTS = ("mnist_paper", "robustness", "beyond_vision", "where_it_does_not_help")


def made_again(script, folder, monkeypatch):
    """The report that a script makes of the stored runs in a folder."""
    module = example(script, "sklearn", "sqlalchemy", "matplotlib")
    for file in RESULTS.glob("*_*"):
        shutil.copy(file, folder)
    (folder / f"{module.NAME}.md").unlink(missing_ok=True)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--report-only", "--write", str(folder)])
    module.main()
    return module, (folder / f"{module.NAME}.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("script", EXPERIMENTS)
def test_a_stored_report_is_that_of_the_stored_runs(script, monkeypatch, tmp_path, capsys):
    module, text = made_again(script, tmp_path, monkeypatch)
    assert text == (RESULTS / f"{module.NAME}.md").read_text(encoding="utf-8")
    assert re.search(r"Command: `python examples/\w+\.py .*`\. Machine: \d+ cores? of .*torch \d", text)
    assert (tmp_path / f"{module.NAME}.png").stat().st_size > 10_000


def rows_of(text):
    return [line for line in text.splitlines() if line.startswith("| ")]


def check_summary(folder):
    """Every row of the summary of a folder of stored runs stands in docs/results.md."""
    summary = example("evidence_summary", "sklearn", "sqlalchemy", "matplotlib").summary(folder)
    assert len(rows_of(summary)) >= 15
    rows = [row.replace("](examples/", "](../examples/") for row in rows_of(summary)]
    assert [row for row in rows if row not in MEASURED] == []
    assert all(f"(examples/results/{name})" in summary for name in ("mnist_paper.md", "camvid.md", "limits.md"))


@pytest.mark.slow
def test_the_summary_in_the_docs_is_that_of_the_stored_runs(tmp_path):
    check_summary(RESULTS)
    # Sabotage: test errors ten times as large, and differences with them.
    for file in RESULTS.glob("*.csv"):
        shutil.copy(file, tmp_path)
    for file in RESULTS.glob("*.json"):
        shutil.copy(file, tmp_path)
    for file in RESULTS.glob("*.npz"):
        shutil.copy(file, tmp_path)
    runs = tmp_path / "mnist_paper_runs.csv"
    runs.write_text(re.sub(r",0\.0(\d+),([^,\s]+)$", r",0.\1,\2", runs.read_text(), flags=re.MULTILINE))
    with pytest.raises(AssertionError):
        check_summary(tmp_path)
