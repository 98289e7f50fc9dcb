"""Symmetries that span several tensors: found, certified, and true when they are carried out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from click.testing import CliRunner
from helpers import ROOT
from helpers.diagnosis_cases import BRUTE_FORCE_TOLERANCE, HAND_WRITTEN_EPS, PreNorm, build, sharp
from helpers.toy_networks import TOYS, Lambda, Toy
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.running import split_inputs, to_float64
from manifold_nets.symmetry import SymmetryFamily, SymmetryReport
from manifold_nets.symmetry.joint import solve_jointly
from manifold_nets.symmetry.trace import trace

# A change that no rounding can explain.
NOTICEABLE = 1e6 * BRUTE_FORCE_TOLERANCE


def families(report: SymmetryReport) -> dict[frozenset[str], SymmetryFamily]:
    return {frozenset(str(m) for m in family.members): family for family in report.families}


def move(model: nn.Module, x: Any, symmetry: dict[tuple[str, str], dict[int, float]], alpha: float) -> float:
    """Carry a symmetry out on a float64 twin and return the relative change of the output."""
    twin = sharp(model)
    x = x.double() if x.is_floating_point() else x
    joint = solve_jointly(trace(twin, to_float64(split_inputs(x))))
    partitions = {(name, part): partition for name, part, partition, _, _ in joint.parts()}
    moved = copy.deepcopy(twin)
    parameters = dict(moved.named_parameters())
    with torch.no_grad():
        for place, exponents in symmetry.items():
            partition = partitions[place]
            factors = torch.ones(partition.n_groups, dtype=torch.float64)
            for index, exponent in exponents.items():
                factors[index] = alpha**exponent
            parameter = parameters[place[0]]
            parameter.copy_(partition.multiply(parameter, partition.spread(factors)))
        before, after = twin(x), moved(x)
    return float((before - after).abs().max() / before.abs().max())


@pytest.mark.parametrize("name", TOYS)
def test_no_family_is_refuted(name: str) -> None:
    toy = TOYS[name]
    report = mn.diagnose(build(toy), toy.inputs())
    assert not report.refuted_families
    assert report.unexplained_groups == 0


@pytest.mark.parametrize("name", [n for n in TOYS if n not in HAND_WRITTEN_EPS])
def test_carrying_a_symmetry_out_leaves_the_function_alone(name: str) -> None:
    toy = TOYS[name]
    model = build(toy)
    for family in mn.diagnose(model, toy.inputs()).families:
        assert len(family.symmetries) == family.count
        assert move(model, toy.inputs(), family.symmetries[0], 1.7) <= BRUTE_FORCE_TOLERANCE


@pytest.mark.parametrize("name", ["conv2d-bn", "mlp-relu-bn", "squeeze-excite", "conv-gn"])
def test_carrying_half_of_a_symmetry_out_is_noticed(name: str) -> None:
    """Sabotage twin: a symmetry without its last member, or with the wrong exponent."""
    toy = TOYS[name]
    model = build(toy)
    family = next(f for f in mn.diagnose(model, toy.inputs()).families if f.kind == "rescaling" or name == "conv-gn")
    symmetry = dict(family.symmetries[0])
    place, exponents = symmetry.popitem()
    assert move(model, toy.inputs(), symmetry, 1.7) > NOTICEABLE
    wrong = {**symmetry, place: {index: 2 * e for index, e in exponents.items()}}
    assert move(model, toy.inputs(), wrong, 1.7) > NOTICEABLE


def test_rescaling_through_relu() -> None:
    toy = Toy(lambda: nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), (6, 5), {})
    report = mn.diagnose(build(toy), toy.inputs())
    found = families(report)[frozenset({"0.weight rows", "0.bias entries", "2.weight columns^-1"})]
    assert (found.kind, found.count, found.certificate.verdict) == ("rescaling", 4, "invariant")
    assert "balance" in found.remedy


def test_squeeze_and_excite() -> None:
    toy = TOYS["squeeze-excite"]
    found = families(mn.diagnose(build(toy), toy.inputs()))
    assert found[frozenset({"up.weight rows", "up.bias entries", "down.weight columns^-1"})].count == 8
    assert found[frozenset({"c.weight rows", "c.bias entries", "up.weight columns^-1"})].count == 6


class Attention(nn.Module):
    """Self-attention without normalization of queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(6, 8) for _ in range(3))
        self.o = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_queries_against_keys_and_values_against_output() -> None:
    report = mn.diagnose(Attention(), torch.randn(3, 5, 6))
    found = families(report)
    for family in report.families:
        assert family.certificate.verdict == "invariant"
    values = found[frozenset({"v.weight rows", "v.bias entries", "o.weight columns^-1"})]
    assert values.count == 8
    assert (
        sum(f.count for f in report.families if set(f.parameters) == {"q.weight", "q.bias", "k.weight", "k.bias"}) == 8
    )


def test_residual_stream_is_one_joint_group() -> None:
    report = mn.diagnose(PreNorm(), torch.randint(0, 7, (3, 5)))
    assert not report.invariant
    found = families(report)
    stream = found[frozenset({"embedding.weight columns", "down.weight rows"})]
    assert (stream.kind, stream.count, stream.certificate.verdict) == ("scale", 1, "invariant")
    assert found[frozenset({"up.weight rows", "down.weight columns^-1"})].count == 8
    assert not any("gate.weight rows" in members for members in map(str, found))


def test_pre_activation_residual_stream_is_joint_channel_by_channel() -> None:
    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.c(F.relu(m.n1(x)))
        return m.head(F.relu(m.n2(x)).mean((2, 3)))

    model = Lambda(
        forward,
        stem=nn.Conv2d(3, 4, 3, bias=False),
        c=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        n1=nn.BatchNorm2d(4),
        n2=nn.BatchNorm2d(4),
        head=nn.Linear(4, 2),
    )
    stream = families(mn.diagnose(model, torch.randn(4, 3, 9, 9)))[frozenset({"stem.weight rows", "c.weight rows"})]
    assert (stream.kind, stream.count) == ("scale", 4)


def test_families_are_data() -> None:
    toy = TOYS["conv2d-bn"]
    report = mn.diagnose(build(toy), toy.inputs())
    data = report.to_dict()["families"]
    assert data[0]["kind"] == "scale"
    assert data[0]["members"][0] == {"parameter": "0.weight", "part": "rows", "exponent": 1.0, "size": 1}
    assert "1.weight entries" in str(report)


def test_command_line_lists_them() -> None:
    spec = ROOT / "examples" / "digits.py"
    if not spec.is_file():
        pytest.skip("the examples are not beside the tests")
    result = CliRunner().invoke(main, ["diagnose", f"{spec}:network", "--input-shape", "1,8,8"])
    assert result.exit_code == 0
    assert "Symmetries across parameters" in result.stdout
    assert "3.weight columns" in result.stdout
