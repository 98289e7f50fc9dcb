"""Spheres beyond vision: time series, spoken vowels, a recommender and a character-level transformer.

``python examples/beyond_vision.py --write examples/results`` trains small networks on real data that packages bring
along, with SGD and AdamW and with the recipes of `sphere_recipes`, every one over the same number of learning rates and
weight decays, chosen by validation error. sktime brings the series, Python itself the text, and recbole MovieLens 100K:
``pip install --no-deps recbole``, which is small and whose other dependencies are not needed to read it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from choices import at_the_end_of_the_grid, best, difference, merged, verdict, with_interval
from difference_figure import DifferenceRow, draw_differences
from evidence import (
    SUMMARY_HEAD,
    Arm,
    Run,
    Runs,
    collect,
    options_for,
    preamble,
    show,
    summary_table,
    table,
)
from sphere_recipes import EUCLIDEAN, RECIPES, SPHERES, entrants

from manifold_nets.comparison.statistics import PairedDifference

NAME = "beyond_vision"
RATES = (1e-3, 5.62e-3, 3.16e-2, 1.78e-1, 1.0)
# Weight decay as a penalty acts otherwise than decoupled from the gradient, so each kind has its own value beside 0.
DECAYS = {0.0: (*EUCLIDEAN, *SPHERES), 5e-3: ("sgd", "rsgd", "radam"), 5e-1: ("adamw", *RECIPES)}


@dataclass(frozen=True)
class Subject:
    """What is trained: a task and a network, for so many epochs and seeds; and which optimizers are left out.

    ``more`` are further learning rates for SGD's family, whose best may lie beyond a grid that suits Adam.
    """

    task: str
    model: str
    told: str
    epochs: int
    seeds: int = 5
    rates: tuple[float, ...] = RATES
    without: tuple[str, ...] = ()
    more: tuple[float, ...] = ()


SUBJECTS = (
    Subject("basic-motions", "conv1d:16,32,16", "a watch's motion sensors, 1-D convolutions", 20),
    Subject("japanese-vowels", "conv1d:16,32,16", "spoken vowels of nine speakers, 1-D convolutions", 20),
    Subject(
        "movielens",
        "towers:16,16,16",
        "who likes which film, batch-normalized towers",
        1,
        rates=RATES[:4],
        without=("radam", "rsgd and adamw"),
        more=(1.0, 5.62),
    ),
    Subject(
        "python-manual",
        "transformer:32,1,2",
        "the next character of a manual, transformer with QK-norm and post-norm",
        1,
        seeds=3,
        rates=RATES[:4],
        without=("rsgd", "radam", "rsgd and adamw"),
        more=(1.0, 5.62),
    ),
    Subject("osuleaf", "conv1d:16,32,16", "outlines of leaves, 1-D convolutions", 10, without=("rsgd and adamw",)),
)


@dataclass(frozen=True)
class Part:
    """One comparison of a subject: a weight decay, learning rates, and the optimizers that take part."""

    subject: Subject
    decay: float
    rates: tuple[float, ...]
    optimizers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Its name in the stored runs."""
        larger = "" if self.rates == self.subject.rates else ", larger rates"
        return f"{self.subject.task}, weight decay {self.decay:g}{larger}"


def parts(subject: Subject) -> list[Part]:
    """The comparisons of a subject."""
    found = [
        Part(subject, decay, rates, tuple(name for name in names if name not in subject.without))
        for decay, names in DECAYS.items()
        for rates in (subject.rates, subject.more)
    ]
    return [
        part if part.rates == subject.rates else replace(part, optimizers=_of_sgd(part.optimizers))
        for part in found
        if part.rates == subject.rates or (part.rates and _of_sgd(part.optimizers))
    ]


def _of_sgd(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in names if name in ("sgd", "rsgd"))


def _spec(name: str) -> str:
    """Where a task or a network is: ``conv1d:16,32,16`` is ``paper/series.py:conv1d_16x32x16``."""
    file = {"movielens": "ratings", "towers": "ratings", "python-manual": "text", "transformer": "text"}
    place = Path(__file__).parent / "paper" / f"{file.get(name.partition(':')[0], 'series')}.py"
    return f"{place}:{name.replace('-', '_').replace(':', '_').replace(',', 'x')}"


def arms() -> list[Arm]:
    """All comparisons."""
    return [
        Arm(
            part.name,
            {
                "model": _spec(subject.model),
                "task": _spec(subject.task),
                "optimizers": entrants(part.optimizers),
                "learning_rates": part.rates,
                "seeds": subject.seeds,
                "epochs": subject.epochs,
                "schedule": "cosine",
                "weight_decay": part.decay,
            },
        )
        for subject in SUBJECTS
        for part in parts(subject)
    ]


def tuned(runs: Runs) -> Runs:
    """One arm a subject, in which each optimizer has the weight decay and the rate that validation chose."""
    stored = {run.arm for run in runs.rows}
    rows: list[Run] = []
    for subject in SUBJECTS:
        names = [part.name for part in parts(subject) if part.name in stored]
        rows += merged(runs, subject.task, names).rows
    return Runs(tuple(rows))


