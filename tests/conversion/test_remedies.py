"""Remedies beside spheres: dead biases removed, rescalings balanced, in plans that a person can edit."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from helpers.conversion_cases import EVAL_LIMIT, conv_net, images, randomized
from helpers.diagnosis_cases import assert_same, snapshot
from helpers.toy_networks import Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.conversion import write_plan
from manifold_nets.conversion.actions import chosen_remedies
from manifold_nets.conversion.remedies import dead_biases as dead_biases_module
from manifold_nets.conversion.remedies.dead_biases import removed_biases
from manifold_nets.errors import FunctionChangedError, OptionError, PlanError


@functools.cache
def report() -> mn.SymmetryReport:
    """What `diagnose` says of `conv_net`, found once."""
    return mn.diagnose(conv_net(), images())


DEAD = ["0.bias", "3.bias", "6.bias"]


def both_modes_differ_by(model: nn.Module, other: nn.Module, x: Any) -> float:
    found = mn.verify(model, other, x)
    return max(found.eval_difference, found.train_difference)


def by_name(model: nn.Module) -> dict[str, Any]:
    record = mn.conversion_record(model)
    assert record is not None
    return {action.name: action for action in record.plan.actions if action.remedy != "spheres"}


def separable() -> nn.Module:
    """A bias that reaches its normalization through another linear map, and one through a sum with another bias."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = m.n1(m.pointwise(m.first(x)))
        return m.head(torch.relu(m.n2(m.a(x) + m.b(x))).mean((2, 3)))

    torch.manual_seed(0)
    net = Lambda(
        forward,
        first=nn.Conv2d(3, 4, 3), pointwise=nn.Conv2d(4, 5, 1), n1=nn.BatchNorm2d(5),
        a=nn.Conv2d(5, 6, 1), b=nn.Conv2d(5, 6, 1), n2=nn.BatchNorm2d(6), head=nn.Linear(6, 2),
    )  # fmt: skip
    return randomized(net).double()


def instance_and_group() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1), nn.GroupNorm(4, 4, affine=False), nn.ReLU(),
        nn.ConvTranspose2d(4, 6, 2, groups=2), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(6 * 11 * 11, 2),
    )  # fmt: skip
    return randomized(net).double()


NETWORKS: list[tuple[Callable[[], nn.Module], set[str]]] = [
    (conv_net, set(DEAD)),
    (separable, {"first.bias", "pointwise.bias", "a.bias", "b.bias"}),
    (instance_and_group, {"0.bias", "2.bias", "5.bias"}),
]


@pytest.mark.parametrize(("build", "expected"), NETWORKS)
def test_dead_biases_go_and_both_modes_stay(build: Callable[[], nn.Module], expected: set[str]) -> None:
    model, x = build(), images()
    converted = mn.convert(model, x, remedies="dead-biases")
    assert model.state_dict().keys() - converted.state_dict().keys() == expected
    assert all(converted.get_submodule(name.rpartition(".")[0]).bias is None for name in expected)
    assert both_modes_differ_by(model, converted, x) <= EVAL_LIMIT[torch.float64]
    other = torch.randn(5, 3, 12, 12, dtype=torch.float64)
    assert both_modes_differ_by(model, converted, other) <= EVAL_LIMIT[torch.float64]


