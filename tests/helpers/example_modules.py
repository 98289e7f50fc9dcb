"""The networks of the coverage table, for tests; they skip where the examples are not beside the tests."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

import pytest

from helpers import ROOT

EXAMPLES = ROOT / "examples"


def example(name: str, *packages: str) -> ModuleType:
    """Import an example as a module; skip where it or one of the packages is missing."""
    if not (EXAMPLES / f"{name.replace('.', '/')}.py").is_file():
        pytest.skip("the examples are not beside the tests")
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)
