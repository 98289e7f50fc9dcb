"""Fully sharded training: the parameter objects are replaced by shards, and the weights stay on their spheres."""

import copy
import os

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import manifold_nets as mn
from manifold_nets.constraints import attach
from manifold_nets.errors import EuclideanStepError
from manifold_nets.optim import RiemannianAdam, RiemannianSGD

PARTITIONS = {
    "filters": (mn.Partition.filters((4, 6)), 1.0),
    "filters of radius 2.5": (mn.Partition.filters((4, 6)), 2.5),
    "blocks": (mn.Partition.blocks((4, 6), 2), 1.0),
}
KINDS = {"sgd": (RiemannianSGD, {"momentum": 0.9}), "adam": (RiemannianAdam, {"amsgrad": True})}


def train_beside_an_unsharded_copy(rank, world, store, partition, kind):
    """One process of the group: train a sharded network and a whole one on the same data, and compare."""
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 6))
        chosen, radius = PARTITIONS[partition]
        sphere = mn.SphereProduct(chosen, radius=radius)
        attach(net[0], "weight", sphere, sphere.projx(net[0].weight.detach()))
        whole = copy.deepcopy(net)
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        make, options = KINDS[kind]
        inputs = torch.randn(8, 6)
        for model in (net, whole):
            optimizer = make(mn.param_groups(model), lr=0.1, **options)
            for _ in range(5):
                optimizer.zero_grad()
                model(inputs).square().sum().backward()
                optimizer.step()
        found, expected = net[0].weight.full_tensor(), whole[0].weight
        assert sphere.check_point_on_manifold(found.detach())
        assert torch.allclose(found, expected, rtol=0, atol=100 * radius * torch.finfo(torch.float32).eps)
        net(inputs).sum().backward()
        with pytest.raises(EuclideanStepError):
            torch.optim.SGD(net.parameters(), lr=0.1).step()
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # All is checked. Leaving without the destructors of the libraries: those of gloo's threads now and then abort.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("partition", PARTITIONS)
def test_sharded_weights_stay_on_their_spheres(tmp_path, partition, kind):
    # Raises what a process raised.
    arguments = (2, str(tmp_path / "store"), partition, kind)
    finished = torch.multiprocessing.spawn(train_beside_an_unsharded_copy, args=arguments, nprocs=2)
    assert finished is None


@pytest.mark.slow
def test_a_failure_in_a_process_fails_the_test(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="KeyError"):
        test_sharded_weights_stay_on_their_spheres(tmp_path, "no such partition", "sgd")
