"""Imported before every test module; seeds every test alike, in whatever order and process it runs."""

import os
from collections.abc import Generator

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, by whatever test does so first: its kernels run in its interpreter then.
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Before geoopt, whose import warns: the package keeps that warning from its users, and warnings are errors here.
from manifold_nets import _geoopt  # noqa: F401
from manifold_nets.errors import NativeKernelError
from manifold_nets.optim.backends.build import PLATFORM


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_configure(config: pytest.Config) -> None:
    """Where the kernel in C has no build, on Windows, the warning that it is missing is no fault of a test."""
    if not PLATFORM.choices:
        config.addinivalue_line("filterwarnings", "ignore:The compiled kernel for steps on spheres:UserWarning")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """There, a test that asks for the kernel by name skips."""
    try:
        yield
    except NativeKernelError as error:
        if PLATFORM.choices:
            raise
        pytest.skip(str(error))
