"""Averages of models: what is averaged, and that it stays on the spheres."""

import copy
import io
import itertools
import warnings

import pytest
import torch
from helpers.optim_cases import LAYOUTS
from torch import nn
from torch.optim.swa_utils import AveragedModel as TorchAveragedModel
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_avg_fn, get_swa_multi_avg_fn

import manifold_nets as mn
from manifold_nets.constraints import attach, constrained_weights
from manifold_nets.errors import DegenerateGroupError, OffManifoldError
from manifold_nets.optim import AveragedModel

UPDATES = 12
KINDS = {
    "equal weights": {},
    "equal weights, lists": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "equal weights, one by one": {"avg_fn": get_swa_avg_fn()},
    "moving": {"multi_avg_fn": get_ema_multi_avg_fn(0.8)},
    "moving, one by one": {"avg_fn": get_ema_avg_fn(0.8)},
    "moving, with buffers": {"multi_avg_fn": get_ema_multi_avg_fn(0.8), "use_buffers": True},
}
warned = pytest.mark.filterwarnings("ignore:.*averages by .*AveragedModel are not on them:UserWarning")


def two_shapes(dtype=torch.float32):
    """Weights of two shapes and radii on spheres, plain parameters, and buffers."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 6, 3, groups=2), nn.BatchNorm2d(6))
    spheres = {
        0: mn.SphereProduct((4, 2, 3, 3), radius=torch.linspace(0.5, 2.5, 4)),
        2: mn.SphereProduct(mn.Partition.transposed_filters((4, 3, 3, 3), groups=2)),
    }
    net = net.to(dtype)
    for place, sphere in spheres.items():
        attach(net[place], "weight", sphere, sphere.projx(net[place].weight.detach()))
    return net


def models(spread, dtype=torch.float32, updates=UPDATES):
    """Yield the same network with other values each time: directions that lie apart by about an angle."""
    net = two_shapes(dtype)
    generator = torch.Generator().manual_seed(1)
    for _ in range(updates):
        with torch.no_grad():
            for tensor in (*net.parameters(), *(b for b in net.buffers() if b.is_floating_point())):
                scale = spread * tensor.abs().mean()
                tensor.add_(torch.randn(tensor.shape, generator=generator).to(dtype) * scale)
        mn.project(net)
        yield net


def plain(model):
    """Return the model without its constraints."""
    model = copy.deepcopy(model)
    for weight in list(constrained_weights(model)):
        mn.constraints.detach(weight.module, weight.leaf)
    return model


def check_average(make, options, spread, dtype):
    """Equal to torch's average: projected once on spheres, bit for bit elsewhere."""
    sequence = list(map(copy.deepcopy, models(spread, dtype)))
    averaged, expected = make(two_shapes(dtype), **options), TorchAveragedModel(plain(two_shapes(dtype)), **options)
    for model in sequence:
        averaged.update_parameters(model)
        expected.update_parameters(plain(model))
        weights = {weight.name: weight for weight in constrained_weights(averaged.module)}
        reference = dict(expected.module.named_parameters())
        for name, value in averaged.module.named_parameters():
            if name not in weights:
                assert torch.equal(value, reference[name]), name
                continue
            manifold = weights[name].manifold
            mean = reference[name].detach().double()
            tolerance = 8 * UPDATES * torch.finfo(dtype).eps
            wanted = manifold.projx(mean)
            off = manifold.component_dist(value.detach().double(), wanted)
            assert float(off.max()) <= tolerance
            assert float(manifold.deviations(value).max()) <= 2 * torch.finfo(dtype).eps
            lengths = manifold.partition.norms(mean).flatten() / manifold.radii
            found = averaged.resultant_lengths()[name].double()
            assert float((found - lengths).abs().max()) <= tolerance
        for a, b in zip(averaged.module.buffers(), expected.module.buffers(), strict=True):
            assert torch.equal(a, b)
    assert int(averaged.n_averaged) == UPDATES