def level(found: PairedDifference) -> str:
    """What a difference of test errors says of the first."""
    return verdict(found.t_low, found.t_high, "better", "worse")


def against(runs: Runs, arm: str, ours: str, theirs: str) -> PairedDifference:
    """Paired difference of the test errors of two optimizers at their chosen settings."""
    return difference(runs.chosen(arm, ours), runs.chosen(arm, theirs))


def recipes(runs: Runs, arm: str) -> list[str]:
    """The recipes on spheres that have runs of a subject which came through."""
    return [name for name in SPHERES if runs.chosen(arm, name)]


def euclidean(runs: Runs, arm: str) -> str:
    """SGD or AdamW, whichever validation prefers."""
    return best(runs, arm, EUCLIDEAN)


def statement(runs: Runs, subject: Subject) -> str:
    """The best recipe on spheres, chosen by validation, against tuned SGD and tuned AdamW; and every other recipe."""
    arm = subject.task
    names = recipes(runs, arm)
    ours = best(runs, arm, names)
    words = [f"- **{arm}** ({subject.told}). Of {len(names)} recipes on spheres validation prefers {ours}."]
    for theirs in EUCLIDEAN:
        found = against(runs, arm, ours, theirs)
        preferred = ", which validation prefers of the two" if theirs == euclidean(runs, arm) else ""
        words.append(f"Against {theirs}{preferred}: {with_interval(found)}, {level(found)}.")
    ends = [name for name in (ours, *EUCLIDEAN) if at_the_end_of_the_grid(runs, arm, name)]
    if ends:
        words.append(f"At an end of its grid of learning rates, so that others may be better: {'; '.join(ends)}.")
    matching = [n for n in names if all(level(against(runs, arm, n, e)) != "worse" for e in EUCLIDEAN)]
    words.append(f"Not worse than either: {'; '.join(matching) or 'no recipe'}.")
    return " ".join(words)


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def recipe_rows(runs: Runs) -> list[list[str]]:
    """For each recipe and each Euclidean optimizer on how many subjects it is better, worse, or not told apart."""
    rows = []
    for name in SPHERES:
        arms = [subject.task for subject in SUBJECTS if name in recipes(runs, subject.task)]
        cells = [name, str(len(arms))]
        for theirs in EUCLIDEAN:
            verdicts = [level(against(runs, arm, name, theirs)) for arm in arms]
            cells.append(f"{verdicts.count('better')} / {verdicts.count('worse')}")
        rows.append(cells)
    return rows


def as_markdown(runs: Runs, stored: Runs) -> str:
    """What was found in words, recipes, and a table a subject."""
    subjects = [subject for subject in SUBJECTS if subject.task in {run.arm for run in runs.rows}]
    sizes = {
        subject.task: f"{subject.model}, {_counted(subject.epochs, 'epoch')}, {subject.seeds} seeds"
        for subject in subjects
    }
    head = ("recipe", "subjects", *(f"better / worse than {name}" for name in EUCLIDEAN))
    lines = [
        "# Beyond vision\n",
        preamble(stored) + "\n",
        NOTE + "\n",
        *(statement(runs, subject) for subject in subjects),
        "",
        table(head, recipe_rows(runs)),
    ]
    for subject in subjects:
        reference = euclidean(runs, subject.task)
        lines += [
            f"## {subject.task}: {subject.told}\n",
            f"{sizes[subject.task]}; the reference is {reference}.\n",
            table(SUMMARY_HEAD, summary_table(runs, subject.task, reference)),
        ]
    return "\n".join(lines)


NOTE = (
    "Every optimizer has the same number of learning rates and weight decays, half a cosine as schedule, the same"
    " initial functions and batches; rate and decay are those of the smallest mean validation error, and only then test"
    " data are read. Differences of test errors are paired by seed, with Student's interval of 95 % in the sentences"
    " and a bootstrap interval in the tables. Validation also chooses the recipe; there are more recipes on spheres"
    " than optimizers to compare with, so the best of them had more chances to be chosen."
)


def draw(runs: Runs, path: Path) -> None:
    """Every recipe against the Euclidean optimizer that validation prefers, a row each."""
    rows = []
    for subject in SUBJECTS:
        names = recipes(runs, subject.task)
        for name in names:
            reference = euclidean(runs, subject.task)
            found = against(runs, subject.task, name, reference)
            preferred = name == best(runs, subject.task, names)
            rows.append(
                DifferenceRow(
                    f"{subject.task}: {name} against {reference}", found, "#D55E00" if preferred else "#0072B2"
                )
            )
    told = "test error minus that of the better Euclidean optimizer (points, 95 %); red: the recipe validation prefers"
    draw_differences(rows, told, path)


def main() -> None:
    """Train, or read what was stored, and write tables and figure."""
    options = options_for(NAME, "Spheres beyond vision.").parse_args()
    stored = collect(NAME, arms(), options)
    runs = tuned(stored)
    show(NAME, as_markdown(runs, stored), lambda path: draw(runs, path), options)


if __name__ == "__main__":
    main()
