"""Models by name: every form of MODEL, what goes wrong with it, and torchvision beside another build of torch."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from manifold_nets import errors
from manifold_nets.sources import ModelSpec, find_models, import_torchvision, load_model, read_inputs
from manifold_nets.sources.finding import code_run_by_import

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
        ("a/b c/train.py", ModelSpec("file", "a/b c/train.py", "")),
        ("hf:some/folder", ModelSpec("hf", "hf", "some/folder")),
        ("timm:hf-hub:x/y.z", ModelSpec("timm", "timm", "hf-hub:x/y.z")),
        ("timm:local-dir:x/y", ModelSpec("timm", "timm", "local-dir:x/y")),
        ("timm:hf-hub:", None),
        ("torchvision:a:b", None),
        ("hf:", None),
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


def test_a_script_does_not_parse_the_arguments_of_this_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parse = "parser.parse_args().width"
    (tmp_path / "script.py").write_text(
        "import argparse\nfrom torch import nn\nparser = argparse.ArgumentParser()\n"
        f"parser.add_argument('--width', type=int, default=3)\nWIDTH = {parse}\n"
        f"def net():\n    return nn.Linear(WIDTH, {parse})\n"
    )
    arguments = ["manifold-nets", "diagnose", "script.py", "--width", "5"]
    monkeypatch.setattr("sys.argv", arguments)
    assert load_model(f"{tmp_path}/script.py:net").weight.shape == (3, 3)
    assert sys.argv is arguments


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("import no_such_package", "Install no_such_package, or run from the folder that holds it"),
        ("from . import other", "Name a file of a package as package.module:callable"),
        ("raise SystemExit(2)", "Move what parses arguments or trains under"),
        ("1 / 0", "Check that the file can be imported"),
    ],
)
def test_an_import_that_fails_says_what_to_do(text: str, remedy: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(text)
    with pytest.raises(errors.ModelBuildError, match=re.escape(remedy)):
        load_model(f"{tmp_path}/script.py:net")


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


LOADING = "import manifold_nets as mn; print(mn.sources.load_model('net.py:net').bias)"
REPAIRED = ["from manifold_nets.sources import import_torchvision as get; get(); get()", LOADING]


@pytest.mark.parametrize("through", [*REPAIRED, ""])
def test_operators_that_did_not_load_are_declared(tmp_path: Path, through: str) -> None:
    """A package that registers code for operators which do not exist imports through us, and by itself does not."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(FOREIGN)
    (package / "second.py").write_text(SECOND)
    # The file of a user imports it as well, and hides why that fails.
    hidden = "try:\n    import torchvision\nexcept RuntimeError:\n    raise ImportError('not installed') from None\n"
    (tmp_path / "net.py").write_text(f"{hidden}from torch import nn\nnet = nn.Linear(2, 2, bias=False)\n")
    script = f"{through}\nimport torchvision\nprint(torchvision.second.__name__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    if through:
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("torchvision.second\n")
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


# ---- a Python file alone ---------------------------------------------------------------------------------------------

TRAIN = """
import sys
import torch
import torch.nn.functional as F
from torch import nn
from somewhere import Base

WIDTH = 4

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.layer = nn.Linear(width, width)

class Foreign(Base):
    def forward(self, x):
        return x

class Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

class Data(torch.utils.data.Dataset):
    pass

class Net(torch.nn.Sequential):
    def __init__(self, depth=2, *, width):
        super().__init__(*(Block(width) for _ in range(depth)))

class Deeper(Net):
    pass

def annotated(depth) -> "nn.Module":
    ...

def returning():
    model = nn.Linear(2, 2).eval()
    return model

def train(epochs=3):
    net = Deeper(width=3)
    net(torch.ones(2)).sum().backward()
    return net

def number(x):
    return F.relu(x)

criterion = nn.CrossEntropyLoss()
built = returning()
sys.exit("training begins")

if __name__ == "__main__":
    ready = Net(width=2)
"""


