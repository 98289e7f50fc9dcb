"""Files that are damaged or made up: an error of ours that leaves the model alone, or exactly what the file says.

Each function carries out a number of mutations from a seed and counts how they ended; the tests are small ones of it.
"""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
import sqlite3
import struct
from collections import Counter
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.checkpoint_cases import check_same, check_untouched, snapshot
from helpers.comparison_cases import comparison
from helpers.comparison_runs import reproducible, small_settings, tiny
from helpers.damage_cases import changed, damaged, outcome, text_of
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison import Comparison
from manifold_nets.comparison.api import STUDY_NAME_FILE, study_name
from manifold_nets.comparison.errors import RecordError, StorageError
from manifold_nets.comparison.report import summarise
from manifold_nets.comparison.report.tables import epochs_csv, runs_csv, summary_json, times_csv
from manifold_nets.constraints import constrained_weights
from manifold_nets.conversion import storage
from manifold_nets.conversion.moves import moves_of
from manifold_nets.conversion.remedies.dead_biases import removed_biases
from manifold_nets.documents import with_checksum
from manifold_nets.errors import ManifoldNetsError
from manifold_nets.joint_sphere import JointSphere
from manifold_nets.weights import load_weights

# ---- checkpoints -----------------------------------------------------------------------------------------------------


def shared_weight_network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 6))
    net[4].weight = net[2].weight
    return net


def saved() -> nn.Module:
    """Spheres, a joint sphere, tied weights and a removed bias."""
    net = mn.convert(shared_weight_network(1), torch.randn(16, 4), remedies="spheres,dead-biases", include=["0.*"])
    parts = {"2.weight": mn.Partition.filters((6, 6)), "1.weight": mn.Partition((6,), (6,), (0,))}
    joint = JointSphere(parts, radius=[1, 2, 3, 4, 5, 6])
    points = joint.projx([net[2].weight, net[1].weight])
    for name, manifold, point in zip(parts, joint.manifolds, points, strict=True):
        net.get_parameter(name).data.copy_(point)
        mn.constraints.attach(net[int(name[0])], "weight", manifold)
    net[4].weight = net[2].weight
    return net


def converted_otherwise() -> nn.Module:
    """The same architecture with other spheres and another removed bias."""
    net = mn.convert(shared_weight_network(2), torch.randn(16, 4), remedies="dead-biases", include=["2.*"])
    sphere = mn.SphereProduct((6, 6), radius=3.0)
    mn.constraints.attach(net[2], "weight", sphere, sphere.projx(net[2].weight.detach()))
    net[4].weight = net[2].weight
    return net


def checkpoint(good: bytes, metadata: dict[str, str]) -> bytes:
    size = struct.unpack("<Q", good[:8])[0]
    header = json.dumps({**json.loads(good[8 : 8 + size]), "__metadata__": metadata}).encode("utf-8")
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + good[8 + size :]


def check_as_written(
    model: nn.Module, document: dict[str, Any], tensors: dict[str, torch.Tensor], lost: list[str]
) -> None:
    """A model holds the tensors of a file, on the manifolds and without the biases that its document names.

    Of biases that the model had ``lost`` before, those stay so that the file does not have either.
    """
    manifolds = {document["aliases"].get(w.name, w.name): w.manifold.to_dict() for w in constrained_weights(model)}
    assert manifolds == document["manifolds"]
    assert set(removed_biases(model)) == {*document.get("removed_biases", ()), *lost} - tensors.keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in tensors.items())
    for prefix, moved in document.get("conversions", {}).items():
        moves = moves_of(model.get_submodule(prefix.removesuffix(".")))
        assert moves is not None
        assert moves.to_dict() == moved
    # Whatever the file says of what changes with a weight, a plain state is taken or refused.
    outcome(lambda: model.load_state_dict(shared_weight_network(3).state_dict(), strict=False))


def fuzz_checkpoints(folder: Path, count: int, seed: int) -> Counter[str]:
    path, draw, ends = folder / "net.safetensors", random.Random(seed), Counter[str]()
    original = saved()
    mn.save(original, path)
    good = path.read_bytes()
    tensors = safetensors.torch.load(good)
    with safetensors.safe_open(path, "pt") as file:
        whole = json.loads(file.metadata()["manifold_nets"])
    receivers = [shared_weight_network(), saved(), converted_otherwise()]
    for number in range(count):
        document = None
        if number % 2:
            path.write_bytes(damaged(good, draw))
        else:
            document = changed({k: v for k, v in whole.items() if k != "checksum"}, draw)
            if isinstance(document, dict) and draw.random() < 0.9:
                text = text_of(document)
                try:
                    read = json.loads(text)
                except RecursionError:
                    read = {}
                document["checksum"] = storage.tensors_checksum(tensors, read)
            path.write_bytes(checkpoint(good, {"manifold_nets": text_of(document)}))
        model = copy.deepcopy(draw.choice(receivers))
        before, removed = snapshot(model), list(removed_biases(model))
        read_into = draw.choice([mn.load, load_weights])
        end, _ = outcome(lambda read_into=read_into, model=model: read_into(model, path))
        if end != "done":
            check_untouched(model, before)
            assert list(removed_biases(model)) == removed
        elif document is None:
            check_same(original, model)
            end = "equal"
        else:
            check_as_written(model, json.loads(text_of(document)), tensors, removed)
            end = "as written"
        ends[end] += 1
    return ends


