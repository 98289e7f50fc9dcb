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
from sphere_cases import eps, noise
from torch import Tensor, nn

from manifold_nets import layers
from manifold_nets.constraints import constrained_weights, detach, lost_constraints

PAIRS = layers.UNIT_NORM_LAYERS
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
    assert {f"UnitNorm{plain.__name__}" for plain in PAIRS} == {name for name in layers.__all__ if "UnitNorm" in name}
    assert all(getattr(layers, f"UnitNorm{plain.__name__}") is twin for plain, twin in PAIRS.items())


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
