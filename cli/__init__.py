"""The command line `manifold-nets`: each command parses, calls the package, and shows what comes back.

The modules here import no torch before a command runs, so that help, version and completion answer at once.
"""

from __future__ import annotations

import click

from .compare import compare
from .convert import convert
from .diagnose import diagnose
from .export import export
from .monitor import monitor

__all__ = ["main"]


@click.group(
    commands=[diagnose, convert, export, compare, monitor],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True},
)
@click.version_option(package_name="manifold_nets", prog_name="manifold-nets")
def main() -> None:
    """Find the weight-space symmetries of a network, and train it on the manifold that removes them.

    \b
    MODEL is one of
      package.module:callable   the model that a callable returns
      path/to/file.py:callable  the same, from a file
      path/to/file.py           the only model that the file defines
      torchvision:NAME          an architecture of torchvision, for instance torchvision:resnet18
      timm:NAME                 an architecture of timm; timm:FOLDER and timm:hf-hub:NAME with their weights
      hf:FOLDER, hf:NAME        a model of transformers: a folder of save_pretrained, or a name of the hub

    Results go to standard output, progress and messages to standard error. Exit status: 0 done, 1 the work failed or
    a check did not hold, 2 wrong usage.
    """  # noqa: D301 (click reads the control character)
