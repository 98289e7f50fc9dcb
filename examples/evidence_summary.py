"""The answers of all stored experiments in one table: `python examples/evidence_summary.py`.

Every figure is computed from the runs that are stored in ``examples/results``; the README shows the same table. An
experiment without stored runs has no row.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import beyond_vision
import camvid_scores
import camvid_tables
import invariance
import mnist_report
import robustness
import where_it_does_not_help
from choices import best, verdict, with_interval
from evidence import Runs, read_runs, table
from robustness_measures import findings_of, samples_of, tally
from sphere_recipes import EUCLIDEAN, SPHERES

from manifold_nets.comparison.statistics import PairedDifference

RESULTS = Path(__file__).parent / "results"
HEAD = ("question", "data", "answer", "details")
Row = tuple[str, str, str]


def invariance_rows(folder: Path) -> Iterator[Row]:
    """The theorem."""
    results = invariance.read_csv(folder / "invariance.csv")
    largest = {
        invariant: [
            max(invariance.largest(results, name, next(iter(invariance.PRECISIONS))))
            for name, method in invariance.METHODS.items()
            if method.invariant is invariant
        ]
        for invariant in (True, False)
    }
    yield (
        "Does training forget how filters are scaled?",
        f"digits, float64, {invariance.STEPS} steps",
        (
            f"On spheres and with the scaled metric yes, to {max(largest[True]):.0e}; with the others not, to "
            f"{min(largest[False]):.0e} and more"
        ),
    )


def counted(differences: Iterable[PairedDifference | None], better: str = "better", worse: str = "worse") -> str:
    """How many differences of errors are below zero with their whole interval, how many above, how many neither."""
    found = [verdict(d.t_low, d.t_high, "below", "above", "neither") for d in differences if d is not None]
    counts = {kind: found.count(kind) for kind in ("below", "above", "neither")}
    return (
        f"{better} in {counts['below']} of {len(found)}, {worse} in {counts['above']}, "
        f"not told apart in {counts['neither']}"
    )


def mnist_rows(folder: Path) -> Iterator[Row]:
    """The paper's claims, and today's optimizers."""
    runs = read_runs(folder / f"{mnist_report.NAME}_runs.csv")
    names = [
        mnist_report.paper_arm("Arch2", depth, schedule)
        for depth in mnist_report.DEPTHS
        for schedule in mnist_report.SCHEDULES
    ]
    arms = mnist_report.present(runs, names)
    for method in ("un", "sm-columns"):
        found = [mnist_report.between(runs, arm, method, "sgd") for arm in arms]
        values = ", ".join(f"{d.value:+.2f}".replace("-", "−") for d in found if d is not None)
        yield (
            f"Is {mnist_report.METHODS[method]} better than batch normalization alone?",
            "MNIST, the paper's protocol, Arch2",
            f"{counted(found)} (networks and schedules: {values} points)",
        )
    yield (
        "Is that clearer in deeper networks?",
        "the same, Arch1 and Arch2",
        counted(mnist_report.deeper(runs).values(), "clearer", "less clear"),
    )
    least, middle, most, _ = mnist_report.cost(runs, "un")
    yield (
        "Is there no extra cost?",
        "the same, Arch1 and Arch2",
        f"A step of UN takes {middle:.2f} times as long as one of SGD ({least:.2f} … {most:.2f})",
    )
    for depth in mnist_report.DEPTHS:
        arm = mnist_report.today_arm(depth)
        if mnist_report.present(runs, [arm]):
            yield (
                "And against tuned SGD and AdamW?",
                f"MNIST, depth {depth}",
                best_recipe(runs, arm, mnist_report.between),
            )


def best_recipe(runs: Runs, arm: str, between: Callable[[Runs, str, str, str], PairedDifference | None]) -> str:
    """The recipe on spheres that validation prefers, against SGD and AdamW."""
    ours = best(runs, arm, [name for name in SPHERES if runs.chosen(arm, name)])
    found = ((name, between(runs, arm, ours, name)) for name in EUCLIDEAN)
    return f"{ours}: " + "; ".join(f"{with_interval(d)} from {name}" for name, d in found if d is not None)


def camvid_rows(folder: Path) -> Iterator[Row]:
    """SegNet-Basic."""
    stored = camvid_scores.read_stored(folder)
    pairs = ((camvid_tables.RSGD, camvid_tables.SGD), (camvid_tables.RADAM, camvid_tables.ADAM))
    arms = {run.arm for run in stored.runs.rows}
    for ours, plain in pairs:
        if not {ours[0], plain[0]} <= arms:
            continue
        scores = [
            camvid_tables.spread(camvid_tables.values(stored, key, camvid_tables.mean_iou)) for key in (ours, plain)
        ]
        yield (
            f"{camvid_tables.label(ours)} or {camvid_tables.label(plain)}?",
            "CamVid, SegNet-Basic, mean IoU",
            f"{scores[0]} against {scores[1]} %; {camvid_tables.judged(camvid_tables.difference(stored, ours, plain))}",
        )


def beyond_rows(folder: Path) -> Iterator[Row]:
    """Series, ratings, text."""
    runs = beyond_vision.tuned(read_runs(folder / f"{beyond_vision.NAME}_runs.csv"))
    for subject in beyond_vision.SUBJECTS:
        if runs.optimizers(subject.task):
            yield (
                "Beyond vision, against tuned SGD and AdamW?",
                subject.task,
                best_recipe(runs, subject.task, beyond_vision.against),
            )


def recipe_rows(folder: Path) -> Iterator[Row]:
    """Every recipe on spheres against SGD and AdamW, on all tasks on which it was tuned with them."""
    beyond = beyond_vision.tuned(read_runs(folder / f"{beyond_vision.NAME}_runs.csv"))
    mnist = read_runs(folder / f"{mnist_report.NAME}_runs.csv")
    tasks = [(beyond, subject.task) for subject in beyond_vision.SUBJECTS]
    tasks += [(mnist, mnist_report.today_arm(depth)) for depth in mnist_report.DEPTHS]
    for recipe in SPHERES:
        parts = [
            f"against {name} {counted(mnist_report.between(runs, arm, recipe, name) for runs, arm in tasks)}"
            for name in EUCLIDEAN
        ]
        yield (f"How does the recipe *{recipe}* do?", "MNIST and beyond vision, tuned", "; ".join(parts))


def robustness_rows(folder: Path) -> Iterator[Row]:
    """Less tuning, more stable, indifferent to initial scales."""
    samples = [*samples_of(read_runs(folder / f"{robustness.NAME}_runs.csv")), *robustness.others(folder)]
    findings = findings_of(samples)
    data = ", ".join(dict.fromkeys(finding.arm.partition(",")[0] for finding in findings))
    for claim in robustness.CLAIMS:
        yield (f"{claim[0].upper()}{claim[1:]}?", data, f"{tally(findings, claim)}")


def limit_rows(folder: Path) -> Iterator[Row]:
    """Where spheres lose."""
    runs = read_runs(folder / f"{where_it_does_not_help.NAME}_runs.csv")
    yield ("Where does it not help?", "digits", where_it_does_not_help.counts(runs))


EXPERIMENTS: dict[str, tuple[str, Callable[[Path], Iterator[Row]]]] = {
    "invariance.md": ("invariance.csv", invariance_rows),
    "mnist_paper.md": ("mnist_paper_runs.csv", mnist_rows),
    "camvid.md": ("camvid_runs.csv", camvid_rows),
    "beyond_vision.md": ("beyond_vision_runs.csv", lambda folder: chain(beyond_rows(folder), recipe_rows(folder))),
    "robustness.md": ("robustness_runs.csv", robustness_rows),
    "limits.md": ("limits_runs.csv", limit_rows),
}


def summary(folder: Path) -> str:
    """The table in Markdown."""
    rows = [
        (*row, f"[{report.removesuffix('.md')}](examples/results/{report})")
        for report, (stored, made) in EXPERIMENTS.items()
        if (folder / stored).is_file()
        for row in made(folder)
    ]
    return table(HEAD, rows)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="The answers of all stored experiments in one table.")
    parser.add_argument("--folder", type=Path, default=RESULTS, help="with the stored runs")
    print(summary(parser.parse_args().folder), end="")


if __name__ == "__main__":
    main()
