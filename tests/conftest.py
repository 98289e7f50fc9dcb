"""Imported before every test module; seeds every test alike, in whatever order and process it runs."""

import pytest
import torch

import manifold_nets

# Before geoopt, whose import warns: the package keeps that warning from its users, and warnings are errors here.
manifold_nets.SphereProduct  # noqa: B018


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
