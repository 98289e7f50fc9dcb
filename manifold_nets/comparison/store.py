"""The runs of a comparison as rows of a database: each is claimed, carried out and recorded once.

A run is waiting, running, done (its result is stored) or failed (it was given up); only done ones count. Every process
that starts adds a waiting row for every run without a row in another state. A result depends only on its run, so it
does no harm if two processes carry out the same run: the first recorded result counts.

This module needs SQLAlchemy, so import it only where it is used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.dialects.mysql import MEDIUMTEXT
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from manifold_nets.comparison.database_url import redacted, with_password, without_secrets
from manifold_nets.comparison.errors import DifferentCommandError, RecordError, StorageError
from manifold_nets.comparison.json_records import JsonRecord
from manifold_nets.comparison.results import Environment, RunResult
from manifold_nets.comparison.settings import RunKey, Settings
from manifold_nets.documents import crc32

Record = TypeVar("Record", bound=JsonRecord)
Options = ParamSpec("Options")
Found = TypeVar("Found")

# A run whose heartbeat has not changed for this long belongs to a process that has ended.
GRACE_SECONDS = 120.0
# A server that restarts, or a network that fails, is waited for, with a new attempt every few seconds.
PATIENCE_SECONDS = 600.0
RETRY_SECONDS = 2.0
_RESTORE = "Free disk space, restore the file from a copy, or run the comparison into an empty folder."
_SAME_VERSIONS = ("manifold_nets", "torch")
# How a commit to an SQLite file reaches the disk. Only results need to: a power cut that takes a waiting or a claimed
# run has no result to take.
_SYNCHRONOUS = {False: "NORMAL", True: "FULL"}

_TABLES = sa.MetaData()
_LONG = sa.Text().with_variant(MEDIUMTEXT(), "mysql", "mariadb")  # MySQL's TEXT ends at 65,535 bytes
_STUDIES = sa.Table(
    "manifold_nets_studies",
    _TABLES,
    sa.Column("name", sa.String(255), primary_key=True),
    *(sa.Column(name, _LONG) for name in ("settings", "environment")),
)
_RUNS = sa.Table(
    "manifold_nets_runs",
    _TABLES,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study", sa.String(255), index=True),
    sa.Column("state", sa.String(16)),
    sa.Column("heartbeat", sa.Integer),
    *(sa.Column(name, _LONG) for name in ("key", "result", "test")),
)
_UNFINISHED = ("waiting", "running")


class _AwayError(StorageError):
    """The server of the database cannot be reached, or has closed the connection."""


def _patient(
    method: Callable[Concatenate[RunStore, Options], Found],
) -> Callable[Concatenate[RunStore, Options], Found]:
    """Repeat a method until the server of the database is back; to do it twice does no harm."""

    @functools.wraps(method)
    def repeated(store: RunStore, /, *args: Options.args, **kwargs: Options.kwargs) -> Found:
        end = None
        while True:
            try:
                return method(store, *args, **kwargs)
            except _AwayError:
                now = time.monotonic()
                end = now + PATIENCE_SECONDS if end is None else end
                if now >= end:
                    raise
                # No heartbeat could change meanwhile.
                store._heartbeats.clear()
                time.sleep(RETRY_SECONDS)

    return repeated


class RunStore:
    """The study of one comparison, with its runs, in a database.

    Args:
        url: SQLAlchemy URL of the database: ``sqlite:///runs.db``, ``postgresql://…``, ``mysql://…``.
        study: name of the study in the database.

    Raises:
        StorageError: the database cannot be opened.
    """

    def __init__(self, url: str, study: str) -> None:
        self.url, self.study = url, study
        self._engine, self._in_file = _open(url)
        self._waiting: deque[tuple[int, RunKey]] = deque()
        self._taken: set[int] = set()
        self._heartbeats: dict[int, tuple[Any, float]] = {}
        self._copy_optuna_study()

    @_patient
    def create(self, settings: Settings, environment: Environment) -> Settings:
        """Create the study, or continue an existing one.

        Returns:
            Its settings: these, or those that they extend; see `extend`.

        Raises:
            DifferentCommandError: the study belongs to another comparison or to other package versions.
        """
        values = {"settings": settings.to_json(sort_keys=True), "environment": environment.to_json()}
        with self._transaction() as connection:
            if self._study(connection) is None:
                if self._rows(connection, _RUNS.c.id):
                    raise self._damaged("runs without their study")
                with contextlib.suppress(IntegrityError):  # another process made it at this moment
                    connection.execute(sa.insert(_STUDIES).values(name=self.study, **values))
                    return settings
        there, here, stored = dict(self.environment().versions), dict(environment.versions), self.settings()
        versions = [name for name in _SAME_VERSIONS if there.get(name) != here[name]]
        differences = [f"{name} is {there.get(name)} there and {here.get(name)} here" for name in versions]
        differences[:0] = settings.differences(stored)
        if differences:
            raise DifferentCommandError(self._place, differences)
        return stored

    @_patient
    def extend(self, settings: Settings) -> None:
        """Replace the settings of the study by settings with at least its runs."""
        this, text = _STUDIES.c.name == self.study, settings.to_json(sort_keys=True)
        with self._transaction() as connection:
            connection.execute(sa.update(_STUDIES).where(this).values(settings=text))

    def settings(self) -> Settings:
        """The settings of the study.

        Raises:
            StorageError: the database has no such study.
        """
        return self._read(Settings, self._study_or_error().settings)

    def environment(self) -> Environment:
        """The environment in which the study was created."""
        return self._read(Environment, self._study_or_error().environment)

    @_patient
    def add_missing(self, keys: Iterable[RunKey]) -> None:
        """Add a waiting row for every run that has no waiting, running or done row."""
        with self._transaction() as connection:
            live = {row.key for row in self._rows(connection, _RUNS.c.key, states=(*_UNFINISHED, "done"))}
            new = [key for key in map(_key_json, keys) if key not in live]
            if new:
                row = {"study": self.study, "state": "waiting", "heartbeat": 0}
                connection.execute(sa.insert(_RUNS), [{**row, "key": key} for key in new])

    @_patient
    def claim(self, *, alone: bool = False, among: Collection[RunKey] | None = None) -> tuple[int, RunKey] | None:
        """Claim the next waiting run; return its id and key, or None if there is none.

        Args:
            alone: no other process works on the study, so running states need not be stored.
            among: claim only these runs; an extended study has others.
        """
        if not self._waiting:
            with self._transaction() as connection:
                rows = self._rows(connection, _RUNS.c.id, _RUNS.c.key, states=("waiting",))
            found = [(row.id, self._read(RunKey, row.key)) for row in rows if row.id not in self._taken]
            self._waiting.extend((run_id, key) for run_id, key in found if among is None or key in among)
        while self._waiting:
            run_id, key = self._waiting.popleft()
            if alone or self._change([run_id], ("waiting",), state="running"):
                self._taken.add(run_id)
                return run_id, key
        return None

    @_patient
    def finish(self, run_id: int, result: RunResult) -> None:
        """Store the result of a claimed run; does nothing if another process has marked it as failed."""
        self._change([run_id], _UNFINISHED, durable=True, state="done", result=result.to_json())

    def mark_failed(self, run_ids: Iterable[int]) -> None:
        """Mark claimed runs as failed; `add_missing` adds them again."""
        self._change(list(run_ids), _UNFINISHED, state="failed")

    @_patient
    def heartbeat(self, run_ids: Iterable[int]) -> None:
        """Signal that claimed runs are in progress; call it every half minute."""
        self._change(list(run_ids), ("running",), heartbeat=_RUNS.c.heartbeat + 1)

    def mark_stale_failed(self, now: float | None = None) -> int:
        """Mark runs as failed whose heartbeat has not changed for two minutes; return their number.

        Only this process's own clock is used, so the clocks of machines need not agree.
        """
        running = self.running()
        now = time.monotonic() if now is None else now
        for run_id, beat in running.items():
            if self._heartbeats.get(run_id, (None,))[0] != beat:
                self._heartbeats[run_id] = beat, now
        stale = [run_id for run_id in running if now - self._heartbeats[run_id][1] > GRACE_SECONDS]
        self.mark_failed(stale)
        return len(stale)

    @_patient
    def running(self) -> dict[int, Any]:
        """The heartbeat of every run that is marked as running, by id."""
        with self._transaction() as connection:
            rows = self._rows(connection, _RUNS.c.id, _RUNS.c.heartbeat, states=("running",))
        return {row.id: row.heartbeat for row in rows}

    @_patient
    def results(self) -> dict[RunKey, RunResult]:
        """All stored results, the first of each run."""
        found: dict[RunKey, RunResult] = {}
        with self._transaction() as connection:
            rows = self._rows(connection, _RUNS.c.key, _RUNS.c.result, states=("done",))
        for row in rows:
            result = self._read(RunResult, row.result)
            if _key_json(result.key) != row.key:
                raise self._damaged(f"the result of {result.key} for the run {row.key}")
            found.setdefault(result.key, result)
        return found

    @_patient
    def count_done(self, among: Iterable[RunKey] | None = None) -> int:
        """How many runs have a result: of some, or of all."""
        with self._transaction() as connection:
            found = {row.key for row in self._rows(connection, _RUNS.c.key, states=("done",))}
        return len(found if among is None else found.intersection(map(_key_json, among)))

    @_patient
    def record_test(self, key: RunKey, error: float, loss: float) -> None:
        """Store the test error and test loss of a chosen run."""
        scores = json.dumps([error, loss, _checksum(key, error, loss)])
        with self._transaction(durable=True) as connection:
            these = (_RUNS.c.study == self.study) & (_RUNS.c.key == _key_json(key)) & (_RUNS.c.state == "done")
            connection.execute(sa.update(_RUNS).where(these).values(test=scores))

    @_patient
    def tests(self, keys: Collection[RunKey]) -> dict[RunKey, tuple[float, float]]:
        """The stored test errors and test losses of some runs."""
        with self._transaction() as connection:
            rows = self._rows(connection, _RUNS.c.key, _RUNS.c.test, states=("done",))
        stored = {row.key: row.test for row in rows if row.test is not None}
        return {key: self._scores(key, stored[_key_json(key)]) for key in keys if _key_json(key) in stored}

    def close(self) -> None:
        """Close the connections to the database."""
        self._engine.dispose()

    # ---- the database ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[sa.Connection]:
        """A transaction in which any error of a damaged, lost or full database becomes a `StorageError`.

        Args:
            durable: flush the commit to disk, and with it all earlier ones, which are in the same log.
        """
        try:
            with self._engine.begin() as connection:
                if self._in_file:
                    connection.exec_driver_sql(f"PRAGMA synchronous={_SYNCHRONOUS[durable]}")
                yield connection
        except StorageError:
            raise
        except Exception as error:  # noqa: BLE001  drivers raise what they like
            found = f"{type(error).__name__}: {without_secrets(error.__cause__ or error, with_password(self.url))}"
            expected = "a database that can be read and written"
            # Without a statement it failed to connect or to commit.
            is_away = isinstance(error, OperationalError) and (error.connection_invalidated or error.statement is None)
            if is_away and not self._in_file:
                remedy = "Start its server; the same command goes on from what is stored."
                raise _AwayError(self._place, found, expected, remedy) from None
            raise StorageError(self._place, found, expected, _RESTORE) from None

    def _rows(
        self, connection: sa.Connection, *columns: sa.Column[Any], states: Sequence[str] | None = None
    ) -> list[Any]:
        """Columns of the runs of the study in the order of their ids, of those in some states."""
        query = sa.select(*columns).where(_RUNS.c.study == self.study).order_by(_RUNS.c.id)
        return list(connection.execute(query if states is None else query.where(_RUNS.c.state.in_(states))))

    def _change(self, run_ids: list[int], states: Sequence[str], *, durable: bool = False, **values: Any) -> int:
        """Change those of the given runs that are in the given states; return their number."""
        if not run_ids:
            return 0
        with self._transaction(durable=durable) as connection:
            these = _RUNS.c.id.in_(run_ids) & _RUNS.c.state.in_(states)
            return connection.execute(sa.update(_RUNS).where(these).values(**values)).rowcount

    def _study(self, connection: sa.Connection) -> Any:
        return connection.execute(sa.select(_STUDIES).where(_STUDIES.c.name == self.study)).one_or_none()

    @_patient
    def _study_or_error(self) -> Any:
        with self._transaction() as connection:
            found = self._study(connection)
        if found is None:
            remedy = "Correct the name (--worker), or the URL (--storage)."
            raise StorageError(self._place, "no such study", "a study that a comparison has created", remedy)
        return found

    @property
    def _place(self) -> str:
        return f"study {self.study} in {redacted(self.url)}"

    def _read(self, kind: type[Record], stored: object) -> Record:
        try:
            return kind.from_json(str(stored))
        except RecordError as error:
            raise self._damaged(f"an entry that cannot be read ({error})") from error

    def _scores(self, key: RunKey, stored: str) -> tuple[float, float]:
        with contextlib.suppress(ValueError, TypeError):
            match json.loads(stored):
                # Older studies have no checksum.
                case [int() | float() as error, int() | float() as loss, *more] if not more or more == [
                    _checksum(key, error, loss)
                ]:
                    return float(error), float(loss)
        raise self._damaged(f"test scores {stored!r} of {key}")

    def _damaged(self, found: str) -> StorageError:
        return StorageError(self._place, found, "the data that a comparison stored", _RESTORE)

    def _copy_optuna_study(self) -> None:
        """Copy the results of a study in Optuna's tables, which earlier versions used."""
        with self._transaction() as connection:
            if not sa.inspect(connection).has_table("trial_user_attributes") or self._study(connection) is not None:
                return
            study = {row.key: row.value_json for row in connection.execute(_OPTUNA_STUDY, {"study": self.study})}
            if "settings" not in study:
                return
            texts = {name: json.loads(study[name]) for name in ("settings", "environment")}
            connection.execute(sa.insert(_STUDIES).values(name=self.study, **texts))
            trials: dict[int, dict[str, str]] = {}
            for row in connection.execute(_OPTUNA_TRIALS, {"study": self.study}):
                trials.setdefault(row.trial_id, {})[row.key] = json.loads(row.value_json)
            for trial in trials.values():
                key, count = trial["key"], sum(name.startswith("result-") for name in trial)
                result = "".join(trial[f"result-{i}"] for i in range(count))
                done = {"study": self.study, "key": key, "state": "done", "test": study.get(f"test {key}")}
                connection.execute(sa.insert(_RUNS).values(**done, result=result))


