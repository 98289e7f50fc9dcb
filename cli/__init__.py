"""The command line `manifold-nets`: each command parses, calls the package, and renders what comes back."""

from __future__ import annotations

import importlib.metadata

import click

from .compare import compare
from .convert import convert
from .diagnose import diagnose
from .export import export

__all__ = ["main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(importlib.metadata.version("manifold_nets"), prog_name="manifold-nets")
def main() -> None:
    """Find the weight-space symmetries of a network, and move it to the manifold that removes them.

    \b
    MODEL is one of
      package.module:callable   what the callable returns
      path/to/file.py:callable  the same, from a file
      torchvision:NAME          an architecture of torchvision, for instance torchvision:resnet18
      timm:NAME                 an architecture of timm

    Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the work failed or
    a check did not hold, 2 wrong usage.
    """  # noqa: D301 (click reads the control character)


for _command in (diagnose, convert, export, compare):
    main.add_command(_command)
