"""The tasks and networks of examples/paper: CamVid, series, text and ratings."""

from __future__ import annotations

import json
import pickle
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.comparison_cases import data_folder, examples
from helpers.example_modules import EXAMPLES, example
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison.errors import DataFileError, DataFolderError, TaskSourceError
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.tasks import evaluate
from manifold_nets.comparison.tasks import load_task as task_of
from manifold_nets.errors import ModelBuildError, ModelNotFoundError

camvid = example("paper.camvid")
CLASSES, VOID = camvid.CLASSES, camvid.VOID
confusion, segmentation_scores = camvid.confusion, camvid.segmentation_scores
read_camvid, read_pairs, median_frequency_weights = (
    camvid.read_camvid,
    camvid.read_pairs,
    camvid.median_frequency_weights,
)
FILES = {"movielens": "ratings", "python_manual": "text", "camvid": "camvid"}


def load_task(name: str, **options):
    """A task by its name in examples/paper, such as camvid_120x90."""
    name = name.replace("-", "_")
    file = FILES.get(name if name in FILES else name.partition("_")[0], "series")
    return task_of(f"{EXAMPLES}/paper/{file}.py:{name}", **options)


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


NETWORKS = {
    "series.py:conv1d_8x8": "japanese-vowels",
    "text.py:transformer_16x1x2": "python-manual",
    "ratings.py:towers_8x8": "movielens",
}


@pytest.mark.parametrize("network", NETWORKS)
def test_networks_fit_and_convert(network, tmp_path):
    name = NETWORKS[network]
    if name == "japanese-vowels":
        pytest.importorskip("sktime")
    task = load_task(name, data=ratings_file(tmp_path) if name == "movielens" else None)
    model = build_model(f"{EXAMPLES}/paper/{network}", task, seed=0)
    converted = mn.convert(model, task.example_inputs(16), radius="keep")
    record = mn.conversion_record(converted)
    assert sum(action.action == "sphere" for action in record.plan.actions) >= 2
    # Loss and step, as in a comparison.
    inputs, targets = task.parts["train"].batch(torch.arange(16))
    task.loss(converted(inputs), targets).backward()
    mn.optim.RiemannianSGD(mn.param_groups(converted), lr=0.1).step()
    assert all(bool(parameter.isfinite().all()) for parameter in converted.parameters())


def test_a_network_for_other_examples_is_refused():
    task, paper = task_of("digits"), EXAMPLES / "paper"
    for network in ("series.py:conv1d", "text.py:transformer"):
        with pytest.raises(ModelBuildError, match=r"expected \d ax[ei]s"):
            build_model(f"{paper}/{network}", task, seed=0)
    for network in ("ratings.py:towers", "camvid.py:segnet_basic_4x1"):
        with pytest.raises(TaskSourceError, match=r"inputs of shape \(1, 8, 8\) and 10 outputs"):
            build_model(f"{paper}/{network}", task, seed=0)
    with pytest.raises(ModelBuildError, match="heads"):
        build_model(f"{paper}/text.py:transformer_15x1x2", load_task("python-manual"), seed=0)
    for name in ("camvid.py:camvid_4", "series.py:conv1d_x", "text.py:transformr", "ratings.py:towers_0"):
        with pytest.raises(ModelNotFoundError):
            build_model(f"{paper}/{name}", task, seed=0)


def test_sabotage_text_said_twice_is_noticed():
    task = load_task("python-manual")
    task.parts["test"].inputs[:] = task.parts["train"].inputs[: len(task.parts["test"])]
    assert set(lines_of(task.parts["train"])) & set(lines_of(task.parts["test"]))


# ---- CamVid: files ---------------------------------------------------------------------------------------------------


