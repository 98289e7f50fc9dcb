"""``manifold-nets compare``: a fair comparison of optimizers, resumed where it stopped."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from manifold_nets.errors import ManifoldNetsError

from .options import OutputFolder, Parsed
from .output import echo, print_error, running_code_of

if TYPE_CHECKING:
    from manifold_nets.comparison import Comparison, Settings

__all__ = ["compare"]

_PASSWORD_VARIABLE = "MANIFOLD_NETS_STORAGE_PASSWORD"


def _listed(name: str, read: Callable[[str], Iterable[Any]], fault: str = "") -> Parsed:
    """A type of option with several values in one string; ``fault`` is the error for a string without any."""

    def parse(text: str) -> tuple[Any, ...]:
        try:
            return tuple(read(text))
        except ValueError:
            raise ValueError(f"{text!r} {fault}") from None

    return Parsed(name, parse)


def _rates(text: str) -> Iterable[float]:
    """``0.01,0.1``, or ``LOW:HIGH:COUNT`` equally spaced in logarithms, to six digits."""
    if ":" not in text:
        return map(float, text.split(","))
    low, high, count = text.split(":")
    first, last, steps = math.log10(float(low)), math.log10(float(high)), int(count) - 1
    if steps < 0 or (steps == 0 and first != last):
        raise ValueError(text)
    return [float(f"{10 ** (first + (last - first) * i / max(steps, 1)):.6g}") for i in range(steps + 1)]


def _counts(form: str) -> Parsed:
    def read(text: str) -> Iterable[int]:
        words = text.split(",")
        if len(words) != len(form.split(",")) or not all(word.strip().isdecimal() for word in words):
            raise ValueError(text)
        return map(int, words)

    return _listed(form, read, f"is invalid; expected {form} as whole numbers")


_NAMES = _listed("NAME,NAME,…", lambda text: filter(None, map(str.strip, text.split(","))))
_RATE_FORMS = "expected positive rates such as 0.01,0.1, or LOW:HIGH:COUNT such as 1e-3:1:7"
_RATES = _listed("LOW:HIGH:COUNT", _rates, f"is no list of learning rates; {_RATE_FORMS}")
_DECAY_FORMS = "expected numbers such as 5e-4, or 0,1e-4,1e-3"
_DECAYS = _listed("A,B,…", lambda text: map(float, text.split(",")), f"is no list of weight decays; {_DECAY_FORMS}")
_COUNT = click.IntRange(min=1)
_SCHEDULES = click.Choice(["constant", "cosine", "bold-driver", "exponential"])
_STARTS = click.Choice(["default", "balanced"])
_STORAGE = f"URL of a database for several machines (PostgreSQL, MySQL); password in {_PASSWORD_VARIABLE}[_FILE]."


@click.command()
@click.option("--task", default="digits", help="digits, mnist, fashion-mnist, idx, or F.py:F.")
@click.option("--model", default="mlp:100,100", help="mlp:…, mlp-plain:…, resnet:…, or any MODEL.")
@click.option("--optimizers", type=_NAMES, default="sgd,adam,rsgd,radam", help="Names, or your own as F.py:CLASS.")
@click.option("--lr", "learning_rates", type=_RATES, default="1e-3:1:7", help="Or A,B,…")
@click.option("--seeds", type=_COUNT, default=5, help="How many.")
@click.option("--epochs", type=_COUNT, default=20, help="Passes over the data.")
@click.option("--batch-size", type=_COUNT, help="Examples per step.  [default: the task's own]")
@click.option("--weight-decay", type=_DECAYS, default="0", help="For plain weights; A,B,… to tune it.")
@click.option("--momentum", type=float, default=0.9, help="For SGD and its variants.")
@click.option("--schedule", type=_SCHEDULES, default="constant", help="Learning rate schedule.")
@click.option(
    "--initialization", type=_STARTS, default="default", help="The model's own, or unit-norm filters and zero biases."
)
@click.option("--early-stop", is_flag=True, help="Stop converged runs, from epoch 25 on.")
@click.option("--subset", type=_counts("TRAIN,VALIDATION"), help="Use only this many examples.")
@click.option(
    "--tune-on", type=_counts("TRAIN,VALIDATION,EPOCHS"), help="Choose learning rates on fewer examples and epochs."
)
@click.option("--tune-seeds", type=_COUNT, help="How many seeds --tune-on uses.  [default: all]")
@click.option("--target-error", type=float, default=0.05, help="Validation error for the time to target.")
@click.option("--initial-scales", type=_NAMES, default="plain", help="plain, rescaled, or both.")
@click.option("--data", type=click.Path(file_okay=False), help="Folder with the data of the task.")
@click.option("--device", default="cpu", help="Device of the runs: cpu, cuda, …")
@click.option("--threads", type=_COUNT, default=1, help="Torch threads per run.")
@click.option("--workers", type=_COUNT, default=1, help="Worker processes.")
@click.option("--output", type=OutputFolder(), metavar="DIR", help="Folder of the runs and the report.")
@click.option("--storage", metavar="URL", help=_STORAGE)
@click.option("--worker", metavar="STUDY", help="Only help to run a study in --storage.")
@click.option("--allow", metavar="F.py:F", multiple=True, help="Code that a worker may run; repeatable.")
@click.option("--report-only", type=OutputFolder(), metavar="DIR", help="Rewrite the report of a finished comparison.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document to standard output.")
@click.pass_context
def compare(context: click.Context, /, *, as_json: bool, **options: Any) -> None:
    """Compare optimizers, each with the same start, data order and number of trials.

    Learning rates are chosen on validation data, then the test data are used once. After an interruption, the same
    command resumes the comparison.
    """
    try:
        with running_code_of(options["worker"] or f"{options['model']} on {options['task']}"):
            finished = _carry_out(options)
        if finished is not None:
            _show(*finished, as_json)
    except (ManifoldNetsError, OSError) as error:
        if as_json:
            failure = {"command": "compare", "ok": False, "failures": [str(error)], "error": type(error).__name__}
            echo(json.dumps(failure, indent=2, ensure_ascii=False))
        print_error(str(error))
        from manifold_nets.comparison.errors import OptimizerNameError, SettingsError, TaskNameError

        usage = isinstance(error, (SettingsError, OptimizerNameError, TaskNameError))
        context.exit(2 if usage else 1)


def _carry_out(options: dict[str, Any]) -> tuple[Comparison, Path] | None:
    """Carry out the command; return the comparison and its folder, or None for a worker."""
    from manifold_nets.comparison import Comparison, join_comparison
    from manifold_nets.comparison.api import compare_settings

    worker, allow, report_only = (options.pop(name) for name in ("worker", "allow", "report_only"))
    output, storage, workers = (options.pop(name) for name in ("output", "storage", "workers"))
    if report_only is not None:
        from manifold_nets.comparison.report import write_report  # it needs an extra

        finished = Comparison.read(report_only)
        write_report(finished, report_only)
        return finished, report_only
    if worker is not None:
        if storage is None:
            raise click.UsageError("--worker needs --storage with the URL of the shared database.")
        allowed = {*allow, options["task"], options["model"], *options["optimizers"]}
        join_comparison(storage, worker, workers=workers, progress=True, allow=allowed)
        return None
    if output is None:
        raise click.UsageError("--output is missing: name a folder for the runs and the report.")
    settings = _settings(options)
    if storage is not None:
        click.echo(f"To add a worker, on any machine with {_worker(settings, storage, output)}", err=True)
    return compare_settings(settings, output, workers=workers, storage=storage, progress=True), output


def _worker(settings: Settings, storage: str, output: Path) -> str:
    """What another machine needs to help, and the command to run there, without any password."""
    from manifold_nets.comparison.api import study_name
    from manifold_nets.comparison.database_url import redacted, with_password
    from manifold_nets.comparison.experiment import foreign_code

    shown = redacted(storage)
    words = ["manifold-nets", "compare", "--worker", study_name(settings, output), "--storage", shown]
    for spec in foreign_code(settings):
        words += ["--allow", spec]
    secret = shown != storage or with_password(storage) != storage
    needed = f"the same packages{f' and the password in {_PASSWORD_VARIABLE}' if secret else ''}"
    return f"{needed}: {shlex.join(words)}"


def _settings(options: dict[str, Any]) -> Settings:
    from manifold_nets.comparison import Settings
    from manifold_nets.comparison.tasks import load_task

    if options["batch_size"] is None:
        options["batch_size"] = load_task(options["task"], data=options["data"]).batch_size
    seeds, decays = tuple(range(options.pop("seeds"))), options.pop("weight_decay")
    options |= {"weight_decay": decays[0]} if len(decays) == 1 else {"weight_decays": decays}
    return Settings(seeds=seeds, **options)


def _show(comparison: Comparison, folder: Path, as_json: bool) -> None:
    report = folder / "report.html"
    if not as_json:
        echo(f"{comparison}\nReport: {report}")
        return
    document = {"command": "compare", "ok": True, "failures": [], "report": str(report), **comparison.to_dict()}
    echo(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False))
