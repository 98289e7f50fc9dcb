"""The runs of a comparison as trials of an Optuna study: each is claimed, carried out and recorded once.

A trial waits, runs, and is complete when its result has been stored, or failed when it was given up; only complete ones
count. Whoever starts adds a waiting trial for every run that has no other. A result follows from its run alone, so it
does no harm if two processes carry out the same one: the first to be recorded counts.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import math
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from manifold_nets.comparison.errors import DifferentCommandError, RecordError, StorageError
from manifold_nets.comparison.plain import PlainRecord
from manifold_nets.comparison.records import Environment, RunKey, RunResult, Settings
from manifold_nets.comparison.storage import completed, redacted, without_secrets
from manifold_nets.documents import crc32
from manifold_nets.errors import MissingExtraError

if TYPE_CHECKING:
    from optuna.storages import RDBStorage
    from optuna.trial import FrozenTrial

__all__ = ["RunQueue"]

Record = TypeVar("Record", bound=PlainRecord)

# The text columns of MySQL hold 65,535 bytes.
CHUNK = 30_000
# A beat that has not changed for so long is that of a process that has ended.
GRACE_SECONDS = 120.0
_RESTORE = "Make room, restore the file from a copy, or run the comparison into an empty folder."
_SAME_VERSIONS = ("manifold_nets", "torch")


class RunQueue:
    """The study of one comparison in a database.

    Args:
        url: of the database, as SQLAlchemy writes it: ``sqlite:///runs.db``, ``postgresql://…``, ``mysql://…``.
        study: name of the study in the database.

    Raises:
        StorageError: the database cannot be opened.
        MissingExtraError: Optuna is not installed.
    """

    def __init__(self, url: str, study: str) -> None:
        self._storage = _Guarded(_open(url), f"study {study} in {redacted(url)}", completed(url))
        self.url, self.study = url, study
        self._waiting: deque[tuple[int, RunKey]] = deque()
        self._taken: set[int] = set()
        self._beats: dict[int, tuple[Any, float]] = {}
        self._study = -1

    def create(self, settings: Settings, environment: Environment) -> Settings:
        """Make the study, or go on with the one that is there.

        Returns:
            Its settings: these, or some of which these are an extension; see `extend`.

        Raises:
            DifferentCommandError: it is that of another command, or of other versions.
        """
        from optuna.exceptions import DuplicatedStudyError
        from optuna.study import StudyDirection

        try:
            with _quiet():
                self._study = self._storage.create_new_study([StudyDirection.MINIMIZE], self.study)
        except DuplicatedStudyError:
            # The database also answers so where rows of a study are there without the study itself.
            self._study = self._number(self._damaged("rows of a study that is not there"))
        attributes = self._storage.get_study_user_attrs(self._study)
        if "settings" not in attributes:
            # Whoever makes a study stores its settings first, perhaps at this moment.
            if self._trials() and "settings" not in self._storage.get_study_user_attrs(self._study):
                raise self._damaged("runs without the settings that they belong to")
            self._storage.set_study_user_attr(self._study, "environment", environment.to_json())
            self.extend(settings)
            return settings
        there, here = dict(self.environment().versions), dict(environment.versions)
        stored = self.settings()
        differences = [
            *settings.differences(stored),
            *(f"{n} is {there.get(n)} there and {here.get(n)} here" for n in _SAME_VERSIONS if there.get(n) != here[n]),
        ]
        if differences:
            raise DifferentCommandError(self._place(), differences)
        return stored

    def extend(self, settings: Settings) -> None:
        """Let the study have these settings, which have at least its runs."""
        self._storage.set_study_user_attr(self._study, "settings", settings.to_json(sort_keys=True))

    def join(self) -> None:
        """Take part in a study that another process made.

        Raises:
            StorageError: the database has no such study.
        """
        remedy = "Correct the name (--worker), or the URL (--storage)."
        missing = StorageError(self._place(), "no such study", "one that a comparison has made", remedy)
        self._study = self._number(missing)
        if "settings" not in self._storage.get_study_user_attrs(self._study):
            raise missing

    def settings(self) -> Settings:
        """The settings of the study."""
        return self._read(Settings, self._storage.get_study_user_attrs(self._study).get("settings"))

    def environment(self) -> Environment:
        """Where the study was made."""
        return self._read(Environment, self._storage.get_study_user_attrs(self._study).get("environment"))

    def fill(self, keys: Iterable[RunKey]) -> None:
        """Add a waiting trial for every run that has none, nor a running or complete one."""
        from optuna.trial import TrialState, create_trial

        live = {_key_text(trial) for trial in self._trials() if trial.state is not TrialState.FAIL}
        for key in keys:
            if _text(key) not in live:
                # Without parameters, whose choices no study can extend.
                template = create_trial(state=TrialState.WAITING, user_attrs={"key": _text(key)})
                self._storage.create_new_trial(self._study, template)

    def claim(self, *, alone: bool = False, among: Collection[RunKey] | None = None) -> tuple[int, RunKey] | None:
        """Take the next waiting run, if there is one that no other process takes first.

        Args:
            alone: no other process works on the study: the database need not know which runs are in flight.
            among: take no others, such as those that an extended study has.
        """
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        if not self._waiting:
            waiting = self._trials((TrialState.WAITING,))
            found = ((t._trial_id, self._read(RunKey, _key_text(t))) for t in waiting if t._trial_id not in self._taken)
            self._waiting.extend((ticket, key) for ticket, key in found if among is None or key in among)
        while self._waiting:
            ticket, key = self._waiting.popleft()
            try:
                if alone or self._storage.set_trial_state_values(ticket, state=TrialState.RUNNING):
                    self._taken.add(ticket)
                    return ticket, key
            except UpdateFinishedTrialError:
                continue
        return None

    def finish(self, ticket: int, result: RunResult) -> None:
        """Store the result of a claimed run; nothing happens where another process has given the run up meanwhile."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        text = result.to_json()
        error = result.validation_error
        try:
            for number, start in enumerate(range(0, len(text), CHUNK)):
                self._storage.set_trial_user_attr(ticket, f"result-{number}", text[start : start + CHUNK])
            values = [math.inf if error is None else error]
            with _flushed():
                self._storage.set_trial_state_values(ticket, state=TrialState.COMPLETE, values=values)
        except UpdateFinishedTrialError:
            return

    def give_up(self, ticket: int) -> None:
        """Mark a claimed run as one that has no result; `fill` adds it again."""
        from optuna.exceptions import UpdateFinishedTrialError
        from optuna.trial import TrialState

        try:
            self._storage.set_trial_state_values(ticket, state=TrialState.FAIL)
        except UpdateFinishedTrialError:
            return

    def give_up_all(self) -> None:
        """Give up all claimed runs: for a process that knows that no other works on the study."""
        for ticket in self._running():
            self.give_up(ticket)

    def beat(self, tickets: Iterable[int]) -> None:
        """Show that claimed runs are being worked on; do so every half minute."""
        from optuna.exceptions import UpdateFinishedTrialError

        for ticket in tickets:
            try:
                self._storage.set_trial_user_attr(ticket, "beat", time.time())
            except UpdateFinishedTrialError:
                continue

    def give_up_stale(self, now: float | None = None) -> int:
        """Give up the runs whose beat this process has seen unchanged for two minutes; return how many.

        Only differences of this process's own clock are taken, so that the clocks of machines need not agree.
        """
        now = time.monotonic() if now is None else now
        running = self._running()
        self._beats = {ticket: seen for ticket, seen in self._beats.items() if ticket in running}
        stale = 0
        for ticket, beat in running.items():
            last, since = self._beats.get(ticket, (None, now))
            if ticket not in self._beats or beat != last:
                self._beats[ticket] = beat, now
            elif now - since > GRACE_SECONDS:
                self.give_up(ticket)
                stale += 1
        return stale

    def results(self) -> dict[RunKey, RunResult]:
        """All stored results, the first of each run."""
        from optuna.trial import TrialState

        found: dict[RunKey, RunResult] = {}
        for trial in self._trials((TrialState.COMPLETE,)):
            count = sum(str(name).startswith("result-") for name in trial.user_attrs)
            chunks = [trial.user_attrs.get(f"result-{number}") for number in range(count)]
            result = self._read(RunResult, "".join(map(str, chunks)))
            if _text(result.key) != _key_text(trial):
                raise self._damaged(f"the result of {result.key} for the run {_key_text(trial)}")
            found.setdefault(result.key, result)
        return found

    def done(self, among: Iterable[RunKey] | None = None) -> int:
        """How many runs have a result: of some, or of all."""
        from optuna.trial import TrialState

        found = {_key_text(trial) for trial in self._trials((TrialState.COMPLETE,))}
        return len(found if among is None else found.intersection(map(_text, among)))

    def record_test(self, key: RunKey, error: float, loss: float) -> None:
        """Store what a chosen run has found on the test data."""
        with _flushed():
            scores = [error, loss, _checksum(key, error, loss)]
            self._storage.set_study_user_attr(self._study, f"test {_text(key)}", scores)

    def tests(self, keys: Sequence[RunKey]) -> dict[RunKey, tuple[float, float]]:
        """What has been stored of the test data."""
        attributes = self._storage.get_study_user_attrs(self._study)
        found = {}
        for key in keys:
            stored = attributes.get(f"test {_text(key)}")
            match stored:
                # Older studies have no checksum.
                case [int() | float() as error, int() | float() as loss, *more] if not more or more == [
                    _checksum(key, error, loss)
                ]:
                    found[key] = float(error), float(loss)
                case None:
                    continue
                case _:
                    raise self._damaged(f"test scores {stored!r} of {key}")
        return found

    def close(self) -> None:
        """Let go of the database."""
        self._storage.remove_session()
        self._storage.engine.dispose()

    def _number(self, missing: StorageError) -> int:
        """The number of the study in the database."""
        try:
            number: int = self._storage.get_study_id_from_name(self.study)
        except KeyError:
            raise missing from None
        return number

    def _place(self) -> str:
        return f"study {self.study} in {redacted(self.url)}"

    def _read(self, kind: type[Record], text: object) -> Record:
        try:
            return kind.from_json(str(text))
        except RecordError as error:
            raise self._damaged(f"an entry that cannot be read ({error})") from error

    def _damaged(self, found: str) -> StorageError:
        return StorageError(self._place(), found, "what a comparison has stored", _RESTORE)

    def _running(self) -> dict[int, Any]:
        from optuna.trial import TrialState

        return {trial._trial_id: trial.user_attrs.get("beat") for trial in self._trials((TrialState.RUNNING,))}

    def _trials(self, states: tuple[Any, ...] | None = None) -> list[FrozenTrial]:
        trials: list[FrozenTrial] = self._storage.get_all_trials(self._study, deepcopy=False, states=states)
        return trials


