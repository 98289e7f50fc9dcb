"""UnitNorm layers: torch's layers in everything but the weight, which lies on the unit spheres of its filters."""

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from helpers.sphere_cases import eps, noise
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets import layers
from manifold_nets.constraints import constrained_weights, detach, lost_constraints
from manifold_nets.errors import OffManifoldError, OptionError
from manifold_nets.padded import PaddedSphereProduct

EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
PAIRS = {plain: twin for plain, twin in layers.UNIT_NORM_LAYERS.items() if plain not in EMBEDDINGS}
PADDING_MODES = ("zeros", "reflect", "replicate", "circular")
CONVOLUTIONS = [
    {},
    {"stride": 2, "padding": 1, "bias": False},
    {"groups": 2, "dilation": 2},
    {"groups": 4, "padding": "same"},
    *({"padding": 2, "padding_mode": mode} for mode in PADDING_MODES),
]
TRANSPOSED = [
    {},
    {"stride": 2, "padding": 1, "output_padding": 1, "bias": False},
    {"groups": 2, "dilation": 2},
    {"groups": 4},
]


def cases() -> list[tuple[type[nn.Module], dict[str, Any]]]:
    """Return each torch layer with constructor arguments."""
    found: list[tuple[type[nn.Module], dict[str, Any]]] = []
    for plain in PAIRS:
        if plain is nn.Linear:
            found += [(plain, {"in_features": 4, "out_features": 8, "bias": bias}) for bias in (True, False)]
        else:
            base = {"in_channels": 4, "out_channels": 8, "kernel_size": 3}
            found += [
                (plain, base | extra) for extra in (TRANSPOSED if "Transpose" in plain.__name__ else CONVOLUTIONS)
            ]
    return found


every_case = pytest.mark.parametrize(
    ("plain", "arguments"), cases(), ids=lambda v: v.__name__ if isinstance(v, type) else "-".join(map(str, v.values()))
)
every_layer = pytest.mark.parametrize("plain", PAIRS)


def small(plain: type[nn.Module], **extra: Any) -> nn.Module:
    """Return the unit-norm twin of a torch layer with 4 inputs and 6 outputs."""
    sizes = (4, 6) if plain is nn.Linear else (4, 6, 3)
    return PAIRS[plain](*sizes, **extra)


