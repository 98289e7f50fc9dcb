"""Checks that run on several processes at once."""

import os

import torch
import torch.distributed as dist


def in_a_group(check, rank, world, store, *arguments):
    """Run a check in one process of a group."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    try:
        check(rank, world, *arguments)
        dist.barrier()
    finally:
        dist.destroy_process_group()
    # All is checked. Leaving without the destructors of the libraries: those of gloo's threads now and then abort.
    os._exit(0)


def on_processes(check, folder, *arguments, world=2):
    """Run a check on several processes; what a process raises is raised."""
    torch.multiprocessing.spawn(
        _spawned, args=(check, world, str(folder / f"store-{check.__name__}-{world}"), arguments), nprocs=world
    )
    return True


def _spawned(rank, check, world, store, arguments):
    in_a_group(check, rank, world, store, *arguments)
