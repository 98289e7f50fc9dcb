"""A comparison that is killed, interrupted, repeated or shared gives the same numbers."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import random
import shlex
import signal
import sqlite3
import subprocess
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, quote_plus

import pytest
from click.testing import CliRunner
from helpers import ROOT
from helpers.comparison_runs import reproducible, small_settings, tiny
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import event, make_url
from sqlalchemy.exc import OperationalError

from manifold_nets.cli import main
from manifold_nets.cli.compare import compare as command_line
from manifold_nets.comparison import OptimizerSpec, Progress, scheduler, store
from manifold_nets.comparison.api import compare_settings, join_comparison, study_name
from manifold_nets.comparison.database_url import PASSWORD_VARIABLE, redacted, with_password, without_secrets
from manifold_nets.comparison.errors import (
    DifferentCommandError,
    FolderInUseError,
    OptimizerBuildError,
    SettingsError,
    StorageError,
)
from manifold_nets.comparison.experiment import InitialModels
from manifold_nets.comparison.report.tables import runs_csv
from manifold_nets.comparison.results import environment
from manifold_nets.comparison.store import GRACE_SECONDS, RunStore


@pytest.fixture(scope="module")
def whole():
    """The tiny comparison, carried out at once."""
    return tiny()


def test_the_same_call_gives_the_same_numbers(whole):
    assert reproducible(tiny()) == reproducible(whole)
    # Sabotage: another seed gives others.
    with pytest.raises(AssertionError):
        assert reproducible(tiny(seeds=[0, 2])) == reproducible(whole)


def test_what_is_done_is_not_done_again(tmp_path, whole):
    seen: list[Progress] = []

    def interrupt(progress):
        seen.append(progress)
        if progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=tmp_path, progress=interrupt)
    seen.clear()
    resumed = tiny(output=tmp_path, progress=seen.append)
    assert (seen[0].done, seen[-1].done, seen[-1].total) == (3, 8, 8)
    assert sum(progress.last is not None for progress in seen) == 5
    assert reproducible(resumed) == reproducible(whole)
    assert seen[-1].best is not None
    assert tiny(output=tmp_path) == resumed
    assert runs_csv(resumed) == runs_csv(whole)


def seconds_left_after_a_late_start(whole, monkeypatch) -> list[float | None]:
    """What is told after none, one and two of eight runs of a second each whose worker took a minute to get ready."""
    runs = [
        replace(run, epochs=(replace(run.epochs[-1], seconds=0.5),), validation_seconds=0.25, harness_seconds=0.25)
        for run in whole.results[:2]
    ]
    now, told = [100.0], []
    monkeypatch.setattr(scheduler, "time", SimpleNamespace(monotonic=lambda: now[0]))
    executor = SimpleNamespace(running=dict)
    made = scheduler.Scheduler(None, whole.settings, executor, False, None, lambda progress: told.append(progress))
    made.report(None)
    for run, ended in zip(runs, (161.0, 162.0), strict=True):
        now[0] = ended
        made.results[run.key] = run
        made.report(run)
    return [progress.seconds_left for progress in told]


def test_the_time_left_is_that_of_runs_without_the_start_of_their_workers(whole, monkeypatch):
    assert seconds_left_after_a_late_start(whole, monkeypatch) == [None, 7.0, 6.0]
    # Sabotage: the minute before the first run counts as its own.
    monkeypatch.setattr(scheduler, "_seconds", lambda run: math.inf)
    with pytest.raises(AssertionError):
        assert seconds_left_after_a_late_start(whole, monkeypatch) == [None, 7.0, 6.0]


def test_another_command_into_the_same_folder_is_refused_with_the_difference(tmp_path):
    tiny(output=tmp_path)
    before = (tmp_path / "comparison.json").read_bytes()
    with pytest.raises(DifferentCommandError, match=r"epochs is 2 there and 3 here; momentum is 0\.9 there and 0\.5"):
        tiny(output=tmp_path, epochs=3, momentum=0.5)
    # Nothing was written.
    assert (tmp_path / "comparison.json").read_bytes() == before


MORE = {"optimizers": ["adam", "sgd", "rsgd"], "learning_rates": [0.01, 0.05, 0.5], "seeds": [0, 1, 5]}


def extended(folder: Path, **first) -> tuple[str, list[Progress]]:
    """The tiny comparison, and then more of it, in the same folder: its CSV, and what was told of the second call."""
    tiny(output=folder, **first)
    seen: list[Progress] = []
    return runs_csv(tiny(output=folder, progress=seen.append, **MORE)), seen


def test_a_finished_study_is_extended_by_the_new_runs_alone(tmp_path, whole):
    text, seen = extended(tmp_path)
    assert (seen[0].done, seen[0].total, seen[-1].done) == (8, 27, 27)
    assert sum(progress.last is not None for progress in seen) == 19
    assert text == runs_csv(tiny(**MORE))
    # The runs that were there are as they were, and the extended study goes on as any other.
    before = {run.key: run for run in whole.results}
    after = {run.key: run for run in tiny(output=tmp_path, **MORE).results}
    assert {key: run.epochs[-1].train_loss for key, run in before.items()} == {
        key: after[key].epochs[-1].train_loss for key in before
    }
    # Sabotage: with another first seed the runs would be those of another analysis.
    with pytest.raises(AssertionError):
        assert text == runs_csv(tiny(**{**MORE, "seeds": [2, 1, 5]}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"seeds": [0]}, r"seeds is \(0, 1\) there and \(0,\) here"),
        ({"seeds": [1, 0, 2]}, r"seeds is \(0, 1\) there and \(1, 0, 2\) here"),
        ({"seeds": [0, 2, 3]}, "seeds is"),
        ({"optimizers": ["sgd", "adam"]}, "optimizers is"),
        ({"learning_rates": [0.5, 1.0, 2.0]}, "learning_rates is"),
        ({"seeds": 3, "epochs": 3}, "epochs is 2 there and 3 here"),
        ({"seeds": 3, "weight_decays": [0.0, 0.1]}, "weight_decays is"),
    ],
)
def test_other_changes_of_a_study_are_refused_with_the_difference(changes, said, tmp_path_factory):
    folder = tmp_path_factory.getbasetemp() / "to refuse"
    if not folder.exists():
        tiny(output=folder)
    before = (folder / "comparison.json").read_bytes()
    with pytest.raises(DifferentCommandError, match=said) as refused:
        tiny(output=folder, **changes)
    assert str(refused.value).count(" there and ") == 1
    assert (folder / "comparison.json").read_bytes() == before
    tiny(output=folder)  # and nothing of the study was changed


def test_an_extension_that_cannot_work_leaves_the_study_as_it_was(tmp_path, whole):
    tiny(output=tmp_path)

    def broken(model, rate, settings):
        raise RuntimeError("no such thing")

    with pytest.raises(OptimizerBuildError, match=r"mine.*no such thing"):
        tiny(output=tmp_path, optimizers=["sgd", "rsgd", OptimizerSpec("mine", "plain", "own", "here", broken)])
    assert runs_csv(tiny(output=tmp_path)) == runs_csv(whole)


def test_an_extension_that_was_interrupted_goes_on(tmp_path):
    tiny(output=tmp_path)

    def interrupt(progress):
        if progress.done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=tmp_path, progress=interrupt, **MORE)
    seen: list[Progress] = []
    assert runs_csv(tiny(output=tmp_path, progress=seen.append, **MORE)) == runs_csv(tiny(**MORE))
    assert seen[0].done == 11


@pytest.mark.slow
def test_a_tuned_study_is_extended_too(tmp_path):
    tuned = {"tune_on": (30, 15, 1), "output": tmp_path}
    tiny(**tuned)
    assert runs_csv(tiny(**tuned, **MORE)) == runs_csv(tiny(tune_on=(30, 15, 1), **MORE))


def as_optuna_stored_it(place: Path) -> None:
    """Move a study into the tables of Optuna, as version 0.1.0.dev0 had them; results were cut into pieces."""
    with contextlib.closing(sqlite3.connect(place)) as old:
        ((name, settings, machine),) = old.execute("SELECT name, settings, environment FROM manifold_nets_studies")
        runs = list(old.execute("SELECT key, state, result, test FROM manifold_nets_runs ORDER BY id"))
        old.executescript(
            "DROP TABLE manifold_nets_studies; DROP TABLE manifold_nets_runs;"
            "CREATE TABLE studies (study_id INTEGER, study_name TEXT);"
            "CREATE TABLE study_user_attributes (id INTEGER PRIMARY KEY, study_id INTEGER, key TEXT, value_json TEXT);"
            "CREATE TABLE trials (trial_id INTEGER, study_id INTEGER, state TEXT);"
            "CREATE TABLE trial_user_attributes (id INTEGER PRIMARY KEY, trial_id INTEGER, key TEXT, value_json TEXT);"
        )
        old.execute("INSERT INTO studies VALUES (1, ?)", (name,))
        values = {"settings": settings, "environment": machine} | {
            f"test {key}": json.loads(t) for key, *_, t in runs if t
        }
        for key, value in values.items():
            statement = "INSERT INTO study_user_attributes (study_id, key, value_json) VALUES (1, ?, ?)"
            old.execute(statement, (key, json.dumps(value)))
        for i, (key, state, result, _) in enumerate(runs):
            old.execute("INSERT INTO trials VALUES (?, 1, ?)", (i, {"done": "COMPLETE"}.get(state, "FAIL")))
            for attribute, value in {
                "key": key,
                "result-0": (result or "")[:99],
                "result-1": (result or "")[99:],
            }.items():
                statement = "INSERT INTO trial_user_attributes (trial_id, key, value_json) VALUES (?, ?, ?)"
                old.execute(statement, (i, attribute, json.dumps(value)))
        old.commit()


@pytest.mark.parametrize("stop_at", [3, None])
def test_a_study_that_an_earlier_version_stored_goes_on(stop_at, tmp_path, whole, monkeypatch):
    def interrupt(progress):
        if progress.done == stop_at:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        tiny(output=tmp_path, progress=interrupt)
    as_optuna_stored_it(tmp_path / "study.db")
    seen: list[Progress] = []
    if stop_at is None:  # nothing is carried out and no test is read again
        monkeypatch.setattr(InitialModels, "model", None)
    assert reproducible(tiny(output=tmp_path, progress=seen.append)) == reproducible(whole)
    assert [progress.done for progress in seen[:1]] == ([] if stop_at is None else [stop_at])


def test_who_knows_the_study_before_it_grew_takes_none_of_the_new_runs(tmp_path):
    settings = small_settings()
    queue = RunStore(f"sqlite:///{tmp_path / 'study.db'}", "test")
    queue.create(settings, environment())
    more = small_settings(seeds=(0, 1, 2))
    queue.extend(more)
    queue.add_missing(more.run_keys())
    known = frozenset(settings.run_keys())
    claimed = dict(filter(None, (queue.claim(among=known) for _ in range(20))))
    assert sorted(claimed.values()) == sorted(known)
    assert queue.count_done(known) == 0
    queue.close()


@pytest.mark.slow
def test_a_study_in_a_shared_database_is_extended(tmp_path):
    url, more = f"sqlite:///{tmp_path / 'shared.db'}", {"seeds": (0, 1, 2), "learning_rates": (0.01, 0.1, 1e8)}
    compare_settings(small_settings(), tmp_path / "a", storage=url, report=False)
    name = study_name(small_settings())
    # The folder remembers the study, whose name would be another one.
    assert study_name(small_settings(**more)) != name == study_name(small_settings(**more), tmp_path / "a")
    seen: list[Progress] = []
    found = compare_settings(small_settings(**more), tmp_path / "a", storage=url, report=False, progress=seen.append)
    assert (seen[0].done, seen[-1].done) == (8, 18)
    assert runs_csv(found) == runs_csv(compare_settings(small_settings(**more), None))
    assert join_comparison(url, name) == small_settings(**more)


def test_two_processes_do_not_share_a_folder(tmp_path):
    def second(progress):
        with pytest.raises(FolderInUseError):
            tiny(output=tmp_path)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=tmp_path, progress=second)


COMMAND = ["--model", "mlp:10", "--optimizers", "sgd,rsgd", "--lr", "0.1,1e8", "--seeds", "2", "--epochs", "2"]


def started(folder: Path, *more: str, session: bool = False) -> subprocess.Popen[bytes]:
    # Where the tests themselves run in the background of a shell, Ctrl-C is ignored unless asked for.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    command = [sys.executable, "-c", f"{program}; from manifold_nets.cli import main; main()", "compare", *COMMAND]
    return subprocess.Popen(
        [*command, "--output", str(folder), *more],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=session,
    )


def killed_and_resumed(folder: Path, times: int, *more: str) -> bytes:
    """Kill the command so often, at random moments after the study has been made; let it end; return its CSV."""
    draw = random.Random(7)
    for _ in range(times):
        process = started(folder, *more)
        while not (folder / "study.db").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 4))
        process.send_signal(signal.SIGKILL)
        process.communicate()
    process = started(folder, *more)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return (folder / "runs.csv").read_bytes()


KILLED = """
import os, signal, sys
sys.path.insert(0, "tests")
from helpers.comparison_runs import tiny

