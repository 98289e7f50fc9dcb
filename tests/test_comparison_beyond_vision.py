"""Tasks and networks for series, text and ratings: what is trained and tested on, and that networks fit and convert."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import manifold_nets as mn
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.tasks import load_task
from manifold_nets.comparison.tasks.errors import DataFileError, DataFolderError, TaskNameError
from manifold_nets.comparison.tasks.series import SERIES

SIZES = {"japanese-vowels": (203, 67, 370), "osuleaf": (150, 50, 242), "acsf1": (75, 25, 100)}


def check_parts_are_disjoint(task):
    rows = [{x.numpy().tobytes() for x in task.parts[part].inputs} for part in ("train", "validation", "test")]
    assert not rows[0] & rows[1]
    assert not (rows[0] | rows[1]) & rows[2]


@pytest.mark.parametrize("name", SIZES)
def test_series_keep_their_own_test_part(name):
    pytest.importorskip("sktime")
    task = load_task(name)
    assert tuple(task.sizes().values()) == SIZES[name]
    check_parts_are_disjoint(task)
    x = task.parts["train"].inputs
    assert bool(x.isfinite().all())
    if name != "japanese-vowels":  # these end at different times
        moments = x.double().mean((0, 2)), x.double().std((0, 2))
        torch.testing.assert_close(moments[0], torch.zeros(len(moments[0])).double(), rtol=0, atol=1e-5)
        torch.testing.assert_close(moments[1], torch.ones(len(moments[1])).double(), rtol=1e-3, atol=0)


def test_series_agree_with_what_sktime_says():
    datasets = pytest.importorskip("sktime.datasets")
    x, labels = datasets.load_osuleaf("test", return_X_y=True, return_type="numpy3D")
    part = load_task("osuleaf").parts["test"]
    classes = sorted(set(labels))
    assert [classes[i] for i in part.targets.tolist()] == list(labels)
    # Standardized by one mean and one spread: an affine function of the original.
    correlation = np.corrcoef(part.inputs.numpy().ravel(), x.ravel())[0, 1]
    assert correlation == pytest.approx(1.0, abs=1e-6)
    with pytest.raises(AssertionError):
        assert np.corrcoef(part.inputs.flip(0).numpy().ravel(), x.ravel())[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_sabotage_a_test_series_among_the_training_series_is_noticed():
    pytest.importorskip("sktime")
    task = load_task("osuleaf")
    task.parts["train"].inputs[0] = task.parts["test"].inputs[0]
    with pytest.raises(AssertionError):
        check_parts_are_disjoint(task)


def test_text_is_continued_by_the_next_character():
    task = load_task("python-manual")
    part = task.parts["train"]
    assert torch.equal(part.inputs[:, 1:], part.targets[:, :-1])
    lines = {name: set(lines_of(task.parts[name])) for name in ("train", "validation", "test")}
    assert len(lines["train"]) > 400
    assert not lines["train"] & lines["test"]
    sizes = task.sizes()
    assert sizes["train"] > 5 * sizes["validation"] > 0 < sizes["test"]


def lines_of(part):
    """Whole lines of some length inside the pieces."""
    for piece in part.inputs.tolist():
        text = "".join(map(chr, piece))
        yield from (line for line in text.split(chr(0))[1:-1] if len(line) > 20)


def ratings_file(folder: Path, rows: int = 200) -> Path:
    rng = np.random.default_rng(0)
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{rng.integers(1, 944)}\t{rng.integers(1, 1683)}\t{1 + i % 5}\t{1000 - i}" for i in range(rows)]
    (folder / "ml-100k.inter").write_text("\n".join(lines) + "\n")
    return folder


def test_ratings_are_split_by_time_and_liked_from_four_stars_on(tmp_path):
    task = load_task("movielens", data=ratings_file(tmp_path))
    assert tuple(task.sizes().values()) == (160, 20, 20)
    # The file is in reverse order of time: the last 20 ratings come first.
    assert task.parts["test"].targets.tolist() == [int(1 + i % 5 >= 4) for i in range(19, -1, -1)]
    assert int(task.parts["train"].targets.sum()) == sum(1 + i % 5 >= 4 for i in range(40, 200))


def test_ratings_that_cannot_be_had_are_named(tmp_path, monkeypatch):
    (tmp_path / "ml-100k.inter").write_text("a\tb\n1\t2\n")
    with pytest.raises(DataFileError, match=r"ml-100k\.inter.*2 columns.*four numbers"):
        load_task("movielens", data=tmp_path)
    (tmp_path / "ml-100k.inter").write_text("a\tb\n1\tx\n")
    with pytest.raises(DataFileError, match=r"four numbers"):
        load_task("movielens", data=tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(DataFolderError, match=r"movielens.*recbole"):
        load_task("movielens")
    with pytest.raises(TaskNameError, match="without settings"):
        load_task("python-manual:3")


NETWORKS = {
    "conv1d:8,8": "japanese-vowels",
    "transformer:16,1,2": "python-manual",
    "towers:8,8": "movielens",
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_fit_and_convert(network, tmp_path):
    name = NETWORKS[network]
    if name in SERIES:
        pytest.importorskip("sktime")
    task = load_task(name, data=ratings_file(tmp_path) if name == "movielens" else None)
    model = build_model(network, task, seed=0)
    converted = mn.convert(model, task.example_inputs(16), radius="keep")
    record = mn.conversion_record(converted)
    assert sum(action.action == "sphere" for action in record.plan.actions) >= 2
    # Loss and step, as in a comparison.
    inputs, targets = task.parts["train"].batch(torch.arange(16))
    task.loss(converted(inputs), targets).backward()
    mn.optim.RiemannianSGD(mn.param_groups(converted), lr=0.1).step()
    assert all(bool(parameter.isfinite().all()) for parameter in converted.parameters())


def test_a_network_for_other_examples_is_refused():
    task = load_task("digits")
    for network in ("conv1d", "transformer", "towers"):
        with pytest.raises(TaskNameError, match="axes"):
            build_model(network, task, seed=0)
    with pytest.raises(TaskNameError, match="heads"):
        build_model("transformer:15,1,2", load_task("python-manual"), seed=0)


def test_sabotage_text_said_twice_is_noticed():
    task = load_task("python-manual")
    task.parts["test"].inputs[:] = task.parts["train"].inputs[: len(task.parts["test"])]
    assert set(lines_of(task.parts["train"])) & set(lines_of(task.parts["test"]))