def write_camvid_like(folder: Path, *, prefix: str = "") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Write a data set of a few small images in the layout of the tutorial; return what it holds."""
    image_module = pytest.importorskip("PIL.Image")
    generator = np.random.default_rng(1)
    held = {}
    for part, count in (("train", 4), ("val", 2), ("test", 3)):
        for name in (part, f"{part}annot"):
            (folder / name).mkdir(parents=True)
        x = generator.integers(0, 256, (count, 6, 8, 3)).astype(np.uint8)
        y = generator.integers(0, VOID + 1, (count, 6, 8)).astype(np.uint8)
        lines = []
        for index in range(count):
            files = f"{part}/{index}.png", f"{part}annot/{index}.png"
            for file, array in zip(files, (x[index], y[index]), strict=True):
                image_module.fromarray(array).save(folder / file)
            lines.append(" ".join(prefix + file for file in files))
        (folder / f"{part}.txt").write_text("\n".join(lines) + "\n")
        held[{"val": "validation"}.get(part, part)] = x, y
    return held


@pytest.mark.parametrize("prefix", ["", "/SegNet/CamVid/"])
def test_camvid_is_read_as_it_was_written(prefix: str, tmp_path: Path) -> None:
    held = write_camvid_like(tmp_path, prefix=prefix)
    for part, (images, labels) in read_camvid(tmp_path).items():
        x, y = held[part]
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), x)
        np.testing.assert_array_equal(labels.numpy(), y)


def test_reduced_images_are_box_averages_and_labels_are_taken_from_the_middle(tmp_path: Path) -> None:
    held = write_camvid_like(tmp_path)
    images, labels = read_camvid(tmp_path, size=(4, 3))["train"]
    x, y = held["train"]
    means = x.reshape(4, 3, 2, 4, 2, 3).mean((2, 4))
    np.testing.assert_allclose(images.permute(0, 2, 3, 1).numpy(), means, rtol=0, atol=1)  # rounded twice
    np.testing.assert_array_equal(labels.numpy(), y[:, 1::2, 1::2])


@pytest.mark.parametrize("size", [(9, 6), (8, 7)])
def test_images_are_not_enlarged(size: tuple[int, int], tmp_path: Path) -> None:
    write_camvid_like(tmp_path)
    expected = rf"0\.png: found 8×6 pixels; expected at least the {size[0]}×{size[1]} that images are reduced to"
    with pytest.raises(DataFileError, match=expected):
        read_camvid(tmp_path, size=size)


def by_hand(labels: np.ndarray, classes: int, void: int | None) -> list[float]:
    """Median-frequency weights by counting, in exact fractions."""
    own, around = Counter(), Counter()
    for image in labels:
        counts = Counter(value for value in image.ravel().tolist() if value != void)
        for value, count in counts.items():
            own[value] += count
            around[value] += sum(counts.values())
    frequency = {value: Fraction(own[value], around[value]) for value in own}
    ranked = sorted(frequency.values())
    median = (ranked[(len(ranked) - 1) // 2] + ranked[len(ranked) // 2]) / 2
    return [float(median / frequency[value]) if value in frequency else 0.0 for value in range(classes)]


def check_weights(weights) -> None:
    generator = np.random.default_rng(2)
    labels = generator.choice([0, 1, 2, 3, 4, 6, 11], (7, 6, 5), p=[0.3, 0.3, 0.2, 0.1, 0.05, 0.03, 0.02])
    labels[3:][labels[3:] == 1] = 0  # a class that some images lack
    found = weights(torch.from_numpy(labels), 8, VOID)
    np.testing.assert_allclose(found.numpy(), by_hand(labels, 8, VOID), rtol=4e-7)


def test_class_weights_are_those_counted_by_hand() -> None:
    check_weights(median_frequency_weights)


def test_sabotage_frequencies_over_all_images_are_noticed() -> None:
    def over_all(labels: torch.Tensor, classes: int, void: int) -> torch.Tensor:
        counts = torch.bincount(labels[labels != void], minlength=classes)[:classes].double()
        return torch.where(counts > 0, counts[counts > 0].quantile(0.5) / counts, 0).float()

    with pytest.raises(AssertionError):
        check_weights(over_all)


def test_sabotage_void_counted_as_a_class_is_noticed() -> None:
    with pytest.raises(AssertionError):
        check_weights(lambda labels, classes, void: median_frequency_weights(labels, classes))


@pytest.mark.slow
def test_the_weights_of_camvid_are_near_the_published_ones() -> None:
    """Those of the tutorial count void as a twelfth class; its weight of signs is known to be off."""
    parts = read_camvid(data_folder("camvid-240x180"))
    assert {part: len(images) for part, (images, _) in parts.items()} == {"train": 367, "validation": 101, "test": 233}
    published = [0.2595, 0.1826, 4.5640, 0.1417, 0.9051, 0.3826, None, 1.8418, 0.6823, 6.2478, 7.3614, 1.0974]
    found = median_frequency_weights(parts["train"][1], len(CLASSES) + 1)
    for weight, expected in zip(found.tolist(), published, strict=True):
        assert expected is None or abs(weight / expected - 1) < 0.12


def test_folders_and_lists_that_are_wrong_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataFolderError, match="no such folder"):
        read_pairs(tmp_path / "absent")
    write_camvid_like(tmp_path)
    lists = {name: (tmp_path / name).read_text() for name in ("train.txt", "val.txt", "test.txt")}
    flawed = {
        r"val\.txt, line 1: found 1 words": ("val.txt", "val/0.png\n"),
        r"val\.txt, line 2: found no file .*9\.png": (
            "val.txt",
            lists["val.txt"].splitlines()[0] + "\nval/9.png a/b\n",
        ),
        r"test\.txt: found no lines": ("test.txt", "\n"),
        r"test\.txt: found 0\.png, which the train list names too": ("test.txt", lists["train.txt"]),
    }
    for message, (name, text) in flawed.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(DataFileError, match=message):
            read_pairs(tmp_path)
        (tmp_path / name).write_text(lists[name])
    (tmp_path / "val.txt").unlink()
    with pytest.raises(DataFolderError, match=r"no val\.txt"):
        read_pairs(tmp_path)


def test_images_that_are_wrong_are_refused(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    write_camvid_like(tmp_path)
    good = (tmp_path / "trainannot/1.png").read_bytes()
    (tmp_path / "trainannot/1.png").write_bytes(good[:40])
    with pytest.raises(DataFileError, match=r"1\.png: found no readable image"):
        read_camvid(tmp_path)
    for array, message in (
        (np.full((6, 8), 30, np.uint8), "label 30; expected 0 … 10, or 11 for void"),
        (np.zeros((5, 8), np.uint8), "8×5 pixels; expected the image's 8×6"),
    ):
        image_module.fromarray(array).save(tmp_path / "trainannot/1.png")
        with pytest.raises(DataFileError, match=message):
            read_camvid(tmp_path)


# ---- CamVid: task and network ----------------------------------------------------------------------------------------


def test_camvid_by_name(tmp_path: Path) -> None:
    write_camvid_like(tmp_path / "camvid-small")
    task = load_task("camvid", data=tmp_path)
    assert (task.input_shape, task.outputs) == ((3, 6, 8), 11)
    x, y = examples(task, "train")
    assert x.dtype == torch.float32
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(3), atol=1e-6)
    scores = torch.zeros(len(y), 11, 6, 8)
    all_void = torch.full_like(y, 11)
    mixed = torch.where(torch.arange(8) < 4, y, all_void)
    weights = torch.tensor(list(task.description["class_weights"].values()))
    assert float(task.loss(scores, y)) == pytest.approx(float(torch.tensor(11.0).log()), rel=1e-5)
    assert int(task.measure(scores, mixed).sum()) == int((mixed != 11).sum())
    assert len(weights) == 11
    assert load_task("camvid_4x3", data=tmp_path).input_shape == (3, 3, 4)


@pytest.mark.slow
def test_camvid_trains(tmp_path: Path) -> None:
    task = load_task("camvid_60x45", data=data_folder("camvid-240x180"))
    model = build_model(f"{EXAMPLES}/paper/camvid.py:segnet_basic_8x2", task, seed=0)
    before = evaluate(model, task, "validation", batch_size=25)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for rows in torch.randperm(367).split(12):
        x, y = task.parts["train"].batch(rows)
        optimizer.zero_grad()
        task.loss(model(x), y).backward()
        optimizer.step()
    after = evaluate(model, task, "validation", batch_size=25)
    assert after["loss"] < before["loss"]
    assert after["error"] < before["error"] - 0.05


def test_the_task_can_be_sent_to_other_processes_and_recorded(tmp_path: Path) -> None:
    write_camvid_like(tmp_path)
    task = camvid.camvid(tmp_path)
    copy = pickle.loads(pickle.dumps(task))
    for mine, theirs in zip(examples(task, "test"), examples(copy, "test"), strict=True):
        assert torch.equal(mine, theirs)
    assert json.loads(json.dumps(task.to_dict()))["sizes"] == task.sizes()


def test_segmentation_scores_that_are_no_numbers_are_wrong() -> None:
    outputs = torch.tensor([[torch.nan, 1.0], [0.0, 1.0]])
    assert segmentation_scores(confusion(outputs, torch.tensor([0, 1]), classes=2))["pixel_error"] == 0.5


def check_scores(counts_of) -> None:
    """Compare with scikit-learn's metrics."""
    from sklearn import metrics

    scores, true = torch.randn(50, 4, 3), torch.randint(0, 5, (50, 3))
    kept = true != 4
    arguments = true[kept].numpy(), scores.argmax(1)[kept].numpy()
    found = segmentation_scores(counts_of(scores, true))
    expected = {
        "error": metrics.jaccard_score(*arguments, average="macro"),
        "class_error": metrics.balanced_accuracy_score(*arguments),
        "pixel_error": metrics.accuracy_score(*arguments),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(1 - float(value), abs=1e-12)


def test_scores_are_those_of_scikit_learn() -> None:
    check_scores(lambda scores, true: confusion(scores, true, classes=4, void=4))


def test_sabotage_true_and_predicted_classes_exchanged_are_noticed() -> None:
    def exchanged(scores: Tensor, true: Tensor) -> Tensor:
        counts = confusion(scores, true, classes=4, void=4)
        return torch.cat([counts[:, :4].T, counts[:, 4:]], 1)

    with pytest.raises(AssertionError):
        check_scores(exchanged)


def test_segnet_fits_images_whose_sides_are_odd(tmp_path: Path) -> None:
    write_camvid_like(tmp_path)
    task = load_task("camvid_7x5", data=tmp_path)
    model = build_model(f"{EXAMPLES}/paper/camvid.py:segnet_basic_4x2", task, seed=0)
    assert model(task.example_inputs(2)).shape == (2, 11, 5, 7)
    converted = mn.convert(model, task.example_inputs(4))
    assert len(list(mn.constraints.constrained_weights(converted))) == 4
    assert [m.weight.shape[-1] for m in model.modules() if isinstance(m, nn.Conv2d)] == [7, 7, 7, 7, 1]


@pytest.mark.slow
def test_segmentation_networks_can_be_compared() -> None:
    """At this size rounding decides some indices of the pooling: the converted form keeps its radii."""
    found = mn.compare(
        f"{EXAMPLES}/paper/camvid.py:segnet_basic_8x2",
        task=f"{EXAMPLES}/paper/camvid.py:camvid_60x45",
        data=str(data_folder("camvid-240x180")),
        optimizers=["sgd", "rsgd"],
        learning_rates=[0.1],
        seeds=1,
        epochs=1,
    )
    assert [run.status for run in found.results] == ["finished", "finished"]
    assert all(run.test_error is not None and run.test_error < 0.95 for run in found.results)
