"""A comparison in a shared database, by several processes one of which is killed, and on two hosts.

Most tests run where a server is named; the last makes two hosts of network namespaces, one of them with a server.

MANIFOLD_NETS_STORAGE=postgresql+psycopg://USER@HOST/NAME pytest tests/comparison/test_shared_database.py
"""

from __future__ import annotations

import collections
import os
import pwd
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

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

pytestmark = pytest.mark.slow

# Short beats: whoever is killed is noticed after seconds.
IMPATIENT = """
import manifold_nets.comparison.scheduler as scheduler, manifold_nets.comparison.store as store
scheduler.HEARTBEAT_SECONDS, store.GRACE_SECONDS = 1.0, 20.0
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
    if SERVER is None:
        pytest.skip("no server: MANIFOLD_NETS_STORAGE names no database to share")
    settings = small_settings(target_error=float(f"0.05{uuid.uuid4().int % 10**6:06}"))
    queue = RunStore(SERVER, study_name(settings))
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    yield settings, queue
    with queue._transaction() as connection:
        for name in ("runs WHERE study", "studies WHERE name"):
            connection.execute(text(f"DELETE FROM manifold_nets_{name} = :study"), {"study": queue.study})
    queue.close()


def started(*arguments: str, code: str = IMPATIENT, inside: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*inside, sys.executable, "-c", code, *arguments]
    # No printed command has a password.
    password = None if SERVER is None else make_url(SERVER).password
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


# ---- two hosts -------------------------------------------------------------------------------------------------------

ADDRESSES = ("10.231.77.1", "10.231.77.2")


class Hosts:
    """Two network namespaces with a cable between them; a PostgreSQL server runs on the first."""

    def __init__(self, folder: Path) -> None:
        self.data, user = folder / "data", pwd.getpwnam("postgres")
        self.names = [f"mn-{os.getpid()}-{number}" for number in (1, 2)]
        self.as_postgres = ("setpriv", f"--reuid={user.pw_uid}", f"--regid={user.pw_gid}", "--clear-groups")
        self.url = f"postgresql+psycopg://postgres@{ADDRESSES[0]}/postgres?connect_timeout=5"
        # The tests look into the database from outside of both hosts, through a socket file.
        self.local = f"postgresql+psycopg://postgres@/postgres?host={folder}"
        os.chown(folder, user.pw_uid, user.pw_gid)

    def make(self) -> None:
        first, second = self.names
        for name in self.names:
            run("ip", "netns", "add", name)
        run(*f"ip link add mn0 netns {first} type veth peer name mn0 netns {second}".split())
        for name, address in zip(self.names, ADDRESSES, strict=True):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "mn0")
            for device in ("lo", "mn0"):
                run("ip", "-n", name, "link", "set", device, "up")
        run(*self.as_postgres, *f"initdb -D {self.data} -U postgres -A trust --no-sync --no-locale -E UTF8".split())
        with (self.data / "pg_hba.conf").open("a") as access:
            access.write(f"host all all {ADDRESSES[0]}/24 trust\n")
        self.server("start")

    def server(self, *action: str) -> None:
        options, log = f"-h {ADDRESSES[0]} -k {self.data.parent}", str(self.data.parent / "log")
        command = ("pg_ctl", *action, "-w", "-D", str(self.data), "-o", options, "-l", log)
        run("ip", "netns", "exec", self.names[0], *self.as_postgres, *command)

    def started(self, number: int, *arguments: str) -> subprocess.Popen[str]:
        return started("compare", "--storage", self.url, *arguments, inside=("ip", "netns", "exec", self.names[number]))

    def lose(self, number: int) -> None:
        """Kill all processes of a host."""
        listed = subprocess.run(("ip", "netns", "pids", self.names[number]), capture_output=True, text=True)
        for process in listed.stdout.split():
            os.kill(int(process), signal.SIGKILL)

    def remove(self) -> None:
        for number, name in enumerate(self.names):
            self.lose(number)
            subprocess.run(("ip", "netns", "delete", name), stderr=subprocess.DEVNULL)


def run(*command: str) -> None:
    with tempfile.TemporaryFile("w+") as output:  # a server that goes on running would keep a pipe open
        ended = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, cwd="/")
        if ended.returncode:
            output.seek(0)
            raise OSError(f"{shlex.join(command)}: {output.read()}")


@pytest.fixture
def hosts():
    pytest.importorskip("psycopg")
    missing = [name for name in ("ip", "setpriv", "initdb", "pg_ctl") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"network namespaces and a server need root and {', '.join(missing) or 'no further program'}")
    with tempfile.TemporaryDirectory() as folder:
        made = Hosts(Path(folder))
        try:
            try:
                made.make()
            except OSError as error:
                pytest.skip(f"no network namespaces, or no server: {error}")
            yield made
        finally:
            made.remove()


def until(condition, *processes) -> None:
    """Wait for what shows in the database, while the processes that bring it about run."""
    while not condition():
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)


def check_rows(rows, count: int, lost: set[int]) -> None:
    """Each run has one result; none was begun after its result, and those without one are the lost host's."""
    assert {number for number, _, state in rows if state != "done"} == lost
    done = {key: number for number, key, state in rows if state == "done"}
    assert collections.Counter(state for _, _, state in rows) == {"done": count, "failed": len(lost)}
    assert len(done) == count
    assert all(number <= done[key] for number, key, _ in rows)


def test_a_lost_host_and_a_restarted_server_lose_no_result_and_repeat_none(hosts, tmp_path):
    settings = small_settings(epochs=4)
    queue = RunStore(hosts.local, study_name(settings))
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    worker = hosts.started(1, "--worker", study_name(settings))
    until(lambda: queue.count_done() >= 2 and queue.running(), worker)
    hosts.lose(1)
    worker.communicate()
    before, lost = queue.results(), set(queue.running())
    # A worker takes its next run before the last result is stored.
    assert 2 <= len(before) < 7
    assert 1 <= len(lost) <= 2
    command = hosts.started(0, *arguments_of(settings), "--output", str(tmp_path))
    helper = hosts.started(1, "--worker", study_name(settings))
    until(lambda: queue.count_done() > len(before) and queue.running(), command, helper)
    hosts.server("restart", "-m", "immediate")
    for process in (helper, command):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    after = queue.results()  # by a new connection, as the restart has closed the old one
    with queue._transaction() as connection:
        found = connection.execute(text("SELECT id, key, state FROM manifold_nets_runs ORDER BY id"))
        rows = [tuple(row) for row in found]
    queue.close()
    check_rows(rows, 8, lost)
    assert {key: after[key] for key in before} == before
    alone = compare_settings(settings, tmp_path / "alone", report=False)
    assert (tmp_path / "runs.csv").read_text() == runs_csv(alone)
    # Sabotage: a run that is begun again after its result, and a result that is lost.
    for wrong in ([*rows, (rows[-1][0] + 1, rows[0][1], "done")], [*rows[:-1], (*rows[-1][:2], "failed")]):
        with pytest.raises(AssertionError):
            check_rows(wrong, 8, lost)
