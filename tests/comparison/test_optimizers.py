"""The optimizers of a comparison: each takes the steps of its library, from an unchanged function."""

import copy
import gc
import importlib.util
import threading
from collections.abc import Callable

import geoopt
import pytest
import torch
from helpers.comparison_runs import Batch
from helpers.example_modules import example
from torch import Tensor, nn

import manifold_nets as mn
from manifold_nets.comparison.errors import OptimizerNameError
from manifold_nets.comparison.optimizers import OPTIMIZERS, OptimizerSpec, optimizer_spec
from manifold_nets.comparison.optimizers.builtin import from_torch
from manifold_nets.comparison.settings import Settings
from manifold_nets.errors import MissingExtraError
from manifold_nets.optim import OPTIMIZERS as OWN
from manifold_nets.sources import import_torchvision

REQUIRED = {"timm": "timm", "pymanopt": "pymanopt"}
PAPER = {"un": 2, "sm_columns": 0, "rsgd_all": 3, "radam_all": 3}  # and how many weights each holds on spheres
FULL_BATCH = [name for name, found in OPTIMIZERS.items() if found.full_batch]


def settings(**changes) -> Settings:
    return Settings(**{"optimizers": ("sgd",), "learning_rates": (0.1,), "seeds": (0,), "epochs": 1, **changes})


def data(count: int = 60) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 5, generator=generator)
    return inputs, (inputs[:, :3] + inputs[:, 2:]).argmax(1)


def plain_model() -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(),
        nn.Linear(6, 3),
    )  # fmt: skip


def model_for(found: OptimizerSpec) -> nn.Module:
    model = plain_model()
    return mn.convert(model, data()[0]) if found.form == "converted" else model


def available(name: str) -> OptimizerSpec:
    found = getattr(example("paper.protocol"), name) if name in PAPER else optimizer_spec(name)
    package = REQUIRED.get(found.library, "torch")
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    return found


def trained(make: Callable, found: OptimizerSpec, chosen: Settings, steps: int = 6, rate: float = 0.05) -> nn.Module:
    """Take some steps on batches of 20; return the model."""
    model = model_for(found)
    stepper = make(model, rate, chosen)
    inputs, targets = data()
    for step in range(steps):
        rows = slice(0, 60) if found.full_batch else slice(20 * (step % 3), 20 * (step % 3) + 20)
        loss = stepper.step(Batch(model, inputs[rows], targets[rows]))
        assert torch.isfinite(torch.as_tensor(loss))
    return model


# ---- every optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*OPTIMIZERS, *PAPER])
def test_every_optimizer_learns_and_stays_where_it_belongs(name: str) -> None:
    found = available(name)
    held = PAPER.get(name, 2 if found.form == "converted" else 0)
    inputs, targets = data()
    start = Batch(model_for(found), inputs, targets).loss().detach()
    rate = 0.02 if name in ("angular", "adagrad") else 0.01 if found.family == "adam" else 0.05
    model = trained(found.make, found, settings(), steps=30, rate=rate)
    assert float(Batch(model, inputs, targets).loss().detach()) < 0.9 * float(start)
    weights = list(mn.constraints.constrained_weights(model))
    assert len(weights) == held
    for weight in weights:
        assert weight.manifold.check_point_on_manifold(weight.parameter.detach(), atol=1e-5)
    assert found.description
    assert found.name == name.replace("_", "-")


def check_function_is_kept(found: OptimizerSpec) -> None:
    """Making an optimizer, and a learning rate of zero, leave the function as it was, up to rounding."""
    model = model_for(found)
    inputs, _ = data()
    before = model.eval()(inputs).detach()
    stepper = found.make(model, 0.1, settings())
    after = model.eval()(inputs).detach()
    assert float((after - before).abs().max()) <= 1e-6 * float(before.abs().max())
    if not found.full_batch:
        stepper.set_learning_rate(0.0)
        stepper.step(Batch(model, *data()))
        still = model.eval()(inputs).detach()
        assert float((still - before).abs().max()) <= 1e-5 * float(before.abs().max())


@pytest.mark.parametrize("name", [*OPTIMIZERS, *PAPER])
def test_making_an_optimizer_keeps_the_function(name: str) -> None:
    check_function_is_kept(available(name))


