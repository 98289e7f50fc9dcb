"""Every example runs as it stands, from another folder, without a warning, and shows what it promises."""

import difflib
import importlib.util
import os
import re
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

EPS = 2**-23  # of float32
EXAMPLES = ROOT / "examples"
# What each example must print, as patterns.
PROMISES = {
    "compare_own_network": [r"surfaces, .*network: 2 seeds", r"\nrsgd +plain +[\d.]+ +\d", r"\nsgd +.* of 8"],
    "define_model": [r"accuracy on new images: (9\d\.\d|100\.0)%", r"0\.weight: .*16 filters of 9.* norms off by"],
    "convert_and_give_back": [
        r"2 of 3 weights will be put on spheres",
        r"loaded from its file: SphereProduct\(16 filters",
        r"given back: <class 'torch\.nn\.parameter\.Parameter'>",
        r"the same function: largest relative difference 0\.0e\+00 in evaluation mode, 0\.0e\+00 in training mode",
    ],
    "diagnose_network": [
        r"3 invariant, 2 not invariant",
        r"share one scale: +8 filters of 27",
        r"share one scale: +2 groups of 288",
        r"share one scale: +whole tensor",
        r"chain broken by: +sigmoid in sigmoid_again",
    ],
    "train_with_pymanopt": [
        r"gradient's error (1\.9|2\.0)\d ",
        r"Hessian's error  (2\.9|3\.0)\d ",
        r"TrustRegions +loss \S+ after",
        r"training error 0\.0 %",
    ],
    "monitor_training": [
        r"weight decay 0\.0005: 120 steps",
        r"turns \d+ times slower than at step \d+, all else equal: its norm grew from 0\.\d+ to \d",
        r"with this decay equilibrium takes [\d,]+ steps, the run has 120\.",
        r"Without weight decay it only grows\.",
        r"pages: decay-0\.0005\.html, decay-0\.html",
    ],
    "train_with_torch_schedulers": [r"the same bit for bit: True", r"bold driver, epoch 4"],
}
# As PROMISES, of examples that take longer, and the package that they need.
SLOW_PROMISES = {
    "train_with_lightning": (
        "lightning",
        [
            r"Lightning's Trainer and the plain loop, the weights are the same bit for bit: True",
            r"torch's AdamW is stopped before its first step: .*\(16, 1, 3, 3\).*RiemannianSGD",
        ],
    ),
    "train_with_accelerate": (
        "accelerate",
        [r"Accelerate and the plain loop, the weights are the same bit for bit: True"],
    ),
    "train_with_transformers": (
        "transformers",
        [
            r"4 weights are scale-invariant",
            r"transformers' Trainer and the plain loop, the weights are the same bit for bit: True",
            r"reloaded, plain and on spheres, bit for bit: True",
            r"of the reloaded weights 4 are on spheres",
            r"made by the Trainer: norms off by",
            r"the Trainer's AdamW is stopped before its first step: .*RiemannianSGD",
        ],
    ),
}

NEEDED = {"compare_own_network": ["sqlalchemy"], "train_with_pymanopt": ["pymanopt", "sklearn"]}


