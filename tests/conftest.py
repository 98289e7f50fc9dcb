"""Imported before every test module; seeds every test alike, in whatever order and process it runs."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, by whatever test does so first: its kernels run in its interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before geoopt, whose import warns: the package keeps that warning from its users, and warnings are errors here.
from manifold_nets import _geoopt  # noqa: F401


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