def test_checkpoints(tmp_path: Path) -> None:
    ends = fuzz_checkpoints(tmp_path, 150, seed=0)
    assert {"CheckpointFormatError", "as written"} <= ends.keys()


@pytest.mark.slow
def test_many_checkpoints(tmp_path: Path) -> None:
    fuzz_checkpoints(tmp_path, 3000, seed=1)


@pytest.mark.parametrize("left_out", ["_inconsistency", "tensors_checksum", "manifolds_from_dicts"])
def test_sabotage_without_a_check_a_checkpoint_fails_or_differs(
    tmp_path: Path, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nothing: dict[str, Any] = {"_inconsistency": None, "tensors_checksum": "crc32:00000000", "manifolds_from_dicts": {}}
    monkeypatch.setattr(storage, left_out, lambda *_: nothing[left_out])
    with pytest.raises((AssertionError, KeyError, RuntimeError, TypeError)):
        fuzz_checkpoints(tmp_path, 1000, seed=0)


# ---- plans -----------------------------------------------------------------------------------------------------------


def planned() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)]
    return nn.Sequential(*layers).double(), torch.randn(8, 4, dtype=torch.float64)


def fuzz_plans(folder: Path, count: int, seed: int) -> Counter[str]:
    path, draw, ends = folder / "plan.json", random.Random(seed), Counter[str]()
    model, x = planned()
    report = mn.diagnose(model, x)
    whole = mn.plan(model, report, remedies="all", train_tolerance=math.inf).to_dict()
    before, reference = snapshot(model), model.eval()(x)
    for number in range(count):
        document = changed(whole, draw)
        text = text_of(document).encode("utf-8", "surrogatepass")
        path.write_bytes(damaged(text, draw) if number % 4 == 0 else text)
        given = document if number % 4 == 1 and not isinstance(document, str) else path
        end, converted = outcome(lambda given=given: mn.convert(model, report, plan=given))
        check_untouched(model, before)
        if end == "done":
            assert (converted.eval()(x) - reference).abs().max() <= 1e-12 * reference.abs().max()
            written = json.loads(path.read_bytes()) if given is path else document
            done = {(a.name, a.remedy): a.action for a in mn.conversion_record(converted).plan.actions}
            for entry in written["actions"]:
                remedies = [remedy for name, remedy in done if name == entry["name"]]
                assert entry["action"] in {done[entry["name"], remedy] for remedy in remedies} | {"leave"}
        ends[end] += 1
    return ends


def test_plans(tmp_path: Path) -> None:
    assert {"done", "PlanError"} <= fuzz_plans(tmp_path, 20, seed=0).keys()


@pytest.mark.slow
def test_many_plans(tmp_path: Path) -> None:
    fuzz_plans(tmp_path, 300, seed=1)


# ---- comparisons -----------------------------------------------------------------------------------------------------


def read_and_written(folder: Path) -> Comparison:
    """All that is made of a comparison in a file, but the figures."""
    found = Comparison.read(folder)
    str(found)
    summary = summarise(found)
    summary_json(summary)
    for text in (runs_csv, epochs_csv, times_csv):
        text(found)
    return found


def fuzz_comparisons(folder: Path, count: int, seed: int) -> Counter[str]:
    draw, ends = random.Random(seed), Counter[str]()
    whole = comparison(seeds=(0, 1), epochs=2, rates=(0.01, 0.1), diverged=frozenset({("adam", 0.1, 1)}))
    path = whole.write(folder)
    good = path.read_bytes()
    for number in range(count):
        document = None
        if number % 3 == 0:
            path.write_bytes(damaged(good, draw))
        else:
            document = changed(whole.to_dict(), draw)
            # Older releases wrote no checksum.
            if isinstance(document, dict) and number % 3 == 1:
                with suppress(RecursionError):
                    document["checksum"] = with_checksum(json.loads(text_of(document)))["checksum"]
            path.write_text(text_of(document), encoding="utf-8", errors="surrogatepass")
        end, found = outcome(lambda: read_and_written(folder))
        if end == "done" and document is None:
            assert found == whole
            end = "equal"
        elif end == "done":
            read = json.loads(path.read_bytes())
            read.pop("checksum", None)
            assert found == Comparison.from_dict(read)
            end = "as written"
        ends[end] += 1
    return ends


def test_comparisons(tmp_path: Path) -> None:
    assert {"RecordError", "as written"} <= fuzz_comparisons(tmp_path, 100, seed=0).keys()


@pytest.mark.slow
def test_many_comparisons(tmp_path: Path) -> None:
    fuzz_comparisons(tmp_path, 500, seed=1)


# ---- studies ---------------------------------------------------------------------------------------------------------