def test_sabotage_an_optimizer_that_starts_elsewhere_is_noticed() -> None:
    def moved(model: nn.Module, rate: float, chosen: Settings):
        with torch.no_grad():
            model[-1].weight.mul_(1.001)
        return optimizer_spec("sgd").make(model, rate, chosen)

    with pytest.raises(AssertionError):
        check_function_is_kept(OptimizerSpec("moved", "plain", "sgd", "torch", moved))


# ---- each takes the steps of its library -----------------------------------------------------------------------------


def groups_of(model: nn.Module, decay: float) -> list[dict]:
    """Weights of two axes decay, the rest does not; weights on spheres count as the rest."""
    spheres = {id(weight.parameter) for weight in mn.constraints.constrained_weights(model)}
    parameters = list(model.parameters())
    decayed = [p for p in parameters if p.ndim > 1 and id(p) not in spheres]
    chosen = {id(p) for p in decayed}
    rest = [p for p in parameters if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": decay}, {"params": rest, "weight_decay": 0.0}]


def timm_optimizer(name: str, *args, **kwargs) -> torch.optim.Optimizer:
    import_torchvision()
    return getattr(importlib.import_module("timm.optim"), name)(*args, **kwargs)


DIRECT: dict[str, Callable[[list[dict], float], torch.optim.Optimizer]] = {
    "sgd": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.8),
    "sgd-nesterov": lambda groups, lr: torch.optim.SGD(groups, lr, momentum=0.8, nesterov=True),
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "nadam": torch.optim.NAdam,
    "rmsprop": lambda groups, lr: torch.optim.RMSprop(groups, lr, momentum=0.8),
    "adagrad": torch.optim.Adagrad,
    "rsgd": lambda groups, lr: mn.optim.RiemannianSGD(groups, lr, momentum=0.8),
    "radam": mn.optim.RiemannianAdam,
    "pbwn": lambda groups, lr: mn.optim.ProjectedSGD(groups, lr, momentum=0.8),
    "geoopt-rsgd": lambda groups, lr: geoopt.optim.RiemannianSGD(groups, lr, momentum=0.8, stabilize=10),
    "geoopt-radam": lambda groups, lr: geoopt.optim.RiemannianAdam(groups, lr, stabilize=10),
    "sgdp": lambda groups, lr: timm_optimizer("SGDP", groups, lr, momentum=0.8),
    "adamp": lambda groups, lr: timm_optimizer("AdamP", groups, lr),
}


def check_steps(name: str, make: Callable | None = None) -> None:
    """Compare with a plain training loop around the library's own optimizer, bit for bit."""
    found = available(name)
    model = trained(make or found.make, found, settings(momentum=0.8, weight_decay=0.01), steps=12)
    other = model_for(found)
    optimizer = DIRECT[name](groups_of(other, 0.01), 0.05)
    inputs, targets = data()
    for step in range(12):
        rows = slice(20 * (step % 3), 20 * (step % 3) + 20)
        optimizer.zero_grad()
        nn.functional.cross_entropy(other(inputs[rows]), targets[rows]).backward()
        optimizer.step()
    for (key, ours), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), key


@pytest.mark.parametrize("name", DIRECT)
def test_optimizers_take_the_steps_of_their_library(name: str) -> None:
    check_steps(name)


def test_sabotage_decay_of_all_parameters_is_noticed() -> None:
    def all_decayed(model: nn.Module, rate: float, chosen: Settings):
        return from_torch(lambda groups, lr: torch.optim.SGD(model.parameters(), lr, momentum=0.8, weight_decay=0.01))(
            model, rate, chosen
        )

    with pytest.raises(AssertionError):
        check_steps("sgd", all_decayed)


def test_the_scaled_metric_takes_the_steps_of_the_paper() -> None:
    found = optimizer_spec("sm")
    model = trained(found.make, found, settings(momentum=0.0), steps=3)
    other = plain_model()
    inputs, targets = data()
    for step in range(3):
        rows = slice(20 * step, 20 * step + 20)
        other.zero_grad()
        nn.functional.cross_entropy(other(inputs[rows]), targets[rows]).backward()
        with torch.no_grad():
            for p in other.parameters():
                p -= 0.05 * p.grad * (p.square().sum(1, keepdim=True) if p.ndim > 1 else 1)
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_weight_norm_trains_directions_and_lengths_of_output_channels() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 3, groups=2), nn.Conv2d(4, 5, 3), nn.Flatten(), nn.LazyLinear(3))
    model(torch.zeros(1, 2, 6, 6))
    optimizer_spec("sgd-wn").make(model, 0.1, settings())
    lengths = [model[i].parametrizations.weight.original0.shape for i in (0, 1, 3)]
    assert [shape.numel() for shape in lengths] == [2, 5, 3]


