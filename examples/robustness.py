"""Do spheres need less tuning, and are they steadier? Widths, spreads and initial scales, as numbers with intervals.

``python examples/robustness.py --write examples/results`` trains on scikit-learn's digits over a wide grid of learning
rates, from usual initial weights and from ones whose filters were each multiplied by 10^U(−2, 2), without weight decay
and with it. ``--data FOLDER``, with the four files of MNIST, adds MNIST. Where the results hold the stored runs of
`camvid_segnet`, they are judged alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from evidence import Arm, Runs, collect, options_for, preamble, read_runs, show, table
from robustness_measures import TOLERANCES, Finding, Sample, comparable, findings_of, samples_of, scale_costs, tally
from sphere_recipes import entrants

from manifold_nets.comparison.statistics import mean_interval
from manifold_nets.files import atomic_file

NAME = "robustness"
RATES = tuple(round(10 ** (-3.5 + half / 2), 6) for half in range(9))
OTHERS = ("camvid",)
CLAIMS = {
    "less tuning": "wider range of learning rates within 10 % of the optimizer's own best error, in decades",
    "less tuning for the same error": "the same within 10 % of the smaller of the two best errors",
    "more stable": "smaller standard deviation of the test error over the seeds, logarithm of the ratio",
    "scale-free": "lower cost of other initial scales at the same learning rate, difference in points",
}


def arms(data: str | None = None) -> list[Arm]:
    """Each task without weight decay, and with the kind that goes with each optimizer.

    Args:
        data: folder of MNIST; digits alone when left out.
    """
    tasks: dict[str, dict[str, Any]] = {"digits": {"seeds": 5, "epochs": 4}}
    if data is not None:
        tasks["mnist"] = {"seeds": 3, "epochs": 2, "data": data}
    every = ("sgd", "adamw", "rsgd", "radamw, matched")
    with_decay = {0.0: every, 5e-3: ("sgd", "rsgd"), 5e-1: ("adamw", *every[3:])}
    return [
        Arm(
            f"{task}, weight decay {decay:g}",
            {
                "model": "mlp:100,100",
                "task": task,
                "optimizers": entrants(names),
                "learning_rates": RATES,
                "schedule": "cosine",
                "initial_scales": ("plain", "rescaled"),
                "weight_decay": decay,
                **options,
            },
        )
        for task, options in tasks.items()
        for decay, names in with_decay.items()
    ]


def others(folder: Path) -> list[Sample]:
    """Samples of the stored runs of other experiments in a folder, those from other initial scales beside the plain."""
    return [
        replace(sample, arm=f"{name}, {sample.arm.removesuffix(', rescaled')}")
        for name in OTHERS
        if (folder / f"{name}_runs.csv").is_file()
        for sample in samples_of(read_runs(folder / f"{name}_runs.csv"))
    ]


def row_of(sample: Sample, plain: Sample | None) -> list[str]:
    """One optimizer: settings, test error, widths, and what other initial scales cost."""
    widths = [str(sample.sensitivity(tolerance)) for tolerance in TOLERANCES]
    tests = mean_interval(sample.tests)
    cost = "" if plain is None else mean_interval(scale_costs(plain, sample))
    return [
        sample.arm,
        sample.scale,
        sample.optimizer,
        f"{sample.chosen:.3g}",
        f"{tests.value:.2f} ± {tests.deviation:.2f}",
        *(widths if len(sample.rates) > 2 else ["", ""]),
        cost if isinstance(cost, str) else f"{cost.value:+.2f} ± {cost.half_width:.2f}",
    ]


def rows_of(samples: Iterable[Sample]) -> list[list[str]]:
    """The table of all optimizers."""
    known = {(sample.arm, sample.optimizer, sample.scale): sample for sample in samples}
    rows = []
    for (arm, optimizer, scale), sample in known.items():
        plain = known.get((arm, optimizer, "plain")) if scale == "rescaled" else None
        rows.append(row_of(sample, plain if plain is not None and comparable(plain, sample) else None))
    return rows


HEAD = (
    "runs",
    "initial weights",
    "optimizer",
    "learning rate",
    "test error (%)",
    "rates within 10 %",
    "rates within 100 %",
    "cost of other scales (points)",
)


def finding_row(finding: Finding) -> list[str]:
    """One comparison of a pair."""
    interval = f"{finding.value:+.2f} ({finding.low:+.2f} … {finding.high:+.2f})"
    return [finding.arm, f"{finding.ours} against {finding.theirs}", finding.claim, interval, finding.verdict]


def as_markdown(runs: Runs, samples: list[Sample], findings: list[Finding]) -> str:
    """Claims with their counts, every comparison, and every optimizer."""
    claims = [[claim, told, tally(findings, claim)] for claim, told in CLAIMS.items()]
    by_data = {
        data: [finding for finding in findings if finding.arm.startswith(data)]
        for data in dict.fromkeys(finding.arm.partition(",")[0] for finding in findings)
    }
    parts = [[data, claim, tally(found, claim)] for data, found in by_data.items() for claim in CLAIMS]
    return "\n".join(
        (
            "# Less tuning, more stable?\n",
            preamble(runs) + "\n",
            (
                "A claim holds where the whole 95 % interval of a difference over the seeds is on its side, fails where"
                " it is on the other, and stays open where it holds zero. The error on CamVid is 100 % less the mean"
                " intersection over union.\n"
            ),
            table(["claim", "measured as", "found"], claims),
            table(["data", "claim", "found"], parts),
            "## Every comparison\n",
            table(
                ["runs", "pair", "claim", "difference, positive for the claim", "verdict"], map(finding_row, findings)
            ),
            "## Every optimizer\n",
            (
                "Test error: mean ± standard deviation over the seeds. Rates within so much of the best validation"
                " error: ≥ where they reach an end of the grid. Cost of other scales: rise of the validation error from"
                " usual initial weights to rescaled ones at the learning rate chosen for the usual ones, ± half of"
                " Student's 95 % interval.\n"
            ),
            table(HEAD, rows_of(samples)),
        )
    )


def draw(samples: list[Sample], path: Path) -> None:
    """Validation error over the learning rate: a panel for each arm and kind of initial weights."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = dict.fromkeys((sample.arm, sample.scale) for sample in samples if len(sample.rates) > 2)
    columns = 2
    rows = max(1, -(-len(groups) // columns))
    figure, panels = pyplot.subplots(rows, columns, figsize=(9, 3.1 * rows), layout="constrained", squeeze=False)
    for axes, (arm, scale) in zip(panels.flat, groups, strict=False):
        for sample in samples:
            if (sample.arm, sample.scale) == (arm, scale):
                _curve(axes, sample)
        axes.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation error (%)")
        axes.set_title(f"{arm}, {scale} initial weights", fontsize=9)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=7)
    for axes in list(panels.flat)[len(groups) :]:
        axes.set_axis_off()
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=90)
    pyplot.close(figure)