def _text(key: RunKey) -> str:
    return json.dumps(key.to_dict(), sort_keys=True)


def _key_text(trial: FrozenTrial) -> str:
    return str(trial.user_attrs.get("key"))


def _checksum(key: RunKey, error: float, loss: float) -> str:
    return f"crc32:{crc32({'key': key.to_dict(), 'scores': [error, loss]}):08x}"


class _Guarded:
    """Optuna's storage, in which whatever a damaged, lost or full database leads to is a `StorageError`."""

    def __init__(self, storage: RDBStorage, place: str, url: str) -> None:
        self._storage, self._place, self._url = storage, place, url

    def __getattr__(self, name: str) -> Any:
        from optuna.exceptions import DuplicatedStudyError, UpdateFinishedTrialError

        inner = getattr(self._storage, name)
        if not callable(inner):
            return inner
        meant: tuple[type[Exception], ...] = (DuplicatedStudyError, UpdateFinishedTrialError)
        if name == "get_study_id_from_name":
            meant += (KeyError,)

        @functools.wraps(inner)
        def guarded(*arguments: Any, **options: Any) -> Any:
            try:
                return inner(*arguments, **options)
            except meant:
                raise
            except Exception as error:  # noqa: BLE001  drivers raise what they like
                found = f"{type(error).__name__}: {without_secrets(error.__cause__ or error, self._url)}"
                raise StorageError(self._place, found, "a database that can be read and written", _RESTORE) from None

        return guarded


