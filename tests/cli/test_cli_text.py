"""What the command line shows: names as they are, lines that stay lines, and an output that takes no more."""

from __future__ import annotations

import inspect
import io
import logging
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from helpers.cli_cases import NETS, SHAPE
from rich.console import Console

from manifold_nets.cli import main, output
from manifold_nets.comparison import Progress, RunKey
from manifold_nets.comparison import scheduler as shown
from manifold_nets.comparison.results import EpochRecord, RunResult

NAMED = """
from torch import nn

NAME = "bn [/red] [bold]x :smile:"

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.add_module(NAME, nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)))

    def forward(self, x):
        return self._modules[NAME](x)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "nets.py").write_text(NETS)
    (tmp_path / "named[red].py").write_text(NAMED)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments), prog_name="manifold-nets")


def test_names_are_shown_as_they_are(folder: Path) -> None:
    """A file, a module and a row whose names look like rich's markup, or like the name of an emoji."""
    rates = ("--optimizer", "sgd", "--lr", "0.1")
    result = run("diagnose", "named[red].py:Named", *SHAPE, "--html", "a[red]b.html", *rates)
    assert result.exit_code == 0, result.output
    assert result.stdout.count("bn [/red] [bold]x :smile:.0.weight") == 3
    assert "The page is in a[red]b.html." in result.stdout
    result = run("convert", "named[red].py:Named", *SHAPE, "--output", "a[red]b.safetensors")
    assert result.exit_code == 0, result.output
    assert "bn [/red] [bold]x :smile:.0.weight" in result.stdout
    assert "a[red]b.safetensors" in result.stdout
    result = run("export", "named[red].py:Named", *SHAPE, "--output", "[q].safetensors")
    assert result.stdout.startswith("named[red].py:Named as safetensors\n")
    assert "[q].safetensors" in result.stdout


def test_the_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=file, force_terminal=True, width=200))
    epoch = EpochRecord(1, 1, 1.0, 0.1, 0.1, 0.25, 1.0, ())
    best = RunResult(RunKey("my[/red]own", 0.1, 0), "finished", (), (epoch,), 1, None, None, 0.0, "")
    with shown.shown_progress(True) as show:
        show(Progress(1, 2, (), 60.0, best, best))
    assert "25.00 % (my[/red]own, learning rate 0.1, seed 0)" in file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_shows_the_stage_and_the_elapsed_time(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(output, "_console", lambda **_: Console(file=file, force_terminal=terminal, width=200))
    logger = logging.getLogger("manifold_nets.symmetry")
    with output.progress("Diagnosing a[red]b …"):
        logging.getLogger("manifold_nets.symmetry.diagnose").info("tracing")
    assert (
        "Diagnosing a[red]b … tracing 0:00:00" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", file.getvalue())
    ) == terminal
    assert (logger.handlers, logger.level) == ([], logging.NOTSET)


def test_in_a_file_a_line_stays_a_line(folder: Path) -> None:
    name = "long" * 100
    (folder / "long.py").write_text(NAMED.replace("bn [/red] [bold]x :smile:", name))
    lines = run("convert", "long.py:Named", *SHAPE, "--output", f"{'x' * 200}.safetensors").stdout.splitlines()
    (row,) = (line for line in lines if name in line)
    assert row.split()[:2] == [f"{name}.0.weight", "sphere"]
    assert any("x" * 200 in line for line in lines)


class Full(io.RawIOBase):
    """A disk without room."""

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        raise OSError(28, "No space left on device")


SAID = "error: standard output: No space left on device; the result is not complete. Free disk space, or redirect it.\n"


def test_a_full_disk_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with monkeypatch.context() as context:
        context.setattr(sys, "stdout", io.TextIOWrapper(io.BufferedWriter(Full())))
        with pytest.raises(click.exceptions.Exit) as ended:
            output.show("a result")
        sys.stdout.flush()  # as Python does when it ends
        sys.stdout.close()
    assert (ended.value.exit_code, capsys.readouterr().err) == (1, SAID)


@pytest.mark.slow
@pytest.mark.parametrize("form", [(), ("--json",)])
def test_a_process_whose_disk_is_full_says_nothing_else(folder: Path, form: tuple[str, ...]) -> None:
    program = f"{inspect.getsource(Full)}sys.stdout = io.TextIOWrapper(io.BufferedWriter(Full()))\n"
    program = f"import io, sys\nfrom typing import Any\nfrom manifold_nets.cli import main\n{program}main()\n"
    arguments = [sys.executable, "-c", program, "diagnose", "nets.py:Net", *SHAPE, *form]
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, SAID)
