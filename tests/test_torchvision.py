"""torchvision's networks with random statistics: everything certified is explained and converted, exactly."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "examples" / "coverage_table.py"
EXPECTED = {
    "alexnet": (8, 0), "resnet18": (21, 20), "resnet50": (54, 53), "resnext50_32x4d": (54, 53),
    "wide_resnet50_2": (54, 53), "vgg16_bn": (16, 13), "densenet121": (121, 120), "mobilenet_v2": (53, 52),
    "mobilenet_v3_small": (54, 34), "efficientnet_b0": (82, 49), "googlenet": (64, 59), "inception_v3": (98, 96),
    "regnet_y_400mf": (86, 53), "shufflenet_v2_x1_0": (57, 56), "mnasnet1_0": (53, 52), "fcn_resnet50": (55, 54),
    "deeplabv3_resnet50": (61, 60), "r2plus1d_18": (38, 37),
}  # fmt: skip
EVAL_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
QUICK = ("resnet18", "mobilenet_v3_small", "shufflenet_v2_x1_0")


@pytest.fixture(scope="module")
def table() -> Any:
    if not SCRIPT.is_file():
        pytest.skip("the examples are not beside the tests")
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    spec = importlib.util.spec_from_file_location("coverage_table", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["coverage_table"] = module
    spec.loader.exec_module(module)
    return module


CASES = [
    pytest.param(name, dtype, marks=() if name in QUICK else pytest.mark.slow)
    for name in EXPECTED
    for dtype in (torch.float32, torch.float64)
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_network(name: str, dtype: torch.dtype, table: Any) -> None:
    row = table.measure(name, dtype)
    assert (row.weights, row.certified) == EXPECTED[name]
    assert row.by_structure == row.certified
    assert row.unexplained == 0
    assert row.converted == row.certified
    assert row.eval_difference <= EVAL_LIMIT[dtype]
    assert row.reverted_eval_difference <= EVAL_LIMIT[dtype]
    assert row.layer_train_deviation <= 1e-4
    assert row.train_difference <= 1e-2
    assert row.keep_train_difference <= 1e-12


def test_the_list_is_the_tables_list(table: Any) -> None:
    assert list(EXPECTED) == table.TORCHVISION