def run(name, folder, *arguments):
    """Run an example in a folder of its own; return what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py", *arguments],
        check=False, capture_output=True, text=True, cwd=folder, env=environment, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def check_promises(printed, promises):
    missing = [promise for promise in promises if not re.search(promise, printed)]
    assert not missing, f"{missing} not in:\n{printed}"


@pytest.mark.slow
@pytest.mark.parametrize("name", PROMISES)
def test_example_runs_and_shows_what_it_promises(name, tmp_path):
    for package in NEEDED.get(name, ()):
        pytest.importorskip(package)
    printed = run(name, tmp_path)
    check_promises(printed, PROMISES[name])
    assert all(float(off) < 4 * EPS for off in re.findall(r"norms off by at most (\S+)", printed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SLOW_PROMISES)
def test_trainers_of_other_libraries_follow_the_plain_loop(name, tmp_path):
    package, promises = SLOW_PROMISES[name]
    pytest.importorskip("sklearn")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    printed = run(name, tmp_path)
    check_promises(printed, promises)
    norms = [float(off) for off in re.findall(r"norms off by at most (\S+)", printed)]
    assert norms
    assert all(off < 4 * EPS for off in norms)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_own_script_is_converted_in_mid_run_by_six_lines_and_resumes(tmp_path):
    pytest.importorskip("sklearn")
    texts = [(EXAMPLES / f"mid_run_{name}.py").read_text().splitlines() for name in ("plain", "converted")]
    changed = [line for line in difflib.ndiff(*texts) if line[0] in "+-" and line[1:].strip()]
    assert all(0 < sum(line[0] == sign for line in changed) <= 6 for sign in "+-")

    def losses(name, *until):
        options = ["--checkpoint", "run.pt", "--until", *until] if until else []
        return [float(loss) for loss in re.findall(r"(?:loss|average) (\d\.\d+)", run(name, tmp_path, *options))]

    expected = losses("mid_run_plain")[6:]
    assert len(losses("mid_run_plain", "3")) == 6
    without = torch.load(tmp_path / "run.pt")
    found = losses("mid_run_converted", "5") + losses("mid_run_converted", "8")
    # Without the state of the plain run the path is another one.
    torch.save({**without, "optimizer": {**without["optimizer"], "state": {}}}, tmp_path / "run.pt")
    other = losses("mid_run_converted", "8")
    off = [[abs(a / b - 1) for a, b in zip(run, expected, strict=True)] for run in (found, other)]
    assert max(off[0]) < 0.05  # bfloat16, whose rounding depends on norms
    assert max(off[1]) > 2 * max(off[0])


@pytest.mark.slow
def test_models_with_unit_norms_run_in_small(tmp_path):
    pytest.importorskip("sklearn")
    small = ("--steps", "30", "--seeds", "1", "--turns", "1", "--rates", "0.01", "--features", "64")
    printed = run("sparse_autoencoder", tmp_path, *small)
    row = r" +0\.01 +\d+\.\d+ ± 0\.000 +\d+\.0 ± 0\.0 +(\d\.\de-\d+)"
    check_promises(printed, [rf"{name}{row}" for name in ("recipe: .*divide", "RiemannianAdam", r"on_spheres\(Adam\)")])
    assert all(float(off) < 4 * EPS for off in re.findall(row, printed))
    printed = run("cosine_heads", tmp_path, "--steps", "5", "--seeds", "1")
    check_promises(printed, [rf"{name} +on spheres +rate .*±" for name in ("margins", "items")])


def test_sabotage_an_example_that_prints_something_else_is_noticed():
    with pytest.raises(AssertionError):
        check_promises("the same bit for bit: False", PROMISES["train_with_torch_schedulers"])


def check_demo(printed, folder):
    """The table has its four rows with numbers within bounds, and the files and the plot are there."""
    rows = {
        cells[0].strip(): [cell.strip() for cell in cells[1:]]
        for cells in (line.strip("│ \n").split("│") for line in printed.splitlines() if line.startswith("│"))
    }
    assert list(rows) == ["checkpoint", "torch.optim.SGD", "SGD, another order", "RiemannianSGD", "exported, seed 0"]
    errors = {name: float(row[0].split()[0]) for name, row in rows.items()}
    assert all(0 <= error < 90 for error in errors.values())
    assert float(rows["RiemannianSGD"][1]) < 4 * EPS
    assert float(rows["torch.optim.SGD"][1]) > 100 * EPS
    assert float(rows["exported, seed 0"][2]) == 0.0
    for name in ("trained", "converted", "trained-on-spheres", "exported"):
        assert (folder / f"{name}.safetensors").stat().st_size > 50_000
        assert f"{name}.safetensors" in printed
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "demo.png" in printed
    assert printed.count("$ manifold-nets") == 3
    return errors


@pytest.mark.slow
def test_demo_runs_in_small(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    check_demo(run("demo", tmp_path, "--seeds", "1", "--epochs", "1"), tmp_path / "demo")


def test_sabotage_a_demo_whose_filters_leave_their_spheres_is_noticed(tmp_path):
    rows = [
        "checkpoint │ 4 │ │ │",
        "torch.optim.SGD │ 1 │ 0.5 │ │",
        "SGD, another order │ 1 │ │ │",
        "RiemannianSGD │ 1 │ 1e-5 │ │",
    ]
    printed = "".join(f"│ {row}\n" for row in [*rows, "exported, seed 0 │ 1 │ │ 0.0 │"])
    with pytest.raises(AssertionError, match="1e-05"):
        check_demo(printed, tmp_path)


@pytest.mark.slow
def test_demo_runs_in_full(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    errors = check_demo(run("demo", tmp_path), tmp_path / "demo")
    # Ten classes: both optimizers learn, and neither forgets what the checkpoint knew.
    assert errors["torch.optim.SGD"] < errors["checkpoint"] < 15
    assert errors["RiemannianSGD"] < errors["checkpoint"]
