"""The places where people train, in one process: each path of weights is that of the plain loop."""

import copy
import io
import math
import pickle

import pytest
import torch
from helpers.training_cases import (
    KINDS,
    STEPS,
    batches,
    check_on_spheres,
    check_same_path,
    network,
    optimizer_of,
    plain_path,
    train,
    values,
)
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from torch.utils.checkpoint import checkpoint_sequential

import manifold_nets as mn
from manifold_nets.optim import clip_sphere_grad_norm_

kinds = pytest.mark.parametrize("kind", KINDS)
EPS = torch.finfo(torch.float64).eps


@kinds
def test_sabotage_a_path_that_is_a_little_off_is_noticed(kind):
    expected = plain_path(kind)
    net = network()
    other = train(net, optimizer_of(net, kind, lr=KINDS[kind][1]["lr"] * (1 + 1e-9)), batches())
    with pytest.raises(AssertionError, match="off by"):
        check_same_path(other, expected, EPS)
    check_same_path(plain_path(kind), expected)


# ---- how the gradient is made ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # from importing the compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@kinds
def test_a_compiled_model(kind, backend):
    net = network()
    torch.compiler.reset()
    compiled = torch.compile(net, backend=backend, fullgraph=True)
    found = train(compiled, optimizer_of(compiled, kind), batches())
    check_same_path(found, plain_path(kind), EPS)
    check_on_spheres(compiled)


@kinds
def test_activation_checkpointing(kind):
    net = network("group")
    found = train(
        net,
        optimizer_of(net, kind),
        batches(),
        forward=lambda x: checkpoint_sequential(net, 3, x, use_reentrant=False),
    )
    check_same_path(found, plain_path(kind, "group"))
    check_on_spheres(net)


@kinds
def test_gradient_accumulation(kind):
    net = network("group")
    optimizer, found = optimizer_of(net, kind), []
    for x, y in batches():
        optimizer.zero_grad()
        for part in range(4):
            rows = slice(2 * part, 2 * part + 2)
            (cross_entropy(net(x[rows]), y[rows]) / 4).backward()
        optimizer.step()
        found.append(values(net))
    check_same_path(found, plain_path(kind, "group"), EPS)
    check_on_spheres(net)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kinds
def test_autocast(kind, dtype):
    net, plain = network(dtype=torch.float32), network(dtype=torch.float32)
    for weight in list(mn.constraints.constrained_weights(plain)):
        mn.constraints.detach(weight.module, weight.leaf)

    def cast(model):
        def forward(x):
            with torch.autocast("cpu", dtype):
                return model(x).float()

        return forward

    # The constraint changes no gradient: those of the plain model under autocast are the same bits.
    x, y = batches(1, dtype=torch.float32)[0]
    for model in (net, plain):
        cross_entropy(cast(model)(x), y).backward()
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    data = batches(dtype=torch.float32)
    found = train(net, optimizer_of(net, kind), data, forward=cast(net))
    # One rounding of autocast's dtype for each step: far less than the steps themselves.
    expected, allowed = plain_path(kind, dtype=torch.float32), torch.finfo(dtype).eps / 256
    check_same_path(found, expected, allowed)
    with pytest.raises(AssertionError, match="off by"):
        check_same_path([values(network(dtype=torch.float32))] * STEPS, expected, allowed)
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())
    check_on_spheres(net)


