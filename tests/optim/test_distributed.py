"""Training on two processes: every path is that of one process, and checkpoints move between the two."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.process_groups import on_processes
from helpers.training_cases import (
    KINDS,
    STEPS,
    batches,
    check_same_path,
    network,
    optimizer_of,
    train,
)
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

import manifold_nets as mn
from manifold_nets.constraints import attach, constrained_weights
from manifold_nets.errors import EuclideanStepError
from manifold_nets.optim import clip_sphere_grad_norm_, on_spheres

EPS = torch.finfo(torch.float64).eps
HALF = STEPS // 2
pytestmark = pytest.mark.slow


def part_of(batch, rank, world):
    return tuple(entries.chunk(world)[rank] for entries in batch)


def whole_values(net):
    """The parameters by name, gathered where they are sharded."""
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in net.named_parameters()
    }


def distributed_path(net, optimizer, data, rank, world, between=lambda: None):
    path = []
    for batch in data:
        x, y = part_of(batch, rank, world)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        between()
        optimizer.step()
        path.append(whole_values(net))
    return path


def crossing():
    """Groups that no two processes can share out among them: a whole matrix, and 15 rows in blocks of five."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Flatten(), nn.Linear(50, 11, bias=False), nn.LayerNorm(11), nn.Tanh()),
        *(nn.Linear(11, 15, bias=False), nn.GroupNorm(3, 15), nn.Tanh(), nn.Linear(15, 3)),
    ).double()
    spheres = {
        1: mn.SphereProduct(mn.Partition.whole((11, 50)), radius=1.5),
        4: mn.SphereProduct(mn.Partition.blocks((15, 11), 3), radius=torch.tensor([0.5, 1.0, 2.0])),
    }
    for place, sphere in spheres.items():
        attach(net[place], "weight", sphere, sphere.projx(net[place].weight.detach()))
    return net


NETWORKS = {"filters": functools.partial(network, "group"), "crossing": crossing}


def sharded(world, groups):
    from torch.distributed.fsdp import fully_shard

    net, mesh = NETWORKS[groups](), init_device_mesh("cpu", (world,))
    for layer in net:
        if any(True for _ in layer.parameters()):
            fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def wrapped(world, groups):
    return DistributedDataParallel(NETWORKS[groups]())


# ---- paths -----------------------------------------------------------------------------------------------------------


def check_paths(rank, world, make, groups):
    """Both optimizers, without and with clipping, against the plain loop over whole batches."""
    for kind in KINDS:
        clippings = {
            "none": lambda net: None,
            "torch's": lambda net: clip_grad_norm_(net.parameters(), 0.2),
            "sphere by sphere": lambda net: clip_sphere_grad_norm_(net, 0.01),
        }
        for clip in clippings.values():
            net, plain = make(world, groups), NETWORKS[groups]()
            found = distributed_path(net, optimizer_of(net, kind), batches(), rank, world, functools.partial(clip, net))
            expected = train(plain, optimizer_of(plain, kind), batches(), between=functools.partial(clip, plain))
            check_same_path(found, expected, EPS)


def check_any_optimizer(rank, world, make, groups):
    """Optimizers of torch whose steps are made tangent."""
    for optimizer in (
        lambda net: torch.optim.SGD(mn.param_groups(net), lr=0.1, momentum=0.9),
        lambda net: torch.optim.AdamW(mn.param_groups(net), lr=0.02),
    ):
        net, plain = make(world, groups), NETWORKS[groups]()
        found = distributed_path(net, on_spheres(optimizer(net), net), batches(), rank, world)
        check_same_path(found, train(plain, on_spheres(optimizer(plain), plain), batches()), EPS)


def check_data_parallel(rank, world):
    for groups in NETWORKS:
        check_paths(rank, world, wrapped, groups)
        check_any_optimizer(rank, world, wrapped, groups)


def check_fully_sharded(rank, world):
    for groups in NETWORKS:
        check_paths(rank, world, sharded, groups)
        check_any_optimizer(rank, world, sharded, groups)
    check_one_sum_a_step(rank, world)
    net = sharded(world, "filters")
    x, y = part_of(batches(1)[0], rank, world)
    cross_entropy(net(x), y).backward()
    with pytest.raises(EuclideanStepError):
        torch.optim.SGD(net.parameters(), lr=0.1).step()
    # Moved off the spheres and put back.
    before = whole_values(net)
    with torch.no_grad():
        for weight in constrained_weights(net):
            weight.parameter.mul_(1.5)
    assert {name: round(off, 6) for name, off in mn.project(net).items()} == {"0.weight": 0.5, "3.weight": 0.5}
    check_same_path([whole_values(net)], [before], EPS)


def check_one_sum_a_step(rank, world):
    """In a step each weight whose groups cross the boundary costs one sum of six scalars a group, the others none."""
    for groups, expected in (("filters", []), ("crossing", [6, 18])):
        net = sharded(world, groups)
        optimizer = optimizer_of(net, "sgd")
        distributed_path(net, optimizer, batches(2), rank, world)
        x, y = part_of(batches(3)[2], rank, world)
        optimizer.zero_grad()
        cross_entropy(net(x), y).backward()
        sizes, add_up = [], dist.all_reduce

        def counting(sums, sizes=sizes, add_up=add_up, **options):
            sizes.append(sums.numel())
            return add_up(sums, **options)

        dist.all_reduce = counting
        try:
            optimizer.step()
        finally:
            dist.all_reduce = add_up
        assert sizes == expected


