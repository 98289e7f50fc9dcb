"""The output of a command: its result on standard output, progress and errors on standard error, exit status."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from manifold_nets.documents import without_infinities
from manifold_nets.errors import ManifoldNetsError, ModelBuildError, described

from .options import Request

# Output to a file is never wrapped: a row of a table stays one line, however long.
_FILE_WIDTH = 100_000

_COLORS = {
    "green": ("invariant", "constrained", "sphere", "already", "remove", "balance", "joint sphere"),
    "yellow": ("not invariant", "no evidence", "leave"),
    "magenta": ("unknown",),
    "bold red": ("disagreement",),
}


@dataclass(frozen=True)
class Outcome:
    """What a command found.

    Args:
        document: the result as plain data, for ``--json``.
        shown: the same for people.
        failures: checks that did not hold; any of them makes the exit status 1.
    """

    document: dict[str, Any]
    shown: tuple[RenderableType, ...]
    failures: tuple[str, ...] = ()


def reported(body: Callable[..., Outcome]) -> Callable[..., None]:
    """Make a command's callback of a function that returns an `Outcome`, and add the option ``--json``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document to standard output.")
    @functools.wraps(body)
    def callback(request: Request, *, as_json: bool, **options: Any) -> None:
        document: dict[str, Any] = {"command": body.__name__, "model": str(request.spec)}
        try:
            with running_code_of(str(request.spec)):
                outcome = body(request, **options)
        except (ManifoldNetsError, OSError) as error:
            outcome = Outcome({"error": type(error).__name__}, (), (str(error),))
        if as_json:
            document |= {"ok": not outcome.failures, "failures": list(outcome.failures), **outcome.document}
            echo(json.dumps(without_infinities(document), indent=2, ensure_ascii=False, allow_nan=False))
        elif outcome.shown:
            show(*outcome.shown)
        for failure in outcome.failures:
            print_error(failure)
        if outcome.failures:
            raise click.exceptions.Exit(1)

    return callback


@contextlib.contextmanager
def running_code_of(name: str) -> Iterator[None]:
    """Keep the output and the exit of a user's code apart from the command's own.

    What the code prints goes to standard error, as standard output is for the result alone. Where it calls
    ``sys.exit``, that is an error of the code and not the exit status of the command.

    Args:
        name: what the code belongs to, as written on the command line.

    Raises:
        ModelBuildError: the block raised SystemExit.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except SystemExit as error:
            found = f"its code raised {described(error)} while it ran"
            raise ModelBuildError(name, found, "Remove its call of sys.exit, exit or quit.") from error


def _console(*, stderr: bool = False) -> Console:
    # Names and paths that look like rich's markup, or like the name of an emoji, are shown as they are.
    console = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _FILE_WIDTH
    return console


def show(*parts: RenderableType) -> None:
    """Print parts of a result to standard output."""
    console = _console()
    if console.is_terminal:
        console.print(*parts, sep="\n")
        return
    with console.capture() as captured:
        console.print(*parts, sep="\n")
    # Tables pad their lines with blanks, which a file need not keep.
    echo("\n".join(line.rstrip() for line in captured.get().splitlines()))


def echo(text: str) -> None:
    """Write to standard output; where that fails, print an error and end the command with status 1."""
    try:
        click.echo(text)
    except BrokenPipeError:
        raise  # click ends quietly where the reader has seen enough
    except OSError as error:
        # Python would try to flush the rest of the buffer at exit, and print a traceback.
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115
        why = error.strerror or error
        print_error(f"standard output: {why}; the result is not complete. Free disk space, or redirect it.")
        raise click.exceptions.Exit(1) from error


def print_error(text: str) -> None:
    """Print what went wrong to standard error."""
    _console(stderr=True).print(Text.assemble(("error: ", "bold red"), text), soft_wrap=True)


@contextlib.contextmanager
def progress(text: str) -> Iterator[None]:
    """Show a text, the stage that the package logs, and the elapsed time on standard error, where it is a terminal."""
    console, logger = _console(stderr=True), logging.getLogger("manifold_nets.symmetry")
    if not console.is_terminal:
        yield
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    bar = Progress(
        SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn(),
        console=console, transient=True,
    )  # fmt: skip
    task, handler, level = bar.add_task(text, total=None), logging.Handler(), logger.level

    def show_stage(record: logging.LogRecord) -> None:
        bar.update(task, description=f"{text} {record.getMessage()}", refresh=True)

    handler.emit = show_stage  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with bar:
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def rows_table(title: str, rows: Mapping[str, object]) -> Table:
    """Tabulate names and values."""
    table = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, f"{value:.2e}" if isinstance(value, float) else str(value))
    return table


def columns_table(*columns: str, title: str | None = None) -> Table:
    """Make an empty table of named columns."""
    table = Table(title=title, title_justify="left", pad_edge=False, box=None, header_style="bold")
    for column in columns:
        # In a narrow window explanations are folded before names are.
        table.add_column(column, overflow="fold", no_wrap=column == "weight")
    return table


def styled(word: str) -> Text:
    """Color a status or an action."""
    return Text(word, style=next((color for color, words in _COLORS.items() if word in words), ""))
