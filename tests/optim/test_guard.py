"""No path trains a constrained weight as a Euclidean one in silence."""

import copy
import pickle
import subprocess
import sys

import geoopt
import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.errors import EuclideanStepError
from manifold_nets.optim import RiemannianAdam, RiemannianSGD, allow_euclidean


def linear_on_spheres():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    sphere = mn.SphereProduct((3, 4))
    attach(net[0], "weight", sphere, sphere.projx(net[0].weight.detach()))
    return net


def with_gradients(net):
    net(torch.randn(5, 4)).square().sum().backward()
    return net


def assigned(net):
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)
    return net


def moved_through_meta(net):
    values = net.state_dict()
    net.to("meta").to_empty(device="cpu").load_state_dict({key: value.clone() for key, value in values.items()})
    return net


WAYS = {
    "attached": lambda net: net,
    "deep copy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "assigned": assigned,
    "assigned after a deep copy": lambda net: assigned(copy.deepcopy(net)),
    "to_empty": moved_through_meta,
}
KINDS = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop, torch.optim.Adagrad]


def check_refused(net, optimizer, error=EuclideanStepError):
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(error, match=r"weight|parameter 0 of group 0"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
def test_torch_optimizers_are_stopped_before_they_step(kind, way):
    net = with_gradients(WAYS[way](linear_on_spheres()))
    optimizer = kind(net.parameters(), lr=0.1)
    for _ in range(2):
        check_refused(net, optimizer)


def test_a_silent_step_fails_the_check():
    net = with_gradients(linear_on_spheres())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    allow_euclidean(optimizer)
    with pytest.raises(pytest.fail.Exception):
        check_refused(net, optimizer)


def test_the_message_names_weights_optimizer_and_remedies():
    net = with_gradients(assigned(linear_on_spheres()))
    with pytest.raises(EuclideanStepError, match=r"Linear\.weight.*SGD.*RiemannianSGD.*allow_euclidean\(optimizer\)"):
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    net = with_gradients(linear_on_spheres())
    with pytest.raises(EuclideanStepError, match=r"^0\.weight: ") as error:
        torch.optim.SGD(net.named_parameters(), lr=0.1).step()
    assert error.value.names == ("0.weight",)


def test_geoopts_optimizers_step_what_they_know_and_are_stopped_where_it_is_lost():
    net = with_gradients(linear_on_spheres())
    geoopt.optim.RiemannianAdam(net.parameters(), lr=0.1).step()
    assert net[0].weight.manifold.check_point_on_manifold(net[0].weight)
    net = with_gradients(assigned(linear_on_spheres()))
    check_refused(net, geoopt.optim.RiemannianAdam(net.parameters(), lr=0.1), EuclideanStepError)


@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
def test_our_optimizers_step(kind):
    net = with_gradients(linear_on_spheres())
    kind(net.parameters(), lr=0.1).step()
    assert net[0].weight.manifold.check_point_on_manifold(net[0].weight)


def test_other_models_and_weights_without_a_gradient_are_not_touched():
    plain = with_gradients(nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    before = plain[0].weight.detach().clone()
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert not torch.equal(plain[0].weight, before)
    net = linear_on_spheres()
    net[0].weight.requires_grad_(False)
    with_gradients(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer.step()
    # Unfrozen later: it is the gradient that counts, not what the first step saw.
    net[0].weight.requires_grad_(True)
    with_gradients(net)
    check_refused(net, optimizer)


def test_a_group_added_later_is_seen():
    net = with_gradients(linear_on_spheres())
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    optimizer.step()
    optimizer.add_param_group({"params": net[0].parameters()})
    check_refused(net, optimizer)


def test_a_parameter_that_takes_anothers_place_is_seen():
    net = with_gradients(linear_on_spheres())
    optimizer = torch.optim.SGD(net[2].parameters(), lr=0.1)
    optimizer.step()
    optimizer.param_groups[0]["params"][0] = net[0].weight
    check_refused(net, optimizer)


@pytest.mark.parametrize("kind", [torch.optim.SGD, RiemannianSGD])
@pytest.mark.parametrize("radius", ["keep", "unit"])
def test_an_optimizer_that_holds_the_weight_from_before_its_conversion_is_stopped(radius, kind):
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2)), torch.randn(8, 4)
    optimizer = kind(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        with_gradients(net)
        optimizer.step()
    former = net[0].weight
    mn.convert(net, x, radius=radius, inplace=True)
    optimizer.zero_grad()
    with pytest.warns(
        UserWarning, match=rf"Linear\.weight: .*after {kind.__name__} was built.*does not train the weight"
    ):
        optimizer.step()
    # With a gradient from before, the momentum would move memory that the weight may share.
    former.grad = torch.zeros_like(former)
    check_refused(net, optimizer)
    assert float(net[0].weight.manifold.deviations(net[0].weight.detach()).max()) <= 4 * torch.finfo(torch.float32).eps


def test_a_shallow_copy_is_guarded_when_its_original_is_gone():
    net = linear_on_spheres()
    net[0] = copy.copy(net[0])
    check_refused(net, torch.optim.SGD(with_gradients(assigned(net)).parameters(), lr=0.1))
    again = assigned(copy.deepcopy(net))
    check_refused(again, torch.optim.SGD(with_gradients(again).parameters(), lr=0.1))


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
def test_a_weight_that_was_made_of_others_is_missed():
    """`weight_norm` makes plain parameters of a weight: neither optimizer trains it as a Euclidean one."""
    net = linear_on_spheres()
    nn.utils.weight_norm(net[0])
    with_gradients(net)
    check_refused(net, torch.optim.SGD(net.parameters(), lr=0.1))
    with pytest.raises(EuclideanStepError, match=r"^Linear\.weight: .*weight_norm"):
        RiemannianSGD(mn.param_groups(net), lr=0.1)


@pytest.mark.filterwarnings("ignore:FSDP is switching:UserWarning", "ignore:.*deprecated:FutureWarning")
def test_a_weight_in_a_flat_parameter_is_missed(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        flat = FullyShardedDataParallel(linear_on_spheres(), device_id=torch.device("cpu"))
        with_gradients(flat)
        check_refused(flat, torch.optim.SGD(flat.parameters(), lr=0.1))
        with pytest.raises(EuclideanStepError, match=r"^Linear\.weight: .*use_orig_params=True"):
            RiemannianSGD(mn.param_groups(flat), lr=0.1)
        original = FullyShardedDataParallel(linear_on_spheres(), device_id=torch.device("cpu"), use_orig_params=True)
        optimizer = RiemannianSGD(mn.param_groups(original), lr=0.1)
        sphere = optimizer.param_groups[0]["manifolds"][0]
        with_gradients(original)
        optimizer.step()
        with FullyShardedDataParallel.summon_full_params(original):
            assert sphere.check_point_on_manifold(original.module[0].weight.detach())
    finally:
        torch.distributed.destroy_process_group()


def test_a_closure_that_computes_the_gradients_is_stopped():
    net = linear_on_spheres()
    for call in (lambda o, f: o.step(f), lambda o, f: o.step(closure=f)):
        optimizer = torch.optim.LBFGS(net.parameters(), lr=0.1)
        with pytest.raises(EuclideanStepError):
            call(optimizer, lambda: with_gradients(net)(torch.randn(5, 4)).sum())
    assert net[0].weight.grad is None


def test_a_projected_method_may_step_when_it_says_so():
    net = with_gradients(linear_on_spheres())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    allow_euclidean(optimizer)
    optimizer.step()
    copied, other = copy.deepcopy((net, optimizer))
    with_gradients(copied)
    check_refused(copied, other)  # a copy is another optimizer, with other weights


def test_wrappers_and_schedulers_of_our_optimizers_pass():
    class Wrapped(torch.optim.Optimizer):
        """As accelerate wraps: an optimizer in name that steps another."""

        def __init__(self, optimizer):
            self.optimizer = optimizer
            self.optimizer.load_state_dict(self.optimizer.state_dict())

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        def step(self, closure=None):
            self.optimizer.step(closure)

    net = with_gradients(linear_on_spheres())
    optimizer = Wrapped(RiemannianSGD(mn.param_groups(net), lr=0.1))
    schedule = torch.optim.lr_scheduler.StepLR(optimizer.optimizer, 1)
    optimizer.step()
    schedule.step()
    assert net[0].weight.manifold.check_point_on_manifold(net[0].weight)
    check_refused(net, Wrapped(torch.optim.SGD(net.parameters(), lr=0.1)))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
def test_compiled_steps_are_stopped_and_ours_are_not(backend, kind):
    net = with_gradients(linear_on_spheres())
    twin = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(EuclideanStepError):
        torch.compile(lambda: optimizer.step(), backend=backend)()
    gradients = [torch.randn_like(p) for p in net.parameters()]
    for model, compiled in ((net, True), (twin, False)):
        ours = kind(mn.param_groups(model), lr=0.1)
        step = torch.compile(ours.step, backend=backend) if compiled else ours.step
        for _ in range(3):
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter.grad = gradient
            step()
    for a, b in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=64 * torch.finfo(a.dtype).eps)


def test_the_hook_comes_with_the_first_product_of_spheres_also_from_a_pickle(tmp_path):
    torch.save(linear_on_spheres(), tmp_path / "net.pt")
    code = (
        "import torch, manifold_nets as mn\n"
        "from torch.optim.optimizer import _global_optimizer_pre_hooks as hooks\n"
        "assert len(hooks) == 0\n"
        f"net = torch.load({str(tmp_path / 'net.pt')!r}, weights_only=False)\n"
        "mn.SphereProduct((2, 2))\n"
        "assert len(hooks) == 1\n"
        "net(torch.randn(5, 4)).sum().backward()\n"
        "torch.optim.SGD(net.parameters(), lr=0.1).step()\n"
    )
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert "EuclideanStepError" in result.stderr
    assert "AssertionError" not in result.stderr
    assert result.returncode != 0


# ---- weights that other code moves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [RiemannianSGD, RiemannianAdam])
def test_a_step_says_where_other_code_has_moved_a_weight_off_its_spheres(kind):
    net = linear_on_spheres()
    optimizer = kind(mn.param_groups(net), lr=0.1)
    for _ in range(2):
        with_gradients(net)
        optimizer.step()
        with torch.no_grad():
            net[0].weight.lerp_(torch.randn(3, 4), 0.5)
        with pytest.warns(
            UserWarning,
            match=r"^0\.weight: other code, such as weight averaging, moved it .*manifold_nets\.project\(model\)",
        ):
            optimizer.step()
        optimizer.step()  # once
        with torch.no_grad():
            net[0].weight.mul_(1.5)
        mn.project(net)  # what the warning advises
        optimizer.step()


def test_other_points_of_the_spheres_and_roundings_are_no_news():
    net = linear_on_spheres()
    optimizer = RiemannianSGD(mn.param_groups(net), lr=0.1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    with_gradients(net)
    with torch.no_grad():
        net[0].weight.copy_(net[0].weight.manifold.random().to(torch.bfloat16))
    optimizer.step()
    copied = copy.deepcopy((net, optimizer))
    with_gradients(copied[0])
    copied[1].step()
