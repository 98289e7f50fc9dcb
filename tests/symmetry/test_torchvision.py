"""torchvision's networks with random statistics: everything certified is explained and converted, exactly.

One network of each family is analysed here; the full list is for `examples/coverage_table.py`, whose stored table is
held to the same limits.
"""

from __future__ import annotations

import csv
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.example_modules import EXAMPLES, example
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights
from manifold_nets.errors import ExampleInputsError
from manifold_nets.sources import import_torchvision

# Weights, and how many of them are invariant.
EXPECTED = {
    "alexnet": (8, 0), "resnet18": (21, 20), "resnext50_32x4d": (54, 53), "vgg11_bn": (11, 8),
    "densenet121": (121, 120), "mobilenet_v2": (53, 52), "mobilenet_v3_small": (54, 34), "efficientnet_b0": (82, 49),
    "googlenet": (64, 59), "inception_v3": (98, 96), "regnet_x_400mf": (72, 71), "regnet_y_400mf": (86, 53),
    "shufflenet_v2_x1_0": (57, 56), "squeezenet1_1": (26, 0), "mnasnet0_5": (53, 52), "convnext_tiny": (77, 19),
    "swin_t": (65, 1), "swin_v2_t": (89, 28), "fcn_resnet50": (55, 54), "deeplabv3_mobilenet_v3_large": (70, 53),
    "lraspp_mobilenet_v3_large": (66, 47), "mc3_18": (21, 20), "r2plus1d_18": (38, 37), "mvit_v2_s": (165, 64),
}  # fmt: skip
EVAL_LIMIT = {torch.float32: 1e-5, torch.float64: 1e-12}
QUICK = ("resnet18", "mobilenet_v3_small")


@pytest.fixture(scope="module")
def table() -> Any:
    return example("coverage_table", "torchvision", "timm", "transformers")


CASES = [
    pytest.param(name, dtype, marks=() if name in QUICK and dtype is torch.float32 else pytest.mark.slow)
    for name, dtype in itertools.product(EXPECTED, EVAL_LIMIT)
    if name in QUICK or dtype is torch.float32
]


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_network(name: str, dtype: torch.dtype, table: Any) -> None:
    row = table.measure("torchvision", name, dtype)
    assert (row.weights, row.certified) == EXPECTED[name]
    check_row(row)
    assert row.eval_difference <= EVAL_LIMIT[dtype]
    assert row.reverted_eval_difference <= EVAL_LIMIT[dtype]
    assert row.layer_train_deviation <= 1e-4
    assert row.train_difference <= 1e-2
    assert row.keep_train_difference <= 1e-12


@pytest.mark.parametrize("name", ["squeezenet1_1", pytest.param("vgg11", marks=pytest.mark.slow)])
def test_chains_of_layers_without_normalization_are_balanced(name: str) -> None:
    """Symmetry by symmetry these do not reach the smallest norm within 200 sweeps."""
    example("networks_torchvision", "torchvision")
    torch.manual_seed(0)
    model, x = mn.sources.load_model(f"torchvision:{name}"), torch.randn(2, 3, 64, 64)
    balanced, record = mn.balance(model, x)
    assert record.converged
    assert record.sweeps <= 20
    assert record.norm_after < 0.8 * record.norm_before
    assert mn.verify(model, balanced, x).eval_difference <= EVAL_LIMIT[torch.float32]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fasterrcnn_mobilenet_v3_large_320_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detection_is_refused_with_the_reason(name: str) -> None:
    """In training mode these networks compute losses and want the boxes; nothing ends in an error of another kind."""
    example("networks_torchvision", "torchvision")
    model = mn.sources.load_model(f"torchvision:{name}")
    for inputs in (([torch.rand(3, 64, 64)],), torch.rand(2, 3, 64, 64)):
        with pytest.raises(ExampleInputsError, match="targets should not be none when in training mode"):
            mn.diagnose(model, inputs)


