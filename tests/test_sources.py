"""Models by name: every form of MODEL, what goes wrong with it, and torchvision beside another build of torch."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_nets import errors
from manifold_nets.sources import ModelSpec, import_torchvision, load_model

NET = """
import dataclasses
import torch
from companion import WIDTH

@dataclasses.dataclass
class Config:
    width: int = WIDTH

class Net(torch.nn.Module):
    def __init__(self, width=None):
        super().__init__()
        self.layer = torch.nn.Linear(4, width or Config().width)

    @classmethod
    def narrow(cls):
        return cls(1)

shared = Net(5)

def broken():
    raise OSError("no disk")

def number():
    return 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "companion.py").write_text("WIDTH = 7\n")
    (tmp_path / "net.py").write_text(NET)
    yield tmp_path
    for name in ("companion", "net", "_manifold_nets_model_net"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("torchvision:resnet18", ModelSpec("torchvision", "torchvision", "resnet18")),
        ("timm:hf_hub:x/y.z", None),
        ("timm:vit_tiny_patch16_224.augreg_in21k", ModelSpec("timm", "timm", "vit_tiny_patch16_224.augreg_in21k")),
        ("a/b c/net.py:Net.narrow", ModelSpec("file", "a/b c/net.py", "Net.narrow")),
        ("pkg.sub:build", ModelSpec("module", "pkg.sub", "build")),
        ("resnet18", None),
        (":build", None),
        ("pkg:", None),
        ("pkg:1st", None),
        ("pkg/sub:build", None),
        ("", None),
    ],
)
def test_a_specification_is_read_or_refused(text: str, expected: ModelSpec | None) -> None:
    if expected is None:
        with pytest.raises(errors.ModelSpecError, match="torchvision:NAME"):
            ModelSpec.parse(text)
    else:
        assert ModelSpec.parse(text) == expected
        assert str(expected) == text


def test_a_callable_of_a_file_sees_its_neighbours(folder: Path) -> None:
    before = list(sys.path)
    assert load_model(f"{folder}/net.py:Net").layer.out_features == 7
    assert load_model(f"{folder}/net.py:Net", kwargs={"width": 3}).layer.out_features == 3
    assert load_model(f"{folder}/net.py:Net.narrow").layer.out_features == 1
    assert load_model(f"{folder}/net.py:shared").layer.out_features == 5
    assert sys.path == before


def test_a_callable_of_a_module_in_the_working_directory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    assert load_model("net:Net").layer.out_features == 7


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("{}/net.py:Nte", errors.ModelNotFoundError, r"no attribute 'Nte'. Near matches: .*Net"),
        ("{}/nte.py:Net", errors.ModelNotFoundError, "there is no file"),
        ("{}/net.py:broken", errors.ModelBuildError, "broken.* raised OSError: no disk"),
        ("{}/net.py:number", errors.ModelBuildError, "returned an object of type int"),
        ("{}/net.py:Net.narrow.deep", errors.ModelNotFoundError, "no attribute 'Net.narrow.deep'"),
        ("{}/needs.py:Net", errors.ModelBuildError, "No module named 'not_installed'"),
        ("{}/syntax.py:Net", errors.ModelBuildError, "SyntaxError"),
        ("not_installed.net:Net", errors.ModelNotFoundError, "no module 'not_installed'"),
        ("torchvison:resnet18", errors.ModelNotFoundError, "no module 'torchvison'. Near matches: torchvision"),
        ("torch.not_there:Net", errors.ModelNotFoundError, "no module 'torch.not_there'"),
        ("torch.nn:Linaer", errors.ModelNotFoundError, "Near matches: Linear"),
        ("torch.nn:Linear", errors.ModelBuildError, "missing 2 required positional arguments"),
    ],
)
def test_what_is_wrong_is_named(folder: Path, spec: str, error: type[Exception], message: str) -> None:
    (folder / "needs.py").write_text("import not_installed\n")
    (folder / "syntax.py").write_text("def Net(:\n")
    before = list(sys.path)
    with pytest.raises(error, match=message) as caught:
        load_model(spec.format(folder))
    assert isinstance(caught.value, errors.ManifoldNetsError)
    assert sys.path == before
    assert not [name for name in sys.modules if name in ("_manifold_nets_model_needs", "_manifold_nets_model_syntax")]


def test_a_model_object_takes_no_arguments(folder: Path) -> None:
    with pytest.raises(errors.ModelBuildError, match="takes no arguments"):
        load_model(f"{folder}/net.py:shared", kwargs={"width": 3})


@pytest.mark.parametrize(
    ("library", "name"), [("torchvision", "resnet18"), ("timm", "resnet18"), ("torchvision", "fcn_resnet50")]
)
def test_architectures_are_built_without_a_download(library: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _vision(library)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", _no_download)
    kwargs = {"num_classes": 5}
    model = load_model(f"{library}:{name}", kwargs=kwargs)
    assert (
        list(model.modules())[-1].bias.shape == (5,) if name == "resnet18" else model.classifier[-1].out_channels == 5
    )


def test_a_trained_backbone_would_be_a_download(monkeypatch: pytest.MonkeyPatch) -> None:
    _vision("torchvision")
    torchvision = import_torchvision()
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", _no_download)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", _no_download)
    with pytest.raises(AssertionError, match="download"):
        torchvision.models.get_model("fcn_resnet50", weights=None)


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_near_matches_of_an_architecture(library: str) -> None:
    _vision(library)
    with pytest.raises(
        errors.ModelNotFoundError, match=rf"{library} has no model 'resnte18'. Near matches: .*resnet18"
    ):
        load_model(f"{library}:resnte18")


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_missing_library_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(errors.ModelNotFoundError, match=r"not installed.*manifold_nets\[vision\]"):
        load_model(f"{library}:resnet18")


FOREIGN = """
import torch
@torch.library.register_fake("torchvision::nms")
def nms(x): return x
from torchvision import second
"""
SECOND = """
import torch
@torch.library.register_fake("torchvision::roi_pool")
def roi_pool(x): return x
"""


@pytest.mark.parametrize("through", ["from manifold_nets.sources import import_torchvision as get; get(); get()", ""])
def test_operators_that_did_not_load_are_declared(tmp_path: Path, through: str) -> None:
    """A package that registers code for operators which do not exist imports through us, and by itself does not."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FOREIGN)
    (package / "second.py").write_text(SECOND)
    script = f"{through}\nimport torchvision\nprint(torchvision.second.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    if through:
        assert done.returncode == 0, done.stderr
        assert done.stdout == "torchvision.second\n"
        assert done.stderr.count("built for another torch") == 1
        assert "nms, roi_pool" in done.stderr
    else:
        assert done.returncode == 1
        assert "operator torchvision::nms does not exist" in done.stderr


def test_another_failure_of_the_import_is_passed_on(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('out of luck')")
    script = textwrap.dedent("""
        from manifold_nets.sources import import_torchvision
        try:
            import_torchvision()
        except RuntimeError as error:
            print(error)
    """)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "out of luck\n", done.stderr


def _vision(library: str) -> None:
    for needed in {"torchvision", library}:
        if importlib.util.find_spec(needed) is None:
            pytest.skip(f"{needed} is not installed")


def _no_download(*_: object, **__: object) -> dict[str, nn.Parameter]:
    raise AssertionError("this would be a download")
