"""Checkpoint files that are interrupted, damaged, of another kind, or of another model."""

import json
import math
import os
import pickle
import subprocess
import sys
import textwrap

import hypothesis.strategies as st
import pytest
import safetensors
import safetensors.torch
import torch
from helpers.checkpoint_cases import architecture, check_same, check_untouched, constrained, put, snapshot, with_buffer
from hypothesis import HealthCheck, given, settings
from torch import nn

import manifold_nets as mn
from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion import storage
from manifold_nets.conversion.checkpoint import load, save
from manifold_nets.conversion.remedies.dead_biases import put_back_bias, remove_bias, removed_biases
from manifold_nets.errors import CheckpointError, CheckpointFormatError, CheckpointMismatchError
from manifold_nets.weights import load_weights

# ---- writing all or nothing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace", "safetensors.torch.save_file"])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failed_write_leaves_the_folder_as_it_was(tmp_path, monkeypatch, where, existing):
    path = tmp_path / "net.safetensors"
    if existing:
        save(constrained(seed=7), path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*_args, **_kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(where, fail)
    with pytest.raises(OSError, match="no space left"):
        save(constrained(), path)
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_process_killed_while_writing_leaves_the_old_file(tmp_path):
    path = tmp_path / "layer.safetensors"
    save(put(nn.Linear(3, 3), "weight", mn.SphereProduct((3, 3))), path)
    before = path.read_bytes()
    script = f"""
        import os, torch, manifold_nets
        from manifold_nets.conversion.checkpoint import save
        os.fsync = lambda descriptor: os._exit(9)
        save(torch.nn.Linear(3, 3), {str(path)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False, timeout=120)
    assert done.returncode == 9
    assert path.read_bytes() == before
    load(nn.Linear(3, 3), path)


def test_permissions_and_links_are_kept(tmp_path):
    real, link = tmp_path / "real.safetensors", tmp_path / "link.safetensors"
    save(constrained(), real)
    mask = os.umask(0)
    os.umask(mask)
    assert real.stat().st_mode & 0o777 == 0o666 & ~mask
    real.chmod(0o640)
    link.symlink_to(real)
    save(constrained(seed=3), link)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    check_same(constrained(seed=3), load(architecture(), real))


# ---- bad files ------------------------------------------------------------------------------------------------------


def small():
    torch.manual_seed(0)
    return put(nn.Linear(3, 2), "weight", mn.SphereProduct((2, 3), radius=[0.5, 2.0]))


def check_damaged_file_is_harmless(path, data):
    """Loading gives a checkpoint error and leaves the model alone, or gives exactly what was saved."""
    path.write_bytes(data)
    fresh = nn.Linear(3, 2)
    before = snapshot(fresh)
    try:
        load(fresh, path)
    except CheckpointError as caught:
        error = str(caught)
    else:
        check_same(small(), fresh)
        return
    assert str(path) in error
    check_untouched(fresh, before)


@pytest.fixture(scope="module")
def file_and_bytes(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "layer.safetensors"
    save(small(), path)
    return path, path.read_bytes()


def test_every_truncation_is_an_error(file_and_bytes):
    path, data = file_and_bytes
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointFormatError, match="truncated"):
            load(nn.Linear(3, 2), path)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_bytes_are_harmless(file_and_bytes, data):
    path, good = file_and_bytes
    changed = bytearray(good)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(good) - 1))
        changed[place] = data.draw(st.integers(0, 255))
    check_damaged_file_is_harmless(path, bytes(changed))


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noise=st.binary(max_size=200), keep=st.integers(0, 60))
def test_noise_is_harmless(file_and_bytes, noise, keep):
    path, good = file_and_bytes
    check_damaged_file_is_harmless(path, good[:keep] + noise)


def test_sabotage_without_its_checksum_a_damaged_file_is_loaded(file_and_bytes, monkeypatch):
    path, good = file_and_bytes
    checksum = json.loads(metadata_of(path, good))["checksum"]
    damaged = good[:-32] + bytes([good[-32] ^ 1]) + good[-31:]
    check_damaged_file_is_harmless(path, damaged)
    monkeypatch.setattr(storage, "tensors_checksum", lambda *_: checksum)
    with pytest.raises(AssertionError, match="bias"):
        check_damaged_file_is_harmless(path, damaged)


def metadata_of(path, data):
    path.write_bytes(data)
    with safetensors.safe_open(path, framework="pt") as file:
        return file.metadata()["manifold_nets"]


def rewrite(path, net, **changes):
    """Write a checkpoint whose document is changed, with a checksum that fits."""
    save(net, path)
    document = {**json.loads(metadata_of(path, path.read_bytes())), **changes}
    tensors = safetensors.torch.load_file(path)
    document["checksum"] = storage.tensors_checksum(tensors, document)
    safetensors.torch.save_file(tensors, path, metadata={"manifold_nets": json.dumps(document)})


SPHERES = {"shape": [2, 3], "view": [2, 3], "kept": [0], "radius": [1]}
ABSORBER = {
    "op": "batch_norm", "module": "", "kind": "batch", "eps": 1e-5, "weight": None, "bias": None,
    "running_mean": None, "running_var": None, "calls": 1, "groups": [],
}  # fmt: skip


def moved(**changes):
    """What a conversion moved, as a document says it, for the layer of `small`."""
    weight = {"radius": 1.0, "biases": {}, "absorbers": [], **changes}
    return {"": {"tolerance": None, "weights": {"weight": weight}, "biases": {}}}


MEMBER = {"name": "weight", "shape": [2, 3], "view": [2, 3], "kept": [0]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 3, "manifolds": None}, "format version 3.*upgrade"),
        ({"version": 0}, r"version: 0 is not one of \[1, 2\]"),
        ({"conversions": {}}, "conversions"),
        ({"conversions": moved(radius=-1.0)}, "conversions//weights/weight/radius: -1.0"),
        ({"conversions": moved(biases={"bias": [0, 2]})}, "does not fit 'bias'"),
        ({"conversions": moved(biases={"bias": [0]})}, "does not fit 'bias'"),
        ({"conversions": moved(absorbers=[{**ABSORBER, "running_var": "bias", "groups": [1, 0, 1]}])}, "fit 'bias'"),
        ({"format": "something else"}, "unreadable"),
        ({"more": 1}, "'more' was unexpected"),
        ({"manifolds": {"weight": {}}}, "manifolds/weight: 'shape' is a required property"),
        ({"manifolds": {"weight": {**SPHERES, "view": [7]}}}, r"view \(7,\) of shape \(2, 3\)"),
        ({"manifolds": {"weight": {**SPHERES, "shape": [2, 3.0]}}}, "3.0 is not of type 'integer'"),
        ({"manifolds": {"weight": {**SPHERES, "radius": [math.inf]}}}, "unreadable"),
        ({"manifolds": {"weight": {**SPHERES, "radius": [1, 1]}}}, "with contradicting partitions"),
        ({"manifolds": {"nowhere": {**SPHERES, "shape": [2], "view": [2]}}}, "fits no tensor"),
        ({"manifolds": {"bias": SPHERES}}, "fits no tensor"),
        ({"manifolds": {"weight": {**SPHERES, "radius": [1.5]}}}, "off its sphere"),
        (
            {"manifolds": {"weight": {**SPHERES, "joint": {"members": [MEMBER, MEMBER], "radius": [1]}, "place": 2}}},
            "only",
        ),
        ({"manifolds": {"weight": {**SPHERES, "joint": {"members": [MEMBER, MEMBER], "radius": [1]}}}}, "dependency"),
        ({"aliases": {"more": "nowhere"}}, "aliases/'more' is not another name"),
        ({"aliases": ["more"]}, "aliases: .* is not of type 'object'"),
        ({"removed_biases": ["bias"]}, "the file holds 'bias'"),
    ],
)
def test_documents_of_other_versions_and_contents(tmp_path, changes, message):
    path = tmp_path / "layer.safetensors"
    rewrite(path, small(), **changes)
    fresh = nn.Linear(3, 2)
    before = snapshot(fresh)
    with pytest.raises(CheckpointFormatError, match=message) as caught:
        load(fresh, path)
    assert str(path) in str(caught.value)
    check_untouched(fresh, before)


@pytest.mark.parametrize("names", [["nowhere.bias"], ["weights"], ["running_mean"]])
def test_removed_biases_that_the_model_does_not_have(tmp_path, names):
    path = tmp_path / "layer.safetensors"
    rewrite(path, small(), removed_biases=names)
    fresh = nn.Linear(3, 2)
    before = snapshot(fresh)
    with pytest.raises(CheckpointMismatchError, match=f"'{names[0]}' is a removed bias in the file, but not a bias"):
        load(fresh, path)
    check_untouched(fresh, before)


@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.ones(2), r"bias: torch\.float32 in the file, torch\.float16 in the model"),
        (torch.ones(1).half(), r"bias: shape \(1,\) in the file, \(2,\) in the model"),
    ],
)
@pytest.mark.parametrize("reading", [load, load_weights])
def test_a_removed_bias_comes_back_as_in_the_file_or_not_at_all(tmp_path, reading, bias, message):
    layer, path = nn.Linear(3, 2).half(), tmp_path / "layer.safetensors"
    layer.bias = nn.Parameter(bias)
    save(layer, path)
    fresh = nn.Linear(3, 2).half()
    remove_bias(fresh, "bias")
    before = snapshot(fresh)
    with pytest.raises(CheckpointMismatchError, match=message):
        reading(fresh, path)
    check_untouched(fresh, before)
    assert list(removed_biases(fresh)) == ["bias"]


def test_a_removed_bias_comes_back_under_both_names_and_on_its_sphere(tmp_path):
    def twice():
        layer = nn.Linear(3, 2)
        return nn.Sequential(layer, nn.Linear(2, 3), layer)

    saved, fresh = put(twice(), "0.bias", mn.SphereProduct(mn.Partition.whole((2,)))), twice()
    save(saved, tmp_path / "net.safetensors")
    remove_bias(fresh[0], "bias")
    load(fresh, tmp_path / "net.safetensors")
    check_same(saved, fresh)
    assert not removed_biases(fresh)


class Trap:
    """Runs code when it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return (os.mkdir, (self.flag,))


def test_files_of_other_kinds_are_refused_and_nothing_is_unpickled(tmp_path):
    flag = tmp_path / "unpickled"
    torch.save({"weight": Trap(str(flag))}, tmp_path / "torch.pt")
    (tmp_path / "raw.pkl").write_bytes(pickle.dumps(Trap(str(flag))))
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    safetensors.torch.save_file({"weight": torch.zeros(2, 3), "bias": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for name, message in {
        "torch.pt": "It has another format",
        "raw.pkl": "It has another format",
        "empty": "It has another format",
        "folder": "found a folder",
        "plain.safetensors": "without the metadata.*load_file",
    }.items():
        with pytest.raises(CheckpointFormatError, match=message) as caught:
            load(nn.Linear(3, 2), tmp_path / name)
        assert name in str(caught.value)
    assert not flag.exists()
    with pytest.raises(FileNotFoundError, match="absent"):
        load(nn.Linear(3, 2), tmp_path / "absent.safetensors")


@pytest.mark.parametrize("key", [b"manifold_netr", b"Manifold_nets", b"xxxxxxxxxxxxx"])
def test_a_damaged_key_makes_no_plain_file_of_a_checkpoint(tmp_path, monkeypatch, key):
    path = tmp_path / "layer.safetensors"
    save(small(), path)
    path.write_bytes(path.read_bytes().replace(b"manifold_nets", key, 1))
    fresh = nn.Linear(3, 2)
    before = snapshot(fresh)
    with pytest.raises(CheckpointFormatError, match="damaged"):
        load_weights(fresh, path)
    check_untouched(fresh, before)
    # Sabotage: only the key counts.
    monkeypatch.setattr(storage, "_MARKS", ())
    assert load_weights(fresh, path) is fresh
    assert list(constrained_weights(fresh)) == []


def test_a_file_that_others_have_written_about_may_say_so(tmp_path):
    path = tmp_path / "plain.safetensors"
    about = {"format": "pt", "note": '{"made of": "a manifold_nets checkpoint"}'}
    safetensors.torch.save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, path, metadata=about)
    assert load_weights(nn.Linear(3, 2), path).weight.sum() == 6


@pytest.mark.parametrize("reading", [load, load_weights])
def test_a_file_replaced_while_it_is_read_is_the_old_one(tmp_path, monkeypatch, reading):
    path, other = tmp_path / "layer.safetensors", tmp_path / "other.safetensors"
    save(small(), path)
    torch.manual_seed(1)
    save(nn.Linear(3, 2), other)
    opening = safetensors.safe_open

    def late(place, **options):
        """Replace the file after it was found, and before its tensors are read."""
        other.replace(path) if other.exists() else None
        return opening(place, **options)

    monkeypatch.setattr(safetensors, "safe_open", late)
    check_same(small(), reading(nn.Linear(3, 2), path))
    # Sabotage: the name is opened again.
    save(small(), path)
    save(nn.Linear(3, 2), other)
    monkeypatch.setattr(storage, "path_of_open", lambda file: file.name)
    with pytest.raises(AssertionError):
        check_same(small(), reading(nn.Linear(3, 2), path))


class Refusing(nn.Linear):
    """Fails after it has taken its values, as a hook of a user may."""

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        raise RuntimeError("a hook failed")


@pytest.mark.parametrize("reading", [load, load_weights])
def test_a_hook_that_fails_leaves_the_model_as_it_was(tmp_path, reading):
    path = tmp_path / "layer.safetensors"
    save(small(), path)
    safetensors.torch.save_file({"weight": torch.ones(2, 3), "bias": torch.zeros(2)}, tmp_path / "plain.safetensors")
    for file in (path, tmp_path / "plain.safetensors")[: 1 + (reading is load_weights)]:
        fresh = Refusing(3, 2)
        remove_bias(fresh, "bias")
        removed, weight = removed_biases(fresh), fresh.weight.detach().clone()
        if file != path:
            put_back_bias(fresh, "bias")
            removed = removed_biases(fresh)
        with pytest.raises(RuntimeError, match="a hook failed"):
            reading(fresh, file)
        assert torch.equal(fresh.weight, weight)
        assert removed_biases(fresh) == removed
        assert list(constrained_weights(fresh)) == []


def test_what_a_hook_does_not_take_is_said_and_nothing_is_loaded(tmp_path):
    path = tmp_path / "layer.safetensors"
    save(small(), path)
    fresh = nn.Linear(3, 2)
    fresh.register_load_state_dict_pre_hook(
        lambda module, state, prefix, *_: state.update({f"{prefix}old": state.pop(f"{prefix}bias")})
    )
    before = snapshot(fresh)
    with pytest.raises(CheckpointMismatchError, match="hooks of the model did not take bias, old"):
        load(fresh, path)
    check_untouched(fresh, before)


# ---- a good file and another model ----------------------------------------------------------------------------------


class Renamed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.bias = nn.Linear(3, 2, bias=False), nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize(
    ("fresh", "message"),
    [
        (nn.Linear(3, 2, bias=False), "the model lacks bias"),
        (Renamed(), r"the file lacks first\.weight; the model lacks weight"),
        (nn.Linear(4, 2), r"weight: shape \(2, 3\) in the file, \(2, 4\) in the model"),
        (nn.Linear(3, 2).to(torch.bfloat16), r"weight: torch.float32 in the file, torch.bfloat16 in the model"),
        (nn.Linear(3, 2, device="meta"), "weight: on the meta device"),
        (nn.LazyLinear(2), "weight: a lazy parameter"),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_differences_are_said_and_the_model_is_left_alone(tmp_path, fresh, message):
    save(small(), tmp_path / "layer.safetensors")
    values = {name: p.detach().clone() for name, p in fresh.named_parameters() if not nn.parameter.is_lazy(p)}
    with pytest.raises(CheckpointMismatchError, match=message) as caught:
        load(fresh, tmp_path / "layer.safetensors")
    assert type(fresh).__name__ in str(caught.value)
    assert caught.value.differences
    assert list(constrained_weights(fresh)) == []
    now = {name: fresh.get_parameter(name) for name in values}
    assert all(now[name].is_meta or torch.equal(value, now[name]) for name, value in values.items())


def test_expanded_buffers_and_constrained_buffers_are_refused(tmp_path):
    save(with_buffer(torch.ones(2, 3)), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointMismatchError, match="extra: an expanded view"):
        load(with_buffer(torch.ones(3).expand(2, 3)), tmp_path / "net.safetensors")
    plain = nn.Module()
    plain.register_buffer("weight", torch.zeros(2, 3))
    plain.register_buffer("bias", torch.zeros(2))
    save(small(), tmp_path / "layer.safetensors")
    with pytest.raises(CheckpointMismatchError, match="weight: constrained in the file, not a parameter"):
        load(plain, tmp_path / "layer.safetensors")


def test_long_lists_of_differences_are_cut(tmp_path):
    save(nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)]), tmp_path / "net.safetensors")
    with pytest.raises(CheckpointMismatchError, match="and 32 more of these"):
        load(nn.Sequential(*[nn.Linear(3, 3) for _ in range(20)]), tmp_path / "net.safetensors")
