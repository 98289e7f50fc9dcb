"""Spheres across tensors: one sphere on the concatenated vector is the oracle, from manifold to optimizer."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from helpers.diagnosis_cases import PreNorm, assert_same, snapshot
from helpers.toy_networks import Lambda
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets import JointSphere, Partition
from manifold_nets.conversion import write_plan
from manifold_nets.errors import (
    CheckpointFormatError,
    ConstraintError,
    DegenerateGroupError,
    OffManifoldError,
    PartitionError,
    PlanError,
)
from manifold_nets.joint_sphere import JointSphereMember
from manifold_nets.optim.backends.rule import StepInput
from manifold_nets.symmetry.generators import Part

DTYPES = [torch.float32, torch.float64]


def three(radius: Any = (1.0, 2.0, 0.5, 3.0)) -> JointSphere:
    """Four groups across a convolution, the columns of a table, and a transposed convolution."""
    return JointSphere(
        {
            "conv": Partition.filters((4, 2, 3, 3)),
            "table": Partition((5, 4), (5, 4), (1,)),
            "transposed": Partition.transposed_filters((4, 2, 2, 2), groups=2),
        },
        radius,
    )


def tensors(joint: JointSphere, seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype) for p in joint.partitions]


def concatenated(parts: Any) -> Tensor:
    """The groups as rows, written without `Partition`."""
    conv, table, transposed = parts
    filters = transposed.reshape(2, 2, 2, 2, 2).movedim(2, 1).reshape(4, -1)
    return torch.cat([conv.reshape(4, -1), table.T, filters], 1)


def check_against_one_sphere(joint: JointSphere, dtype: torch.dtype) -> None:
    """geoopt's sphere, row by row, in unit-sphere coordinates."""
    sphere, eps = geoopt.Sphere(), torch.finfo(dtype).eps
    radii = joint.radii.to(dtype)[:, None]
    points = joint.projx(tensors(joint, 0, dtype))
    u = concatenated(points) / radii

    def close(found: Any, expected: Tensor) -> None:
        assert float((concatenated(found) / radii - expected).abs().max()) <= 16 * eps * float(expected.abs().max())

    close(points, sphere.projx(concatenated(tensors(joint, 0, dtype))))
    vectors = joint.proju(points, tensors(joint, 1, dtype))
    v = sphere.proju(u, concatenated(tensors(joint, 1, dtype)) / radii)
    close(vectors, v)
    close(joint.retr(points, vectors), sphere.retr(u, v))
    close(joint.expmap(points, vectors), sphere.expmap(u, v))
    gradients = tensors(joint, 2, dtype)
    close(joint.egrad2rgrad(points, gradients), sphere.egrad2rgrad(u, concatenated(gradients) * radii))
    assert float(joint.inner(points, vectors)) == pytest.approx(float(sphere.inner(u, v).sum()), rel=64 * eps)
    single = sum(float(m.inner(p, x)) for m, p, x in zip(joint.manifolds, points, vectors, strict=True))
    assert float(joint.inner(points, vectors)) == pytest.approx(single, rel=64 * eps)
    assert float(joint.deviations(points).max()) <= 4 * eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("radius", [1.0, 2.5, (1.0, 2.0, 0.5, 3.0)])
def test_joint_sphere_is_one_sphere_on_the_concatenated_rows(radius: Any, dtype: torch.dtype) -> None:
    check_against_one_sphere(three(radius), dtype)