def test_the_whole_table_of_our_optimizers_takes_part() -> None:
    assert set(OWN) <= set(OPTIMIZERS)
    for name, row in OWN.items():
        assert (OPTIMIZERS[name].form == "converted") == (row.weights == "spheres")


# ---- pymanopt --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FULL_BATCH)
def test_full_batch_optimizers_report_the_loss_before_each_step(name: str) -> None:
    found = available(name)
    model = model_for(found)
    stepper = found.make(model, 0.1, settings())
    for _ in range(4):
        before = copy.deepcopy(model.state_dict())
        batch = Batch(model, *data())
        expected = float(batch.loss().detach())
        model.load_state_dict(before)
        assert float(stepper.step(batch)) == pytest.approx(expected, rel=1e-5)
        assert batch.evaluated >= 3
    stepper.set_learning_rate(0.1)


@pytest.mark.parametrize("name", FULL_BATCH)
def test_the_learning_rate_is_the_length_of_the_first_step(name: str) -> None:
    found = available(name)
    bridge = importlib.import_module("manifold_nets.pymanopt_bridge")
    moved = []
    for rate in (1e-3, 1e-2):
        model = model_for(found)
        before, manifold = bridge.point_of(model), bridge.product_manifold(model)
        found.make(model, rate, settings()).step(Batch(model, *data()))
        moved.append(manifold.dist(before, bridge.point_of(model)) / rate)
    assert moved == pytest.approx([1, 1], rel=0.05)


def test_an_optimizer_that_is_dropped_leaves_no_thread() -> None:
    found = available("pymanopt-cg")
    model = model_for(found)
    stepper = found.make(model, 0.1, settings())
    stepper.step(Batch(model, *data()))
    running = [thread for thread in threading.enumerate() if thread.name == "pymanopt"]
    assert running
    del stepper
    gc.collect()
    for thread in running:
        thread.join(timeout=10)
    assert not any(thread.is_alive() for thread in running)


def test_the_penalty_of_weight_decay_is_minimized_and_not_reported() -> None:
    found = available("pymanopt-cg")
    norms, losses = [], []
    for decay in (0.0, 0.1):
        model = model_for(found)
        stepper = found.make(model, 0.1, settings(weight_decay=decay))
        losses.append(float(stepper.step(Batch(model, *data()))))
        for _ in range(15):
            stepper.step(Batch(model, *data()))
        norms.append(float(model[-1].weight.detach().norm()))
    assert norms[1] < 0.5 * norms[0]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_an_optimizer_that_has_finished_takes_no_more_steps() -> None:
    available("pymanopt-tr")
    torch.manual_seed(0)
    inputs = torch.randn(40, 3, dtype=torch.float64)
    targets = inputs.sum(1, keepdim=True)
    model = nn.Linear(3, 1).double()

    class Regression(Batch):
        def loss(self) -> Tensor:
            return nn.functional.mse_loss(self.model(self.inputs), self.targets)

    stepper = optimizer_spec("pymanopt-tr").make(model, 1.0, settings())
    losses = [float(stepper.step(Regression(model, inputs, targets))) for _ in range(40)]
    assert losses[-1] == losses[-2] < 1e-10


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_unknown_names_are_refused() -> None:
    with pytest.raises(OptimizerNameError, match=r"found 'rsdg'; expected one of .*Near matches: rsgd"):
        optimizer_spec("rsdg")


@pytest.mark.parametrize(("name", "package"), [("adamp", "timm"), ("sgdp", "timm"), ("pymanopt-cg", "pymanopt")])
def test_absent_packages_are_named(name: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for module in list(sys.modules):
        if module.partition(".")[0] == package or module.startswith("manifold_nets.pymanopt_bridge"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delattr(mn, "pymanopt_bridge", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    found = optimizer_spec(name)
    with pytest.raises(MissingExtraError, match=f"{package} is not installed.*manifold_nets\\["):
        found.make(model_for(found), 0.1, settings())