def _curve(axes: Any, sample: Sample) -> None:
    """Mean and range over the seeds; nothing where a run diverged."""
    style = STYLES.get(sample.optimizer, {"color": "#777777"})
    axes.fill_between(sample.rates, sample.errors.min(1), sample.errors.max(1), alpha=0.1, color=style["color"])
    axes.plot(sample.rates, np.mean(sample.errors, axis=1), label=sample.optimizer, markersize=3, **style)


# Colours of Okabe and Ito; broken lines for plain weights, solid ones for spheres.
STYLES: dict[str, dict[str, Any]] = {
    "sgd": {"color": "#000000", "linestyle": "--", "marker": "o"},
    "adam": {"color": "#E69F00", "linestyle": "--", "marker": "s"},
    "adamw": {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    "rsgd": {"color": "#0072B2", "marker": "o"},
    "radam": {"color": "#56B4E9", "marker": "^"},
    "radamw, matched": {"color": "#009E73", "marker": "s"},
    "rsgd and adamw": {"color": "#F0E442", "marker": "v"},
    "angular and adamw": {"color": "#CC79A7", "marker": "D"},
}


def main() -> None:
    """Train, or read what was stored, and write tables and figure."""
    parser = options_for(NAME, "Width of the good learning rates, spread over seeds, initial scales.")
    parser.add_argument("--data", help="folder with the four files of MNIST")
    options = parser.parse_args()
    runs = collect(NAME, arms(options.data), options)
    samples = samples_of(runs) + ([] if options.write is None else others(options.write))
    findings = findings_of(samples)
    show(NAME, as_markdown(runs, samples, findings), lambda path: draw(samples, path), options)


if __name__ == "__main__":
    main()
