"""mn.constrain and mn.unconstrain: by name, in place, whole or not at all, and with true words about what changed."""

from __future__ import annotations

import copy
import io
import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from helpers.sphere_cases import eps
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.constraints import attach, constrained_weights
from manifold_nets.errors import (
    ArgumentTypeError,
    ConstraintError,
    DegenerateGroupError,
    EuclideanStepError,
    OffManifoldError,
    OptionError,
)


class Autoencoder(nn.Module):
    """A sparse autoencoder with an attention block, for names of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up = nn.ConvTranspose2d(4, 6, 3, groups=2)
        self.attention = nn.MultiheadAttention(8, 2)
        self.scale = nn.Parameter(torch.tensor([3.0, 4.0]))

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x).relu())


@pytest.fixture
def model() -> Autoencoder:
    torch.manual_seed(0)
    return Autoencoder().double()


def groups_by_loop(weight: Tensor, per: str, heads: int = 6) -> list[Tensor]:
    """The entries of each group, picked out by indices."""
    if per == "tensor":
        return [weight.flatten()]
    if per == "column":
        return [weight[:, i].flatten() for i in range(weight.shape[1])]
    if per == "head":
        size = len(weight) // heads
        return [weight[i * size : (i + 1) * size].flatten() for i in range(heads)]
    if weight.ndim == 4:  # the transposed convolution, in two groups of two input and three output channels
        return [weight[2 * (c // 3) : 2 * (c // 3) + 2, c % 3].flatten() for c in range(6)]
    return [weight[i].flatten() for i in range(len(weight))]


CASES = [
    ("encoder.weight", "filter"),
    ("up.weight", "filter"),
    ("encoder.weight", "row"),
    ("decoder.weight", "column"),
    ("decoder.weight", "tensor"),
    ("scale", "tensor"),
    ("attention.in_proj_weight", "head"),
]


def check_constrained(model: nn.Module, name: str, per: Any, radius: float | str) -> None:
    """Constrain, and compare norms, directions and the record with those of groups picked out by loops."""
    before = model.get_parameter(name).detach().clone()
    record = mn.constrain(model, name, per=per, radius=radius)
    weight = model.get_parameter(name)
    assert isinstance(weight, geoopt.ManifoldParameter)
    old, new = groups_by_loop(before, per), groups_by_loop(weight.detach(), per)
    norms = torch.stack([group.norm() for group in old])
    assert weight.manifold.partition.n_groups == len(old)
    for one, two in zip(old, new, strict=True):
        scale = 1.0 if radius == "keep" else float(radius) / one.norm()
        torch.testing.assert_close(two, scale * one, rtol=8 * eps(torch.float64), atol=0)
    assert torch.equal(weight, before) == record.function_kept == (radius == "keep")
    (row,) = record.weights
    assert row.name == name
    found = torch.tensor([row.smallest, row.median, row.largest], dtype=torch.float64)
    torch.testing.assert_close(found, torch.stack([norms.min(), norms.median(), norms.max()]))
    assert row.change == pytest.approx(float((weight.detach() - before).norm() / before.norm()), abs=1e-12)
    json.dumps(record.to_dict())


@pytest.mark.parametrize("radius", [1.0, 2.5, "keep"])
@pytest.mark.parametrize(("name", "per"), CASES)
def test_groups_get_their_radius_and_keep_their_direction(
    model: Autoencoder, name: str, per: str, radius: float | str
) -> None:
    check_constrained(model, name, per, radius)


def test_sabotage_other_groups_are_noticed(model: Autoencoder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mn.constraining, "_partition", lambda *_: mn.Partition.filters((8, 12)))
    with pytest.raises(AssertionError):
        check_constrained(model, "decoder.weight", "column", 1.0)


def test_a_partition_divides_a_weight_as_it_says(model: Autoencoder) -> None:
    mn.constrain(model, "encoder.weight", per=mn.Partition.blocks((12, 8), 4))
    norms = model.encoder.weight.detach().reshape(4, -1).norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("decoder.weight", {"decoder.weight"}),
        ("*coder.weight", {"encoder.weight", "decoder.weight"}),
        (["decoder", "up"], {"decoder.weight", "up.weight"}),
        (lambda name: name.startswith("en"), {"encoder.weight"}),
        (
            "*",
            {"encoder.weight", "decoder.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight"},
        ),
        (["scale", "encoder.bias"], {"scale", "encoder.bias"}),
    ],
)
def test_names_patterns_modules_and_predicates(model: Autoencoder, names: Any, expected: set[str]) -> None:
    record = mn.constrain(model, names, per="tensor")
    assert {weight.name for weight in record.weights} == expected == {w.name for w in constrained_weights(model)}


def test_the_record_says_what_changed(model: Autoencoder) -> None:
    changed, kept = (str(mn.constrain(copy.deepcopy(model), "*coder.weight", radius=r)) for r in (1.0, "keep"))
    assert "Autoencoder: 2 weights put on spheres" in changed
    assert "12 filters of 8; norms 0." in changed
    assert "set to 1; the weight changed by" in changed
    assert "The function changed: rescaling a weight is not a symmetry in general." in changed
    assert "kept" in kept
    assert "The function is the same." in kept
    assert "changed by" not in kept


# ---- refusals: nothing is half done ----------------------------------------------------------------------------------


def zeroed(model: Autoencoder) -> None:
    with torch.no_grad():
        model.encoder.weight[3] = 0


def doubly(model: Autoencoder) -> None:
    mn.constrain(model, "encoder.weight")


def normalized(model: Autoencoder) -> None:
    nn.utils.parametrizations.weight_norm(model.encoder)


REFUSALS: list[tuple[Any, dict[str, Any], type[Exception], str, Callable[[Autoencoder], None] | None]] = [
    (["decoder.weight", "decoder.wieght"], {}, OptionError, "Near matches: decoder.weight", None),
    (lambda name: False, {}, OptionError, "a predicate", None),
    ([], {}, OptionError, "at least one weight", None),
    ("*coder.weight", {"radius": 0.0}, OptionError, "radius: found 0.0", None),
    ("*coder.weight", {"radius": math.nan}, OptionError, "radius: found nan", None),
    ("*coder.weight", {"radius": "unit"}, OptionError, "or 'keep'", None),
    ("*coder.weight", {"per": "rows"}, OptionError, "'filter', 'row', 'column', 'tensor', 'head'", None),
    ("*coder.weight", {"per": mn.Partition.filters((8, 12))}, ConstraintError, r"shape \(12, 8\)", None),
    (["decoder.weight", "scale"], {"per": "column"}, ConstraintError, "a shape with the axis that", None),
    (["attention.in_proj_weight", "decoder.weight"], {"per": "head"}, ConstraintError, "Partition.blocks", None),
    ("*coder.weight", {}, DegenerateGroupError, "encoder.weight: group 3 with norm 0", zeroed),
    (["decoder.weight", "encoder.weight"], {}, ConstraintError, "on SphereProduct.* already", doubly),
    ("encoder.parametrizations.*", {}, ConstraintError, "a parameter under a parametrization", normalized),
    (None, {}, ArgumentTypeError, "names: found", None),
    (3, {}, ArgumentTypeError, "names: found 3", None),
    (["decoder.weight", 3], {}, ArgumentTypeError, "names: found 3", None),
    (["decoder.weight", "scale"], {}, ConstraintError, "scale: found spheres of one entry", None),
    ("decoder.weight", {"radius": 1e-315}, ConstraintError, "one that torch.float64 can hold", None),
]


@pytest.mark.parametrize(("names", "options", "error", "message", "before"), REFUSALS)
def test_what_cannot_be_done_leaves_the_model_as_it_was(
    model: Autoencoder, names: Any, options: dict[str, Any], error: Any, message: str, before: Any
) -> None:
    if before is not None:
        before(model)
    held, values = dict(model.named_parameters()), copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        mn.constrain(model, names, **options)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in held.items()}
    assert all(torch.equal(value, values[name]) for name, value in model.state_dict().items())
    assert len(list(constrained_weights(model))) == (before is doubly)


def test_weights_without_values_and_embeddings_that_rescale_rows_are_refused() -> None:
    with pytest.raises(ConstraintError, match="no values yet"):
        mn.constrain(nn.LazyLinear(3), "weight")
    with pytest.raises(ConstraintError, match="no values yet"):
        mn.constrain(nn.Linear(2, 3, device="meta"), "weight")
    with pytest.raises(ConstraintError, match="max_norm=1"):
        mn.constrain(nn.Embedding(4, 3, max_norm=1.0), "weight")


# ---- taking weights off again ----------------------------------------------------------------------------------------


def test_unconstrain_keeps_the_values(model: Autoencoder) -> None:
    mn.constrain(model, ["*coder.weight", "scale"], per="tensor", radius=2.0)
    before = copy.deepcopy(model.state_dict())
    assert mn.unconstrain(model, "encoder") == ["encoder.weight"]
    assert [w.name for w in constrained_weights(model)] == ["scale", "decoder.weight"]
    assert mn.unconstrain(model) == ["scale", "decoder.weight"]
    assert mn.unconstrain(model) == []
    assert all(type(p) is nn.Parameter for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(OptionError):
        mn.unconstrain(model, "encoder.weight")


def test_unit_norm_layers_become_torchs() -> None:
    model = nn.Sequential(mn.layers.UnitNormEmbedding(4, 3, padding_idx=0), mn.layers.UnitNormLinear(3, 2))
    assert mn.unconstrain(model) == ["0.weight", "1.weight"]
    assert [type(layer) for layer in model] == [nn.Embedding, nn.Linear]
    model[1].reset_parameters()
    assert type(model[1].weight) is nn.Parameter


def test_converted_weights_and_parts_of_joint_spheres_are_not_taken_off() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))
    converted = mn.convert(net, torch.randn(16, 4))
    mn.constrain(converted, "3.weight")
    assert mn.unconstrain(converted) == ["3.weight"]
    with pytest.raises(ConstraintError, match="a weight on spheres by conversion"):
        mn.unconstrain(converted, "0.weight")
    two = nn.Sequential(nn.Linear(3, 2), nn.Linear(5, 2))
    joint = mn.JointSphere({"0.weight": mn.Partition.filters((2, 3)), "1.weight": mn.Partition.filters((2, 5))})
    for layer, manifold, point in zip(two, joint.manifolds, joint.projx([two[0].weight, two[1].weight]), strict=True):
        attach(layer, "weight", manifold, point)
    with pytest.raises(ConstraintError):
        mn.unconstrain(two, "0.weight")
    assert mn.unconstrain(two) == ["0.weight", "1.weight"]


def test_radii_that_a_dtype_cannot_hold_are_refused() -> None:
    for dtype, radius in ((torch.float16, 1e-7), (torch.float32, 1e-42), (torch.float16, 1e6)):
        with pytest.raises(ConstraintError, match=f"one that {dtype} can hold"):
            mn.constrain(nn.Linear(4, 3).to(dtype), "weight", radius=radius)
    for dtype, radius in ((torch.float16, 1e-3), (torch.float32, 1e-37)):
        mn.constrain(nn.Linear(4, 3).to(dtype), "weight", radius=radius)


def test_models_and_names_of_another_kind_are_refused(model: Autoencoder) -> None:
    for call in (mn.constrain, mn.unconstrain):
        with pytest.raises(ArgumentTypeError, match=r"model: found .*expected a torch\.nn\.Module"):
            call(model.state_dict(), "encoder.weight")
    with pytest.raises(OptionError, match="no weight of the model is on spheres"):
        mn.unconstrain(model, "encoder.weight")
    with pytest.raises(OptionError, match="none here has two dimensions"):
        mn.constrain(nn.LayerNorm(3), "wieght")
    mn.constrain(model, "encoder")
    with pytest.raises(ArgumentTypeError, match="names: found 3"):
        mn.unconstrain(model, 3)


@pytest.mark.parametrize("names", ["head.weight", "head", "he*", lambda name: name.startswith("head")])
def test_every_name_of_a_shared_weight_counts(names: Any) -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    assert [weight.name for weight in mn.constrain(model, names).weights] == ["embedding.weight"]
    assert model["head"].weight is model["embedding"].weight
    assert mn.unconstrain(model, names) == ["embedding.weight"]
    assert model["head"].weight is model["embedding"].weight


@pytest.mark.parametrize("names", ["0.weight", "0", "wrapped.0.weight", lambda name: name == "0.weight"])
@pytest.mark.parametrize("wrapper", ["_orig_mod", "module"])
def test_wrapped_models_take_the_names_of_the_inner_one(wrapper: str, names: Any) -> None:
    inner = nn.Sequential(nn.Linear(4, 3))
    model = nn.DataParallel(inner) if wrapper == "module" else torch.compile(inner, backend="eager")
    names = names.replace("wrapped", wrapper) if isinstance(names, str) else names
    record = mn.constrain(model, names)
    assert (record.model, [weight.name for weight in record.weights]) == ("Sequential", ["0.weight"])
    assert [weight.name for weight in constrained_weights(inner)] == ["0.weight"]
    assert mn.unconstrain(model, names) == ["0.weight"]


def test_distributed_data_parallel_is_to_be_made_anew() -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Linear(4, 3))
        with pytest.warns(UserWarning, match="Wrap the model again"):
            mn.constrain(model, "weight")
        with pytest.warns(UserWarning, match="Wrap the model again"):
            mn.unconstrain(model)
        assert type(model.module.weight) is nn.Parameter
    finally:
        torch.distributed.destroy_process_group()


def test_an_optimizer_that_holds_a_weight_that_was_taken_off_is_noticed(model: Autoencoder) -> None:
    mn.constrain(model, "decoder.weight", per="column")
    optimizer = own(model)
    train(model, optimizer)
    mn.unconstrain(model)
    with pytest.warns(UserWarning, match=r"Linear\.weight: taken off its spheres after RiemannianAdam was built"):
        train(model, optimizer)
    train(model, torch.optim.Adam(model.parameters()))


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleDict({"embedding": nn.Embedding(6, 4), "head": nn.Linear(4, 6, bias=False)})
    model["head"].weight = model["embedding"].weight
    mn.constrain(model, "embedding")
    assert model["head"].weight is model["embedding"].weight
    assert [w.name for w in constrained_weights(model)] == ["embedding.weight"]
    mn.unconstrain(model)
    assert model["head"].weight is model["embedding"].weight
    assert type(model["head"].weight) is nn.Parameter


# ---- training, states, files -----------------------------------------------------------------------------------------


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    torch.manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 8, dtype=torch.float64)).square().sum().backward()
        optimizer.step()


def own(model: nn.Module) -> torch.optim.Optimizer:
    return mn.optim.RiemannianAdam(mn.param_groups(model, sphere_lr=0.1), lr=0.01)


def test_optimizers_keep_the_norms_and_others_are_stopped(model: Autoencoder) -> None:
    mn.constrain(model, "decoder.weight", per="column", radius=2.0)
    groups = mn.param_groups(model, weight_decay=0.1)
    assert groups[0]["param_names"] == ["decoder.weight"]
    assert groups[0]["weight_decay"] == 0
    before = model.decoder.weight.detach().clone()
    train(model, own(model))
    assert not torch.equal(before, model.decoder.weight)
    norms = model.decoder.weight.detach().norm(dim=0)
    torch.testing.assert_close(norms, torch.full_like(norms, 2.0), rtol=4 * eps(torch.float64), atol=0)
    with pytest.raises(EuclideanStepError, match=r"Linear\.weight"):
        train(model, torch.optim.Adam(model.parameters()))


def test_an_optimizer_that_was_built_before_is_noticed(model: Autoencoder) -> None:
    optimizer = torch.optim.Adam(model.parameters())
    mn.constrain(model, "decoder.weight", per="column")
    with pytest.warns(UserWarning, match="still holds the old parameter"):
        train(model, optimizer)


def saved_and_loaded(model: Autoencoder, path: Path) -> nn.Module:
    mn.save(model, path)
    return mn.load(Autoencoder().double(), path)


@pytest.mark.parametrize(
    "copied",
    [
        lambda model, _: copy.deepcopy(model),
        lambda model, _: pickle.loads(pickle.dumps(model)),
        lambda model, _: torch.load(io.BytesIO(_torch_bytes(model)), weights_only=False),
        lambda model, path: saved_and_loaded(model, path / "net.safetensors"),
    ],
)
def test_copies_and_files_keep_constraints_and_train_on_alike(
    model: Autoencoder, copied: Callable[..., nn.Module], tmp_path: Path
) -> None:
    mn.constrain(model, ["decoder.weight"], per="column")
    mn.constrain(model, "encoder.weight", per="tensor", radius="keep")
    other = copied(model, tmp_path)
    assert {w.name: w.manifold.to_dict() for w in constrained_weights(other)} == {
        w.name: w.manifold.to_dict() for w in constrained_weights(model)
    }
    for net in (model, other):
        train(net, own(net))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert mn.project(other)["decoder.weight"] < 8 * eps(torch.float64)
    assert mn.unconstrain(other) == ["encoder.weight", "decoder.weight"]


def _torch_bytes(model: nn.Module) -> bytes:
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def test_an_embedding_with_padding_goes_through_a_file(tmp_path: Path) -> None:
    layer = nn.Embedding(5, 3, padding_idx=0)
    (lowest,) = re.findall(r"; norms (\S+)", str(mn.constrain(layer, "weight", radius="keep")))
    assert float(lowest) == pytest.approx(float(layer.weight.detach()[1:].norm(dim=1).min()), rel=1e-2)
    mn.save(layer, tmp_path / "rows.safetensors")
    loaded = mn.load(nn.Embedding(5, 3, padding_idx=0), tmp_path / "rows.safetensors")
    assert loaded.weight.manifold.to_dict() == layer.weight.manifold.to_dict()
    optimizer = mn.optim.RiemannianSGD(mn.param_groups(loaded), lr=0.1)
    loaded(torch.arange(5)).sum().backward()
    optimizer.step()
    assert not loaded.weight[0].any()
    assert loaded.weight.manifold.check_point_on_manifold(loaded.weight)


def test_states_are_loaded_where_they_lie_on_the_spheres(model: Autoencoder) -> None:
    plain = copy.deepcopy(model.state_dict())
    mn.constrain(model, "decoder.weight", per="column")
    other = Autoencoder().double()
    mn.constrain(other, "decoder.weight", per="column")
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.decoder.weight, model.decoder.weight)
    with pytest.raises(OffManifoldError, match=r"decoder\.weight.*mn\.unconstrain|manifold_nets\.unconstrain"):
        other.load_state_dict(plain)


def test_revert_gives_the_plain_network(model: Autoencoder) -> None:
    mn.constrain(model, "decoder.weight", per="column")
    plain = mn.revert(model)
    assert type(plain.decoder.weight) is nn.Parameter
    x = torch.randn(3, 8, dtype=torch.float64)
    assert torch.equal(plain(x), model(x))


# ---- learning rates --------------------------------------------------------------------------------------------------


def turn(before: Tensor, after: Tensor) -> Tensor:
    """Angle of each column, by Kahan's formula."""
    u, v = before / before.norm(dim=0), after / after.norm(dim=0)
    return 2 * torch.atan2((u - v).norm(dim=0), (u + v).norm(dim=0))


