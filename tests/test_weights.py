"""Weights from files: what is read, what is refused, and that a refused file changes nothing."""

from __future__ import annotations

import argparse
import io
import pickle
import random
import re
from collections import OrderedDict
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import manifold_nets as mn
from manifold_nets import errors
from manifold_nets.sources import load_model
from manifold_nets.weights import load_weights, read_state_dict


def small(seed: int, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(2, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2)).to(dtype)
    net[1].running_mean.uniform_(-1, 1)
    return net


def check_same(one: nn.Module, other: nn.Module) -> None:
    assert one.state_dict().keys() == other.state_dict().keys()
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def write(path: Path, state: dict[str, torch.Tensor], form: str) -> Path:
    if form == "safetensors":
        safetensors.torch.save_file(state, path)
    elif form == "legacy":
        torch.save(state, path, _use_new_zipfile_serialization=False)
    else:
        torch.save({form: state, "epoch": 3} if form != "plain" else state, path)
    return path


@pytest.mark.parametrize("form", ["safetensors", "plain", "legacy", "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_file_gives_the_weights_back(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    trained, fresh = small(1, dtype), small(2, dtype)
    path = write(tmp_path / "net.bin", dict(trained.state_dict()), form)
    with pytest.raises(AssertionError):
        check_same(fresh, trained)
    assert load_weights(fresh, path) is fresh
    check_same(fresh, trained)


def test_through_a_specification(tmp_path: Path) -> None:
    trained = nn.Linear(3, 2)
    path = write(tmp_path / "net.safetensors", dict(trained.state_dict()), "safetensors")
    model = load_model("torch.nn:Linear", kwargs={"in_features": 3, "out_features": 2}, weights=str(path))
    check_same(model, trained)


def test_a_tied_weight_may_be_stored_once(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
            self.head.weight = self.embedding.weight

    trained, fresh = Tied(), Tied()
    path = tmp_path / "net.safetensors"
    safetensors.torch.save_model(trained, str(path))
    assert len(read_state_dict(path)) == 1
    check_same(load_weights(fresh, path), trained)


def test_old_files_lack_the_batch_counter(tmp_path: Path) -> None:
    state = {name: value for name, value in small(1).state_dict().items() if "num_batches" not in name}
    model = load_weights(small(2), write(tmp_path / "net.pt", state, "plain"))
    assert torch.equal(model[0].weight, state["0.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("0.weight"), r"1 missing from the file: 0\.weight"),
        (lambda s: s.update(extra=torch.ones(2)), "1 unknown to the model: extra"),
        (lambda s: s.update({"3.bias": torch.ones(5)}), r"1 of another shape: 3\.bias \(5,\) instead of \(2,\)"),
    ],
)
def test_a_mismatch_lists_the_names_and_changes_nothing(tmp_path: Path, change: object, message: str) -> None:
    state = dict(small(1).state_dict())
    change(state)
    path = write(tmp_path / "net.pt", state, "plain")
    model = small(2)
    with pytest.raises(errors.CheckpointMismatchError, match=message):
        load_weights(model, path)
    check_same(model, small(2))


def test_a_wrapped_model_is_recognized(tmp_path: Path) -> None:
    state = {f"module.{name}": value for name, value in small(1).state_dict().items()}
    with pytest.raises(errors.CheckpointMismatchError, match="begin with 'module'"):
        load_weights(small(2), write(tmp_path / "net.pt", state, "plain"))


class Trap:
    """Unpickling runs code: it leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return (Path.touch, (self.path,))


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"weight": Trap(sprung)}, tmp_path / "net.pt")
    with pytest.raises(errors.CheckpointFormatError, match="weights_only=True"):
        read_state_dict(tmp_path / "net.pt")
    assert not sprung.exists()
    torch.load(tmp_path / "net.pt", weights_only=False)
    assert sprung.exists(), "the trap must work where code is run"


@pytest.mark.parametrize("form", ["safetensors", "plain", "legacy"])
@pytest.mark.parametrize("kept", [0, 5, 100, -10])
def test_a_truncated_file_is_named(tmp_path: Path, form: str, kept: int) -> None:
    path = write(tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt"), small(1).state_dict(), form)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(errors.CheckpointFormatError, match=path.name):
        read_state_dict(path)


@pytest.mark.parametrize("content", [3, [torch.ones(2)], {}, {"a": 1}, OrderedDict(a=torch.ones(1), b="x")])
def test_a_torch_file_without_weights(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(errors.CheckpointFormatError, match="dictionary of tensors"):
        read_state_dict(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({1: torch.ones(2)}, "found 1 as the name of a tensor"),
        ({"a": torch.ones(2, device="meta")}, "found a, on the meta device"),
        ({"a": torch.ones(2).to_sparse()}, r"found a, a torch\.sparse_coo tensor"),
    ],
)
def test_a_torch_file_of_tensors_that_are_no_weights(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "net.pt")
    with pytest.raises(errors.CheckpointFormatError, match=message):
        read_state_dict(tmp_path / "net.pt")


def damaged(data: bytes, number: int) -> bytes:
    """Turn one bit of the part of a file that says what it holds: of its first and last kilobyte."""
    draw = random.Random(number)
    place = draw.randrange(min(len(data), 1000)) * draw.choice((1, -1))
    changed = bytearray(data)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def check_damage_is_named(path: Path, numbers: range) -> None:
    """Each damaged version of a file loads, or is refused by an error of the package that names the file."""
    data, refusals = path.read_bytes(), []
    for number in numbers:
        path.write_bytes(damaged(data, number))
        try:
            load_weights(small(2), path)
        except errors.ManifoldNetsError as error:
            refusals.append(str(error))
    path.write_bytes(data)
    assert len(refusals) > len(numbers) / 10
    assert all(path.name in said for said in refusals)


@pytest.mark.parametrize("form", ["safetensors", "plain", "legacy"])
def test_a_damaged_file_is_named(tmp_path: Path, form: str) -> None:
    path = tmp_path / ("net.safetensors" if form == "safetensors" else "net.pt")
    check_damage_is_named(write(path, dict(small(1).state_dict()), form), range(120))


def test_the_damage_leads_to_errors_of_many_kinds(tmp_path: Path) -> None:
    """The sabotage twin: a list of the errors that one might expect of a reader is too short."""
    data, kinds = write(tmp_path / "net.pt", dict(small(1).state_dict()), "legacy").read_bytes(), set()
    for number in range(120):
        try:
            torch.load(io.BytesIO(damaged(data, number)), weights_only=True)
        except Exception as error:  # noqa: BLE001
            kinds.add(type(error))
    assert any(
        not issubclass(kind, (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError)) for kind in kinds
    )


@pytest.mark.parametrize(
    "content",
    [
        b"a",
        b"not found",
        b"404: Not Found",
        b"Entry not found",
        b"<!DOCTYPE html><html>",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\n",
        b"\x89PNG\r\n\x1a\n",
        bytes(100),
        b'{"a": 1}',
    ],
)
@pytest.mark.parametrize("name", ["net.pt", "net.safetensors"])
def test_what_a_download_may_leave_is_named(tmp_path: Path, content: bytes, name: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(errors.CheckpointFormatError, match=name):
        load_weights(small(2), tmp_path / name)


def test_a_foreign_or_missing_file(tmp_path: Path) -> None:
    (tmp_path / "net.txt").write_text("just a note about a net\n")
    with pytest.raises(errors.CheckpointFormatError, match=r"net\.txt"):
        read_state_dict(tmp_path / "net.txt")
    with pytest.raises(errors.CheckpointFormatError, match="no such file"):
        read_state_dict(tmp_path / "gone.pt")


def test_the_file_of_a_converted_model_puts_the_weights_on_their_spheres(tmp_path: Path) -> None:
    converted = mn.convert(small(1), torch.randn(4, 2, 4, 4), radius="keep")
    mn.save(converted, tmp_path / "net.safetensors")
    loaded = load_weights(small(2), tmp_path / "net.safetensors")
    check_same(loaded, converted)
    assert [w.manifold.to_dict() for w in mn.constraints.constrained_weights(loaded)] == [
        w.manifold.to_dict() for w in mn.constraints.constrained_weights(converted)
    ]
    assert len(list(mn.constraints.constrained_weights(loaded))) == 1
    # The tensors alone, as any reader of safetensors sees them, load as a plain model.
    safetensors.torch.save_file(read_state_dict(tmp_path / "net.safetensors"), tmp_path / "plain.safetensors")
    assert not list(mn.constraints.constrained_weights(load_weights(small(2), tmp_path / "plain.safetensors")))


def test_a_damaged_file_of_a_converted_model_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    mn.save(mn.convert(small(1), torch.randn(4, 2, 4, 4)), path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    model = small(2)
    with pytest.raises(errors.CheckpointError, match=r"net\.safetensors"):
        load_weights(model, path)
    check_same(model, small(2))


# ---- one of several sets of weights, and names with something in front -----------------------------------------------


def test_the_only_weights_of_a_file_are_taken_and_of_several_those_that_are_named(tmp_path: Path) -> None:
    """Never a guess: where a file holds an average as well, the message lists the keys and the option."""
    plain, average = small(1), small(3)
    adam = torch.optim.Adam(plain.parameters()).state_dict()
    content = {"epoch": 3, "args": argparse.Namespace(lr=0.1), "state_dict": plain.state_dict()}
    content |= {"optimizer": {**adam, "by_name": {"0.weight": {"exp_avg": torch.ones(2)}}}}
    content |= {"ema": {"decay": 0.9, "shadow": average.state_dict()}, "best": {"a.ckpt": torch.tensor(0.5)}}
    path = tmp_path / "checkpoint.pth"
    torch.save(content, path)
    with pytest.raises(errors.CheckpointFormatError, match=r"several keys, state_dict, ema\.shadow; .*--key"):
        load_weights(small(2), path)
    check_same(load_weights(small(2), path, key="state_dict"), plain)
    check_same(load_weights(small(2), path, key="ema.shadow"), average)
    with pytest.raises(errors.CheckpointFormatError, match=r"under the key 'ema'; .*under state_dict, ema\.shadow"):
        load_weights(small(2), path, key="ema")
    torch.save({**content, "ema": None}, path)
    check_same(load_weights(small(2), path), plain)
    torch.save(plain.state_dict(), path)
    with pytest.raises(errors.CheckpointFormatError, match="under no key"):
        load_weights(small(2), path, key="state_dict")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "model.net."])
def test_what_names_begin_with_is_said_and_taken_off(prefix: str, tmp_path: Path) -> None:
    state = {f"{prefix}{name}": value for name, value in small(1).state_dict().items()}
    path = write(tmp_path / "net.pt", {**state, "n_averaged": torch.tensor(3)}, "plain")
    with pytest.raises(errors.CheckpointMismatchError, match=rf"pass --prefix {re.escape(prefix)} "):
        load_weights(small(2), path)
    check_same(load_weights(small(2), path, prefix=prefix), small(1))
    with pytest.raises(errors.CheckpointFormatError, match=r"no weights whose names begin with 'net\.'"):
        load_weights(small(2), path, prefix="net.")


def test_code_of_a_file_is_run_only_where_that_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"model": small(1), "trap": Trap(tmp_path / "sprung")}, path)
    with pytest.raises(errors.CheckpointFormatError, match="if you trust the file, pass --allow-pickle"):
        load_weights(small(2), path)
    assert not (tmp_path / "sprung").exists()
    check_same(load_weights(small(2), path, allow_pickle=True), small(1))
    assert (tmp_path / "sprung").exists()


def test_several_models_in_one_dictionary_are_all_named(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    for first, second in (("net", "ema_net"), ("ema_net", "net")):
        models = {first: nn.Linear(2, 3), second: nn.Linear(2, 3)}
        torch.save({"state_dict": nn.ModuleDict(models).state_dict()}, path)
        said = rf"begin with '{first}' or '{second}' \(several models; choose one\): pass --prefix {first}\. on"
        with pytest.raises(errors.CheckpointMismatchError, match=said):
            load_weights(nn.Linear(2, 3), path)
