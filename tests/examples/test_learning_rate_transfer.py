"""A network converted in mid-training: its losses go on as before; with the plain rate on spheres they do not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT

EXAMPLES = ROOT / "examples"
SEEDS, EPOCHS, SETTING = 3, 2, "decay, cosine"


@pytest.fixture(scope="module")
def found():
    """Distances of log losses from the plain run as before, (seeds, measurements) for each way, and those of chance."""
    pytest.importorskip("sklearn")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        import learning_rate_transfer as example

        problem = example.digits(Path())
        decay, cosine = example.SETTINGS[SETTING]
        runs = [example.losses_of(problem, seed, 2, EPOCHS, decay=decay, cosine=cosine) for seed in range(SEEDS)]
        after = {way: torch.tensor([run[way] for run in runs], dtype=torch.float64) for way in example.WAYS}
        return {name: ratios.abs() for name, ratios in example.log_ratios(after).items()}, example.spread_of_chance(
            after
        )


def check_continues(distances, chance):
    """No farther from the plain run than two other plain runs at any measurement, and much nearer in the mean."""
    assert bool((distances <= chance + 1e-6)[:, 1:].all())
    assert float(distances.mean()) < 0.2 * float(chance.mean())


@pytest.mark.slow
def test_a_converted_run_goes_on(found):
    check_continues(found[0]["converted, from_torch"], found[1])


@pytest.mark.slow
def test_sabotage_with_the_plain_rate_on_spheres_it_does_not(found):
    with pytest.raises(AssertionError):
        check_continues(found[0]["converted, plain rate"], found[1])


@pytest.mark.slow
def test_example_runs_in_small(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    command = [sys.executable, EXAMPLES / "learning_rate_transfer.py", "--seeds", "1", "--first", "1", "--epochs", "1"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    assert re.search(r"converted, from_torch: \d+\.\d % of the measurements within", done.stdout), done.stdout
    assert (tmp_path / "learning_rate_transfer.png").read_bytes().startswith(b"\x89PNG")