def small_mvit() -> nn.Module:
    """Two blocks with the settings of the last ones of mvit_v2_s, for 2 frames of 16×16."""
    example("networks_torchvision", "torchvision")
    video = import_torchvision().models.video.mvit
    blocks = [video.MSBlockConfig(1, 8, 8, [3, 3, 3], [3, 3, 3], [1, 1, 1], [1, 1, 1]) for _ in range(2)]
    model: nn.Module = video.MViT(
        (16, 16), 2, blocks, residual_pool=True, residual_with_cls_embed=False, rel_pos_embed=True,
        proj_after_attn=True, num_classes=3, patch_embed_kernel=(1, 4, 4), patch_embed_stride=(1, 4, 4),
        patch_embed_padding=(0, 0, 0),
    )  # fmt: skip
    return model


def test_the_last_pooling_of_the_queries_of_mvit_is_certified_where_it_is_normalized() -> None:
    """The head reads the class token, which that pooling bypasses: no output depends on it."""
    torch.manual_seed(0)
    model, x = small_mvit().eval(), torch.randn(2, 3, 2, 16, 16)
    found = [w for w in mn.diagnose(model, x).weights if w.name.endswith(".pool.weight")]
    assert {w.status for w in found} == {"invariant"}
    inside = {w.name: w.certificate.taken_at for w in found if w.certificate.taken_at}
    assert inside == {"blocks.1.attn.pool_q.pool.weight": "blocks.1.attn.pool_q.norm_act.0 (layer_norm)"}
    converted = mn.convert(model, x)
    assert {w.name for w in found} <= {w.name for w in constrained_weights(converted)}
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT[torch.float32]


def check_row(row: Any) -> None:
    """Everything certified is found and converted, nothing that is found is refuted, nothing is unknown."""
    assert row.found == row.certified == row.converted
    assert row.groups_unexplained == row.contradictions == 0
    assert row.remark == "" or row.remark.startswith("float64 for one weight at a time")


def test_every_kind_of_network_is_in_the_list() -> None:
    networks = example("networks_torchvision", "torchvision")
    models = import_torchvision().models
    modules = (models, models.segmentation, models.video)
    assert sorted(networks.TORCHVISION) == sorted(name for m in modules for name in models.list_models(module=m))
    assert set(EXPECTED) <= set(networks.TORCHVISION)


def stored(table: Any) -> list[Any]:
    path = EXAMPLES / "results" / "coverage.csv"
    return list(table.stored_rows(path))


def test_the_stored_table_holds_what_is_said_of_torchvision(table: Any) -> None:
    rows = [row for row in stored(table) if row.suite.startswith("torchvision")]
    assert {row.network for row in rows} <= set(table.SUITES["torchvision"][0])
    assert len(rows) >= 30
    for row in rows:
        if not row.remark.startswith("not tried"):
            check_row(row)
            assert row.eval_difference <= 1e-4


def explained(rows: list[Any]) -> float:
    """The share of all certified groups and shifts that structure explains."""
    found = sum(row.groups_certified + row.shifts for row in rows)
    return found / (found + sum(row.groups_unexplained + row.shifts_unexplained for row in rows))


def test_structure_explains_nearly_all_that_the_certificate_finds(table: Any) -> None:
    rows = stored(table)
    assert {row.suite.partition(",")[0] for row in rows} == set(table.SUITES)
    assert explained(rows) >= 0.99
    for suite in table.SUITES:
        assert explained([row for row in rows if row.suite.startswith(suite)]) >= 0.99
    with pytest.raises(AssertionError):
        assert explained([replace(row, shifts_unexplained=row.shifts) for row in rows]) >= 0.99


def test_a_table_with_a_refuted_group_is_noticed(table: Any, tmp_path: Path) -> None:
    """The sabotage twin of the test above."""
    text = (EXAMPLES / "results" / "coverage.csv").read_text(encoding="utf-8")
    lines = list(csv.DictReader(text.splitlines()))
    for column, value in (("contradictions", "1"), ("groups_unexplained", "3"), ("remark", "2 of its weights unknown")):
        path = tmp_path / "coverage.csv"
        with path.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, list(lines[0]))
            writer.writeheader()
            writer.writerow({**lines[0], column: value})
        (row,) = table.stored_rows(path)
        with pytest.raises(AssertionError):
            check_row(row)
