"""The package as a whole: its public names, what it imports, what it ships, and what its files say about each other."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from helpers import ROOT

import manifold_nets as mn
from manifold_nets.cli import main
from manifold_nets.comparison.settings import Initialization, Schedule
from manifold_nets.conversion import REMEDIES
from manifold_nets.conversion.export import FileFormat
from manifold_nets.symmetry.diagnose import LARGEST_SEED
from manifold_nets.symmetry.optimizer_settings import OPTIMIZERS

TOP = ROOT


def modules() -> list[str]:
    names = [info.name for info in pkgutil.walk_packages(mn.__path__, "manifold_nets.")]
    cli = importlib.import_module("manifold_nets.cli")
    names += [info.name for info in pkgutil.walk_packages(cli.__path__, "manifold_nets.cli.")]
    return ["manifold_nets", "manifold_nets.cli", *dict.fromkeys(names)]


def undocumented(module: types.ModuleType) -> Iterator[str]:
    """Public names of a module, and public methods of its classes, without a docstring of their own."""
    if not module.__doc__:
        yield module.__name__
    for name in getattr(module, "__all__", []):
        value = getattr(module, name)
        if not (inspect.isclass(value) or inspect.isroutine(value)) or not value.__module__.startswith("manifold_nets"):
            continue
        if not _own_docstring(value):
            yield f"{module.__name__}.{name}"
        if inspect.isclass(value):
            for member, method in vars(value).items():
                if member in getattr(value, "__dataclass_fields__", {}):
                    continue  # described in the class; a default that is a function is no method
                public = inspect.isroutine(method) or isinstance(method, (property, classmethod, staticmethod))
                if public and not member.startswith("_") and not inspect.getdoc(getattr(value, member)):
                    yield f"{module.__name__}.{name}.{member}"


def _own_docstring(value: Any) -> bool:
    # A dataclass without a docstring gets its signature for one.
    text = value.__doc__ or ""
    return bool(text.strip()) and not text.startswith(f"{value.__name__}(")


@pytest.mark.parametrize("name", modules())
def test_public_names_are_documented(name: str) -> None:
    assert list(undocumented(importlib.import_module(name))) == []


def test_missing_docstrings_are_found() -> None:
    module = types.ModuleType("manifold_nets.planted", "Planted.")
    source = "class Bare:\n    def method(self): ...\ndef bare(): ...\ndef fine():\n    'Fine.'\n"
    exec(source, module.__dict__ | {"__name__": module.__name__}, module.__dict__)
    for name in ("Bare", "bare", "fine"):
        vars(module)[name].__module__ = module.__name__
    module.__all__ = ["Bare", "bare", "fine"]
    found = ["manifold_nets.planted.Bare", "manifold_nets.planted.Bare.method", "manifold_nets.planted.bare"]
    assert list(undocumented(module)) == found


PUBLIC = ("", ".layers", ".optim", ".comparison", ".pymanopt_bridge")


def without_example(module: types.ModuleType) -> Iterator[str]:
    """Public names whose docstring has no section Example with code; a doctest runs those that have."""
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value) or inspect.isroutine(value):
            _, found, example = (value.__doc__ or "").partition("Example:\n")
            if not found or ">>>" not in example:
                yield name


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_examples(name: str) -> None:
    module = importlib.import_module(f"manifold_nets{name}")
    assert list(without_example(module)) == []


def test_missing_examples_are_found() -> None:
    module = types.ModuleType("planted")
    source = "def bare():\n    'Nothing.'\ndef fine():\n    'Fine.\\n\\n    Example:\\n        >>> fine()\\n    '\n"
    exec(source, vars(module))
    module.__all__ = ["bare", "fine"]
    assert list(without_example(module)) == ["bare"]


@pytest.mark.parametrize("name", modules())
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert len(exported) == len(set(exported))
    assert all(hasattr(module, entry) for entry in exported)


def imported(statement: str, **environment: str) -> set[str]:
    """Top-level packages in memory after a statement, in a Python of its own."""
    script = f"import atexit, sys\natexit.register(lambda: print('\\n' + ' '.join(sys.modules)))\n{statement}"
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=variables)
    return {name.partition(".")[0] for name in done.stdout.splitlines()[-1].split()}


OPTIONAL = {"click", "rich", "pymanopt", "sklearn", "matplotlib", "torchvision", "timm", "onnx", "onnxscript"}
# jsonschema is required, but not imported before a file is read; scipy comes with geoopt.
OPTIONAL |= {"jsonschema", "onnxruntime", "pytest", "hypothesis", "accelerate", "lightning", "transformers"}
OPTIONAL |= {"sqlalchemy", "cloudpickle"}
HEAVY = {"torch", "geoopt", "numpy", "scipy"}


def test_importing_the_package_imports_nothing_heavy() -> None:
    listed = "import manifold_nets as mn; assert {'conversion', 'symmetry'} <= set(dir(mn))"
    assert imported(listed) & (OPTIONAL | HEAVY) == set()
    assert set(mn.__all__) <= set(dir(mn))
    with pytest.raises(AttributeError, match="has no attribute 'diagnoze'"):
        _ = mn.diagnoze


def test_the_core_imports_no_optional_package() -> None:
    statement = "import manifold_nets as mn\nfor name in mn.__all__:\n    getattr(mn, name)"
    found = imported(statement)
    assert found & OPTIONAL == set()
    assert found > HEAVY


def test_an_optional_package_would_be_seen() -> None:
    assert imported("import manifold_nets.cli") & (OPTIONAL | HEAVY) == {"click", "rich"}


@pytest.mark.parametrize("command", ["", "diagnose", "convert", "export", "compare"])
def test_help_version_and_completion_import_no_torch(command: str) -> None:
    start = "from manifold_nets.cli import main; "
    asked = [command, "--help"] if command else ["--help"]
    found = imported(f"{start}main({asked})")
    assert "click" in found
    assert found & HEAVY == set()
    assert imported(f"{start}main(['--version'])") & HEAVY == set()
    words = f"manifold-nets {command} torchvision:resnet18 --input-shape 3,8,8 --remedies all --"
    completing = {"_MANIFOLD_NETS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    assert imported(f"{start}main(prog_name='manifold-nets')", **completing) & HEAVY == set()


@pytest.mark.slow
def test_torch_would_be_seen() -> None:
    start = "from manifold_nets.cli import main; "
    spec = ["diagnose", "torch.nn:Identity", "--input-shape", "4"]
    assert imported(f"{start}main({spec})") > HEAVY


def test_names_that_help_shows_are_those_of_the_package() -> None:
    """Help imports no torch, and so repeats a few names that are defined elsewhere."""
    parameters = {(name, p.name): p for name, command in main.commands.items() for p in command.params}
    expected = {
        ("diagnose", "optimizer"): OPTIMIZERS,
        ("export", "file_format"): get_args(FileFormat),
        ("compare", "schedule"): get_args(Schedule),
        ("compare", "initialization"): get_args(Initialization),
    }
    assert {key: tuple(parameters[key].type.choices) for key in expected} == expected
    assert f"some of {','.join(REMEDIES)}." in parameters["convert", "remedies"].help
    assert parameters["diagnose", "seed"].type.max == LARGEST_SEED


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["", "layers", "constraints", "optim", "conversion", "symmetry", "comparison", "pymanopt_bridge", "cli"]
)
def test_importing_is_silent(module: str) -> None:
    """Not even geoopt's warnings escape, whatever is imported first."""
    script = f"import torch; import manifold_nets.{module}" if module else "import manifold_nets as mn; mn.diagnose"
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


