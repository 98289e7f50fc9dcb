"""What several test files share: networks, cases with their expected answers, and processes."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pytest brings it there

__all__ = ["ROOT", "newer_torch", "one_needs_newer_torch", "tomllib"]

ROOT = Path(__file__).parents[2]


def newer_torch(release: str, lack: str) -> pytest.MarkDecorator:
    """Skip a test on releases of torch before this one, which lack something."""
    older = [int(x) for x in torch.__version__.split(".")[:2]] < [int(x) for x in release.split(".")]
    return pytest.mark.skipif(older, reason=f"before torch {release}, {lack}")


def one_needs_newer_torch(names: Iterable[str], name: str, release: str, lack: str) -> list[Any]:
    """Parameters of a test, one of which is skipped so."""
    return [pytest.param(each, marks=newer_torch(release, lack)) if each == name else each for each in names]