def change_a_cell(path: Path, draw: random.Random) -> None:
    """Put something else into one place of one table, or lose a row."""
    with closing(sqlite3.connect(path)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        filled = [name for name in tables if connection.execute(f"SELECT 1 FROM {name}").fetchone()]
        table = draw.choice(filled)
        columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})")]
        rows = [row[0] for row in connection.execute(f"SELECT rowid FROM {table}")]
        column, row = draw.choice(columns), draw.choice(rows)
        (old,) = connection.execute(f"SELECT {column} FROM {table} WHERE rowid = ?", (row,)).fetchone()
        new = draw.choice([None, -1, 7, "", "x", "{}", "[]", "null", '"x"', "COMPLETE", "WAITING", 1e308, b"\xff\xfe"])
        if isinstance(old, str) and old and draw.random() < 0.7:
            place = draw.randrange(len(old))
            new = old[:place] + draw.choice('0123456789x"{}[],:') + old[place + 1 :]
        with suppress(sqlite3.Error):  # the table does not take it
            if draw.random() < 0.1:
                connection.execute(f"DELETE FROM {table} WHERE rowid = ?", (row,))
            else:
                connection.execute(f"UPDATE {table} SET {column} = ? WHERE rowid = ?", (new, row))
            connection.commit()


def fuzz_studies(folder: Path, count: int, seed: int) -> Counter[str]:
    draw, ends = random.Random(seed), Counter[str]()
    # What is called on a damaged study is its own command, or one that extends it.
    wanted = {2: reproducible(tiny(output=folder / "whole")), 3: reproducible(tiny(seeds=3))}
    begun: list[int] = []

    def interrupt(progress: Any) -> None:
        begun.append(progress.done)
        if progress.done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny(output=folder / "begun", progress=interrupt)
    for state in ("whole", "begun"):
        with closing(sqlite3.connect(folder / state / "study.db")) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    for number in range(count):
        place = folder / "place"
        shutil.rmtree(place, ignore_errors=True)
        shutil.copytree(folder / ("whole", "begun")[number % 2], place)
        (place / "comparison.json").unlink(missing_ok=True)
        if number % 3:
            change_a_cell(place / "study.db", draw)
        else:
            good = (place / "study.db").read_bytes()
            (place / "study.db").write_bytes(damaged(good, draw))
        seeds = draw.choice([2, 2, 3])
        end, found = outcome(lambda place=place, seeds=seeds: tiny(output=place, seeds=seeds))
        if end == "done":
            assert reproducible(found) == wanted[seeds]
            end = "equal"
        ends[end] += 1
    return ends


def test_studies(tmp_path: Path) -> None:
    assert {"StorageError", "equal"} <= fuzz_studies(tmp_path, 6, seed=0).keys()


@pytest.mark.slow
def test_many_studies(tmp_path: Path) -> None:
    fuzz_studies(tmp_path, 100, seed=1)


def changed_study(folder: Path, statement: str) -> None:
    with closing(sqlite3.connect(folder / "study.db")) as connection:
        connection.execute(statement)
        connection.commit()


@pytest.mark.parametrize("change", ["key = NULL", "result = NULL", "result = '[]'"])
def test_a_result_without_its_name_or_value_is_an_error_of_ours(tmp_path: Path, change: str) -> None:
    tiny(output=tmp_path, seeds=1, epochs=1)
    changed_study(tmp_path, f"UPDATE manifold_nets_runs SET {change} WHERE id = 1")
    with pytest.raises(StorageError, match=r"study\.db"):
        tiny(output=tmp_path, seeds=1, epochs=1)


def test_rows_of_a_study_that_is_lost_are_an_error_of_ours(tmp_path: Path) -> None:
    tiny(output=tmp_path, seeds=1, epochs=1)
    changed_study(tmp_path, "DELETE FROM manifold_nets_studies")
    with pytest.raises(StorageError, match=r"study comparison in sqlite.*runs without their study"):
        tiny(output=tmp_path, seeds=1, epochs=1)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"manifold-nets-0123456789aB", b"a\nb"])
def test_a_damaged_name_of_a_study_is_an_error_of_ours(tmp_path: Path, content: bytes) -> None:
    whole = small_settings()
    (tmp_path / STUDY_NAME_FILE).write_bytes(study_name(whole).encode() + b"\n")
    assert study_name(small_settings(seeds=(0, 1, 2)), tmp_path) == study_name(whole)
    (tmp_path / STUDY_NAME_FILE).write_bytes(content)
    with pytest.raises(RecordError, match=r"study-name\.txt: found .*; expected the name of a study"):
        study_name(whole, tmp_path)


def test_sabotage_without_checksums_a_study_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny(output=tmp_path)

    error = '"validation_error": 0.'
    changed_study(
        tmp_path, f"UPDATE manifold_nets_runs SET result = replace(result, '{error}', '{error}9') WHERE id = 1"
    )
    with pytest.raises(ManifoldNetsError, match="do not match their checksum"):
        tiny(output=tmp_path)
    monkeypatch.setattr("manifold_nets.comparison.json_records.is_intact", lambda _: True)
    assert reproducible(tiny(output=tmp_path)) != reproducible(whole)