def check_made_on_meta(rank, world):
    """Made without values, sharded, and only then filled: by drawing, or from a checkpoint."""
    from torch.distributed.fsdp import fully_shard

    def empty():
        with torch.device("meta"):
            net = torch.nn.Sequential(
                mn.layers.UnitNormConv2d(2, 5, 3, bias=False), torch.nn.BatchNorm2d(5), torch.nn.ReLU(),
                mn.layers.UnitNormConvTranspose2d(5, 3, 3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(),
            )  # fmt: skip
        fully_shard(net, mesh=init_device_mesh("cpu", (world,)))
        net.to_empty(device="cpu")
        return net

    def fill(net):
        torch.manual_seed(rank)  # each process draws other values
        for layer in net:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
        return net

    net, other = fill(empty()), empty()
    set_model_state_dict(other, get_model_state_dict(net))
    for each in (net, other):
        distributed_path(each, optimizer_of(each, "adam"), batches(3, dtype=torch.float32), rank, world)
        for weight in constrained_weights(each):
            whole = weight.parameter.full_tensor()
            assert float(weight.manifold.deviations(whole).max()) <= 4 * torch.finfo(torch.float32).eps
    check_same_path([whole_values(other)], [whole_values(net)])


def check_each_process_by_itself_differs(rank, world):
    """Sabotage: without an exchange of gradients the paths are others."""
    net, plain = network("group"), network("group")
    found = distributed_path(net, optimizer_of(net, "sgd"), batches(), rank, world)
    check_same_path(found, train(plain, optimizer_of(plain, "sgd"), batches()), EPS)


def plain_network(seed):
    """Convolutions in front of a batch and a group normalization, and random running statistics."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.GroupNorm(2, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip
    with torch.no_grad():
        net[1].running_mean.normal_()
        net[1].running_var.uniform_(0.5, 2.0)
        net[0].weight.mul_(1.0 + seed)
    return net.eval()


def check_plain_states(rank, world, folder):
    """A state of the plain network, whole, in parts or from a distributed checkpoint, gives its converted form."""
    from torch.distributed.fsdp import fully_shard

    x = torch.randn(4, 2, 7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    plain = plain_network(2)
    expected = plain(x).detach()
    mesh = init_device_mesh("cpu", (world,))

    def converted():
        net = fully_shard(mn.convert(plain_network(0), x), mesh=mesh)
        return net, optimizer_of(net, "sgd")

    def whole_state(net):
        options = StateDictOptions(full_state_dict=True)
        set_model_state_dict(net, plain.state_dict(), options=options)

    def from_the_first(net):
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        set_model_state_dict(net, plain.state_dict() if rank == 0 else {}, options=options)

    def from_a_checkpoint(net):
        state = get_model_state_dict(net)
        dcp.load(state, checkpoint_id=f"{folder}/plain")
        set_model_state_dict(net, state)

    dcp.save(plain.state_dict(), checkpoint_id=f"{folder}/plain")
    for load in (whole_state, from_the_first, from_a_checkpoint):
        net, optimizer = converted()
        load(net)
        for group in optimizer.param_groups:
            group["lr"] = 1e-30
        assert float((net(x) - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), load.__name__
        net(x).square().mean().backward()
        optimizer.step()
        assert float((net(x) - expected).abs().max()) <= 1e-12 * float(expected.abs().max()), load.__name__


def test_plain_states_are_converted_when_they_are_loaded_into_shards(tmp_path):
    assert on_processes(check_plain_states, tmp_path, str(tmp_path))


def test_data_parallel(tmp_path):
    assert on_processes(check_data_parallel, tmp_path)


def test_fully_sharded(tmp_path):
    assert on_processes(check_fully_sharded, tmp_path)


def test_made_on_meta_and_fully_sharded(tmp_path):
    assert on_processes(check_made_on_meta, tmp_path)


def test_sabotage_a_check_that_fails_in_a_process_fails_here(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="off by"):
        on_processes(check_each_process_by_itself_differs, tmp_path)


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def states_of(net, optimizer):
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save_after_half(rank, world, folder):
    for kind, groups in itertools.product(KINDS, NETWORKS):
        net = sharded(world, groups) if world > 1 else NETWORKS[groups]()
        optimizer = optimizer_of(net, kind)
        distributed_path(net, optimizer, batches()[:HALF], rank, world)
        dcp.save(states_of(net, optimizer), checkpoint_id=f"{folder}/{kind}-{groups}-{world}")


def go_on_from(rank, world, folder, saved_by):
    """Load what another number of processes has saved, into a network of other values, and compare the rest."""
    for kind, groups in itertools.product(KINDS, NETWORKS):
        net = sharded(world, groups) if world > 1 else NETWORKS[groups]()
        optimizer = optimizer_of(net, kind)
        distributed_path(net, optimizer, batches()[HALF:], rank, world)
        states = states_of(net, optimizer)
        dcp.load(states, checkpoint_id=f"{folder}/{kind}-{groups}-{saved_by}")
        set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
        found = distributed_path(net, optimizer, batches()[HALF:], rank, world)
        plain = NETWORKS[groups]()
        expected = train(plain, optimizer_of(plain, kind), batches())[HALF:]
        check_same_path(found, expected, HALF * EPS)


def go_on_and_save(rank, world, folder):
    go_on_from(rank, world, folder, 1)
    save_after_half(rank, world, folder)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_one_process_goes_on_in_two_and_back(tmp_path):
    save_after_half(0, 1, str(tmp_path))
    assert on_processes(go_on_and_save, tmp_path, str(tmp_path))
    go_on_from(0, 1, str(tmp_path), 2)
    assert (tmp_path / "sgd-crossing-2").is_dir()
