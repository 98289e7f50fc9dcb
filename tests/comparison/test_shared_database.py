"""A comparison in a shared database, by several processes one of which is killed; runs where a server is named.

MANIFOLD_NETS_STORAGE=postgresql+psycopg://USER@HOST/NAME pytest tests/comparison/test_shared_database.py
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import uuid

import pytest
from helpers.comparison_runs import small_settings
from sqlalchemy import make_url, text

from manifold_nets.comparison import Settings
from manifold_nets.comparison.api import compare_settings, study_name
from manifold_nets.comparison.database_url import PASSWORD_VARIABLE
from manifold_nets.comparison.report.tables import runs_csv
from manifold_nets.comparison.results import environment
from manifold_nets.comparison.store import RunStore

SERVER = os.environ.get("MANIFOLD_NETS_STORAGE")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(SERVER is None, reason="no server: MANIFOLD_NETS_STORAGE names no database to share"),
]

# Short beats: whoever is killed is noticed after seconds.
IMPATIENT = """
import manifold_nets.comparison.scheduler as scheduler, manifold_nets.comparison.store as store
scheduler.HEARTBEAT_SECONDS, store.GRACE_SECONDS = 1.0, 5.0
from manifold_nets.cli import main
main()
"""

KILLED = """
import os, signal, sys
from manifold_nets.comparison.api import join_comparison

def die(progress):
    if progress.done == 2 and progress.running:
        os.kill(os.getpid(), signal.SIGKILL)

join_comparison(*sys.argv[1:], progress=die)
"""


@pytest.fixture
def shared():
    """Settings whose study is in no database yet, and the empty study in the named one; it is deleted at the end."""
    settings = small_settings(target_error=float(f"0.05{uuid.uuid4().int % 10**6:06}"))
    queue = RunStore(SERVER, study_name(settings))
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    yield settings, queue
    with queue._transaction() as connection:
        for name in ("runs WHERE study", "studies WHERE name"):
            connection.execute(text(f"DELETE FROM manifold_nets_{name} = :study"), {"study": queue.study})
    queue.close()


def started(*arguments: str, code: str = IMPATIENT) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, *arguments]
    # No printed command has a password.
    password = make_url(SERVER).password
    variables = os.environ if password is None else {**os.environ, PASSWORD_VARIABLE: password}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=variables)


def arguments_of(settings: Settings) -> list[str]:
    rates = ",".join(map(str, settings.learning_rates))
    given = ["--model", settings.model, "--optimizers", ",".join(settings.optimizers), "--lr", rates]
    return [*given, "--seeds", "2", "--epochs", str(settings.epochs), "--target-error", str(settings.target_error)]


def test_a_killed_worker_in_a_shared_database_changes_nothing(shared, tmp_path):
    settings, queue = shared
    killed = started(SERVER, study_name(settings), code=KILLED)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    # Two runs are stored, and one is claimed by a process that is no more.
    assert (queue.count_done(), len(queue.running())) == (2, 1)
    command = started("compare", *arguments_of(settings), "--storage", SERVER, "--output", str(tmp_path))
    announced = next(line for line in command.stderr if "To add a worker" in line)
    helper = started(*shlex.split(announced.partition(": manifold-nets ")[2]))
    for process in (helper, command):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    assert queue.count_done() == 8
    alone = compare_settings(settings, tmp_path / "alone", report=False)
    assert (tmp_path / "runs.csv").read_text() == runs_csv(alone)
    # Sabotage: another seed gives another file.
    other = compare_settings(small_settings(seeds=(0, 2)), None, report=False)
    assert (tmp_path / "runs.csv").read_text() != runs_csv(other)


def test_processes_take_each_run_once(shared):
    settings, queue = shared
    other = RunStore(SERVER, study_name(settings))
    assert other.settings() == settings
    claimed = [found for _ in range(5) for taker in (queue, other) if (found := taker.claim()) is not None]
    assert sorted(key for _, key in claimed) == sorted(settings.run_keys())
    other.close()