@pytest.mark.parametrize("clipped", [False, True])
@kinds
def test_a_gradient_scaler(kind, clipped):
    """A scale that is a power of two changes no bit; a step whose gradients overflow is not taken."""
    dtype = torch.float32
    data = batches(dtype=dtype)
    skipped = 3
    net, twin = network("group", dtype), network("group", dtype)
    optimizer, found = optimizer_of(net, kind), []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for number, (x, y) in enumerate(data):
        optimizer.zero_grad()
        scaler.scale(cross_entropy(net(x), y)).backward()
        if number == skipped:
            net[0].weight.grad[0, 0, 0, 0] = math.inf
        if clipped:
            scaler.unscale_(optimizer)
            clip_grad_norm_(net.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        if number != skipped:
            found.append(values(net))
    kept = [batch for number, batch in enumerate(data) if number != skipped]
    clip = (lambda: clip_grad_norm_(twin.parameters(), 0.1)) if clipped else lambda: None
    check_same_path(found, train(twin, optimizer_of(twin, kind), kept, between=clip))
    check_on_spheres(net)


# ---- what is done to the gradient ------------------------------------------------------------------------------------


def clip_by_formula(net, bound):
    """torch's clipping, written out: one factor for all gradients of the model."""
    gradients = [parameter.grad for parameter in net.parameters()]
    total = torch.stack([gradient.square().sum() for gradient in gradients]).sum().sqrt()
    for gradient in gradients:
        gradient.mul_(min(1.0, bound / (float(total) + 1e-6)))


@kinds
def test_clipping_of_the_whole_gradient(kind):
    net, twin = network(), network()
    found = train(net, optimizer_of(net, kind), batches(), between=lambda: clip_grad_norm_(net.parameters(), 0.2))
    expected = train(twin, optimizer_of(twin, kind), batches(), between=lambda: clip_by_formula(twin, 0.2))
    check_same_path(found, expected, EPS)
    check_on_spheres(net)
    with pytest.raises(AssertionError):
        check_same_path(found, plain_path(kind), EPS)


def clip_spheres_by_formula(net, bound):
    for weight in mn.constraints.constrained_weights(net):
        manifold, partition = weight.manifold, weight.manifold.partition
        rows, gradient = partition.rows(weight.parameter.detach()), partition.rows(weight.parameter.grad)
        radius = manifold.radii[:, None]
        tangent = gradient - (rows * gradient).sum(1, keepdim=True) / radius**2 * rows
        length = radius * tangent.square().sum(1, keepdim=True).sqrt()
        clipped = gradient * torch.minimum(bound / length, torch.ones_like(length))
        weight.parameter.grad.copy_(partition.from_rows(clipped))


@kinds
def test_clipping_sphere_by_sphere(kind):
    net, twin = network(), network()
    found = train(net, optimizer_of(net, kind), batches(), between=lambda: clip_sphere_grad_norm_(net, 0.01))
    expected = train(twin, optimizer_of(twin, kind), batches(), between=lambda: clip_spheres_by_formula(twin, 0.01))
    check_same_path(found, expected, EPS)
    check_on_spheres(net)
    with pytest.raises(AssertionError):
        check_same_path(found, plain_path(kind), EPS)


# ---- what is done to the model ---------------------------------------------------------------------------------------


def assigned(net):
    net.load_state_dict({key: value.clone() for key, value in net.state_dict().items()}, assign=True)
    return net


def through_meta(net):
    state = {key: value.clone() for key, value in net.state_dict().items()}
    net.to("meta").to_empty(device="cpu").load_state_dict(state)
    return net


def made_on_meta(net):
    """A model that never had values before it got those of a checkpoint."""
    with torch.device("meta"):
        other = network()
    other.load_state_dict(net.state_dict(), assign=True)
    return other


def restored(net):
    assert len(mn.restore(assigned(net))) == 2
    return net


WAYS = {
    "deep copy": copy.deepcopy,
    "pickle": lambda net: pickle.loads(pickle.dumps(net)),
    "assigned": assigned,
    "assigned, restored": restored,
    "through meta": through_meta,
    "made on meta": made_on_meta,
}


@pytest.mark.parametrize("way", WAYS)
@kinds
def test_copied_and_replaced_parameters(kind, way):
    net = WAYS[way](network())
    check_same_path(train(net, optimizer_of(net, kind), batches()), plain_path(kind))
    check_on_spheres(net)


@kinds
def test_sabotage_a_replaced_weight_that_is_trained_off_its_spheres_is_noticed(kind):
    net = assigned(network())
    for weight in list(mn.constraints.constrained_weights(net)):
        mn.constraints.detach(weight.module, weight.leaf)
    found = train(net, optimizer_of(net, kind), batches())
    with pytest.raises(AssertionError, match="off by"):
        check_same_path(found, plain_path(kind), EPS)


# ---- interruptions ---------------------------------------------------------------------------------------------------


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def noisy_run(kind, data):
    """A network with dropout, an optimizer and a scheduler, and how to go on: all that a checkpoint must hold."""
    net = network(dtype=torch.float32, dropout=0.5)
    optimizer = optimizer_of(net, kind)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)

    def go_on(part):
        path = []
        for batch in part:
            path += train(net, optimizer, [batch])
            schedule.step()
        return path

    return net, optimizer, schedule, go_on


def check_resumed(kind, restore_rng=True):
    """Interrupted after three steps and taken up in new objects, the path is the same bit for bit."""
    data = batches(dtype=torch.float32)
    expected = noisy_run(kind, data)[-1](data)
    net, optimizer, schedule, go_on = noisy_run(kind, data)
    found = go_on(data[:3])
    saved = through_a_file(
        {
            "model": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict(),
            "rng": torch.get_rng_state(),
        }
    )
    net, optimizer, schedule, go_on = noisy_run(kind, data)
    torch.randn(100)
    net.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    if restore_rng:
        torch.set_rng_state(saved["rng"])
    check_same_path(found + go_on(data[3:]), expected)
    check_on_spheres(net)


@kinds
def test_an_interrupted_run_goes_on_bit_for_bit(kind):
    check_resumed(kind)


@kinds
def test_sabotage_without_the_random_numbers_it_does_not(kind):
    with pytest.raises(AssertionError, match="step 4"):
        check_resumed(kind, restore_rng=False)


@kinds
def test_a_moving_average_beside_the_training_changes_nothing(kind):
    net = network()
    averaged = mn.optim.AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    optimizer, found = optimizer_of(net, kind), []
    for batch in batches():
        found += train(net, optimizer, [batch])
        averaged.update_parameters(net)
        check_on_spheres(averaged.module)
    check_same_path(found, plain_path(kind))
    assert not torch.equal(averaged.module[0].weight, net[0].weight)
    assert isinstance(averaged.module[0].weight, nn.Parameter)