def test_what_a_file_defines_is_listed_without_running_it(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(TRAIN)
    assert [str(found) for found in find_models(tmp_path / "train.py")] == [
        "Block (class, needs width)",
        "Foreign (class, needs no arguments)",
        "Net (class, needs width)",
        "Deeper (class, needs width)",
        "annotated (function, needs depth)",
        "returning (function, needs no arguments)",
        "built (an object)",
    ]
    with pytest.raises(errors.ModelNotFoundError, match=r"it defines Block .*, built \(an object\).*train\.py:Foreign"):
        load_model(f"{tmp_path}/train.py")
    assert [line.partition(":")[2] for line in code_run_by_import(tmp_path / "train.py")] == [
        " criterion = nn.CrossEntropyLoss()", " built = returning()", " sys.exit('training begins')",
    ]  # fmt: skip


ONE = """
from torch import nn
class Part(nn.Linear):
    def __init__(self, width):
        super().__init__(width, 2)
class Net(nn.Sequential):
    def __init__(self, width{default}):
        super().__init__(Part(width))
{rest}
if __name__ == "__main__":
    raise SystemExit("training")
"""


@pytest.mark.parametrize(
    ("default", "rest", "kwargs", "width"),
    [("=3", "", {}, 3), ("", "", {"width": 5}, 5), ("", "def make():\n    return Net(4)", {}, 4)],
)
def test_the_one_model_that_needs_nothing_more_is_taken(
    default: str, rest: str, kwargs: dict[str, int], width: int, tmp_path: Path
) -> None:
    (tmp_path / "train.py").write_text(ONE.format(default=default, rest=rest))
    assert load_model(f"{tmp_path}/train.py", kwargs=kwargs)[0].in_features == width


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE.format(default="", rest=""), r"Net \(class, needs width\).*give width as keyword arguments"),
        (ONE.format(default="=3", rest="class Other(nn.ReLU): ..."), r"Name one of them, as .*train\.py:Net"),
        ("import torch\n", "no subclass of torch.nn.Module"),
        ("def net(:\n", "it is not valid Python code"),
        (None, "cannot be read"),
    ],
)
def test_what_cannot_be_taken_is_said(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "train.py").write_text(text)
    with pytest.raises((errors.ModelNotFoundError, errors.ModelBuildError), match=message):
        load_model(f"{tmp_path}/train.py")


# ---- example inputs from a file --------------------------------------------------------------------------------------

X, Y = torch.arange(6.0).reshape(2, 3), torch.tensor([[1], [0]])
CONTENTS = {
    "one.npy": (lambda path: np.save(path, X), ((X,), {})),
    "two.npz": (lambda path: np.savez(path, X, Y), ((X, Y), {})),
    "named.npz": (lambda path: np.savez(path, X, mask=Y), ((X,), {"mask": Y})),
    "named.safetensors": (lambda path: safetensors.torch.save_file({"1": Y, "0": X}, path), ((X, Y), {})),
    "tensor.pt": (lambda path: torch.save(X, path), ((X,), {})),
    "tuple.pt": (lambda path: torch.save((X, Y), path), ((X, Y), {})),
    "dict.pt": (lambda path: torch.save({"x": X, "y": Y}, path), ((), {"x": X, "y": Y})),
    "both.pt": (lambda path: torch.save(((X,), {"y": Y}), path), ((X,), {"y": Y})),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_example_inputs_of_a_file(name: str, tmp_path: Path) -> None:
    write, (positional, keywords) = CONTENTS[name]
    write(tmp_path / name)
    for dtype in (None, torch.float64):
        found, named = read_inputs(tmp_path / name, dtype)
        assert named.keys() == keywords.keys()
        for one, other in zip((*found, *named.values()), (*positional, *keywords.values()), strict=True):
            assert one.dtype == (dtype if dtype and other.is_floating_point() else other.dtype)
            assert torch.equal(one, other.to(one.dtype))


@pytest.mark.parametrize(
    ("name", "content"),
    [("objects.npy", np.array([print], dtype=object)), ("code.pt", print), ("text.pt", "x"), ("note.txt", "x")],
)
def test_a_file_that_holds_no_inputs_is_named(name: str, content: object, tmp_path: Path) -> None:
    if isinstance(content, np.ndarray):
        np.save(tmp_path / name, content, allow_pickle=True)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(errors.ExampleInputsError, match=name):
        read_inputs(tmp_path / name)
