"""How a command ends: its result on standard output, what went wrong on standard error, and the exit status."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import RenderableType

from manifold_nets.errors import ManifoldNetsError, ModelExitError

from .options import Request
from .render import complain, put_out, show

__all__ = ["Outcome", "reported", "running_code_of"]


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
    failures: tuple[str, ...] = field(default=())


def reported(body: Callable[..., Outcome]) -> Callable[..., None]:
    """Make a command's callback of a function that returns an `Outcome`, and add the option ``--json``."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document to standard output.")
    @functools.wraps(body)
    def callback(request: Request, *, as_json: bool, **options: Any) -> None:
        head = {"command": body.__name__, "model": str(request.spec)}
        try:
            with running_code_of(str(request.spec)):
                outcome = body(request, **options)
        except (ManifoldNetsError, OSError) as error:
            if as_json:
                _write({**head, "ok": False, "failures": [str(error)], "error": type(error).__name__})
            complain(str(error))
            raise click.exceptions.Exit(1) from error
        if as_json:
            _write({**head, "ok": not outcome.failures, "failures": list(outcome.failures), **outcome.document})
        else:
            show(*outcome.shown)
        for failure in outcome.failures:
            complain(failure)
        if outcome.failures:
            raise click.exceptions.Exit(1)

    return callback


@contextlib.contextmanager
def running_code_of(name: str) -> Iterator[None]:
    """Keep a user's code from speaking for the command, while a block runs it.

    What it prints goes to standard error, since standard output is for the result alone, and where it asks for the end
    of the program, that is an error of this code, and not the exit status of the command.

    Args:
        name: what the code belongs to, as written on the command line.

    Raises:
        ModelExitError: the block raised SystemExit.
    """
    with contextlib.redirect_stdout(sys.stderr):
        try:
            yield
        except SystemExit as error:
            raise ModelExitError(name, error) from error


def _write(document: dict[str, Any]) -> None:
    put_out(json.dumps(_finite(document), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: Any) -> Any:
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
