"""What a step keeps and what it takes on the way: measured by the system, for every optimizer and execution."""

import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import geoopt
import pytest
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets.optim import OPTIMIZERS
from manifold_nets.optim.backends import reference
from manifold_nets.optim.backends.rule import StepInput
from manifold_nets.optim.backends.sharded import Part

STATUS = Path("/proc/self/status")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BOTH = {"rsgd", "radam"}
CASES = [(name, {}) for name in OPTIMIZERS]
CASES += [(name, {how: True}) for name in sorted(BOTH) for how in ("foreach", "fused")]
linux = pytest.mark.skipif(not STATUS.exists(), reason="reads the peak of memory from /proc")
in_a_process = pytest.mark.slow


def optimizer_of(name, weight, sphere, **options):
    row = OPTIMIZERS[name]
    group = {"params": [weight]}
    if row.weights == "plain":
        group["partitions"] = [sphere.partition.to_dict()]
    more = {} if row.adaptive else {"momentum": 0.9}
    return row.kind([group], lr=1e-3, **more, **row.options, **options)


def weight_of(name, sphere, dtype):
    point = sphere.random().to(dtype)
    if OPTIMIZERS[name].weights == "spheres":
        return geoopt.ManifoldParameter(point, manifold=sphere)
    return nn.Parameter(point.as_subclass(torch.Tensor))


def kilobytes(key):
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(key))


def measure(cases, shape=(1024, 4096)):
    """Write for each case the growth of memory at its peak within a third step, and the state, in weights."""
    torch.set_num_threads(1)
    found = []
    for name, options, dtype in cases:
        sphere = mn.SphereProduct(shape)
        weight = weight_of(name, sphere, DTYPES[dtype])
        weight.grad = torch.randn_like(weight)
        optimizer = optimizer_of(name, weight, sphere, **options)
        optimizer.step()
        optimizer.step()
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = kilobytes("VmRSS")
        optimizer.step()
        taken = 1024 * (kilobytes("VmHWM") - before)
        kept = sum(x.nbytes for x in optimizer.state[weight].values())
        found.append((taken / weight.nbytes, kept / weight.nbytes))
    sys.stdout.write(json.dumps(found))


def measured(cases, before=""):
    """Measure in a process that gives freed memory back at once."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "0"}
    code = f"from {Path(__file__).stem} import measure, reference; {before}measure({cases!r})"
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=Path(__file__).parent,
        env=environment, timeout=600,
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def check(cases, allowed=1.0, before=""):
    for case, (taken, kept) in zip(cases, measured(cases, before), strict=True):
        assert taken <= allowed, f"{case}: {taken:.2f} weights at the peak"
        # The moment, and one scalar a sphere in float32; one an entry where Adam's direction is wanted.
        entries = 4 / DTYPES[case[2]].itemsize if case[0] == "angular-adam" else 0
        assert kept <= 1.0 + entries + 4 / 4096, case


@linux
@in_a_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_that_a_step_takes_is_less_than_one_weight_and_it_keeps_one(dtype):
    check([(name, options, dtype) for name, options in CASES])


@linux
@in_a_process
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_compiled_step_writes_in_place(dtype):
    check([(name, {"compile": True}, dtype) for name in sorted(BOTH)], allowed=0.1)


@linux
@in_a_process
def test_sabotage_the_reference_takes_float32_copies_of_a_weight_that_is_not_cut():
    check([("rsgd", {"foreach": False}, "bfloat16")])
    with pytest.raises(AssertionError, match="weights at the peak"):
        check([("rsgd", {"foreach": False}, "bfloat16")], before="reference._ENTRIES = 2**40; ")


# ---- chunks ----------------------------------------------------------------------------------------------------------

PARTITIONS = {
    "filters": mn.Partition.filters((10, 3, 2)),
    "blocks": mn.Partition.blocks((12, 5), 6),
    "heads and columns": mn.Partition((8, 6), (4, 2, 6), (0, 2)),
    "transposed, four groups": mn.Partition.transposed_filters((16, 3, 2), groups=4),
}


@pytest.mark.parametrize("radius", ["one", "each"])
@pytest.mark.parametrize("name", PARTITIONS)
def test_chunks_hold_whole_groups_with_their_radii(name, radius):
    partition = PARTITIONS[name]
    radii = torch.linspace(0.5, 2.5, partition.n_groups) if radius == "each" else 1.5
    sphere = mn.SphereProduct(partition, radius=radii)
    weight = sphere.random(dtype=torch.float64).as_subclass(torch.Tensor)
    second = torch.arange(partition.n_groups).double().reshape(partition.spread_shape)
    member = StepInput(weight, -weight, sphere, 2 * weight, second)
    view, _ = reference._view_of(member, Part(sphere), by_entries=False)
    parts = list(view.chunks(2 * weight.numel() // partition.view[0]))
    assert len(parts) == partition.view[0] // 2 > 1
    for number, expected in enumerate((weight, -weight, 2 * weight, second)):
        assert torch.equal(torch.cat([part[number] for part in parts]).flatten(), expected.flatten())
    for part in parts:
        assert weight.data_ptr() <= part.weight.data_ptr() < weight.data_ptr() + weight.nbytes
        norms = part.weight.square().sum(partition.reduced, keepdim=True).sqrt()
        torch.testing.assert_close(norms, torch.as_tensor(part.radius).expand_as(norms).double())


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("case", ["filters", "blocks"])
def test_steps_in_chunks_are_those_of_whole_weights(name, case, monkeypatch):
    partition = PARTITIONS[case]
    paths = []
    for entries in (2**20, partition.group_size):
        monkeypatch.setattr(reference, "_ENTRIES", entries)
        torch.manual_seed(0)
        sphere = mn.SphereProduct(partition, radius=torch.linspace(0.5, 2.5, partition.n_groups))
        weight = weight_of(name, sphere, torch.float64)
        # What is stepped in batches has chunks of its own.
        optimizer = optimizer_of(name, weight, sphere, foreach=False)
        for _ in range(4):
            weight.grad = torch.randn(partition.shape, dtype=torch.float64)
            optimizer.step()
        paths.append((weight.detach().clone(), *(x.clone() for x in optimizer.state[weight].values())))
    eps = torch.finfo(torch.float64).eps
    for whole, cut in zip(*paths, strict=True):
        # To the order in which processors take the entries of a loop and its rest.
        torch.testing.assert_close(whole, cut, rtol=64 * eps, atol=64 * eps)


def test_angles_of_a_whole_weight_are_not_taken_chunk_by_chunk(monkeypatch):
    monkeypatch.setattr(reference, "_ENTRIES", 6)
    sphere = mn.SphereProduct((10, 3, 2))
    weight = weight_of("angular", sphere, torch.float64)
    before = weight.detach().clone()
    weight.grad = torch.randn(10, 3, 2, dtype=torch.float64)
    mn.optim.AngularSGD([weight], lr=0.25, per="weight").step()
    angles = sphere.component_dist(before, weight.detach())
    assert float(angles.square().mean().sqrt()) == pytest.approx(0.25, rel=1e-7)
    assert float(angles.min()) < 0.24


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gradients_are_let_go_after_a_step(name):
    sphere = mn.SphereProduct((4, 3))
    weight = weight_of(name, sphere, torch.float32)
    for how in ({}, {"foreach": True}, {"foreach": False}):
        optimizer = optimizer_of(name, weight, sphere, **how)
        for _ in range(3):
            weight.grad = torch.randn(4, 3)
            alive = weakref.ref(weight.grad)
            optimizer.step()
            optimizer.zero_grad()
            assert alive() is None
