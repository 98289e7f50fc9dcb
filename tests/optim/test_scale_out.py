"""One model under every parallelism: the path, a run converted half-way, and checkpoints are those of one process."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.process_groups import on_processes
from helpers.training_cases import check_same_path
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import manifold_nets as mn
from manifold_nets.errors import UnsupportedModelError
from manifold_nets.optim import from_torch, on_spheres, plain_norms, to_torch

EPS = torch.finfo(torch.float64).eps
STEPS = 3
GENERATOR = torch.Generator().manual_seed(3)
X, Y = torch.randn(16, 6, dtype=torch.float64, generator=GENERATOR), torch.arange(16) % 3
pytestmark = pytest.mark.slow


class Net(nn.Module):
    """A column-wise layer whose heads are normalized, and a row-wise one whose outputs are, both with biases."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.up, self.down, self.last = (nn.Linear(*s) for s in ((6, 8), (8, 12), (12, 8), (8, 3)))
        # Exactly scale-invariant: with a larger eps a plain run and its converted form part.
        self.heads, self.norm = nn.LayerNorm(3, 1e-30, elementwise_affine=False), nn.GroupNorm(2, 8, 1e-30)
        self.double()

    def forward(self, x):
        heads = self.heads(self.up(self.first(x).tanh()).unflatten(-1, (-1, 3)))
        return self.last(self.norm(self.down(heads.flatten(-2).relu())))


def converted(net):
    net = mn.convert(net, X[:4])
    # Heads of 3 rows stay whole where columns are cut; 2 blocks of 4 rows are cut across by rows of inputs.
    assert [w.manifold.partition.n_groups for w in mn.constraints.constrained_weights(net)] == [4, 2]
    return net


# ---- ways to spread a model ------------------------------------------------------------------------------------------


def data_parallel(net, world):
    return DistributedDataParallel(net)


def fully_sharded(net, world):
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    for layer in (net.first, net.up, net.down):
        fully_shard(layer, mesh=mesh)
    return fully_shard(net, mesh=mesh)


def tensor_parallel(net, world):
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    return parallelize_module(
        net, init_device_mesh("cpu", (world,)), {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )


def alone(net, world):
    return net


SPREAD = (data_parallel, fully_sharded, tensor_parallel)


def batch_of(spread, rank, world):
    if spread in (alone, tensor_parallel):  # every process sees the whole batch
        return X, Y
    return X.chunk(world)[rank], Y.chunk(world)[rank]


def values(net):
    return {
        name.removeprefix("module."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone()
        for name, p in net.named_parameters()
    }


def path(net, optimizer, batch, steps=STEPS):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()
        found.append(values(net))
    return found


def whole(net):
    """A plain network of the values of a spread one."""
    net_of_all = Net(1)
    net_of_all.load_state_dict(values(net))
    return net_of_all


SGD = functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01)
ADAM = functools.partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)


# ---- paths -----------------------------------------------------------------------------------------------------------


def on_manifolds(make, spread, rank, world):
    """The path of a network that is converted, and then spread."""
    net = spread(converted(Net()), world)
    return path(net, make(net), batch_of(spread, rank, world))


def optimizers():
    return (
        lambda net: mn.optim.RiemannianSGD(mn.param_groups(net), lr=0.1, momentum=0.9),
        lambda net: mn.optim.RiemannianAdam(mn.param_groups(net), lr=0.02),
        lambda net: on_spheres(SGD(net.parameters()), net),
        lambda net: on_spheres(ADAM(net.parameters()), net),
    )


def check_paths(rank, world):
    for make in optimizers():
        expected = on_manifolds(make, alone, rank, world)
        for spread in SPREAD:
            check_same_path(on_manifolds(make, spread, rank, world), expected, EPS)
    # What only a whole model can be asked is refused, with a way that works.
    for spread in (fully_sharded, tensor_parallel):
        with pytest.raises(UnsupportedModelError, match=r"which is sharded; .* into a whole model, and shard what"):
            mn.convert(spread(Net(), world), X[:4])


