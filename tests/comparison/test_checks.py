"""What is found out before the first run of a comparison: arguments, settings, devices, optimizers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.comparison_runs import small_settings, tiny
from torch import nn

import manifold_nets as mn
from manifold_nets.comparison.errors import OptimizerBuildError, OptimizerNameError, SettingsError
from manifold_nets.comparison.experiment import InitialModels, require_device
from manifold_nets.comparison.optimizers import optimizer_spec
from manifold_nets.errors import ArgumentTypeError


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("learning_rates", 0.1, r"found 0\.1; expected a sequence of numbers\. Write one rate as \[0\.1\]"),
        ("learning_rates", "0.1", r"found '0\.1'; expected a sequence of numbers"),
        ("learning_rates", ["large"], r"found \['large'\]; expected a sequence of numbers"),
        ("seeds", 0.5, r"found 0\.5; expected a sequence of numbers\. Write 3"),
        ("seeds", [0.5], r"found \[0\.5\]; expected a sequence of numbers"),
        ("optimizers", 3, r"found 3; expected names, optimizer classes or OptimizerSpecs\. Write them as"),
        ("optimizers", ["sgd", 8], "found 8; expected names, optimizer classes or OptimizerSpecs"),
        ("task", [1], r"found \[1\]; expected a name or a Task"),
        ("model", nn.Linear(4, 2), "found an object of type Linear; .*fresh weights: pass the class"),
        ("model", 8, "found 8; expected a name, or a callable"),
    ],
)
def test_arguments_of_another_kind_are_refused_by_name(name, value, message):
    with pytest.raises(ArgumentTypeError, match=f"^{name}: {message}"):
        mn.compare(**{name: value})


def test_one_optimizer_need_not_be_in_a_list():
    assert tiny(optimizers="sgd", seeds=1, epochs=1).settings.optimizers == ("sgd",)
    own = replace(optimizer_spec("sgd"), name="own")
    assert tiny(optimizers=own, seeds=1, epochs=1).settings.optimizers == ("own",)
    with pytest.raises(OptimizerNameError, match="found 'rsdg'"):
        mn.compare(optimizers="sgd, rsdg")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [({"subset": (1000, 10)}, {"subset": (40, 10)}), ({"device": "cdua"}, {}), ({"tune_on": (9, 99, 1)}, {})],
)
def test_a_wrong_setting_leaves_nothing_that_the_corrected_one_is_refused_for(tmp_path, wrong, right):
    small = {"optimizers": ["sgd"], "learning_rates": [0.1], "seeds": 1, "epochs": 1, "output": tmp_path}
    with pytest.raises(SettingsError, match=f"^{next(iter(wrong))}: found"):
        tiny(**small, **wrong)
    assert len(tiny(**small, **right).results) == 1


def test_a_study_that_is_there_is_not_checked_again(tmp_path, monkeypatch):
    """A finished comparison is read without an optimizer being made."""
    found = tiny(seeds=1, epochs=1, output=tmp_path)
    monkeypatch.setattr(InitialModels, "model", None)
    assert tiny(seeds=1, epochs=1, output=tmp_path) == found


def test_the_check_of_optimizers_serves_the_runs(monkeypatch):
    """The network is analysed once a comparison."""
    made, honest = [], InitialModels.__init__

    def counted(self, *args):
        made.append(self)
        honest(self, *args)

    monkeypatch.setattr(InitialModels, "__init__", counted)
    tiny(seeds=1, epochs=1)
    assert len(made) == 1


def test_optimizers_are_tried_at_every_initial_scale(tmp_path):
    """What only a rescaled start makes impossible is found as well, before the runs that could be carried out."""

    def make(model, rate, settings):
        if float(model[0].weight.detach().norm(dim=1).max()) > 3:
            raise ValueError("too large.")
        return optimizer_spec("sgd").make(model, rate, settings)

    own = replace(optimizer_spec("sgd"), name="own", make=make)
    with pytest.raises(
        OptimizerBuildError, match=r"^run own, .*, rescaled: found ValueError: too large; expected an opti"
    ):
        tiny(optimizers=["sgd", own], initial_scales=("plain", "rescaled"), output=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_devices_are_those_of_this_machine(monkeypatch):
    """On a machine with two graphics processors, as torch would tell."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        require_device(small_settings(device=name))
    for name in ("cuda:2", "cdua", "", "meta", "cuda:-1"):
        with pytest.raises(SettingsError, match=r"; expected a device .* such as cpu, cuda:0, cuda:1\."):
            require_device(small_settings(device=name))
