"""A step inside a graph that the user compiles: one graph, and the path of the run that is not compiled, to a bit."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS, RiemannianAdam, RiemannianSGD, ScaledMetricSGD
from manifold_nets.optim.backends.graph import step_group_

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
BATCHES = [torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
SPHERES = {name: row for name, row in OPTIMIZERS.items() if row.weights == "spheres"}


def unit_norm_convolution():
    torch.manual_seed(0)
    first = mn.layers.UnitNormConv2d(3, 8, 3, bias=False)
    return nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3))


def train(net, optimizer, step):
    """Train on all batches, at a rate that falls, and return the parameters, one after the other."""
    for batch in BATCHES:
        optimizer.zero_grad()
        net(batch).square().mean().backward()
        step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    return torch.cat([parameter.detach().flatten() for parameter in net.parameters()])


def check_compiled(make, backend, net=None, fault=lambda optimizer: None):
    torch.compiler.reset()
    plain = unit_norm_convolution() if net is None else net
    paths = []
    for compiled in (False, True):
        model = copy.deepcopy(plain)
        optimizer = make(model)
        step = torch.compile(optimizer.step, backend=backend, fullgraph=True) if compiled else optimizer.step
        if compiled:
            fault(optimizer)
        paths.append(train(model, optimizer, step))
    assert torch.equal(*paths)


@pytest.mark.parametrize("name", SPHERES)
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_step_is_one_graph_and_takes_the_same_path(name, backend):
    row = SPHERES[name]
    options = {} if row.adaptive else {"momentum": 0.9, "nesterov": True}
    check_compiled(lambda net: row.kind(mn.param_groups(net, weight_decay=1e-2), lr=0.05, **options), backend)


@pytest.mark.parametrize("missing", [False, True], ids=["all gradients", "one gradient missing"])
def test_a_compiled_step_in_the_scaled_metric_takes_the_same_path(missing):
    """Scaled weights stand among plain ones, and not each has a gradient."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(108, 6), nn.BatchNorm1d(6), nn.Linear(6, 5), nn.Linear(5, 2))
    net[1].weight.requires_grad_(not missing)

    def make(model):
        partitions = {f"{n}.weight": mn.Partition.filters(model[n].weight.shape) for n in (1, 3)}
        return ScaledMetricSGD(mn.optim.scaled_metric_groups(model, partitions), lr=0.05, momentum=0.9)

    check_compiled(make, "eager", net)


@pytest.mark.parametrize("options", [{"foreach": True}, {"foreach": False}, {"fused": False}, {"amsgrad": True}])
def test_every_execution_runs_inside_a_graph(options):
    check_compiled(lambda net: RiemannianAdam(mn.param_groups(net), lr=0.05, **options), "aot_eager")


class HalfPrecision(nn.Module):
    """A network in bfloat16 on images in float32."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), mn.layers.UnitNormLinear(108, 8), nn.Linear(8, 2)).bfloat16()

    def forward(self, images):
        return self.net(images.bfloat16()).float()


def test_master_weights_are_kept_by_a_compiled_step():
    options = {"momentum": 0.9, "master_weights": True}
    check_compiled(lambda net: RiemannianSGD(mn.param_groups(net), lr=0.01, **options), "eager", HalfPrecision())


def test_another_momentum_in_the_compiled_run_is_noticed():
    def change(optimizer):
        optimizer.param_groups[0]["momentum"] = 0.8

    with pytest.raises(AssertionError):
        check_compiled(
            lambda net: RiemannianSGD(mn.param_groups(net), lr=0.05, momentum=0.9), "eager", None, fault=change
        )


def test_model_and_step_in_one_function_break_where_torch_does_and_nowhere_else():
    torch.compiler.reset()
    counters.clear()
    paths = []
    for compiled in (False, True):
        net = unit_norm_convolution()
        optimizer = RiemannianSGD(mn.param_groups(net), lr=0.05, momentum=0.9)

        def whole(batch, net=net, optimizer=optimizer):
            net(batch).square().mean().backward()
            optimizer.step()

        run = torch.compile(whole, backend="aot_eager") if compiled else whole
        for batch in BATCHES:
            optimizer.zero_grad()
            run(batch)
        paths.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert torch.allclose(*paths, rtol=0, atol=64 * torch.finfo(torch.float32).eps)
    (reason,) = counters["graph_break"]
    assert "backward()" in reason


@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
def test_values_that_a_graph_holds_apart_are_stepped_and_the_parameters_left_alone(kind):
    nets = [unit_norm_convolution(), unit_norm_convolution()]
    optimizers = [kind(mn.param_groups(net), lr=0.05) for net in nets]
    for _ in range(3):
        for net in nets:
            net(BATCHES[0]).square().mean().backward()
        optimizers[0].step()
        kept = []
        for number, group in enumerate(optimizers[1].param_groups):
            params = group["params"]
            values, before = ([p.detach().clone() for p in params] for _ in range(2))
            gradients = [p.grad for p in params]
            for p in params:
                p.grad = None
            step_group_(values, gradients, range(len(params)), optimizers[1]._number, number)
            assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
            kept += zip(params, values, strict=True)
        for parameter, value in kept:
            parameter.data.copy_(value)
        for net in nets:
            net.zero_grad()
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_the_schema_of_the_operation_says_what_it_does():
    layer = mn.layers.UnitNormLinear(4, 3, bias=False)
    optimizer = RiemannianSGD(layer.parameters(), lr=0.1)
    weight, gradient = layer.weight.detach().clone(), torch.randn(3, 4)
    arguments = ([weight], [gradient], [0], optimizer._number, 0)
    torch.library.opcheck(torch.ops.manifold_nets.step_group_.default, arguments)


def test_a_copy_of_an_optimizer_is_another_one_to_a_graph():
    layer = mn.layers.UnitNormLinear(4, 3)
    optimizer = RiemannianSGD(layer.parameters(), lr=0.1)
    assert copy.deepcopy(optimizer)._number != optimizer._number


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["RiemannianSGD", "RiemannianAdam"])
def test_kernels_are_compiled_ahead_of_time(kind):
    """Called with torch's guards a small weight's step takes twice as long."""
    from manifold_nets.optim.backends import compiled

    layer = mn.layers.UnitNormLinear(27, 16, bias=False)
    layer.weight.grad = torch.randn(16, 27)
    compiled._kernel.cache_clear()
    made = []
    original = compiled._kernel
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "_kernel", lambda *form: made.append(original(*form)) or made[-1])
        getattr(mn.optim, kind)(mn.param_groups(layer), lr=0.1, compile=True).step()
    assert made
    assert all(getattr(kernel, "__name__", "") != "on_no_views" for kernel in made)
