"""The report of a comparison: true to the runs, complete, self-contained, and legible whatever went wrong."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.browser import measure, photograph
from helpers.comparison_cases import ELEVEN, RATES, TROUBLES, comparison
from helpers.page_cases import Page, check_accessible, check_contrast, check_picture, check_self_contained
from hypothesis import assume, given
from hypothesis import strategies as st

from manifold_nets.cli import main
from manifold_nets.comparison.report import Summary, latex_report, markdown_report, page_html, summarise, write_report
from manifold_nets.comparison.report.figures import FIGURES, Drawing
from manifold_nets.comparison.report.style import NARROW, WIDE, Size, look
from manifold_nets.comparison.report.tables import (
    Table,
    conclusions,
    epochs_csv,
    explanation,
    latex,
    rescaled_table,
    result_table,
    robustness_table,
    runs_csv,
    times_csv,
)
from manifold_nets.comparison.results import Comparison
from manifold_nets.errors import MissingExtraError
from manifold_nets.page.plots import SERIES, figure_svg, plot_settings, save_figure, settled

PLOTS = {drawing.name for drawing in FIGURES}


# ---- the summary -----------------------------------------------------------------------------------------------------


def check_summary(found: Summary, of: Comparison) -> None:
    """Every number of the table is recomputed from the records."""
    for optimizer in found.optimizers:
        choice = of.choice(optimizer.name)
        runs = [
            r
            for r in of.results
            if r.key.optimizer == optimizer.name
            and r.key.initial_scale == "plain"
            and r.key.learning_rate == choice.learning_rate
        ]
        tests = [r.test_error for r in runs if r.test_error is not None]
        assert optimizer.test.count == len(tests)
        assert optimizer.test.lost == len(of.settings.seeds) - len(tests)
        assert optimizer.test.value == pytest.approx(np.mean(tests)) if tests else math.isnan(optimizer.test.value)
        for errors, seconds, run in zip(optimizer.errors, optimizer.seconds, runs, strict=True):
            assert len(errors) == of.settings.epochs
            assert errors[: len(run.epochs)] == tuple(epoch.validation_error for epoch in run.epochs)
            assert all(value == math.inf for value in errors[len(run.epochs) :])
            assert seconds[: len(run.epochs)] == tuple(epoch.seconds for epoch in run.epochs)
        every = [r for r in of.results if r.key.optimizer == optimizer.name and r.key.initial_scale == "plain"]
        assert optimizer.failed == sum(r.status == "diverged" for r in every)
        assert optimizer.runs == len(every)


def test_summaries_are_true_to_the_runs() -> None:
    of = TROUBLES["half of the chosen lost"]
    check_summary(summarise(of), of)
    check_summary(summarise(TROUBLES["eleven"]), TROUBLES["eleven"])
    first, *others = of.results
    other = dataclasses.replace(of, results=(dataclasses.replace(first, status="finished", test_error=0.5), *others))
    with pytest.raises(AssertionError):  # Sabotage: a run more or a run less.
        check_summary(summarise(other), of)


def test_diverged_runs_rank_last_and_are_named() -> None:
    found = summarise(TROUBLES["one lost altogether"])
    assert found.friedman is not None
    names = [optimizer.name for optimizer in found.optimizers]
    assert found.friedman.mean_ranks[names.index("adam")] == 3.0
    told = " ".join(conclusions(found))
    assert "Runs of adam diverged at every learning rate" in told
    assert "12 of 36 runs diverged" in told
    partial = summarise(TROUBLES["half of the chosen lost"])
    assert "Runs of sgd and adam diverged even at the chosen" in " ".join(conclusions(partial))
    cells = {row[0]: row for row in result_table(partial).rows}
    assert "(survivors, 2 of 3)" in cells["sgd"][2]
    assert "survivors" not in cells["rsgd"][2]


def test_passes_over_the_data_are_counted_as_they_were_made() -> None:
    found = {optimizer.name: optimizer for optimizer in summarise(TROUBLES["eleven"]).optimizers}
    assert found["sgd"].passes == (1, 2, 3, 4, 5, 6)
    assert found["pymanopt-cg"].passes == (3, 6, 9, 12, 15, 18)


def with_tests(errors: dict[str, tuple[float, ...]], losses: float = 0.1) -> Comparison:
    """One learning rate, and these test errors, seed by seed."""
    seeds = tuple(range(len(next(iter(errors.values())))))
    of = comparison(tuple(errors), rates=(0.1,), seeds=seeds, epochs=1, scales=("plain",))
    runs = tuple(run.with_test(errors[run.key.optimizer][run.key.seed], losses) for run in of.results)
    return dataclasses.replace(of, results=runs)


SENTENCES = {
    "a tie of all": (
        {"sgd": (0.02, 0.04), "radam": (0.04, 0.02)},
        "sgd and radam share the lowest mean test error: 3.00 %.",
    ),
    "a tie and a third": (
        {"sgd": (0.02, 0.04, 0.03), "radam": (0.02, 0.04, 0.03), "pbwn": (0.05, 0.05, 0.04)},
        (
            "sgd and radam share the lowest mean test error: 3.00 %. "
            "sgd and radam do not differ significantly from pbwn (5 % level, corrected for 3 pairs)."
        ),
    ),
    "one seed": (
        {"sgd": (0.02,), "radam": (0.03,)},
        "sgd has the lowest test error: 2.00 %. With one seed, no difference can be tested.",
    ),
    "alone": ({"sgd": (0.02, 0.02)}, "The mean test error of sgd is 2.00 %, all equal."),
    "apart": (
        {"sgd": (0.020, 0.021, 0.022, 0.023), "adam": (0.50, 0.51, 0.52, 0.54), "rsgd": (0.6, 0.61, 0.62, 0.64)},
        (
            "sgd has the lowest mean test error: 2.15 ± 0.21 %. "
            "sgd differs significantly from adam and rsgd (5 % level, corrected for 3 pairs)."
        ),
    ),
}


@pytest.mark.parametrize("name", SENTENCES)
def test_conclusions_in_words(name: str) -> None:
    errors, expected = SENTENCES[name]
    assert " ".join(conclusions(summarise(with_tests(errors)))) == expected


def test_a_difference_without_spread_has_no_interval_and_no_t_test() -> None:
    found = summarise(with_tests({"sgd": (0.0200, 0.0300), "radam": (0.0344, 0.0444), "rsgd": (0.01, 0.05)}))
    cells = {row[0]: row for row in result_table(found).rows}
    assert cells["radam"][4:6] == ("+1.44, all equal", "1.000 (sign test)")
    assert cells["rsgd"][5] == "1.000"
    assert "the p-value is from the sign test" in explanation(found)
    alone = summarise(with_tests({"sgd": (0.02,), "radam": (0.0344,)}))
    assert result_table(alone).rows[1][4:6] == ("+1.44 (one seed: no test)", "–")
    assert explanation(alone) == "One seed: there are no confidence intervals and no tests."
    assert not re.search(r"\[|t-test", markdown_report(alone))


def test_choices_at_the_edge_of_the_grid_are_flagged(tmp_path: Path) -> None:
    of = TROUBLES["no errors"]  # where the smallest rate is chosen
    assert {choice.learning_rate for choice in of.choices} == {min(RATES)}
    note = "at the edge of the grid: extend the grid."
    assert note in str(of)
    assert "adam (0.001)" in str(of)
    assert "sgd (rescaled, 0.001)" in str(of)
    summary = summarise(of)
    assert {row[1] for row in result_table(summary).rows} == {"0.001 (edge of the grid)"}
    assert note in Page(page_html(summary, {})).text
    # Nothing was chosen from a grid of one rate, and what lies inside is no edge.
    for name in ("one learning rate", "three"):
        assert "edge" not in str(TROUBLES[name]) + markdown_report(summarise(TROUBLES[name]))
    with pytest.raises(AssertionError):  # Sabotage: the grid goes on below.
        assert note in str(
            dataclasses.replace(of, settings=dataclasses.replace(of.settings, learning_rates=(1e-4, *RATES[1:], 1e-3)))
        )


def test_adamw_without_weight_decay_is_said_to_be_adam() -> None:
    note = "adamw with weight decay 0 takes the same steps as adam"
    of = with_tests({"adam": (0.1, 0.2), "adamw": (0.1, 0.2)})
    assert note in str(of)
    assert note in markdown_report(summarise(of))
    assert note in Page(page_html(summarise(of), {})).text
    decayed = dataclasses.replace(of, settings=dataclasses.replace(of.settings, weight_decay=0.01))
    assert note not in str(decayed)
    assert note not in str(with_tests({"adam": (0.1, 0.2)}))


@pytest.mark.parametrize("bad", [math.nan, pytest.param(math.inf, marks=pytest.mark.slow)])
def test_test_values_that_are_not_finite_are_recorded_and_rank_last(bad: float, tmp_path: Path) -> None:
    of = with_tests({"sgd": (bad, bad), "rsgd": (0.2, 0.3), "pbwn": (0.1, bad)}, losses=bad)
    of.write(tmp_path)
    text = (tmp_path / "comparison.json").read_text(encoding="utf-8")
    document = json.loads(text, parse_constant=lambda name: pytest.fail(f"no JSON: {name}"))
    assert document["results"][0]["test_error"] == str(bad)
    back = Comparison.read(tmp_path)
    assert repr(back) == repr(of)  # NaN equals nothing, itself included
    summary = summarise(back)
    ranks = dict(zip(("sgd", "rsgd", "pbwn"), summary.friedman.mean_ranks, strict=True))
    assert ranks == {"sgd": 2.75, "rsgd": 1.5, "pbwn": 1.75}
    cells = {row[0]: row[2:4] for row in result_table(summary).rows}
    assert cells["sgd"] == ("not finite", "0 of 2")
    assert cells["pbwn"] == ("10.00 (survivors, 1 of 2)", "0 of 2")
    told = " ".join(conclusions(summary))
    assert told.startswith("Of the optimizers with a test error on every seed, rsgd has the lowest mean test error")
    assert "The test error of sgd is not finite in 2 of 2 runs" in told
    assert "The test error of pbwn is not finite in 1 of 2 runs" in told
    assert "The test loss of rsgd is not finite in 2 of 2 runs" in told
    assert "diverged" not in told
    assert "not finite" in str(of)
    assert rows(runs_csv(of))[0]["test_error"] == str(bad)
    write_report(of, tmp_path)
    json.loads((tmp_path / "summary.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_errors_that_are_no_shares_are_shown_as_they_are() -> None:
    assert summarise(TROUBLES["three"]).unit.sign == "%"
    other = summarise(comparison(level=1.5))
    assert other.unit.sign == ""
    told = markdown_report(other)
    assert "1.5, all equal" in told
    assert "error (%)" not in told


# ---- data ------------------------------------------------------------------------------------------------------------


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def check_runs(text: str, of: Comparison) -> None:
    """One row a run, bit for bit."""
    found = rows(text)
    assert len(found) == len(of.results)
    for row, run in zip(found, of.results, strict=True):
        key = run.key
        assert (row["optimizer"], row["initial_scale"], int(row["seed"])) == (
            key.optimizer,
            key.initial_scale,
            key.seed,
        )
        assert float(row["learning_rate"]) == key.learning_rate
        assert row["status"] == run.status
        for name in ("validation_error", "test_error", "test_loss"):
            value = getattr(run, name)
            assert row[name] == "" if value is None else float(row[name]) == value
        assert row["chosen"] == str(int(of.choice(key.optimizer, key.initial_scale).learning_rate == key.learning_rate))


@pytest.mark.parametrize("name", ["three", "half of the chosen lost", "all lost", "NaN losses"])
def test_tables_of_runs_are_the_records(name: str) -> None:
    of = TROUBLES[name]
    text = runs_csv(of)
    check_runs(text, of)
    lines = text.splitlines()
    with pytest.raises(AssertionError):  # Sabotage: two runs change places.
        check_runs("\n".join([lines[0], lines[2], lines[1], *lines[3:]]), of)
    epochs = rows(epochs_csv(of))
    assert len(epochs) == sum(len(run.epochs) for run in of.results)
    assert len(rows(times_csv(of))) == len(of.results)
    if epochs:
        assert "norm:blocks.4.conv.weight" in epochs[0]


def test_measured_times_are_kept_apart() -> None:
    """What follows from the settings is the same text, however fast the machine was."""
    of = TROUBLES["three"]
    slower = dataclasses.replace(
        of,
        results=tuple(
            dataclasses.replace(
                run,
                seconds_per_step=9.0,
                peak_memory_bytes=1,
                harness_seconds=9.0,
                machine="another",
                epochs=tuple(dataclasses.replace(epoch, seconds=99.0) for epoch in run.epochs),
            )
            for run in of.results
        ),
    )
    assert runs_csv(of) == runs_csv(slower)
    assert epochs_csv(of) == epochs_csv(slower)
    assert times_csv(of) != times_csv(slower)


# ---- the folder ------------------------------------------------------------------------------------------------------


def check_folder(folder: Path, of: Comparison) -> None:
    text = (folder / "report.html").read_text(encoding="utf-8")
    check_self_contained(text)
    check_accessible(text)
    check_contrast(text)
    page = Page(text)
    summary = summarise(of)
    for told in conclusions(summary):
        assert told in page.text
    for choice in of.choices:
        assert choice.reason in page.text
    for row in result_table(summary).rows:
        assert row[0] in page.text
        assert row[2] in page.text.replace("\u00a0", " ")
    drawn = {drawing.name for drawing in FIGURES if drawing.has_data(summary)}
    assert drawn == {a["id"] for a in page.having("section") if a["id"] in PLOTS}
    assert {file.stem for file in (folder / "plots").iterdir()} == drawn
    assert {file.suffix for file in (folder / "plots").iterdir()} == {".png", ".svg"}
    names = {"report.html", "plots", "runs.csv", "epochs.csv", "times.csv", "summary.json", "tables.md", "tables.tex"}
    assert {file.name for file in folder.iterdir()} == names
    assert "NaN" not in (folder / "summary.json").read_text(encoding="utf-8")
    written = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert written["title"] == summary.title
    assert [found["name"] for found in written["contestants"]] == list(of.settings.optimizers)  # the name of the form
    for told in (page.text, (folder / "tables.md").read_text(encoding="utf-8")):
        assert not re.search(r"\b(nan|inf)\b", told)


def test_a_report_is_complete(tmp_path: Path) -> None:
    of = TROUBLES["half of the chosen lost"]
    assert write_report(of, tmp_path / "new" / "folder") == tmp_path / "new" / "folder" / "report.html"
    check_folder(tmp_path / "new" / "folder", of)
    with pytest.raises(AssertionError):  # Sabotage: the report of another comparison.
        check_folder(tmp_path / "new" / "folder", TROUBLES["one optimizer"])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TROUBLES))
def test_reports_of_comparisons_in_trouble(name: str, tmp_path: Path) -> None:
    write_report(TROUBLES[name], tmp_path)
    check_folder(tmp_path, TROUBLES[name])


@pytest.mark.slow
def test_a_second_report_is_the_same_and_replaces_the_first(tmp_path: Path) -> None:
    of = TROUBLES["one run"]
    write_report(of, tmp_path)
    (tmp_path / "plots" / "rescaled.png").write_bytes(b"of an earlier report")
    before = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    write_report(of, tmp_path)
    after = {file.name: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert before.keys() - after.keys() == {"rescaled.png"}
    assert all(before[name] == after[name] for name in after)


@pytest.mark.slow
def test_the_command_rebuilds_a_report(tmp_path: Path) -> None:
    of = TROUBLES["one run"]
    of.write(tmp_path)
    done = CliRunner().invoke(main, ["compare", "--report-only", str(tmp_path)])
    assert done.exit_code == 0, done.output
    (tmp_path / "comparison.json").unlink()
    check_folder(tmp_path, of)
    again = CliRunner().invoke(main, ["compare", "--report-only", str(tmp_path)])
    assert again.exit_code != 0
    assert "comparison.json" in again.stderr


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError, match=r"manifold_nets\[monitor\]"):
        write_report(TROUBLES["one run"], tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_the_markdown_table_has_every_optimizer_and_equal_columns() -> None:
    text = markdown_report(summarise(TROUBLES["eleven"]))
    tables = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert [re.match(r"\| (\S+)", line)[1] for line in table[2:]] == list(ELEVEN)
        assert len({line.count("|") for line in table}) == 1


# ---- names that a format would take for its own ----------------------------------------------------------------------

FORMULAS = ("=1+1", "+1", "-1", "@SUM(A1)", "=cmd|' /C calc'!A0")


@pytest.mark.parametrize("name", FORMULAS)
def test_no_text_in_a_csv_file_is_a_formula(name: str) -> None:
    of = comparison(("sgd", name), rates=(0.1,), seeds=(0,), epochs=1, scales=("plain",), level=0.5)
    of = dataclasses.replace(of, results=tuple(dataclasses.replace(run, machine=name) for run in of.results))
    for text in (runs_csv(of), epochs_csv(of), times_csv(of)):
        cells = [cell for row in csv.reader(io.StringIO(text)) for cell in row]
        assert f"'{name}" in cells
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in cells)
    # Numbers stay numbers.
    negative = dataclasses.replace(of.results[0], test_error=-0.5, test_loss=-1e-7)
    assert rows(runs_csv(dataclasses.replace(of, results=(negative,))))[0]["test_loss"] == "-1e-07"


def unescaped(text: str) -> str:
    """What LaTeX prints for the text of a cell, by the commands of its manual."""
    printed = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^", r"\textless{}": "<"}
    printed |= {r"\textgreater{}": ">", "$-$": "−", r"$\pm$": "±", r"$\ge$": "≥", r"\dots{}": "…", "--": "–"}
    printed |= {rf"\{sign}": sign for sign in "&%$#_{}"} | {r"$\infty$": "∞", r"$\times$": "×"}
    pattern = "|".join(map(re.escape, sorted(printed, key=len, reverse=True)))
    bare = re.sub(pattern, "", text)
    assert not set(bare) & set("\\&%$#_{}~^<>−±≥∞–…×"), bare
    return re.sub(pattern, lambda found: printed[found[0]], text)


def check_latex(text: str, table: Table) -> None:
    body = text.partition("\\midrule\n")[2].partition("\\bottomrule")[0].strip().splitlines()
    cells = [tuple(map(unescaped, re.split(r" (?<!\\)& ", line.removesuffix(r" \\")))) for line in body]
    assert cells == list(table.rows)
    for command in ("toprule", "midrule", "bottomrule"):
        assert text.count(f"\\{command}\n") == 1


@pytest.mark.parametrize("name", ["three", "half of the chosen lost", "no errors"])
def test_latex_tables_have_the_cells_of_the_others(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = summarise(TROUBLES[name])
    for table in (result_table(summary), robustness_table(summary), rescaled_table(summary)):
        check_latex(latex(table, "x"), table)
    report = latex_report(summary)
    assert report.count(r"\begin{table}") == report.count(r"\end{table}") == 4
    assert len(set(re.findall(r"\\label\{(.*?)\}", report))) == 4
    named = Table("x", ("a", "b"), (("a_b", "1 %"),))
    check_latex(latex(named, "x"), named)
    monkeypatch.setattr("manifold_nets.comparison.report.tables._LATEX", {})
    with pytest.raises(AssertionError):  # Sabotage: nothing is escaped.
        check_latex(latex(named, "x"), named)


@given(st.text(st.characters(codec="utf-8", exclude_categories=["C", "Z"]), min_size=1))
def test_any_name_is_printed_by_latex_as_it_is(name: str) -> None:
    assume(not set(name) & set("−±≥∞–…×") and "--" not in name)
    table = Table("x", ("a", "b"), ((name, name),))
    check_latex(latex(table, "x"), table)


HOSTILE = "<script>alert('x')</script>&\"$x^2$"


def test_markdown_has_no_markup_of_names() -> None:
    name = "<img src=x onerror=alert(1)>[a](http://x)|`b`"
    of = comparison(("sgd", name), rates=(0.1,), seeds=(0, 1), epochs=2, scales=("plain",))
    text = markdown_report(summarise(dataclasses.replace(of, settings=dataclasses.replace(of.settings, task=name))))
    assert "<" not in text.replace("< 0.001", "")
    assert "](" not in text
    assert not re.search(r"(?<!\\)`", text)
    assert r"&lt;img src=x onerror=alert(1)&gt;[a]\(http://x)\|\`b\`" in text
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in text.splitlines() if line.startswith("| ")}) == 1


def hostile() -> Comparison:
    of = comparison(("sgd", HOSTILE), rates=(0.1,), seeds=(0, 1), epochs=2, scales=("plain",))
    return dataclasses.replace(of, settings=dataclasses.replace(of.settings, task=HOSTILE, model=HOSTILE))


def test_names_are_escaped(monkeypatch: pytest.MonkeyPatch) -> None:
    text = page_html(summarise(hostile()))
    check_self_contained(text)
    assert Page(text).text.count(HOSTILE) > 6
    monkeypatch.setattr("manifold_nets.page.markup.html.escape", lambda text, quote: text)
    with pytest.raises(AssertionError):  # Sabotage: nothing is escaped.
        check_self_contained(page_html(summarise(hostile()), {}))


# ---- figures ---------------------------------------------------------------------------------------------------------


def draw(name: str, summary: Summary) -> object:
    drawing = next(drawing for drawing in FIGURES if drawing.name == name)
    with plot_settings(WIDE.font):
        return settled(drawing.draw(summary, WIDE))


def check_curve(axes: object, optimizer: object) -> None:
    line = next(line for line in axes.lines if line.get_label().startswith(optimizer.name))
    assert np.allclose(line.get_ydata(), np.median(optimizer.errors, axis=0), equal_nan=True)


def test_learning_curves_are_medians_of_the_runs() -> None:
    summary = summarise(TROUBLES["three"])
    figure = draw("learning-curves", summary)
    for optimizer in summary.optimizers:
        check_curve(figure.axes[1], optimizer)
    with pytest.raises(AssertionError):  # Sabotage: the training loss in place of the error.
        check_curve(figure.axes[0], summary.optimizers[0])


def test_a_curve_ends_where_most_runs_are_lost() -> None:
    summary = summarise(TROUBLES["half of the chosen lost"])
    lines = draw("learning-curves", summary).axes[1].lines
    adam = next(line for line in lines if line.get_label().startswith("adam"))
    assert "2 of 3" in adam.get_label()
    assert np.isfinite(adam.get_ydata()).tolist() == [True] * 3 + [False] * 3
    crosses = [line for line in lines if line.get_marker() == "x"]
    assert [line.get_xdata()[0] for line in crosses] == [3]


def test_sensitivity_shows_the_grid_and_where_runs_diverged() -> None:
    lost = frozenset({("sgd", 1.0, 0), ("sgd", 0.001, 0), ("sgd", 0.001, 1), ("sgd", 0.001, 2)})
    summary = summarise(comparison(("sgd", "rsgd"), diverged=lost, scales=("plain",)))
    upper, lower = draw("sensitivity", summary).axes
    sgd = next(line for line in upper.lines if line.get_label() == "sgd")
    assert list(sgd.get_xdata()) == list(RATES)
    assert np.isfinite(sgd.get_ydata()).tolist() == [False, True, True, False]
    hollow = [line for line in upper.lines if line.get_markerfacecolor() == "none"]
    assert [list(line.get_xdata()) for line in hollow] == [[1.0]]
    crosses = [list(line.get_xdata()) for line in lower.lines if line.get_marker() == "x"]
    assert crosses == [[0.001], [1.0]]


def test_critical_differences_join_what_belongs_together() -> None:
    summary = summarise(TROUBLES["eleven"])
    assert summary.friedman is not None
    figure = draw("critical-differences", summary)
    (axes,) = figure.axes
    bars = [line for line in axes.lines if line.get_linewidth() == 4]
    assert len(bars) == len(summary.cliques)
    for bar, clique in zip(bars, summary.cliques, strict=True):
        ranks = [summary.friedman.mean_ranks[i] for i in clique]
        assert min(bar.get_xdata()) <= min(ranks)
        assert max(bar.get_xdata()) >= max(ranks)
    assert {text.get_text() for text in axes.texts} >= set(ELEVEN)


def test_looks_differ_beyond_colour() -> None:
    looks = [look(i) for i in range(12)]
    assert len({a["marker"] for a in looks}) == 12
    assert len({(a["color"], str(a["linestyle"])) for a in looks}) == 12


def texts_of(figure: object) -> list:
    """What is drawn: matplotlib keeps labels of ticks beyond the ends of an axis, and shows none of them."""
    found = []
    for axes in figure.axes:
        for axis, (low, high), place in ((axes.xaxis, axes.get_xlim(), 0), (axes.yaxis, sorted(axes.get_ylim()), 1)):
            if axes.axison:
                labels = [tick.label1 for tick in axis.get_major_ticks() if tick.label1.get_visible()]
                found += [text for text in labels if low <= text.get_position()[place] <= high]
        found += [*axes.texts, axes._left_title, axes.xaxis.label]
    return [text for text in found if text.get_visible() and text.get_text()]


def check_no_overlap(figure: object) -> None:
    """No two texts stand on each other, and none leaves the figure."""
    boxes = [text.get_window_extent() for text in texts_of(figure)]
    for i, box in enumerate(boxes):
        assert figure.bbox.x0 - 1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1
        assert not any(box.shrunk(0.9, 0.9).overlaps(other.shrunk(0.9, 0.9)) for other in boxes[i + 1 :])


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("drawing", FIGURES, ids=lambda drawing: drawing.name)
def test_texts_do_not_stand_on_each_other(drawing: Drawing, size: Size) -> None:
    with plot_settings(size.font):
        check_no_overlap(settled(drawing.draw(summarise(TROUBLES["eleven"]), size)))


def test_sabotage_texts_on_each_other_are_noticed() -> None:
    figure = draw("test-error", summarise(TROUBLES["one run"]))
    check_no_overlap(figure)
    figure.axes[0].text(0.5, 0.5, "one", transform=figure.axes[0].transAxes)
    figure.axes[0].text(0.5, 0.5, "another", transform=figure.axes[0].transAxes)
    with pytest.raises(AssertionError):
        check_no_overlap(figure)


def test_files_of_figures_are_the_same_each_time_and_are_pictures(tmp_path: Path) -> None:
    summary = summarise(TROUBLES["one run"])
    written = []
    for _ in range(2):
        with plot_settings(WIDE.font):
            figure = settled(FIGURES[0].draw(summary, WIDE))
            save_figure(figure, tmp_path / "a.png", "png")
            save_figure(figure, tmp_path / "a.svg", "svg")
        written.append(((tmp_path / "a.png").read_bytes(), (tmp_path / "a.svg").read_bytes()))
    assert written[0] == written[1]
    assert written[0][0].startswith(b"\x89PNG")
    assert b"<svg" in written[0][1]


def test_drawings_of_a_page_take_its_colours() -> None:
    summary = summarise(TROUBLES["one run"])
    with plot_settings(WIDE.font):
        text = figure_svg(
            settled(FIGURES[0].draw(summary, WIDE)), label='a "label"', prefix="p", titles={"series-0": "<sgd>"}
        )
    assert 'aria-label="a &quot;label&quot;"' in text
    assert "<title>&lt;sgd&gt;</title>" in text
    assert "var(--series-0)" in text
    assert SERIES[0][0] not in text
    assert "xmlns" not in text


# ---- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page() -> str:
    lost = frozenset({("sgd", 1.0, 0)})
    return page_html(summarise(comparison(("sgd", "a-name-of-some-length"), diverged=lost, epochs=4)))


@pytest.mark.parametrize(("size", "scheme"), [((1200, 700), "light"), ((390, 700), "dark")])
def test_the_page_is_drawn(page: str, size: tuple[int, int], scheme: str, tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text(page, encoding="utf-8")
    check_picture(photograph(tmp_path / "report.html", tmp_path / "report.png", *size, scheme), size, scheme)


WIDTHS = [320, 390, 768, 1200]


def check_widths(text: str, folder: Path) -> None:
    assert measure(text, folder, WIDTHS, opened=True) == {width: (width, width) for width in WIDTHS}


def test_no_page_is_wider_than_its_window(page: str, tmp_path: Path) -> None:
    check_widths(page, tmp_path)
    with pytest.raises(AssertionError):
        check_widths(page.replace("</h1>", '</h1><div style="width:400px">x</div>', 1), tmp_path)
