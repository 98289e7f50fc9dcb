"""Networks of a comparison: they fit their tasks, depend on the seed alone, and convert."""

import importlib.util

import pytest
import torch
from helpers.comparison_cases import examples
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison.errors import TaskNameError, TaskSourceError
from manifold_nets.comparison.experiment import converted_form
from manifold_nets.comparison.models import build_model
from manifold_nets.comparison.tasks import Task, evaluate, load_task, task_from_data
from manifold_nets.errors import FunctionChangedError, ModelNotFoundError

pytest.importorskip("sklearn")


def weights_of(model: nn.Module) -> list[Tensor]:
    return list(model.state_dict().values())


@pytest.mark.parametrize("name", ["mlp:30,20", "mlp", "resnet:8,4"])
def test_networks_fit_depend_on_the_seed_alone_and_convert(name: str) -> None:
    task = load_task("digits")
    state = torch.get_rng_state()
    model, again, other = (build_model(name, task, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(again), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(weights_of(model), weights_of(other), strict=True))
    assert all(module.training for module in model.modules())
    converted = mn.convert(model, task.example_inputs())
    constrained = [weight.name for weight in mn.constraints.constrained_weights(converted)]
    assert len(constrained) == sum(p.ndim > 1 for p in model.parameters()) - 1  # all but the classifier
    check_same_function(model, converted, task)


def check_same_function(model: nn.Module, converted: nn.Module, task: Task) -> None:
    first, second = (evaluate(network.double(), _double(task), "test") for network in (model, converted))
    assert first["loss"] == pytest.approx(second["loss"], rel=1e-7)


def _double(task: Task) -> Task:
    parts = [(examples(task, part)[0].double(), examples(task, part)[1]) for part in ("train", "validation", "test")]
    return task_from_data(*parts, outputs=task.outputs)


def test_sabotage_another_initial_function_is_noticed() -> None:
    task = load_task("digits")
    with pytest.raises(AssertionError):
        check_same_function(build_model("mlp:20", task, seed=0), build_model("mlp:20", task, seed=1), task)


class Unpooled(nn.Module):
    """Passes on where a maximum was found: which of two nearly equal outputs wins is a matter of rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Linear(4, 2, bias=False)
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.features.weight[0, 2:] = 0
            self.features.weight[1] = self.features.weight[0, :2].repeat(2) / 2

    def forward(self, x: Tensor) -> Tensor:
        largest, index = nn.functional.max_pool1d(self.norm(self.features(x))[:, None], 2, return_indices=True)
        return self.head(nn.functional.max_unpool1d(largest, index, 2)[:, 0])


def test_rounding_that_decides_keeps_the_radii() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 2).repeat(1, 2)
    model = Unpooled()
    with pytest.raises(FunctionChangedError):
        mn.convert(model, x)
    converted = converted_form(model, x)
    assert torch.equal(converted.features.weight, model.features.weight)
    assert torch.equal(converted(x), model(x))
    manifold = converted.features.weight.manifold
    assert torch.allclose(manifold.radii.float(), model.features.weight.norm(dim=1))


def test_architectures_of_timm_get_the_channels_and_classes_of_the_task() -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    task = load_task("digits")
    model = build_model("timm:resnet10t", task, seed=0)
    assert model(task.example_inputs(2)).shape == (2, 10)


def test_callables_of_any_signature() -> None:
    task = load_task("digits")
    small = build_model(lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), task, seed=0)
    assert len(small) == 2
    fitted = build_model(lambda input_shape, outputs: nn.Sequential(nn.Flatten(), nn.Linear(64, outputs)), task, seed=0)
    assert torch.equal(small[1].weight, fitted[1].weight)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("mlpp", TaskNameError, "Correct the name"),
        ("mpl:8", TaskNameError, r"'mpl:8'; expected mlp:WIDTHS, .*Near matches: mlp"),
        ("torchvison:resnet18", ModelNotFoundError, "no module 'torchvison'. Near matches: torchvision"),
        ("mlp:10,x", TaskNameError, "positive whole numbers, separated by commas"),
        ("mlp:", TaskNameError, "positive whole numbers, separated by commas"),
        ("resnet:9", TaskNameError, "depth: found 9; expected 6n"),
        ("resnet:8,4,2", TaskNameError, "at most two settings"),
        ("torch.nn:Identity", TaskSourceError, r"inputs of shape \(1, 8, 8\) and 10 outputs"),
        ("segnet-basic:4,1", TaskNameError, "use --model examples/paper/camvid.py:segnet_basic"),
    ],
)
def test_networks_that_do_not_fit_are_refused(name: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build_model(name, load_task("digits"), seed=0)