def _open(url: str) -> RDBStorage:
    try:
        from optuna.storages import RDBStorage
        from sqlalchemy import event, make_url
    except ModuleNotFoundError as error:
        raise MissingExtraError("Optuna", "comparisons", "compare") from error
    whole, remedy = completed(url), "Correct the URL (--storage)."
    try:
        file = make_url(url).database if url.startswith("sqlite") else None
        in_file = file not in (None, "", ":memory:")
        if in_file:
            remedy = _RESTORE if Path(str(file)).parent.is_dir() else remedy
            # Readers do not wait for writers, and commits are appended to one log. The file remembers it.
            with contextlib.closing(sqlite3.connect(str(file))) as connection:
                connection.execute("PRAGMA journal_mode=WAL")
                (state,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
                if state != "ok":
                    raise sqlite3.DatabaseError(" ".join(state.split()))
        with _quiet():
            storage = RDBStorage(whole, engine_kwargs={"connect_args": {"timeout": 120}} if in_file else None)
    except Exception as error:  # noqa: BLE001  drivers raise what they like
        # They quote the URL with its password.
        expected = "a database that opens, such as postgresql://USER@HOST/NAME, and its driver installed"
        raise StorageError(redacted(url), without_secrets(error, whole), expected, remedy) from None
    if in_file:
        event.listen(storage.engine, "checkout", _set_durability)
    return storage


_flushing = threading.local()


def _set_durability(connection: sqlite3.Connection, *_: object) -> None:
    """Of the commits of a connection that is about to be used."""
    connection.execute(f"PRAGMA synchronous={'FULL' if getattr(_flushing, 'now', False) else 'NORMAL'}")


@contextmanager
def _flushed() -> Iterator[None]:
    """Commits to a file that reach the disk, and with them all earlier ones, which are in the same log.

    Others need not: a power cut that takes a waiting or a claimed trial has no result to take.
    """
    _flushing.now = True
    try:
        yield
    finally:
        _flushing.now = False


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces what it makes on standard error."""
    logger = logging.getLogger("optuna")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
