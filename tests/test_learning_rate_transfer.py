"""A network converted in mid-training: with matched rates the loss curve goes on, with SGD's own rate it does not."""

import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
SEEDS, EPOCHS = 6, 4


@pytest.fixture(scope="module")
def ratios():
    """Logarithms of training losses over those of SGD as before, (seeds, epochs) for each way to go on."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import learning_rate_transfer as example

        images = example.load_digits()["train"]
        runs = [example.losses_of(seed, images, EPOCHS)[1] for seed in range(SEEDS)]
        after = {name: torch.tensor([run[name] for run in runs], dtype=torch.float64) for name in example.STYLES}
        return example.log_ratios(after)


def bounds(distances):
    """Mean of the seeds, less and plus three standard errors."""
    half = 3 * float(distances.std()) / math.sqrt(len(distances))
    return float(distances.mean()) - half, float(distances.mean()) + half


def check_continues(ratios, name):
    """Farther from SGD as before than chance takes two runs in no epoch, and far nearer than with SGD's rate."""
    matched, chance, unmatched = (
        ratios[key].abs().amax(1) for key in (name, "SGD, other order", "spheres, SGD's rate")
    )
    assert bounds(matched)[0] <= bounds(chance)[1]
    assert bounds(unmatched - matched)[0] > 0
    # Just after the conversion the weights have had no time to change their norms, and chance is small.
    assert bounds(ratios[name][:, 0].abs())[1] < bounds(ratios["spheres, SGD's rate"][:, 0].abs())[0]


@pytest.mark.slow
def test_matched_rates_continue_the_loss_curve(ratios):
    check_continues(ratios, "spheres, matched")


@pytest.mark.slow
def test_the_unmatched_rate_does_not(ratios):
    with pytest.raises(AssertionError):
        check_continues(ratios, "spheres, SGD's rate")
    assert bounds(ratios["spheres, SGD's rate"][:, -1])[0] > bounds(ratios["SGD, other order"].abs().amax(1))[1]


@pytest.mark.slow
def test_nor_do_matched_rates_without_the_momentum(ratios):
    with pytest.raises(AssertionError):
        check_continues(ratios, "spheres, matched, empty momentum")


@pytest.mark.slow
def test_example_runs_in_small(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, EXAMPLES / "learning_rate_transfer.py", "--seeds", "1", "--epochs", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.search(r"In 1 of 1 seeds the matched rates stay closer", done.stdout), done.stdout
    assert (tmp_path / "learning_rate_transfer.png").read_bytes().startswith(b"\x89PNG")