_OPTUNA_STUDY = sa.text(
    "SELECT a.* FROM study_user_attributes a JOIN studies s USING (study_id) WHERE s.study_name = :study ORDER BY 1"
)
_OPTUNA_TRIALS = sa.text(
    "SELECT a.* FROM trial_user_attributes a JOIN trials t USING (trial_id) JOIN studies s USING (study_id) "
    "WHERE s.study_name = :study AND t.state = 'COMPLETE' ORDER BY 1"
)


def _key_json(key: RunKey) -> str:
    return json.dumps(key.to_dict(), sort_keys=True)


def _checksum(key: RunKey, error: float, loss: float) -> str:
    return f"crc32:{crc32({'key': key.to_dict(), 'scores': [error, loss]}):08x}"


def _open(url: str) -> tuple[sa.Engine, bool]:
    """The database with its tables, and whether it is an SQLite file."""
    whole, remedy = with_password(url), "Correct the URL (--storage)."
    try:
        file = sa.make_url(url).database if url.startswith("sqlite") else None
        in_file = file not in (None, "", ":memory:")
        if in_file:
            remedy = _RESTORE if Path(str(file)).parent.is_dir() else remedy
            # Readers do not wait for writers, and commits are appended to one log. The file remembers it.
            with contextlib.closing(sqlite3.connect(str(file))) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(" ".join(state.split()))
        engine = sa.create_engine(whole, **({"connect_args": {"timeout": 120}} if in_file else {}))
        try:
            _TABLES.create_all(engine)
        except DBAPIError:  # another process may have been making them at this moment
            _TABLES.create_all(engine)
    except Exception as error:  # noqa: BLE001  drivers raise what they like
        # They quote the URL with its password.
        expected = "a database that opens, such as postgresql://USER@HOST/NAME, and its driver installed"
        raise StorageError(redacted(url), without_secrets(error, whole), expected, remedy) from None
    return engine, in_file