def inputs_for(layer: nn.Module, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return inputs of the number of dimensions that a layer takes."""
    spatial = layer.weight.dim() - 2
    return noise((2, 4, *[7] * spatial), dtype)


def assert_unit_filters(layer: nn.Module) -> None:
    """Require filters of unit norm, picked out of the weight by loops over the output channels."""
    weight, expected = layer.weight.detach().double(), 1.0
    for channel in range(layer.weight.manifold.partition.n_groups):
        if isinstance(layer, nn.modules.conv._ConvTransposeNd):
            group, index = divmod(channel, layer.out_channels // layer.groups)
            block = layer.in_channels // layer.groups
            entries = weight[group * block : (group + 1) * block, index]
        else:
            entries = weight[channel]
        assert float(entries.norm()) == pytest.approx(expected, abs=2 * eps(layer.weight.dtype))


# ---- torch's layers ------------------------------------------------------------------------------------------------


def check_is_the_torch_layer(layer: nn.Module, plain: nn.Module) -> None:
    """Compare names, shapes, output and gradients with those of the torch layer that holds the same values."""
    assert {name: value.shape for name, value in layer.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }
    plain.load_state_dict(layer.state_dict())
    x, y = (inputs_for(layer).requires_grad_() for _ in range(2))
    found, expected = layer(x), plain(y)
    assert torch.equal(found, expected)
    found.square().sum().backward()
    expected.square().sum().backward()
    for one, two in zip((x, *layer.parameters()), (y, *plain.parameters()), strict=True):
        assert torch.equal(one.grad, two.grad)


@every_case
def test_a_layer_is_torchs_with_unit_filters(plain: type[nn.Module], arguments: dict[str, Any]) -> None:
    layer = PAIRS[plain](**arguments)
    assert isinstance(layer, plain)
    assert layer.weight.manifold.partition.n_groups == 8
    assert_unit_filters(layer)
    check_is_the_torch_layer(layer, plain(**arguments))
    assert "forward" not in vars(type(layer))


def test_a_layer_that_differs_is_noticed() -> None:
    layer = layers.UnitNormConv2d(4, 8, 3, padding=1)
    with pytest.raises(AssertionError):
        check_is_the_torch_layer(layer, nn.Conv2d(4, 8, 3, padding=1, padding_mode="circular"))
    with torch.no_grad():
        layer.weight[3] *= 1 + 4 * eps(torch.float32)
    with pytest.raises(AssertionError):
        assert_unit_filters(layer)


def test_every_torch_layer_has_a_twin_of_its_own_name() -> None:
    twins = layers.UNIT_NORM_LAYERS
    assert {f"UnitNorm{plain.__name__}" for plain in twins} == {name for name in layers.__all__ if "UnitNorm" in name}
    assert all(getattr(layers, f"UnitNorm{plain.__name__}") is twin for plain, twin in twins.items())


@every_layer
def test_the_bias_is_drawn_as_torch_draws_it(plain: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = small(plain)
    torch.manual_seed(0)
    expected = plain(*((4, 6) if plain is nn.Linear else (4, 6, 3)))
    assert torch.equal(layer.bias, expected.bias)
    assert not torch.equal(layer.weight, expected.weight)


@every_layer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_layers_are_made_in_a_dtype(plain: type[nn.Module], dtype: torch.dtype) -> None:
    layer = small(plain, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert_unit_filters(layer)
    assert layer(inputs_for(layer, dtype)).isfinite().all()


# ---- drawing -------------------------------------------------------------------------------------------------------


def check_uniform(draw: Callable[[], Tensor]) -> None:
    """Require the fourth moment that a coordinate of a uniform point of a sphere in 4 dimensions has, 3/(4·6)."""
    n = 4000
    rows = draw().detach().double().reshape(n, 4)
    # Six standard deviations: a coordinate to the fourth has variance below E u⁸ = 105/(4·6·8·10).
    deviation = 6 * math.sqrt(105 / 1920 / n)
    assert float((rows.pow(4).mean(0) - 1 / 8).abs().max()) < deviation
    assert float((rows.T @ rows / n - torch.eye(4) / 4).abs().max()) < deviation


def test_filters_are_uniform_on_their_spheres() -> None:
    torch.manual_seed(0)
    check_uniform(lambda: layers.UnitNormLinear(4, 4000).weight)
    check_uniform(lambda: layers.UnitNormConvTranspose2d(1, 4000, 2).weight)


def test_normalized_signs_are_not_uniform() -> None:
    with pytest.raises(AssertionError):
        check_uniform(lambda: noise((4000, 4)).sign() / 2)


@every_layer
def test_resetting_draws_again_into_the_same_parameter(plain: type[nn.Module]) -> None:
    torch.manual_seed(0)
    layer = small(plain)
    parameter, before = layer.weight, layer.weight.detach().clone()
    layer.reset_parameters()
    assert layer.weight is parameter
    assert not torch.equal(parameter, before)
    assert_unit_filters(layer)
    torch.manual_seed(0)
    layer.reset_parameters()
    assert torch.equal(parameter, before)


@every_layer
@pytest.mark.parametrize("way", ["to meta", "made on meta", "device context", "skip_init", "assign"])
def test_resetting_renews_a_parameter_that_was_lost(plain: type[nn.Module], way: str) -> None:
    sizes = (4, 6) if plain is nn.Linear else (4, 6, 3)
    if way == "skip_init":
        layer = nn.utils.skip_init(PAIRS[plain], *sizes)
    elif way == "device context":
        with torch.device("meta"):
            layer = small(plain)
    else:
        layer = small(plain, device="meta" if way == "made on meta" else None)
    if way == "assign":
        layer.load_state_dict(PAIRS[plain](*sizes).state_dict(), assign=True)
    elif way != "skip_init":
        layer = layer.to("meta").to_empty(device="cpu")
    assert not isinstance(layer.weight, geoopt.ManifoldParameter)
    assert lost_constraints(layer.parameters()) == [f"{type(layer).__name__}.weight"]
    (weight,) = constrained_weights(layer)
    layer.reset_parameters()
    assert isinstance(layer.weight, geoopt.ManifoldParameter)
    assert layer.weight.manifold is weight.manifold
    assert lost_constraints(layer.parameters()) == []
    assert_unit_filters(layer)


def test_a_layer_on_the_meta_device_has_its_manifold() -> None:
    layer = layers.UnitNormConv2d(4, 6, 3, device="meta")
    assert layer.weight.is_meta
    assert layer.weight.manifold.partition.n_groups == 6


# ---- copies --------------------------------------------------------------------------------------------------------


def through_torch_save(layer: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@every_layer
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer)), through_torch_save])
def test_copies_are_on_their_own_spheres(plain: type[nn.Module], copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = small(plain)
    other = copied(layer)
    assert isinstance(other.weight, geoopt.ManifoldParameter)
    assert other.weight.manifold.to_dict() == layer.weight.manifold.to_dict()
    assert next(constrained_weights(other)).module is other
    x = inputs_for(layer)
    assert torch.equal(other(x), layer(x))
    before = layer.weight.detach().clone()
    other.reset_parameters()
    assert torch.equal(layer.weight, before)
    detach(other, "weight")
    assert next(constrained_weights(layer)).manifold is layer.weight.manifold


@every_layer
def test_state_dicts_pass_between_torch_layers_and_these(plain: type[nn.Module]) -> None:
    first, second = small(plain), small(plain)
    second.load_state_dict(first.state_dict())
    assert isinstance(second.weight, geoopt.ManifoldParameter)
    assert torch.equal(second.weight, first.weight)


@every_layer
def test_layers_are_exported_and_compiled_as_torchs(plain: type[nn.Module]) -> None:
    layer = small(plain)
    x = inputs_for(layer)
    found = [str(node.target) for node in torch.export.export(layer, (x,)).graph.nodes if node.op == "call_function"]
    twin = plain(*((4, 6) if plain is nn.Linear else (4, 6, 3)))
    expected = [str(node.target) for node in torch.export.export(twin, (x,)).graph.nodes if node.op == "call_function"]
    assert found == expected
    torch._dynamo.reset()
    assert torch.equal(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x))


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
@every_layer
def test_layers_train_under_geoopt_and_keep_their_norms(plain: type[nn.Module], make: Any) -> None:
    torch.manual_seed(0)
    layer = small(plain)
    x = inputs_for(layer)
    target = small(plain)(x).detach()
    optimizer = make(layer.parameters(), lr=0.1 if make is geoopt.optim.RiemannianSGD else 0.02)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert_unit_filters(layer)


# ---- embeddings ----------------------------------------------------------------------------------------------------


every_embedding = pytest.mark.parametrize("plain", EMBEDDINGS)


def embedding(plain: type[nn.Module], **options: Any) -> nn.Module:
    """Return the unit-norm twin of a torch embedding of 7 rows."""
    return layers.UNIT_NORM_LAYERS[plain](7, 3, **options)


def looked_up(layer: nn.Module, numbers: Tensor) -> Tensor:
    return layer(numbers) if isinstance(layer, nn.Embedding) else layer(numbers, torch.arange(0, len(numbers), 2))


def assert_unit_rows(weight: Tensor, padding: int | None) -> None:
    expected = torch.ones(len(weight), dtype=torch.float64)
    if padding is not None:
        expected[padding] = 0
    norms = weight.detach().double().norm(dim=1)
    torch.testing.assert_close(norms, expected, rtol=0, atol=2 * eps(weight.dtype))
    if padding is not None:
        assert norms[padding] == 0


@every_embedding
@pytest.mark.parametrize("padding", [None, 0, 3, -1])
def test_an_embedding_is_torchs_with_unit_rows_and_zero_padding(plain: type[nn.Module], padding: int | None) -> None:
    layer, twin = embedding(plain, padding_idx=padding), plain(7, 3, padding_idx=padding)
    place = layer.padding_idx
    assert_unit_rows(layer.weight, place)
    twin.load_state_dict(layer.state_dict())
    numbers = torch.tensor([0, 3, 6, 6, 1, 2])
    assert torch.equal(looked_up(layer, numbers), looked_up(twin, numbers))
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(before, layer.weight)
    assert_unit_rows(layer.weight, place)
    again = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert again.weight.manifold.to_dict() == layer.weight.manifold.to_dict()
    again.load_state_dict(layer.state_dict(), assign=True)
    again.reset_parameters()
    assert_unit_rows(again.weight, place)


@every_embedding
def test_a_padding_row_that_is_not_zero_is_noticed(plain: type[nn.Module]) -> None:
    layer = embedding(plain, padding_idx=3)
    state = layer.state_dict()
    state["weight"] = state["weight"].clone()
    state["weight"][3] = 0.1
    with pytest.raises(OffManifoldError, match=r"group 3 has norm 0.17.*its sphere has radius 0"):
        layer.load_state_dict(state)
    with pytest.raises(AssertionError):
        assert_unit_rows(state["weight"], 3)


@every_embedding
def test_max_norm_and_rows_of_other_norms_are_refused(plain: type[nn.Module]) -> None:
    with pytest.raises(OptionError, match=r"max_norm: found 1\.0"):
        embedding(plain, max_norm=1.0)
    twin = layers.UNIT_NORM_LAYERS[plain]
    with pytest.raises(OffManifoldError, match="Divide every row by its norm"):
        twin.from_pretrained(2 * torch.eye(3))
    assert isinstance(twin.from_pretrained(torch.eye(3)).weight, geoopt.ManifoldParameter)


STEPPERS = [
    (mn.optim.RiemannianSGD, {}),
    (mn.optim.RiemannianSGD, {"momentum": 0.9}),
    (mn.optim.RiemannianAdam, {}),
    (mn.optim.AngularSGD, {"momentum": 0.9, "per": "weight"}),
    (mn.optim.AngularAdam, {}),
]


def trained(sparse: bool, padding: int | None, make: Any, options: dict[str, Any], numbers: Tensor) -> Tensor:
    """Rows after five steps towards random targets, looking up some of them in each."""
    torch.manual_seed(0)
    layer = layers.UnitNormEmbedding(7, 3, padding_idx=padding, sparse=sparse, dtype=torch.float64)
    targets = noise((7, 3), torch.float64)
    optimizer = make(mn.param_groups(layer), lr=0.1, **options)
    for _ in range(5):
        optimizer.zero_grad()
        (layer(numbers) - targets[numbers]).square().sum().backward()
        optimizer.step()
    assert_unit_rows(layer.weight, layer.padding_idx)
    return layer.weight.detach()


@pytest.mark.parametrize(("make", "options"), STEPPERS)
@pytest.mark.parametrize("padding", [None, 0, 3, 6])
def test_sparse_gradients_take_the_steps_of_dense_ones(make: Any, options: dict[str, Any], padding: int | None) -> None:
    numbers = torch.tensor([5, 1, 0, 6, 2, 3, 4, 1])
    dense, sparse = (trained(is_sparse, padding, make, options, numbers) for is_sparse in (False, True))
    torch.testing.assert_close(sparse, dense, rtol=0, atol=64 * eps(torch.float64))


def test_rows_beside_the_padding_take_the_steps_of_rows_without_one() -> None:
    """Rows that are not looked up and the padding row stay; all others step as in a weight without padding."""
    numbers = torch.tensor([5, 1, 6, 2, 5])
    torch.manual_seed(0)
    start = layers.UnitNormEmbedding(7, 3, padding_idx=3, dtype=torch.float64).weight.detach()
    for make, options in STEPPERS[:3]:
        found = trained(True, 3, make, options, numbers)
        assert torch.equal(found[[0, 4]], start[[0, 4]])
        torch.manual_seed(0)
        part = nn.Parameter(start[numbers.unique()])
        part = geoopt.ManifoldParameter(part.data, manifold=mn.SphereProduct(part.shape))
        counts = torch.bincount(numbers)[numbers.unique()][:, None]
        torch.manual_seed(0)
        layers.UnitNormEmbedding(7, 3, padding_idx=3, dtype=torch.float64)
        targets = noise((7, 3), torch.float64)[numbers.unique()]
        optimizer = make([part], lr=0.1, **options)
        for _ in range(5):
            optimizer.zero_grad()
            (counts * (part - targets).square()).sum().backward()
            optimizer.step()
        torch.testing.assert_close(found[numbers.unique()], part.detach(), rtol=0, atol=64 * eps(torch.float64))


@pytest.mark.parametrize("make", [geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam])
def test_a_padding_row_stays_zero_under_geoopt(make: Any) -> None:
    trained(False, 3, lambda groups, lr: make([p for g in groups for p in g["params"]], lr=lr), {}, torch.arange(7))


def test_the_gradient_of_a_lookup_does_not_move_what_was_not_looked_up() -> None:
    """Adam without sparse gradients moves rows by their moments alone; with sparse ones it does not."""
    layers_made = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = layers.UnitNormEmbedding(4, 3, sparse=sparse)
        optimizer = mn.optim.RiemannianAdam(mn.param_groups(layer), lr=0.1)
        for numbers in ([0, 1], [2]):
            optimizer.zero_grad()
            layer(torch.tensor(numbers))[:, 0].sum().backward()
            optimizer.step()
            layers_made.append(layer.weight.detach().clone())
    assert not torch.equal(layers_made[0][0], layers_made[1][0])
    assert torch.equal(layers_made[2][0], layers_made[3][0])


def check_geometry(sphere: mn.SphereProduct) -> None:
    """Compare points, projections, moves and distances with those of the rows beside the padding."""
    others, plain = [0, 1, 3], mn.SphereProduct((3, 4))
    x, y = (sphere.random_uniform(dtype=torch.float64).as_subclass(Tensor) for _ in range(2))
    u = sphere.proju(x, noise((4, 4), torch.float64))
    for point in (x, sphere.retr(x, u), sphere.expmap(x, u), sphere.origin(dtype=torch.float64)):
        assert sphere.check_point_on_manifold(point)
    assert sphere.check_vector_on_tangent(x, u)
    assert not sphere.check_vector_on_tangent(x, u + torch.eye(4, dtype=torch.float64)[2][:, None])
    for found, expected in (
        (sphere.retr(x, u), plain.retr(x[others], u[others])),
        (sphere.expmap(x, u), plain.expmap(x[others], u[others])),
        (sphere.logmap(x, y), plain.logmap(x[others], y[others])),
        (sphere.egrad2rgrad(x, u + x), plain.egrad2rgrad(x[others], (u + x)[others])),
    ):
        torch.testing.assert_close(found[others], expected, rtol=0, atol=16 * eps(torch.float64))
        assert not found[2].any()
    torch.testing.assert_close(sphere.dist(x, y), plain.dist(x[others], y[others]))
    torch.testing.assert_close(sphere.norm(x, u), plain.norm(x[others], u[others]))


def test_the_geometry_beside_a_padding_row_is_that_of_the_other_rows() -> None:
    check_geometry(PaddedSphereProduct((4, 4), 2))
    with pytest.raises(AssertionError):
        check_geometry(mn.SphereProduct((4, 4)))
