"""Monitor on two processes: the numbers are those of one process, whatever each of the two holds of a weight."""

import warnings

import numpy as np
import pytest
import torch
from helpers.process_groups import on_processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import manifold_nets as mn
from manifold_nets import monitor as module
from manifold_nets.monitor_records import QUANTITIES

STEPS = 4
pytestmark = pytest.mark.slow


def network():
    """A whole matrix, blocks of rows and single filters, each in front of a normalization of single examples."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Flatten(), nn.Linear(50, 11, bias=False), nn.LayerNorm(11), nn.Tanh()),
        *(nn.Linear(11, 15, bias=False), nn.GroupNorm(3, 15), nn.Tanh()),
        *(nn.Unflatten(1, (15, 1, 1)), nn.ConvTranspose2d(15, 5, 3, bias=False), nn.InstanceNorm2d(5), nn.Tanh()),
        *(nn.Flatten(), nn.Linear(45, 3)),
    ).double()


GROUPS = {"1.weight": 1, "4.weight": 3, "8.weight": 5}


def batches():
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(8, 2, 5, 5, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator))
        for _ in range(STEPS)
    ]


def path_of(net, report, rank=0, world=1, *, watched=True, file=None):
    """Train on this process's part of each batch; return the numbers of all samples, and the weights."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.1)
    monitor = mn.Monitor(net, optimizer, report, every=1, max_groups=4, writer=file) if watched else None
    for x, y in batches():
        optimizer.zero_grad()
        cross_entropy(net(x.chunk(world)[rank]), y.chunk(world)[rank]).backward()
        optimizer.step()
    weights = [p.full_tensor() if hasattr(p, "full_tensor") else p.detach() for p in net.parameters()]
    if monitor is None:
        return None, weights
    assert dict(zip(monitor.history.weights, monitor.history.groups, strict=True)) == GROUPS
    return {quantity: monitor.history.of(quantity) for quantity in QUANTITIES}, weights


def check_same(found, expected):
    for quantity, values in expected.items():
        # Radial shares of gradients are rounding; steps to equilibrium are logarithms of differences.
        loose = {"radial_gradient": 1e-12, "steps_to_equilibrium": 1e-6}
        off = loose.get(quantity, 1e-10 * np.nanmax(np.abs(values)) if np.isfinite(values).any() else 0)
        np.testing.assert_allclose(found[quantity], values, rtol=0, atol=off, err_msg=quantity)


def sharded(net, world):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in net:
        if isinstance(layer, (nn.Linear, nn.ConvTranspose2d)):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def check_training(rank, world, folder):
    report = mn.diagnose(network(), batches()[0][0])
    expected, weights = path_of(network(), report)
    for wrap in (DistributedDataParallel, lambda net: sharded(net, world)):
        found, same = path_of(wrap(network()), report, rank, world, file=folder / f"{rank}.csv")
        check_same(found, expected)
        _, unwatched = path_of(wrap(network()), report, rank, world, watched=False)
        assert all(torch.equal(a, b) for a, b in zip(same, unwatched, strict=True))
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(same, weights, strict=True))
    # The first process writes.
    assert (folder / f"{rank}.csv").exists() == (rank == 0)
    # Sabotage: without the exchange the numbers are those of the parts.
    module.Monitor._exchange = lambda self, sums: None
    found, _ = path_of(sharded(network(), world), report, rank, world)
    with pytest.raises(AssertionError):
        check_same(found, expected)


def check_placements(rank, world):
    """Tensor parallelism cuts weights along any axis, and meshes have several."""
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    report = mn.diagnose(network(), batches()[0][0])
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in network().parameters()]

    def numbers(place):
        net = network()
        for holder in net.modules():
            for name, parameter in list(holder.named_parameters(recurse=False)):
                setattr(holder, name, nn.Parameter(place(parameter.detach())))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, weight_decay=0.1, foreach=False)
        monitor = mn.Monitor(net, optimizer, report, every=1)
        for parameter, gradient in zip(net.parameters(), gradients, strict=True):
            parameter.grad = place(gradient)
        # Gradients are noise here, and one process says so.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", module.MonitorWarning)
            optimizer.step()
        return {quantity: monitor.history.of(quantity) for quantity in QUANTITIES}

    expected = numbers(torch.clone)
    line, flat = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (1, world))
    for mesh, placements in (
        (line, [Shard(0)]),
        (line, [Shard(1)]),
        (line, [Replicate()]),
        (flat, [Shard(0), Shard(1)]),
        (flat, [Replicate(), Shard(0)]),
    ):

        def place(value, mesh=mesh, placements=placements):
            fits = [p if not isinstance(p, Shard) or p.dim < value.ndim else Replicate() for p in placements]
            return distribute_tensor(value, mesh, fits, src_data_rank=None)

        check_same(numbers(place), expected)


def test_data_parallel_and_fully_sharded(tmp_path):
    assert on_processes(check_training, tmp_path, tmp_path)


def test_tensor_parallel(tmp_path):
    assert on_processes(check_placements, tmp_path)