def of_a_plain_run(make, transfer, spread, rank, world):
    """Three plain steps, three on spheres, and three plain ones again; what is converted and reverted is whole."""
    batch, net = batch_of(spread, rank, world), spread(Net(), world)
    optimizer = make(net.parameters())
    found = path(net, optimizer, batch)
    form = converted(whole(net))
    round_net = spread(form if spread is alone else converted(whole(net)), world)
    round_optimizer = from_torch(optimizer, net, round_net, transfer=transfer)
    found += path(round_net, round_optimizer, batch)
    if transfer == "follow":
        norms = plain_norms(round_optimizer, getattr(round_net, "module", round_net))
        form.load_state_dict(values(round_net))
        plain = spread(mn.revert(form, norms=norms), world)
        found += path(plain, to_torch(round_optimizer, round_net, plain), batch)
    return found


def check_plain_runs(rank, world):
    for make in (SGD, ADAM):
        for transfer in ("follow", "equilibrium"):
            expected = of_a_plain_run(make, transfer, alone, rank, world)
            for spread in SPREAD:
                check_same_path(of_a_plain_run(make, transfer, spread, rank, world), expected, EPS)
        # The plain run was never left.
        net = Net()
        plain = path(net, make(net.parameters()), (X, Y), 3 * STEPS)
        check_same_path([of_a_plain_run(make, "follow", alone, rank, world)[-1]], [plain[-1]], 3 * STEPS * EPS)


def check_local_sums_differ(rank, world):
    """Sabotage: the parts of a sphere are not added up."""
    dist.all_reduce = lambda *given, **options: None
    make = optimizers()[0]
    check_same_path(on_manifolds(make, tensor_parallel, rank, world), on_manifolds(make, alone, rank, world), EPS)


def test_paths(tmp_path):
    assert on_processes(check_paths, tmp_path)


def test_plain_runs_go_on_in_converted_form_and_back(tmp_path):
    assert on_processes(check_plain_runs, tmp_path)


def test_sabotage_sums_that_are_not_exchanged_give_another_path(tmp_path):
    with pytest.raises(torch.multiprocessing.ProcessRaisedException, match="off by"):
        on_processes(check_local_sums_differ, tmp_path)


# ---- checkpoints across world sizes ----------------------------------------------------------------------------------


RUNS = (*optimizers()[1:3], SGD, ADAM)


def spread_run(make, spread, world):
    """A network in the middle of its run: converted, or a plain run that goes on in converted form."""
    net = spread(converted(Net()), world)
    if make in RUNS[2:]:
        plain = Net()
        return net, from_torch(make(plain.parameters()), plain, net)
    return net, make(net)


def states_of(net, optimizer):
    model_state, optimizer_state = get_state_dict(net, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save(rank, world, folder):
    for number, make in enumerate(RUNS):
        for spread in (fully_sharded, tensor_parallel):
            net, optimizer = spread_run(make, spread, world)
            path(net, optimizer, batch_of(spread, rank, world))
            dcp.save(states_of(net, optimizer), checkpoint_id=f"{folder}/{number}-{spread.__name__}")


def go_on(rank, world, folder, spreads=(fully_sharded, tensor_parallel)):
    """Load what two processes have saved into a network that has gone another way, and go on from there."""
    for number, make in enumerate(RUNS):
        net, optimizer = spread_run(make, alone, world)
        expected = path(net, optimizer, (X, Y), 2 * STEPS)[STEPS:]
        for spread in spreads:
            for saved_by in {fully_sharded, tensor_parallel} - {spread}:
                net, optimizer = spread_run(make, spread, world)
                batch = batch_of(spread, rank, world)
                path(net, optimizer, batch, 1)
                states = states_of(net, optimizer)
                dcp.load(states, checkpoint_id=f"{folder}/{number}-{saved_by.__name__}")
                set_state_dict(net, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
                check_same_path(path(net, optimizer, batch), expected, 2 * EPS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_a_checkpoint_of_two_processes_goes_on_in_one_and_in_four(tmp_path):
    assert on_processes(save, tmp_path, str(tmp_path))
    go_on(0, 1, str(tmp_path), spreads=(alone,))
    assert on_processes(go_on, tmp_path, str(tmp_path), world=4)