@pytest.mark.parametrize("build", [conv_net, separable])
def test_running_means_that_do_not_follow_are_noticed(
    build: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage twin: the bias goes, the running mean stays."""
    original = dead_biases_module._shifts_of

    def wrong(*args: Any) -> Any:
        return {mean: 0.5 * values for mean, values in original(*args).items()}

    monkeypatch.setattr(dead_biases_module, "_shifts_of", wrong)
    model = build()
    before = snapshot(model)
    with pytest.raises(FunctionChangedError):
        mn.convert(model, images(), remedies="dead-biases", inplace=True)
    assert_same(before, snapshot(model))
    assert removed_biases(model) == {}


def test_the_bias_itself_is_subtracted_where_nothing_stands_between() -> None:
    model = conv_net()
    converted = mn.convert(model, report(), remedies="dead-biases")
    assert torch.equal(converted[1].running_mean, model[1].running_mean - model[0].bias)
    assert torch.equal(converted[1].running_var, model[1].running_var)


def test_what_is_dead_in_part_or_needed_is_left_with_the_reason() -> None:
    def half(m: Lambda, x: Tensor) -> Tensor:
        a, b = m.c(x).chunk(2, 1)
        return torch.cat([m.n(a), b], 1)

    net = Lambda(half, c=nn.Conv2d(3, 4, 3), n=nn.BatchNorm2d(2))
    actions = {a.name: a for a in mn.plan(net, torch.randn(4, 3, 7, 7), remedies="dead-biases").actions}
    assert actions["c.bias"].action == "leave"
    assert "2 of its 4 entries" in actions["c.bias"].reason

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.bias

    plan = mn.plan(nn.Sequential(Added(), nn.BatchNorm1d(3)), torch.randn(5, 3), remedies="dead-biases")
    assert plan["0.bias"].reason == "Added 0 needs it"


def test_removed_biases_survive_copies_pickles_and_checkpoints(tmp_path: Path) -> None:
    model, x = conv_net(), images()
    converted = mn.convert(model, report(), remedies="all")
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert set(removed_biases(copied)) == set(DEAD)
        assert mn.verify(converted, copied, x) == mn.conversion.Verification(0.0, 0.0)
    mn.save(converted, tmp_path / "net.safetensors")
    for fresh in (conv_net(), copy.deepcopy(converted)):
        loaded = mn.load(fresh, tmp_path / "net.safetensors")
        assert loaded.state_dict().keys() == converted.state_dict().keys()
        assert mn.verify(converted, loaded, x) == mn.conversion.Verification(0.0, 0.0)
        assert set(removed_biases(loaded)) == set(DEAD)
    mn.save(model, tmp_path / "plain.safetensors")
    back = mn.load(converted, tmp_path / "plain.safetensors")
    assert list(back.state_dict()) == list(model.state_dict())
    assert mn.verify(model, back, x) == mn.conversion.Verification(0.0, 0.0)


def test_revert_puts_zeros_back_so_that_the_keys_are_those_of_the_architecture() -> None:
    model, x = conv_net(), images()
    converted = mn.convert(model, report(), remedies="all")
    reverted = mn.revert(converted)
    assert list(reverted.state_dict()) == list(model.state_dict())
    assert not any(reverted.get_parameter(name).any() for name in DEAD)
    assert mn.verify(converted, reverted, x) == mn.conversion.Verification(0.0, 0.0)
    conv_net().load_state_dict(reverted.state_dict())
    assert set(removed_biases(converted)) == set(DEAD)


def test_all_remedies_together() -> None:
    model, x = conv_net(), images()
    converted = mn.convert(model, report(), remedies="all", train_tolerance=1.0)
    assert mn.verify(model, converted, x).eval_difference <= EVAL_LIMIT[torch.float64]
    found = by_name(converted)
    assert {found[name].action for name in DEAD} == {"remove"}
    assert any(action.action == "balance" for action in found.values())
    for weight in ("0.weight", "3.weight", "6.weight"):
        parameter = converted.get_parameter(weight)
        assert parameter.manifold.check_point_on_manifold(parameter)
    assert mn.conversion_record(converted).plan["0.weight"].radius == "unit"


def test_balance_as_a_remedy_is_balance() -> None:
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3)).double()
    with torch.no_grad():
        model[0].weight *= 100
    x = torch.randn(9, 5, dtype=torch.float64)
    converted, (balanced, record) = mn.convert(model, x, remedies="balance"), mn.balance(model, x)
    assert record.norm_after < 0.5 * record.norm_before
    for a, b in zip(converted.parameters(), balanced.parameters(), strict=True):
        assert torch.equal(a, b)
    action = by_name(converted)["balance 1"]
    assert action.members == ("0.weight rows", "0.bias entries", "2.weight columns^-1")


def test_plan_can_be_edited(tmp_path: Path) -> None:
    model, file = conv_net(), tmp_path / "plan.json"
    write_plan(mn.plan(model, report(), remedies=["dead-biases", "balance", "spheres"]), file)
    same = mn.convert(model, report(), plan=file)
    for a, b in zip(
        same.state_dict().values(),
        mn.convert(model, report(), remedies="dead-biases,balance,spheres", train_tolerance=float("inf"))
        .state_dict()
        .values(),
        strict=True,
    ):
        assert torch.equal(a, b)
    data = json.loads(file.read_text())
    entries = {entry["name"]: entry for entry in data["actions"]}
    for entry in data["actions"]:
        if entry["name"] not in ("0.bias", "balance 2"):
            entry["action"] = "leave"
    edited = mn.convert(model, report(), plan=data)
    assert set(removed_biases(edited)) == {"0.bias"}
    assert {name for name, a in by_name(edited).items() if a.action != "leave"} == {"0.bias", "balance 2"}
    entries["balance 2"]["members"] = ["9.weight rows"]
    with pytest.raises(PlanError, match=r"members \['9\.weight rows'\] of balance 2"):
        mn.convert(model, report(), plan=data)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"name": "11.bias", "action": "remove"}, "'remove' for '11.bias'.*0.bias"),
    ({"name": "0.bias", "action": "remove", "remedy": "balance"}, "'remove' with remedy 'balance'"),
    ({"name": "balance 99", "action": "balance"}, "'balance' for 'balance 99'"),
    ({"name": "0.bias", "action": "leave", "remedy": "magic"}, "remedy: 'magic'"),
]


@pytest.mark.parametrize(("entry", "message"), REFUSED)
def test_impossible_edits_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        mn.convert(conv_net(), report(), plan={"actions": [entry]})


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm])
def test_a_bias_behind_a_spectral_norm_is_a_constant(norm: Callable[[nn.Module], nn.Module]) -> None:
    """Its power iteration gives another weight at every pass in training mode."""
    net = nn.Sequential(norm(nn.Linear(4, 6)), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)).double()
    x = torch.randn(16, 4, dtype=torch.float64)
    assert mn.plan(net, x, remedies="dead-biases")["0.bias"].reason.endswith("1.running_mean is adjusted for it")
    before, mean = copy.deepcopy(net), net[1].running_mean - net[0].bias
    converted = mn.convert(net, x, remedies="dead-biases")
    assert converted[0].bias is None
    torch.testing.assert_close(converted[1].running_mean, mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(converted.eval()(x), before.eval()(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(converted.train()(x), before.train()(x), rtol=1e-12, atol=1e-12)


def test_a_plan_names_what_it_has() -> None:
    with pytest.raises(KeyError, match=r"^plan\['0\.wieght'\]: .* Near matches: 0\.weight"):
        mn.plan(conv_net(), report())["0.wieght"]


def test_selection_of_remedies() -> None:
    assert chosen_remedies("all") == tuple(mn.conversion.REMEDIES)
    assert chosen_remedies(["spheres", "dead-biases"]) == ("dead-biases", "spheres")
    for wrong in ("", "sphere", [], ["balance", "all"]):
        with pytest.raises(OptionError, match="remedies"):
            chosen_remedies(wrong)
    with pytest.raises(OptionError, match=r"found 'sphere,balance'; .*Near matches: spheres, joint-spheres"):
        chosen_remedies("sphere,balance")
    with pytest.raises(OptionError, match="remedies"):
        mn.plan(conv_net(), report(), remedies="wonder")
    plan = mn.plan(conv_net(), report(), remedies="all", include=["0.*", "3.bias"])
    assert [a.name for a in plan.of("remove")] == ["0.bias", "3.bias"]
    assert [a.name for a in plan.spheres] == ["0.weight"]
    assert all(a.remedy == "spheres" for a in mn.plan(conv_net(), report()).actions)


def test_command_line(tmp_path: Path) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    first, second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)\n"
        "    return nn.Sequential(first, nn.BatchNorm2d(4), nn.ReLU(), second, nn.BatchNorm2d(4))\n"
    )
    command = ["convert", f"{tmp_path / 'net.py'}:build", "--input-shape", "3,9,9"]
    result = CliRunner().invoke(main, [*command, "--remedies", "dead-biases,balance", "--json"])
    assert result.exit_code == 0
    actions = [a["action"] for a in json.loads(result.stdout)["plan"]["actions"]]
    assert actions == ["leave", "leave", "remove", "remove", "balance"]
    shown = CliRunner().invoke(main, [*command, "--remedies", "all"]).stdout
    assert "remove" in shown
    assert "0.bias" in shown
    assert CliRunner().invoke(main, [*command, "--remedies", "wonder"]).exit_code == 2


def test_balanced_norm_is_minimal_along_every_rescaling() -> None:
    model = conv_net()
    balanced = mn.convert(model, report(), remedies="balance")
    names = {name for a in by_name(balanced).values() if a.action == "balance" for name in _parameters(a.members)}

    def norm(of: nn.Module) -> float:
        return sum(float(of.get_parameter(name).detach().square().sum()) for name in names)

    def moved(of: nn.Module, family: Any, step: float) -> float:
        copied = copy.deepcopy(of)
        with torch.no_grad():
            for place, exponents in family.symmetries[0].items():
                partition, parameter = family.partitions[place], copied.get_parameter(place[0])
                factors = torch.ones(partition.n_groups, dtype=torch.float64)
                for index, exponent in exponents.items():
                    factors[index] = (1 + step) ** exponent
                parameter.copy_(partition.multiply(parameter, partition.spread(factors)))
        return norm(copied)

    families = [f for f in report().families if f.kind == "rescaling" and not f.absorbed]
    assert families
    for family in families:
        assert min(moved(balanced, family, step) for step in (1e-3, -1e-3)) >= norm(balanced)
    # The network as it was is at no minimum.
    assert any(moved(model, family, step) < norm(model) for family in families for step in (1e-3, -1e-3))


def _parameters(members: tuple[str, ...]) -> list[str]:
    return [member.rpartition(" ")[0] for member in members]


class Heads(nn.Module):
    """A whole matrix, heads and a table in front of batch normalizations, which can take up unit radius."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.matrix, self.heads = nn.Embedding(7, 6), nn.Linear(6, 4), nn.Linear(4, 6)
        self.n1, self.n2, self.n3 = nn.BatchNorm1d(1), nn.BatchNorm1d(1), nn.BatchNorm1d(2)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.n1(self.table(tokens)[:, None]).squeeze(1)
        x = self.n2(self.matrix(x)[:, None]).squeeze(1)
        return self.n3(self.heads(x).reshape(-1, 2, 3))


def test_unit_radius_is_a_mean_square_filter_norm_of_one() -> None:
    """A group of k filters gets √k: rows of a whole matrix, of a head, and of a table."""
    torch.manual_seed(3)
    model, tokens = Heads().double(), torch.arange(7).repeat(9)
    for norm in (model.n1, model.n2, model.n3):
        norm.eps = 1e-12
    converted = mn.convert(model, tokens)
    expected = {"table": (1, 7.0), "matrix": (1, 4.0), "heads": (2, 3.0)}
    for name, (groups, filters) in expected.items():
        weight = converted.get_parameter(f"{name}.weight")
        assert mn.conversion_record(converted).plan[f"{name}.weight"].radius == "unit"
        assert weight.manifold.partition.n_groups == groups
        assert weight.manifold.uniform_radius == pytest.approx(filters**0.5)
        rows = weight.detach().square().sum(1)
        assert float(rows.mean()) == pytest.approx(1.0, rel=1e-12)
    assert both_modes_differ_by(model, converted, tokens) <= 1e-9
    assert not torch.allclose(
        model.matrix.weight.square().sum(1).mean(), torch.ones((), dtype=torch.float64), rtol=1e-2
    )