def die(progress):
    if progress.done == 3 and progress.running:
        os.kill(os.getpid(), signal.SIGKILL)

tiny(output=sys.argv[1], progress=die)
"""


def test_a_kill_in_the_middle_of_a_run_loses_only_that_run(tmp_path, whole):
    ended = subprocess.run([sys.executable, "-c", KILLED.replace("tests", str(ROOT / "tests")), str(tmp_path)])
    assert ended.returncode == -signal.SIGKILL
    assert not (tmp_path / "comparison.json").exists()
    seen: list[Progress] = []
    resumed = tiny(output=tmp_path, progress=seen.append)
    assert (seen[0].done, seen[-1].done) == (3, 8)
    assert sum(progress.last is not None for progress in seen) == 5
    assert runs_csv(resumed) == runs_csv(whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ctrl_c_ends_all_processes_without_a_traceback(tmp_path, workers):
    """A terminal sends it to the whole group of processes, here while workers start and while they work."""
    for seconds in (0.5, 8.0):
        folder = tmp_path / f"{seconds}"
        process = started(folder, "--workers", workers, "--epochs", "2000", session=True)
        while not (folder / "study.db").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 1
        assert b"Traceback" not in errors
        assert errors.splitlines()[-1] == b"Aborted!"


@pytest.mark.slow
def test_one_or_two_workers_and_kills_give_the_same_file(tmp_path):
    expected = runs_csv(compare_settings(small_settings(), None)).encode()
    assert b"diverged" in expected
    assert killed_and_resumed(tmp_path / "two", 0, "--workers", "2") == expected
    assert killed_and_resumed(tmp_path / "killed", 2) == expected
    assert killed_and_resumed(tmp_path / "two killed", 3, "--workers", "2") == expected


@pytest.mark.slow
def test_ten_kills_give_the_same_file(tmp_path):
    killed = killed_and_resumed(tmp_path / "killed", 10)
    assert killed == runs_csv(compare_settings(small_settings(), None)).encode()


def test_every_run_is_queued_once_and_stale_ones_are_given_up(tmp_path):
    settings = small_settings()
    queue = RunStore(f"sqlite:///{tmp_path / 'study.db'}", "test")
    queue.create(settings, environment())
    for _ in range(2):
        queue.add_missing(settings.run_keys())
    claimed = dict(filter(None, (queue.claim() for _ in range(9))))
    assert sorted(claimed.values()) == sorted(settings.run_keys())
    queue.add_missing(settings.run_keys())
    assert queue.claim() is None
    again = RunStore(queue.url, "test")
    assert again.claim() is None
    again.close()
    # Those that show no beat are stale after a while, those that do are not.
    alive = min(claimed)
    assert queue.mark_stale_failed(0.0) == 0
    queue.heartbeat([alive])
    assert queue.mark_stale_failed(1.0) == 0
    assert queue.mark_stale_failed(GRACE_SECONDS + 0.5) == 7
    queue.add_missing(settings.run_keys())
    again = dict(filter(None, (queue.claim() for _ in range(8))))
    assert sorted(again.values()) == sorted(key for ticket, key in claimed.items() if ticket != alive)
    queue.close()


def test_one_that_is_alone_claims_each_run_once_and_leaves_no_trace(tmp_path):
    settings = small_settings()
    queue = RunStore(f"sqlite:///{tmp_path / 'study.db'}", "test")
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    claimed = dict(filter(None, (queue.claim(alone=True) for _ in range(9))))
    assert sorted(claimed.values()) == sorted(settings.run_keys())
    assert queue.claim(alone=True) is None
    assert queue.running() == {}
    ticket, key = next(iter(claimed.items()))
    run = tiny(seeds=1, epochs=1).results[0]
    queue.finish(ticket, dataclasses.replace(run, key=key))
    queue.mark_failed([next(reversed(claimed))])
    queue.close()
    # Killed, and started again: all but what has ended is still to be done.
    after = RunStore(queue.url, "test")
    after.create(settings, environment())
    after.add_missing(settings.run_keys())
    assert set(after.results()) == {key}
    rest = dict(filter(None, (after.claim(alone=True) for _ in range(9))))
    assert sorted(rest.values()) == sorted(set(settings.run_keys()) - {key})
    after.close()


def check_what_reaches_the_disk(place: Path) -> None:
    """How hard each commit is pressed to the disk: 1 leaves it to the system, 2 waits until it is there."""
    levels: list[int] = []

    def note(connection):
        levels.append(connection.connection.driver_connection.execute("PRAGMA synchronous").fetchone()[0])

    run = tiny(seeds=1, epochs=1).results[0]
    queue = RunStore(f"sqlite:///{place}", "test")
    queue.create(small_settings(), environment())
    queue.add_missing([run.key])
    event.listen(queue._engine, "commit", note)
    ticket, _ = queue.claim()
    assert set(levels) == {1}
    levels.clear()
    queue.finish(ticket, run)
    assert levels == [2]
    queue.record_test(run.key, 0.1, 0.2)
    assert levels[-1] == 2
    assert queue.results() == {run.key: run}
    queue.close()
    with contextlib.closing(sqlite3.connect(place)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_a_result_is_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    check_what_reaches_the_disk(tmp_path / "study.db")
    # Sabotage: nobody waits for the disk.
    monkeypatch.setitem(store._SYNCHRONOUS, True, "NORMAL")
    with pytest.raises(AssertionError):
        check_what_reaches_the_disk(tmp_path / "other.db")


def test_a_server_that_is_away_is_waited_for(monkeypatch):
    queue, away = RunStore("sqlite://", "test"), [OperationalError(None, None, Exception("gone"))] * 3
    reach = queue._engine.begin

    def begin():
        if away:
            raise away.pop()
        return reach()

    monkeypatch.setattr(queue._engine, "begin", begin)
    monkeypatch.setattr(store, "RETRY_SECONDS", 0.0)
    queue.create(small_settings(), environment())
    assert (queue.settings(), away) == (small_settings(), [])
    # Sabotage: nobody waits.
    monkeypatch.setattr(store, "PATIENCE_SECONDS", 0.0)
    away.append(OperationalError(None, None, Exception("gone")))
    with pytest.raises(StorageError, match=r"gone.*Start its server"):
        queue.settings()
    queue.close()


@pytest.mark.slow
def test_a_worker_joins_through_a_shared_database(tmp_path):
    settings, url = small_settings(), f"sqlite:///{tmp_path / 'shared.db'}"
    queue = RunStore(url, study_name(settings))
    queue.create(settings, environment())
    queue.add_missing(settings.run_keys())
    assert join_comparison(url, study_name(settings)) == settings
    assert queue.count_done() == 8
    queue.close()
    # The one that started it has no weights of these runs, and carries the chosen ones out again.
    shared = compare_settings(settings, tmp_path / "shared", storage=url, report=False)
    assert reproducible(shared) == reproducible(compare_settings(settings, None))


def test_a_worker_without_the_device_of_the_study_is_refused(tmp_path):
    """The machine that made the study has it; this one does not."""
    settings = small_settings(device="cuda:999")
    queue = RunStore(f"sqlite:///{tmp_path / 'x.db'}", study_name(settings))
    queue.create(settings, environment())
    queue.close()
    with pytest.raises(SettingsError, match=r"^device: found 'cuda:999'; expected a device that torch has"):
        join_comparison(f"sqlite:///{tmp_path / 'x.db'}", study_name(settings))


def test_a_database_without_the_study_is_refused(tmp_path):
    with pytest.raises(StorageError, match=r"study nothing in sqlite.*no such study.*name \(--worker"):
        join_comparison(f"sqlite:///{tmp_path / 'x.db'}", "nothing")
    assert {"--storage", "--worker", "--allow"} <= {flag for option in command_line.params for flag in option.opts}


# ---- passwords -------------------------------------------------------------------------------------------------------

SECRET = "s3cret-p4ss"
WITH_SECRETS = [
    f"postgresql+psycopg://me:{SECRET}@127.0.0.1:9/db",
    f"postgresql+psycopg://me@127.0.0.1:9/db?password={SECRET}&connect_timeout=9",
    f"postgresql+psycopg://me:x@127.0.0.1:9/db?sslpassword={SECRET}",
    f"mysql+pymysql://me@127.0.0.1:9/db?ssl_key_password={SECRET}&charset=utf8mb4",
    f"mssql+pyodbc:///?odbc_connect=DRIVER%3Dx%3BPWD%3D{SECRET}",
    f"postgresql://127.0.0.1:9/db?user=me&auth_token={SECRET}",
    f"postgresql://me:a@{SECRET}@127.0.0.1:9/db",
    f"postgresql://me:a/b@{SECRET}@127.0.0.1:9/db",
    f"postgresql+nothing://me:{SECRET}@127.0.0.1:9/db",
    f"nonsense {SECRET}",
    f"://me:{SECRET}@127.0.0.1:9",
]


def check_hidden(shown: str) -> None:
    assert SECRET not in shown


@pytest.mark.parametrize("url", WITH_SECRETS)
def test_no_password_of_a_url_is_shown(url, tmp_path, monkeypatch):
    check_hidden(redacted(url))
    with pytest.raises(StorageError) as caught:
        RunStore(url, "x")
    check_hidden("".join(traceback.format_exception(caught.value)))
    assert str(caught.value).endswith("Correct the URL (--storage).")
    done = CliRunner().invoke(main, ["compare", *COMMAND, "--storage", url, "--output", str(tmp_path / "x")])
    assert done.exit_code == 1
    assert "To add a worker" in done.output
    check_hidden(done.output)
    with pytest.raises(AssertionError):  # Sabotage: the URL as it is.
        check_hidden(url)


@given(st.text(min_size=4), st.sampled_from(["me:{}@host/db", "me@host/db?password={}", "host/db?a=b&sslpassword={}"]))
def test_passwords_of_any_letters_are_left_out(secret, form):
    url = f"postgresql+psycopg://{form.format(quote(secret, safe=''))}"
    assert redacted(url) == f"postgresql+psycopg://{form.format('')}".replace("me:@", "me@").replace(
        "?password=", ""
    ).replace("&sslpassword=", "")
    shown = without_secrets(RuntimeError(f"no {url}, {quote(secret)}, {quote_plus(secret)}"), url)
    assert not any(form(secret) in shown for form in (quote, quote_plus, lambda text: quote(text, safe="")))


def test_the_password_comes_from_the_environment_or_a_file(tmp_path, monkeypatch):
    url = "postgresql+psycopg://me@host/db"
    monkeypatch.delenv(PASSWORD_VARIABLE, raising=False)
    assert with_password(url) == url
    (tmp_path / "password").write_text("a@b:c\n")
    monkeypatch.setenv(f"{PASSWORD_VARIABLE}_FILE", str(tmp_path / "password"))
    assert make_url(with_password(url)).password == "a@b:c"
    monkeypatch.setenv(PASSWORD_VARIABLE, "d e/f")
    assert make_url(with_password(url)).password == "d e/f"
    # What the URL has counts, and a file needs none.
    for other in ("postgresql://me:own@host/db", "postgresql://me@host/db?password=own", "sqlite:///a.db"):
        assert with_password(other) == other
    monkeypatch.delenv(PASSWORD_VARIABLE)
    monkeypatch.setenv(f"{PASSWORD_VARIABLE}_FILE", str(tmp_path / "absent"))
    with pytest.raises(StorageError, match=f"^{PASSWORD_VARIABLE}_FILE: found .*absent"):
        with_password(url)


def test_the_command_for_other_workers_is_one_that_works(tmp_path, monkeypatch):
    """Without the password of the URL, and with what it takes to open the same database."""
    given = "postgresql+psycopg://me:secret@127.0.0.1:9/a b?connect_timeout=9"
    said = CliRunner().invoke(main, ["compare", *COMMAND, "--storage", given, "--output", str(tmp_path)]).stderr
    line = next(line for line in said.splitlines() if "To add a worker" in line)
    assert f"and the password in {PASSWORD_VARIABLE}: " in line
    words = shlex.split(line.partition(": manifold-nets ")[2])
    monkeypatch.setenv(PASSWORD_VARIABLE, "secret")
    assert make_url(with_password(words[words.index("--storage") + 1])) == make_url(given)