def test_spheres_of_single_members_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sabotage twin: each weight projected on a sphere of its own."""

    def alone(joint: JointSphere, points: Any) -> tuple[Tensor, ...]:
        pairs = zip(joint.partitions, points, strict=True)
        return tuple(mn.SphereProduct(p, radius=joint.radii / 3**0.5).projx(x) for p, x in pairs)

    monkeypatch.setattr(JointSphere, "projx", alone)
    with pytest.raises(AssertionError):
        check_against_one_sphere(three(), torch.float64)


def test_distance_against_pymanopt() -> None:
    manifolds = pytest.importorskip("pymanopt.manifolds")
    joint = three(2.0)
    a, b = joint.projx(tensors(joint, 0)), joint.projx(tensors(joint, 1))
    sphere = manifolds.Sphere(concatenated(a).shape[1])
    rows = zip((concatenated(a) / 2).numpy(), (concatenated(b) / 2).numpy(), strict=True)
    expected = np.sqrt(sum(sphere.dist(x, y) ** 2 for x, y in rows))
    assert float(joint.dist(a, b)) == pytest.approx(expected, rel=1e-10)


def test_one_member_alone_refuses_what_it_cannot_know() -> None:
    member, point = three().manifolds[1], torch.randn(5, 4)
    for ask in (
        lambda: member.projx(point),
        lambda: member.proju(point, point),
        lambda: member.retr(point, point),
        lambda: member.dist(point, point),
        lambda: member.random_uniform(5, 4),
        lambda: member.check_point_on_manifold(point),
        lambda: member.check_vector_on_tangent(point, point),
        lambda: member.require_point(point, "table", rtol=1.0, remedy=""),
    ):
        with pytest.raises(ConstraintError, match=r"table: .*conv, transposed"):
            ask()
    assert member.group_inner(point, point).shape == (1, 4)
    assert "with conv, transposed" in str(member)


def test_data_and_bad_input() -> None:
    joint = three()
    assert JointSphere.from_dict(json.loads(json.dumps(joint.to_dict()))).to_dict() == joint.to_dict()
    data = joint.manifolds[2].to_dict()
    assert type(joint.manifolds[2]).from_dict(data).to_dict() == data
    with pytest.raises(PartitionError, match=r"\[2, 3\] groups"):
        JointSphere({"a": Partition.filters((2, 3)), "b": Partition.filters((3, 3))})
    with pytest.raises(PartitionError, match="no weights"):
        JointSphere({})
    points = tensors(joint, 0)
    with pytest.raises(OffManifoldError, match=r"conv \+ table"):
        joint.require_point(points, rtol=1e-3, remedy="")
    for point in points:
        point.zero_()
    with pytest.raises(DegenerateGroupError, match=r"conv \+ table"):
        joint.refuse_degenerate(points)


# ---- optimizers ------------------------------------------------------------------------------------------------------


def parameters_of(joint: JointSphere, dtype: torch.dtype) -> list[geoopt.ManifoldParameter]:
    pairs = zip(joint.projx(tensors(joint, 3, dtype)), joint.manifolds, strict=True)
    return [geoopt.ManifoldParameter(point, manifold=manifold) for point, manifold in pairs]


OPTIMIZERS: list[tuple[Any, dict[str, Any]]] = [
    (mn.optim.RiemannianSGD, {"lr": 0.1}),
    (mn.optim.RiemannianSGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    (mn.optim.RiemannianAdam, {"lr": 0.05}),
    (mn.optim.RiemannianAdam, {"lr": 0.05, "amsgrad": True}),
    (mn.optim.RiemannianSGD, {"lr": 0.1, "momentum": 0.9, "foreach": False}),
    (mn.optim.RiemannianAdam, {"lr": 0.05, "foreach": True}),
    (mn.optim.SGDG, {"lr": 0.1, "momentum": 0.9}),
]


def check_steps(make: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Some steps on the weights equal the same steps on their concatenation."""
    joint = three()
    weights = parameters_of(joint, dtype)
    whole = geoopt.ManifoldParameter(
        concatenated([w.detach() for w in weights]).clone(),
        manifold=mn.SphereProduct((4, concatenated(weights).shape[1]), radius=joint.radii),
    )
    optimizer, reference = make(weights, **options), make([whole], **options)
    for step in range(4):
        gradients = tensors(joint, 10 + step, dtype)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        whole.grad = concatenated(gradients)
        optimizer.step()
        reference.step()
        difference = (concatenated([w.detach() for w in weights]) - whole.detach()).abs().max()
        assert float(difference) <= 16 * torch.finfo(dtype).eps * float(whole.detach().abs().max())
        assert float(joint.deviations(weights).max()) <= 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_steps_equal_those_of_the_concatenated_tensor(make: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    check_steps(make, options, dtype)


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_steps_of_single_members_are_noticed(
    make: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sabotage twin: each member steps as if it were alone on its sphere."""

    @contextlib.contextmanager
    def alone(members: list[StepInput], **_: Any) -> Iterator[list[StepInput]]:
        spheres = [mn.SphereProduct(m.manifold.partition, radius=m.manifold.radii) for m in members]
        yield [dataclasses.replace(m, manifold=s) for m, s in zip(members, spheres, strict=True)]

    monkeypatch.setattr("manifold_nets.optim.base.joined", alone)
    with pytest.raises(AssertionError):
        check_steps(make, options, torch.float64)


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_states_are_saved_and_resumed(make: Any, options: dict[str, Any]) -> None:
    joint = three()
    weights = parameters_of(joint, torch.float64)
    other = [geoopt.ManifoldParameter(w.detach().clone(), manifold=w.manifold) for w in weights]
    first, second = make(weights, **options), make(other, **options)

    def step(optimizer: Any, params: Any, seed: int) -> None:
        for weight, gradient in zip(params, tensors(joint, seed), strict=True):
            weight.grad = gradient
        optimizer.step()

    step(first, weights, 1)
    with torch.no_grad():
        for a, b in zip(other, weights, strict=True):
            a.copy_(b)
    second.load_state_dict(first.state_dict())
    step(first, weights, 2)
    step(second, other, 2)
    assert all(torch.equal(a, b) for a, b in zip(weights, other, strict=True))
    assert set(first.state) <= set(weights)


@pytest.mark.parametrize("bound", [0.5, 5.0])
def test_gradients_are_clipped_by_the_joint_length(bound: float) -> None:
    joint = three()
    net = nn.ParameterList(parameters_of(joint, torch.float64))
    gradients = tensors(joint, 7)
    for weight, gradient in zip(net, gradients, strict=True):
        weight.grad = gradient.clone()
    radii = joint.radii[:, None]
    u = concatenated([w.detach() for w in net]) / radii
    lengths = (geoopt.Sphere().proju(u, concatenated(gradients)) * radii).norm(dim=1, keepdim=True)
    assert float(mn.optim.clip_sphere_grad_norm_(net, bound)) == pytest.approx(float(lengths.max()), rel=1e-12)
    expected = concatenated(gradients) * (bound / lengths).clamp(max=1)
    assert torch.allclose(concatenated([w.grad for w in net]), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(expected, concatenated(gradients))


def test_missing_gradients_count_as_zero() -> None:
    joint = three()
    a, b = parameters_of(joint, torch.float64), parameters_of(joint, torch.float64)
    for weights, zeros in ((a, False), (b, True)):
        optimizer = mn.optim.RiemannianSGD(weights, lr=0.1, momentum=0.9)
        optimizer.step()
        weights[0].grad = tensors(joint, 5)[0]
        if zeros:
            weights[1].grad, weights[2].grad = torch.zeros_like(weights[1]), torch.zeros_like(weights[2])
        optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_all_members_belong_in_one_group() -> None:
    weights = parameters_of(three(), torch.float64)
    with pytest.raises(ConstraintError, match="without transposed"):
        mn.optim.RiemannianSGD(weights[:2], lr=0.1)
    with pytest.raises(ConstraintError, match="without table, transposed"):
        mn.optim.RiemannianAdam([{"params": weights[:1]}, {"params": weights[1:]}])
    with torch.no_grad():
        weights[0].mul_(2)
    with pytest.raises(OffManifoldError, match=r"conv \+ table \+ transposed"):
        mn.optim.RiemannianSGD(weights, lr=0.1)


# ---- networks --------------------------------------------------------------------------------------------------------


def pre_activation() -> nn.Module:
    """A pre-activation residual network: the stem and both branches share one scale a channel."""

    def forward(m: Lambda, x: Tensor) -> Tensor:
        x = m.stem(x)
        x = x + m.c2(F.relu(m.n2(m.c1(F.relu(m.n1(x))))))
        x = x + m.c4(F.relu(m.n4(m.c3(F.relu(m.n3(x))))))
        return m.head(F.relu(m.n5(x)).mean((2, 3)))

    torch.manual_seed(0)
    convolutions = {f"c{k}": nn.Conv2d(4, 4, 3, padding=1, bias=False) for k in range(1, 5)}
    norms = {f"n{k}": nn.BatchNorm2d(4) for k in range(1, 6)}
    stem = nn.Conv2d(3, 4, 3, padding=1, bias=False)
    return Lambda(forward, stem=stem, **convolutions, **norms, head=nn.Linear(4, 3))


def llama() -> nn.Module:
    torch.manual_seed(0)
    return Llama()


class Llama(nn.Module):
    """Two pre-norm blocks of attention and gated feed-forward layers, with an untied head."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{n: nn.Linear(width, width, bias=False) for n in ("q_proj", "k_proj", "v_proj", "o_proj")},
                    "gate_proj": nn.Linear(width, 12, bias=False),
                    "up_proj": nn.Linear(width, 12, bias=False),
                    "down_proj": nn.Linear(12, width, bias=False),
                    "n1": nn.RMSNorm(width),
                    "n2": nn.RMSNorm(width),
                }
            )
            for _ in range(2)
        )
        self.norm, self.head = nn.RMSNorm(width), nn.Linear(width, 11, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            h = block["n1"](x)
            q, k, v = (block[n](h).unflatten(-1, (2, 4)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj"))
            x = x + block["o_proj"](F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            h = block["n2"](x)
            x = x + block["down_proj"](F.silu(block["gate_proj"](h)) * block["up_proj"](h))
        return self.head(self.norm(x))


def images() -> Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def tokens() -> Tensor:
    return torch.randint(0, 11, (4, 5), generator=torch.Generator().manual_seed(1))


STREAM = {"embedding.weight", *(f"blocks.{k}.{n}.weight" for k in range(2) for n in ("o_proj", "down_proj"))}
NETWORKS: list[tuple[Callable[[], nn.Module], Callable[[], Tensor], set[str], int, Any]] = [
    (pre_activation, images, {"stem.weight", "c2.weight", "c4.weight"}, 4, mn.optim.RiemannianSGD),
    (llama, tokens, STREAM, 1, mn.optim.RiemannianAdam),
]


@pytest.mark.parametrize(("build", "inputs", "expected", "groups", "make"), NETWORKS)
def test_convert_train_save_and_revert(
    build: Callable[[], nn.Module],
    inputs: Callable[[], Tensor],
    expected: set[str],
    groups: int,
    make: Any,
    tmp_path: Path,
) -> None:
    model, x = build(), inputs()
    converted = mn.convert(model, x, remedies=["spheres", "joint-spheres"])
    assert mn.verify(model, converted, x).eval_difference <= 1e-5
    ((joint, weights),) = mn.joint_spheres(converted)
    assert {weight.name for weight in weights} == expected
    assert joint.sphere.partition.n_groups == groups
    assert all(torch.equal(w.parameter, model.get_parameter(w.name)) for w in weights)
    before = [w.parameter.detach().clone() for w in weights]
    optimizer = make(mn.param_groups(converted, weight_decay=1e-2), lr=0.02)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = converted(x).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(not torch.equal(a, w.parameter) for a, w in zip(before, weights, strict=True))
    own = [w.parameter.norm() for w in weights]
    assert not torch.allclose(torch.stack(own), torch.stack([b.norm() for b in before]), rtol=1e-4)
    assert float(joint.deviations([w.parameter for w in weights]).max()) <= 4 * torch.finfo(torch.float32).eps
    mn.save(converted, tmp_path / "net.safetensors")
    loaded = mn.load(build(), tmp_path / "net.safetensors")
    ((again, others),) = mn.joint_spheres(loaded)
    assert again.to_dict() == joint.to_dict()
    assert all(torch.equal(a.parameter, b.parameter) for a, b in zip(weights, others, strict=True))
    plain = mn.revert(converted)
    assert mn.verify(converted, plain, x) == mn.conversion.Verification(0.0, 0.0)
    assert not any(isinstance(p, geoopt.ManifoldParameter) for p in plain.parameters())
    assert list(plain.state_dict()) == list(model.state_dict())


def test_membership_survives_copies_pickles_restoring_and_loading(tmp_path: Path) -> None:
    converted = mn.convert(llama(), tokens(), remedies="joint-spheres")
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        ((joint, weights),) = mn.joint_spheres(copied)
        assert len(weights) == 5
        assert joint is not mn.joint_spheres(converted)[0][0]
    changed = copy.deepcopy(converted)
    changed.load_state_dict(llama().state_dict(), assign=True)
    assert len(mn.joint_spheres(changed)[0][1]) == 5
    assert set(mn.restore(changed)) == STREAM
    assert all(isinstance(w.parameter.manifold, JointSphereMember) for w in mn.joint_spheres(changed)[0][1])
    mn.save(converted, tmp_path / "net.safetensors")
    kept = [weight.parameter for weight in mn.joint_spheres(converted)[0][1]]
    mn.load(converted, tmp_path / "net.safetensors")
    assert all(a is w.parameter for a, w in zip(kept, mn.joint_spheres(converted)[0][1], strict=True))
    mn.constraints.attach(converted.embedding, "weight", mn.SphereProduct((11, 8), kept=()), None)
    mn.load(converted, tmp_path / "net.safetensors")
    assert len(mn.joint_spheres(converted)[0][1]) == 5


def test_a_part_of_a_joint_sphere_is_refused(tmp_path: Path) -> None:
    converted = mn.convert(llama(), tokens(), remedies="joint-spheres")
    mn.constraints.detach(converted.embedding, "weight")
    with pytest.raises(ConstraintError, match=r"without embedding\.weight"):
        mn.save(converted, tmp_path / "net.safetensors")
    assert not (tmp_path / "net.safetensors").exists()
    with pytest.raises(ConstraintError, match=r"without embedding\.weight"):
        mn.optim.RiemannianSGD(mn.param_groups(converted), lr=0.1)
    with pytest.raises(ConstraintError, match="project"):
        mn.optim.AveragedModel(converted)


def test_project_and_save_look_at_the_joint_norm(tmp_path: Path) -> None:
    converted = mn.convert(pre_activation(), images(), remedies="joint-spheres")
    with torch.no_grad():
        for weight in mn.joint_spheres(converted)[0][1]:
            weight.parameter.mul_(1.5)
    with pytest.raises(OffManifoldError, match=r"stem\.weight \+ "):
        mn.save(converted, tmp_path / "net.safetensors")
    deviations = mn.project(converted)
    assert set(deviations) == {"stem.weight", "c2.weight", "c4.weight"}
    assert all(value == pytest.approx(0.5, rel=1e-5) for value in deviations.values())
    assert max(mn.project(converted).values()) < 1e-6
    mn.save(converted, tmp_path / "net.safetensors")
    damaged = (tmp_path / "net.safetensors").read_bytes()
    (tmp_path / "net.safetensors").write_bytes(damaged[:-3] + b"abc")
    with pytest.raises(CheckpointFormatError):
        mn.load(pre_activation(), tmp_path / "net.safetensors")


def test_twice_changes_nothing_and_plans_can_be_edited(tmp_path: Path) -> None:
    model, x = pre_activation(), images()
    plan = mn.plan(model, x, remedies="joint-spheres")
    assert plan["joint sphere 1"].members == ("stem.weight rows", "c2.weight rows", "c4.weight rows")
    write_plan(plan, tmp_path / "plan.json")
    converted = mn.convert(model, x, plan=tmp_path / "plan.json")
    assert len(mn.joint_spheres(converted)[0][1]) == 3
    again = mn.convert(converted, x, remedies="joint-spheres")
    assert mn.conversion_record(again).plan["joint sphere 1"].action == "already"
    assert len(mn.joint_spheres(again)) == 1
    data = json.loads((tmp_path / "plan.json").read_text())
    data["actions"][-1]["name"] = "joint sphere 7"
    before = snapshot(model)
    with pytest.raises(PlanError, match="joint sphere 7"):
        mn.convert(model, x, plan=data, inplace=True)
    assert_same(before, snapshot(model))


def test_what_is_no_sphere_is_left_with_the_reason() -> None:
    report = mn.diagnose(PreNorm(), torch.randint(0, 7, (3, 5)))
    plan = mn.plan(PreNorm(), report, remedies="joint-spheres", exclude="down.weight")
    assert plan["joint sphere 1"].reason == "not selected"
    family = next(f for f in report.families if "embedding.weight" in f.parameters)
    members = tuple(dataclasses.replace(m, exponent=k + 1.0) for k, m in enumerate(family.members))
    mixed = dataclasses.replace(report, families=(dataclasses.replace(family, members=members),))
    assert "different powers" in mn.plan(PreNorm(), mixed, remedies="joint-spheres")["joint sphere 1"].reason
    parts = [(part, 1 if part.parameter == "embedding.weight" else 0) for part in family.generators.parts]
    first = tuple(Part(p.parameter, p.partition, p.groups[:n], p.numbers[:n], p.coefficients[:n]) for p, n in parts)
    half = dataclasses.replace(family, generators=dataclasses.replace(family.generators, parts=first))
    partly = dataclasses.replace(report, families=(half,))
    assert "only some of the columns" in mn.plan(PreNorm(), partly, remedies="joint-spheres")["joint sphere 1"].reason
    model = PreNorm()
    norm = float(model.down.weight.detach().norm())
    mn.constraints.attach(model.down, "weight", mn.SphereProduct((6, 8), kept=(), radius=norm))
    plan = mn.plan(model, report, remedies="joint-spheres")
    assert plan["joint sphere 1"].reason == "down.weight is on spheres"


def test_a_step_says_where_other_code_has_moved_weights_off_a_joint_sphere() -> None:
    converted = mn.convert(pre_activation(), images(), remedies="joint-spheres")
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(converted), lr=1e-3)
    with torch.no_grad():
        mn.joint_spheres(converted)[0][1][0].parameter.mul_(3.0)
    converted(images()).square().mean().backward()
    with pytest.warns(UserWarning, match="other code, such as weight averaging, moved it off its spheres"):
        optimizer.step()
    optimizer.step()
