"""The options about the optimizer of the plain network, and the learning rates that match it as a table."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import click
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from manifold_nets.errors import OptionError
from manifold_nets.symmetry.learning_rates import LearningRates, Spread
from manifold_nets.symmetry.optimizer_settings import OPTIMIZERS, OptimizerSettings

from .outcome import Outcome

__all__ = ["optimizer_options", "shown_rates"]

_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--optimizer",
        type=click.Choice(OPTIMIZERS),
        help="Optimizer of the plain network: also find the learning rates on spheres that match it.",
    ),
    click.option("--lr", type=float, help="Its learning rate."),
    click.option("--momentum", type=float, help="Momentum of sgd.  [default: 0]"),
    click.option("--betas", type=float, nargs=2, help="Both betas of adam and adamw.  [default: 0.9 0.999]"),
    click.option("--weight-decay", type=float, help="Its weight decay.  [default: 0]"),
)


def optimizer_options(body: Callable[..., Outcome]) -> Callable[..., Outcome]:
    """Add the options about an optimizer to a command, which gets them as ``settings``: None where none is named."""

    @functools.wraps(body)
    def parsed(*arguments: Any, optimizer: str | None, **options: Any) -> Outcome:
        names = ("lr", "momentum", "betas", "weight_decay")
        given = {name: value for name in names if (value := options.pop(name)) is not None}
        return body(*arguments, settings=_settings(optimizer, given), **options)

    decorated: Callable[..., Any] = parsed
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated


def _settings(optimizer: str | None, given: dict[str, Any]) -> OptimizerSettings | None:
    flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
    if optimizer is None:
        if given:
            raise click.UsageError(f"{flags} without --optimizer; name the optimizer that it belongs to.")
        return None
    if "lr" not in given:
        raise click.UsageError("--optimizer without --lr; give its learning rate.")
    other = "betas" if optimizer == "sgd" else "momentum"
    if other in given:
        raise click.UsageError(f"--{other} with --optimizer {optimizer}, which has none; leave it out.")
    try:
        return OptimizerSettings(optimizer, **given)
    except OptionError as error:
        raise click.UsageError(str(error)) from error


def shown_rates(rates: LearningRates) -> tuple[RenderableType, ...]:
    """Tabulate learning rates, one row a weight and one for all groups together, between two sentences."""
    # A title or caption of the table would be folded to its width.
    table = Table(pad_edge=False, box=None, header_style="bold")
    table.add_column("weight", no_wrap=True)
    for column in ("groups", "median norm", "median", "quartiles", "smallest … largest"):
        table.add_column(column, overflow="fold")
    for weight in rates.weights:
        table.add_row(weight.name, str(weight.groups), f"{weight.norms.median:.3g}", *_cells(weight.next_step))
    if rates.next_step is not None:
        table.add_row("all", str(sum(weight.groups for weight in rates.weights)), "", *_cells(rates.next_step))
    headline = f"\nLearning rates on spheres that match the next step of {rates.settings}:"
    return Text(headline), table, Text(f"{rates.long_run[0].upper()}{rates.long_run[1:]}.")


def _cells(spread: Spread) -> tuple[str, str, str]:
    return (
        f"{spread.median:.3g}",
        f"{spread.lower_quartile:.3g} … {spread.upper_quartile:.3g}",
        f"{spread.smallest:.3g} … {spread.largest:.3g}",
    )
