"""timm's architecture families: no crash, no contradiction, everything certified is explained, conversion is exact."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.example_modules import example

import manifold_nets as mn
from manifold_nets.errors import NothingToConvertError
from manifold_nets.symmetry.report import SymmetryReport

FAMILIES = (
    "resnet|resnetv2|resnetv2 with group norm|nf_resnet|nfnet|densenet|dpn|vovnet|hrnet|ghostnet|repghost|levit|"
    "mobilevit|mobilevitv2|fastvit|repvgg|repvit|convnext|convnextv2|edgenext|efficientformer|efficientformerv2|"
    "efficientvit|efficientvit of mit|coatnet|maxvit|swin|swinv2|vit|vit with qk_norm|deit|beit|eva|cait|xcit|crossvit|"
    "volo|hiera|davit|focalnet|pvt|twins|convit|tnt|nest|gcvit|visformer|nextvit|swiftformer|shvit|xception|"
    "inception_resnet_v2|dla|res2net|resnest|sknet|cspnet|selecsls|tresnet|mobileone|mobilenetv3|mobilenetv4|"
    "efficientnet|rexnet|tinynet|hgnet|lcnet|mixnet|poolformer|gernet|regnet|eca|botnet|halonet|lambda|sequencer|"
    "mlp-mixer|gmixer|resmlp|inception_next|starnet|rdnet|mambaout|convmixer"
).split("|")
QUICK = ("lcnet", "vit with qk_norm")
EVAL_LIMIT = 1e-4  # float32
LEAST_EXPLAINED = 0.99


@pytest.fixture(scope="module")
def networks() -> Any:
    return example("networks", "timm", "torchvision")


def explained(report: SymmetryReport) -> float:
    """Share of the certified groups that structure explains."""
    certified = sum(w.certificate.groups_certified for w in report.weights)
    return 1.0 if certified == 0 else 1.0 - report.unexplained_groups / certified


def contradictions(report: SymmetryReport) -> list[str]:
    """Groups that structure claims and the certificate refutes."""
    weights = [w.name for w in report.weights if w.partition is not None and w.certificate.verdict == "not invariant"]
    return [*weights, *map(str, report.refuted_families), *map(str, report.refuted_shifts)]


def case(family: str) -> Any:
    return pytest.param(family, marks=[] if family in QUICK else [pytest.mark.slow])


@pytest.mark.parametrize("family", [case(family) for family in FAMILIES])
def test_family(family: str, networks: Any) -> None:
    torch.manual_seed(0)
    model, images = networks.timm_network(family)
    report = mn.diagnose(model, images)
    assert contradictions(report) == []
    assert not [w.name for w in report.weights if w.status == "unknown"]
    assert explained(report) >= LEAST_EXPLAINED
    if not report.invariant:
        with pytest.raises(NothingToConvertError):
            mn.convert(model, report)
        return
    converted = mn.convert(model, report)
    record = mn.conversion_record(converted)
    assert len(record.plan.spheres) == len(report.invariant)
    assert record.verification.eval_difference <= EVAL_LIMIT


def test_the_suite_of_the_examples_is_the_one_that_is_tested(networks: Any) -> None:
    assert sorted(networks.TIMM) == sorted(FAMILIES)
    assert len(FAMILIES) >= 60


def test_a_wrong_rule_is_a_contradiction(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the first test: a gate that is taken for one that a scale cannot reach."""
    from manifold_nets.symmetry.rules import RULES

    monkeypatch.setitem(RULES, "hardsigmoid", lambda use: None)
    torch.manual_seed(0)
    model, images = networks.timm_network("mobilenetv3")
    with pytest.raises(AssertionError):
        assert contradictions(mn.diagnose(model, images)) == []


@pytest.mark.slow
def test_a_rule_that_is_missing_leaves_groups_unexplained(networks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sabotage twin of the share that is explained."""
    from manifold_nets.symmetry.rules import RULES

    monkeypatch.delitem(RULES, "batch_norm")
    torch.manual_seed(0)
    report = mn.diagnose(*networks.timm_network("lcnet"))
    with pytest.raises(AssertionError):
        assert explained(report) >= LEAST_EXPLAINED
