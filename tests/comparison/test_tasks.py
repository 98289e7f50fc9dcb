"""Tasks and networks of a comparison: splits, preparation, scores, names, and what is refused."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.comparison_cases import data_folder, examples, write_mnist_like
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from manifold_nets.comparison.errors import DataFolderError, TaskNameError, TaskSourceError
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.tasks import Task, evaluate, load_task, task_from_data
from manifold_nets.comparison.tasks.task import classification_scores, hits
from manifold_nets.errors import ModelBuildError, ModelNotFoundError

pytest.importorskip("sklearn")


# ---- splits and preparation ------------------------------------------------------------------------------------------


def check_split(task: Task) -> None:
    """No image is in two parts, and the training part alone has mean 0 and spread 1."""
    seen = [{image.numpy().tobytes() for image in examples(task, part)[0]} for part in ("train", "validation", "test")]
    assert len(set.union(*seen)) == sum(map(len, seen))
    x = examples(task, "train")[0].double()
    assert abs(float(x.mean())) < 1e-6
    assert abs(float(x.std(correction=0)) - 1) < 1e-6


def test_digits_are_split_once_and_for_all() -> None:
    task = load_task("digits")
    check_split(task)
    assert task.sizes() == {"train": 1000, "validation": 297, "test": 500}
    again = load_task("digits")
    assert all(torch.equal(a, b) for a, b in zip(examples(task, "test"), examples(again, "test"), strict=True))
    from sklearn.datasets import load_digits

    original = load_digits()
    pairs = {(image.tobytes(), int(label)) for image, label in zip(original.images, original.target, strict=True)}
    mean, spread = (float(word) for word in task.description["preprocessing"].split(" minus ")[1].split(", over "))
    for part in ("train", "validation", "test"):
        x, y = examples(task, part)
        restored = (x[:, 0].double() * spread + mean).round().numpy()
        assert {(image.tobytes(), int(label)) for image, label in zip(restored, y, strict=True)} <= pairs


def test_sabotage_test_images_among_the_training_images_are_noticed() -> None:
    task = load_task("digits")
    leaking = task_from_data(examples(task, "train"), examples(task, "validation"), examples(task, "train"))
    with pytest.raises(AssertionError):
        check_split(leaking)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "idx"])
def test_idx_folders_by_name(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = write_mnist_like(tmp_path / name, compress=True)
    task = load_task(name, data=tmp_path)
    assert task.name == name
    assert task.sizes() == {"train": 25, "validation": 5, "test": 12}
    assert (task.input_shape, task.outputs) == ((1, 5, 4), 3)
    monkeypatch.setenv("MANIFOLD_NETS_DATA", str(tmp_path))
    for again in (load_task(name, data=tmp_path / name), load_task(name)):
        assert torch.equal(examples(again, "train")[0], examples(task, "train")[0])
    labels = torch.cat([examples(task, part)[1] for part in ("train", "validation")])
    assert labels.bincount().tolist() == np.bincount(held["train-labels-idx1-ubyte"]).tolist()
    small = load_task(f"{name}:10,4")
    assert small.sizes() == {"train": 10, "validation": 4, "test": 12}
    with pytest.raises(TaskNameError, match=rf"task {name}: found '26 images'; expected 1 … 25"):
        load_task(f"{name}:26")


@pytest.mark.slow
def test_mnist_has_the_split_of_the_paper() -> None:
    task = load_task("mnist", data=data_folder("mnist"))
    assert task.sizes() == {"train": 50000, "validation": 10000, "test": 10000}
    x, _ = examples(task, "train")
    assert abs(float(x.double().mean())) < 1e-6


def test_tasks_can_be_sent_to_other_processes_and_recorded() -> None:
    task = load_task("digits")
    copy = pickle.loads(pickle.dumps(task))
    for mine, theirs in zip(examples(task, "test"), examples(copy, "test"), strict=True):
        assert torch.equal(mine, theirs)
    assert json.loads(json.dumps(task.to_dict()))["sizes"] == task.sizes()


def test_example_inputs_are_fewer_where_they_are_large() -> None:
    x, y = torch.zeros(20, 3, 200, 200), torch.arange(20) % 2
    large = task_from_data((x, y), (x, y), (x, y))
    assert large.example_inputs().shape == (2, 3, 200, 200)
    assert load_task("digits").example_inputs().shape == (16, 1, 8, 8)
    assert large.example_inputs(30).shape[0] == 20


# ---- scores ----------------------------------------------------------------------------------------------------------


def test_the_share_of_wrong_classes_is_that_of_scikit_learn() -> None:
    from sklearn import metrics

    scores, true = torch.randn(50, 4, 3), torch.randint(0, 4, (50, 3))
    expected = 1 - float(metrics.accuracy_score(true.flatten().numpy(), scores.argmax(1).flatten().numpy()))
    assert classification_scores(hits(scores, true)) == {"error": pytest.approx(expected)}
    with pytest.raises(AssertionError):  # sabotage: the classes are off by one
        assert classification_scores(hits(scores, (true + 1) % 4)) == {"error": pytest.approx(expected)}


def test_scores_that_are_no_numbers_are_wrong() -> None:
    outputs = torch.tensor([[torch.nan, 1.0], [0.0, 1.0]])
    assert classification_scores(hits(outputs, torch.tensor([0, 1]))) == {"error": 0.5}


def test_evaluation_does_not_depend_on_batches_and_puts_modes_back() -> None:
    task = load_task("digits")
    model = build_model("mlp:20", task, seed=3)
    model[2].eval()
    whole = evaluate(model, task, "test")
    parts = evaluate(model, task, "test", batch_size=7)
    assert parts["error"] == whole["error"]
    assert parts["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    x, y = examples(task, "test")
    assert whole["error"] == pytest.approx(float((model.eval()(x).argmax(1) != y).double().mean()))
    assert evaluate(model, task, "test", rows=[0, 1])["loss"] == pytest.approx(
        float(task.loss(model(x[:2]), y[:2]).detach())
    )
    model.train()
    model[2].eval()
    evaluate(model, task, "test", rows=[0])
    assert [module.training for module in model] == [True, True, False, True, True]


# ---- one's own data --------------------------------------------------------------------------------------------------


class Squares(Dataset):
    def __len__(self) -> int:
        return 20

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return torch.tensor([float(row)]), torch.tensor([float(row) ** 2])


def test_data_of_ones_own_in_every_form() -> None:
    x, y = torch.randn(30, 4), torch.arange(30) % 3
    dataset = TensorDataset(x, y)
    forms = [(x, y), dataset, DataLoader(dataset, batch_size=8, shuffle=True)]
    tasks = [task_from_data(form, form, form, outputs=3) for form in forms]
    rows = torch.tensor([4, 1, 7])
    for task in tasks:
        inputs, targets = task.parts["validation"].batch(rows)
        assert torch.equal(inputs, x[rows])
        assert torch.equal(targets, y[rows])
        assert task.input_shape == (4,)
    assert [task.batch_size for task in tasks] == [100, 100, 8]
    squares = task_from_data(
        Squares(), Squares(), Squares(), outputs=1,
        loss=nn.functional.mse_loss, error=lambda outputs, targets: (outputs - targets).abs().mean(1),
    )  # fmt: skip
    zero = nn.Linear(1, 1)
    nn.init.zeros_(zero.weight)
    nn.init.zeros_(zero.bias)
    scores = evaluate(zero, squares, "test", batch_size=3)
    assert scores["error"] == pytest.approx(np.mean(np.arange(20.0) ** 2))
    assert scores["loss"] == pytest.approx(np.mean(np.arange(20.0) ** 4))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (((torch.zeros(3, 2), torch.zeros(2)),) * 3, "3 inputs and 2 targets"),
        (([1, 2],) * 3, "object of type list; expected a tuple of two tensors"),
        ((Squares(),) * 3, "no number of outputs"),
        (((torch.zeros(0, 2), torch.zeros(0).long()),) * 3, "no examples"),
    ],
)
def test_data_of_another_form_are_refused(data: tuple, message: str) -> None:
    with pytest.raises(TaskSourceError, match=message):
        task_from_data(*data)


# ---- names -----------------------------------------------------------------------------------------------------------


def test_tasks_and_networks_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "from manifold_nets.comparison.tasks import task_from_data\n"
        "def task():\n"
        "    x, y = torch.ones(8, 3), torch.arange(8) % 2\n"
        "    return task_from_data((x, y), (x, y), (x, y), name='mine')\n"
        "def network(outputs):\n"
        "    return torch.nn.Linear(3, outputs)\n"
        "def number():\n"
        "    return 3\n"
        "def fails():\n"
        "    raise KeyError('lost')\n"
    )
    task = load_task(f"{file}:task")
    assert (task.name, task.outputs) == ("mine", 2)
    assert build_model(f"{file}:network", task, seed=0).out_features == 2
    with pytest.raises(TaskSourceError, match="found an object of type int; expected a manifold_nets"):
        load_task(f"{file}:number")
    with pytest.raises(TaskSourceError, match=r"type int; expected a torch\.nn\.Module"):
        build_model(f"{file}:number", task, seed=0)
    with pytest.raises(ModelBuildError, match="KeyError: 'lost'"):
        load_task(f"{file}:fails")
    with pytest.raises(ModelNotFoundError, match="no attribute"):
        load_task(f"{file}:absent")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "expected digits, mnist"),
        ("digit", "Near matches: digits"),
        ("minst:100", "expected digits, mnist.*Near matches: mnist"),
        ("digits:3", "digits without settings"),
        ("mnist:1,2,3", "mnist:TRAIN,VALIDATION"),
        ("mnist:0", "positive whole numbers"),
        ("camvid:120x90", r"no longer built in\. .* --task examples/paper/camvid.py:camvid"),
    ],
)
def test_names_that_name_no_task_are_refused(spec: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(TaskNameError, match=message):
        load_task(spec, data=tmp_path)


def test_absent_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MANIFOLD_NETS_DATA", raising=False)
    with pytest.raises(DataFolderError, match=r"task mnist: found no data folder.*--data.*MANIFOLD_NETS_DATA"):
        load_task("mnist")
    with pytest.raises(DataFolderError, match="absent: found no such folder"):
        load_task("mnist", data=tmp_path / "absent")
