"""The check of a device, as it runs on the CPU; and that it sees an optimizer that steps wrongly."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def check(tmp_path, *words, **environment):
    """Run it; return its rows, what it printed, and its exit code."""
    found = tmp_path / "found.json"
    command = ["bash", "examples/device_check.sh", "--device", "cpu", "--smoke", "--out", str(found), *words]
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    return json.loads(found.read_text())["rows"], done.stdout, done.returncode


@pytest.mark.slow
def test_the_check_of_a_device_runs_on_the_cpu(tmp_path):
    rows, table, code = check(tmp_path)
    assert code == 0, table
    assert {row["part"] for row in rows} == {"correctness", "steps", "training"}
    assert all(row.get("holds", True) for row in rows)
    assert "RiemannianSGD, default" in table


@pytest.mark.slow
def test_sabotage_wrong_steps_and_what_there_was_no_time_for_are_told(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import manifold_nets.optim.backends.dispatch as dispatch\ndispatch.run_native = lambda rule, members: None\n"
    )  # steps nothing
    rows, table, code = check(tmp_path, "--seconds", "0.5", PYTHONPATH=str(tmp_path))
    assert code == 1
    assert any(row.get("holds") is False for row in rows)
    assert rows[-1]["case"] == "stopped"
    assert "False" in table