@pytest.mark.parametrize("spread", [0.1, 1.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_average_is_torchs_projected_once(kind, spread, dtype):
    check_average(AveragedModel, KINDS[kind], spread, dtype)


class AverageOfProjections(AveragedModel):
    """Sabotage: forgets how long the mean was, so that every average starts from a projected one."""

    def update_parameters(self, model):
        for lengths in self.lengths.buffers():
            lengths.fill_(1.0)
        super().update_parameters(model)


@pytest.mark.parametrize("kind", ["equal weights", "moving"])
def test_sabotage_an_average_of_projections_fails_the_comparison(kind):
    with pytest.raises(AssertionError):
        check_average(AverageOfProjections, KINDS[kind], 0.1, torch.float64)


@warned
def test_sabotage_torchs_own_average_leaves_the_spheres():
    averaged = TorchAveragedModel(two_shapes())
    for model in models(0.5):
        averaged.update_parameters(model)
    weight = averaged.module[0].weight
    assert float(weight.manifold.deviations(weight).max()) > 0.01


@warned
def test_torchs_own_average_is_noticed_and_can_be_put_back(tmp_path):
    with pytest.warns(UserWarning, match=r"0\.weight: .*manifold_nets\.optim\.AveragedModel.*project"):
        averaged = TorchAveragedModel(two_shapes())
    ours = AveragedModel(two_shapes())
    for model in models(0.5):
        averaged.update_parameters(model)
        ours.update_parameters(model)
    with pytest.raises(OffManifoldError, match=r"0\.weight"):
        mn.save(averaged.module, tmp_path / "net.safetensors")
    with pytest.raises(OffManifoldError, match=r"0\.weight"):
        mn.optim.RiemannianSGD(mn.param_groups(averaged.module), lr=0.1)
    off = mn.project(averaged.module)
    assert list(off) == ["0.weight", "2.weight"]
    assert min(off.values()) > 0.01
    mn.save(averaged.module, tmp_path / "net.safetensors")
    for a, b in zip(averaged.module.parameters(), ours.module.parameters(), strict=True):
        scale = float(b.detach().abs().max())
        assert torch.allclose(a, b, rtol=0, atol=8 * UPDATES * scale * torch.finfo(torch.float32).eps)


def test_models_without_constraints_are_averaged_by_torch_without_a_word():
    net = nn.Linear(3, 2)
    averaged, expected = AveragedModel(net), TorchAveragedModel(net)
    for shift in (0.0, 1.0):
        nn.init.constant_(net.weight, shift)
        averaged.update_parameters(net)
        expected.update_parameters(net)
    assert torch.equal(averaged.module.weight, expected.module.weight)
    assert averaged.resultant_lengths() == {}


def karcher_mean(sphere, points):
    """Minimize the sum of squared angles by the fixed-point iteration."""
    mean = points[0]
    for _ in range(200):
        mean = sphere.expmap(mean, torch.stack([sphere.logmap(mean, point) for point in points]).mean(0))
    return mean


def chordal_mean(sphere, points):
    layer = nn.Linear(sphere.partition.shape[1], sphere.partition.shape[0], bias=False, dtype=torch.float64)
    attach(layer, "weight", sphere, points[0].clone())
    averaged = AveragedModel(layer)
    for point in points:
        with torch.no_grad():
            layer.weight.copy_(point)
        averaged.update_parameters(layer)
    return averaged.module.weight.detach()


def points_at(sphere, angle, count):
    """Points on the geodesics from one point, at unequal angles of about the given one."""
    base = sphere.random(dtype=torch.float64).as_subclass(torch.Tensor)
    for number in range(count):
        tangent = sphere.proju(base, torch.randn(sphere.partition.shape, dtype=torch.float64))
        unit = sphere.partition.divide(tangent, sphere.partition.norms(tangent) / sphere.radius_for(base))
        yield sphere.expmap(base, angle * (1 + number) * unit)


def test_two_models_of_equal_weight_meet_at_their_riemannian_mean():
    sphere = mn.SphereProduct((3, 5), radius=2.0)
    points = list(points_at(sphere, 0.4, 2))
    off = sphere.component_dist(chordal_mean(sphere, points), karcher_mean(sphere, points))
    assert float(off.max()) < 64 * torch.finfo(torch.float64).eps


def test_otherwise_the_riemannian_mean_differs_by_a_term_of_the_third_order():
    sphere, differences = mn.SphereProduct((3, 5)), []
    for angle in (0.1, 0.05, 0.025):
        torch.manual_seed(0)
        points = list(points_at(sphere, angle, 3))
        differences.append(float(sphere.dist(chordal_mean(sphere, points), karcher_mean(sphere, points))))
    assert 0 < differences[0] < 0.1
    orders = [torch.tensor(a / b).log2().item() for a, b in itertools.pairwise(differences)]
    assert all(abs(order - 3) < 0.2 for order in orders), orders


def test_a_mean_of_zero_takes_the_newest_direction_and_the_next_average_is_right():
    net = mn.layers.UnitNormLinear(2, 1, bias=False)
    averaged, path = AveragedModel(net), [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]
    for point in path:
        net.load_state_dict({"weight": torch.tensor([point])})
        averaged.update_parameters(net)
        if point[0] == -1.0:
            assert averaged.module.weight.tolist() == [point]
            assert averaged.resultant_lengths()["weight"].tolist() == [0.0]
    assert averaged.module.weight.tolist() == [[0.0, 1.0]]
    assert float(averaged.resultant_lengths()["weight"]) == pytest.approx(1 / 3)


def test_values_that_are_not_finite_stay_so():
    net = mn.layers.UnitNormLinear(2, 2, bias=False)
    averaged = AveragedModel(net)
    averaged.update_parameters(net)
    with torch.no_grad():
        net.weight[0] = torch.nan
    averaged.update_parameters(net)
    assert averaged.module.weight.isnan().any(1).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_on_the_spheres(dtype):
    averaged = AveragedModel(two_shapes(dtype), multi_avg_fn=get_ema_multi_avg_fn(0.8))
    for model in models(0.3, dtype):
        averaged.update_parameters(model)
        for weight in constrained_weights(averaged.module):
            assert weight.parameter.dtype == dtype
            assert float(weight.manifold.deviations(weight.parameter).max()) <= torch.finfo(dtype).eps
    assert all(lengths.dtype == torch.float32 for lengths in averaged.resultant_lengths().values())


def test_an_average_goes_on_bit_for_bit_from_its_state():
    sequence = list(map(copy.deepcopy, models(0.3)))
    averaged = AveragedModel(two_shapes())
    for model in sequence[:5]:
        averaged.update_parameters(model)
    file = io.BytesIO()
    torch.save(averaged.state_dict(), file)
    file.seek(0)
    resumed = AveragedModel(two_shapes())
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied = copy.deepcopy(averaged)
    for model in sequence[5:]:
        for each in (averaged, resumed, copied):
            each.update_parameters(model)
    for other in (resumed, copied):
        for key, value in averaged.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


class ModelEmaV3(nn.Module):
    """What timm's class does first."""

    def __init__(self, model):
        super().__init__()
        self.module = copy.deepcopy(model)


def test_timms_average_is_noticed(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ModelEmaV3(two_shapes())  # by another module
    monkeypatch.setattr(ModelEmaV3, "__module__", "timm.utils.model_ema")
    with pytest.warns(UserWarning, match=r"0\.weight: .*averages by .*model_ema\.ModelEmaV3 are not on them.*project"):
        ModelEmaV3(two_shapes())


# ---- project -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_project_finds_the_nearest_point_and_says_how_far_it_was(layout):
    holder, sphere = nn.Module(), mn.SphereProduct(layout.partition, radius=1.5)
    values = torch.randn(layout.partition.shape, dtype=torch.float64)
    holder.weight = nn.Parameter(values.clone())
    attach(holder, "weight", sphere)
    off = mn.project(holder)
    ids = torch.from_numpy(layout.ids())
    norms = torch.zeros(sphere.partition.n_groups, dtype=torch.float64).index_add(
        0, ids.flatten(), values.flatten().square()
    ).sqrt()  # fmt: skip
    eps = torch.finfo(torch.float64).eps
    assert torch.allclose(holder.weight, 1.5 * values / norms[ids], rtol=8 * eps, atol=0)
    assert off["weight"] == pytest.approx(float((norms / 1.5 - 1).abs().max()), rel=8 * eps)
    assert mn.project(holder)["weight"] <= 4 * eps


def test_project_names_a_group_without_direction_and_changes_nothing():
    net = two_shapes()
    with torch.no_grad():
        net[0].weight.mul_(2.0)
        net[2].weight.zero_()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(DegenerateGroupError, match=r"2\.weight"):
        mn.project(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


def test_project_reaches_weights_whose_parameter_object_was_replaced():
    layer = mn.layers.UnitNormLinear(4, 3)
    layer.load_state_dict(mn.layers.UnitNormLinear(4, 3).state_dict(), assign=True)
    with torch.no_grad():
        layer.weight.mul_(1.5)
    assert mn.project(layer)["weight"] > 0.01
    assert torch.allclose(layer.weight.norm(dim=1), torch.ones(3))
