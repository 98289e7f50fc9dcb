"""Imported before every test module; seeds every test alike, in whatever order and process it runs."""

import pytest
import torch

# Before geoopt, whose import warns: the package keeps that warning from its users, and warnings are errors here.
from manifold_nets import _geoopt  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