GUARDED = """
import torch
import manifold_nets.manifold as manifold
from manifold_nets.layers import UnitNormLinear
from manifold_nets.errors import EuclideanStepError

def is_guarded():
    layer = UnitNormLinear(4, 3)
    layer(torch.ones(2, 4)).sum().backward()
    try:
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
    except EuclideanStepError:
        return True
    return False

waiting = manifold._on_first_instance
actions = waiting.copy()
waiting.clear()  # sabotage: nothing waits for the first weight on spheres
assert not is_guarded()
waiting.extend(actions)
assert is_guarded()
"""


def test_weights_are_guarded_though_no_optimizer_of_ours_was_imported() -> None:
    subprocess.run([sys.executable, "-c", GUARDED], check=True)


# ---- the files of the project, where they are at hand ----------------------------------------------------------------


def text_of(name: str) -> str:
    path = TOP / name
    if not path.is_file():
        pytest.skip(f"{name} is not beside the tests")
    return path.read_text(encoding="utf-8")


def project() -> dict[str, Any]:
    return tomllib.loads(text_of("pyproject.toml"))


def test_the_version_is_the_same_everywhere() -> None:
    version = project()["project"]["version"]
    assert importlib.metadata.version("manifold_nets") == version
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?", text_of("CHANGELOG.md"), re.MULTILINE)
    newest, detail = headings[0]
    assert version in (newest, detail)


def test_every_package_is_shipped() -> None:
    if not (TOP / "manifold_nets").is_dir():
        pytest.skip("the source is not beside the tests")
    packages = {
        ".".join(path.parent.relative_to(TOP).parts) for path in (TOP / "manifold_nets").rglob("__init__.py")
    } | {"manifold_nets.cli"}
    assert set(project()["tool"]["setuptools"]["packages"]) == packages


def test_every_schema_is_shipped() -> None:
    if not (TOP / "manifold_nets").is_dir():
        pytest.skip("the source is not beside the tests")
    present = {
        (".".join(path.parent.relative_to(TOP).parts), path.name)
        for path in (TOP / "manifold_nets").rglob("*.schema.json")
    }
    shipped = project()["tool"]["setuptools"]["package-data"]
    assert present <= {(package, name) for package, names in shipped.items() for name in names}
    assert len(present) >= 3


def requirement_names(requirements: list[str]) -> set[str]:
    names = {re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0] for requirement in requirements}
    return {name.lower().replace("_", "-") for name in names} - {"manifold-nets"}


def test_every_requirement_is_pinned() -> None:
    metadata = project()["project"]
    lines = [line for line in text_of("constraints.txt").splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    wanted = requirement_names(metadata["dependencies"])
    for extra in metadata["optional-dependencies"].values():
        wanted |= requirement_names(extra)
    assert wanted - requirement_names(lines) == set()
    # Sabotage: one pin taken out.
    assert wanted - requirement_names([line for line in lines if not line.startswith("torch==")]) == {"torch"}


def test_the_extras_of_the_contract_exist() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert {"pymanopt", "compare", "vision", "dev", "all"} <= extras.keys()
    everything = set(re.findall(r"\[(.+)\]", extras["all"][0])[0].split(","))
    assert everything == extras.keys() - {"all", "dev", "docs"}


def test_what_a_wheel_must_carry() -> None:
    files = {str(path) for path in importlib.metadata.files("manifold_nets") or []}
    metadata = importlib.metadata.metadata("manifold_nets")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("entry_points.txt") for name in files)
    scripts = importlib.metadata.entry_points(group="console_scripts", name="manifold-nets")
    assert [script.value for script in scripts] == ["manifold_nets.cli:main"]
    assert (Path(mn.__file__).parent / "py.typed").is_file()