def turns(make: Callable[[nn.Module], torch.optim.Optimizer], radius: float, tangent: bool) -> Tensor:
    """How far one step turns each column; the gradient is made tangent first where asked for, as the recipe does."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 400, bias=False, dtype=torch.float64)
    mn.constrain(layer, "weight", per="column", radius=radius)
    before = layer.weight.detach().clone()
    optimizer = make(layer)
    if not isinstance(optimizer, mn.optim.RiemannianSGD):
        mn.optim.allow_euclidean(optimizer)
    layer(torch.randn(7, 6, dtype=torch.float64)).pow(3).sum().backward()
    if tangent:
        layer.weight.grad = layer.weight.manifold.proju(layer.weight, layer.weight.grad)
    optimizer.step()
    return turn(before, layer.weight.detach())


def check_matched(kind: str, fault: float = 1.0) -> None:
    """Compare the angles of the usual recipe's step with those at the matched rate."""
    for radius in (0.5, 1.0, 3.0):
        lr = 1e-5 if kind == "sgd" else 1e-4
        plain = torch.optim.SGD if kind == "sgd" else torch.optim.Adam
        ours = mn.optim.RiemannianSGD if kind == "sgd" else mn.optim.RiemannianAdam

        def matched(layer: nn.Module, lr: float = lr, ours: Any = ours) -> torch.optim.Optimizer:
            rates = mn.matched_learning_rates(layer, optimizer=kind, lr=lr).by_weight()
            return ours(mn.param_groups(layer, sphere_lr={n: fault * r for n, r in rates.items()}), lr=1.0)

        expected = turns(lambda layer, lr=lr, plain=plain: plain(layer.parameters(), lr=lr), radius, tangent=True)
        found = turns(matched, radius, tangent=True)
        # Exact for SGD to first order in the angle; for Adam the signs have a part along the weight, some 1/d of it.
        tolerance = 1e-4 if kind == "sgd" else 0.02
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_matched_rates_of_weights_on_spheres_take_the_recipes_step(kind: str) -> None:
    check_matched(kind)


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_sabotage_a_rate_without_the_root_of_the_size_is_noticed(kind: str) -> None:
    with pytest.raises(AssertionError):
        check_matched(kind, 1.05)


def test_rates_without_a_diagnosis_are_those_of_the_radii(model: Autoencoder) -> None:
    mn.constrain(model, "decoder.weight", per="column", radius=2.0)
    rates = mn.matched_learning_rates(model, optimizer="adamw", lr=1e-3, weight_decay=0.1)
    assert rates["decoder.weight"].groups == 12
    assert rates["decoder.weight"].next_step.median == pytest.approx(1e-3 * math.sqrt(8) / (2 * (1 - 1e-4)))
    assert rates.long_run == "weight decay has no effect on weights whose norms are held fixed"
    entries = mn.matched_learning_rates(model, optimizer="adam", lr=1e-3, per="entry")
    assert entries["decoder.weight"].next_step.median == pytest.approx(5e-4)
    with pytest.raises(OptionError, match="per: found 'entry'"):
        mn.matched_learning_rates(model, lr=1e-3, per="entry")
