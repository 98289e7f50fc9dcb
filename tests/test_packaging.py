"""The package as a whole: its public names, what it imports, what it ships, and what its files say about each other."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import manifold_nets as mn

TOP = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize("name", modules())
def test_public_names_exist(name: str) -> None:
    module = importlib.import_module(name)
    exported = list(getattr(module, "__all__", []))
    assert len(exported) == len(set(exported))
    assert all(hasattr(module, entry) for entry in exported)


def imported(statement: str) -> set[str]:
    """Top-level packages in memory after a statement, in a Python of its own."""
    script = f"{statement}\nimport sys\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


OPTIONAL = {"click", "rich", "pymanopt", "sklearn", "matplotlib", "torchvision", "timm", "onnx", "onnxscript"}
# jsonschema is required, but not imported before a file is read.
OPTIONAL |= {"jsonschema", "onnxruntime", "pytest", "hypothesis", "accelerate", "lightning", "transformers"}


def test_the_core_imports_no_optional_package() -> None:
    assert imported("import manifold_nets") & OPTIONAL == set()


def test_an_optional_package_would_be_seen() -> None:
    assert imported("import manifold_nets, manifold_nets.cli") & OPTIONAL == {"click", "rich"}


def test_importing_is_silent() -> None:
    """No warning escapes, even where all of them are shown."""
    script = "import manifold_nets, manifold_nets.cli"
    done = subprocess.run([sys.executable, "-W", "always", "-c", script], capture_output=True, text=True, check=True)
    ours = [line for line in done.stderr.splitlines() if "manifold_nets" in line or "geoopt" in line]
    assert (done.stdout, ours) == ("", [])


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
    assert everything == extras.keys() - {"all", "dev"}


def test_what_a_wheel_must_carry() -> None:
    files = {str(path) for path in importlib.metadata.files("manifold_nets") or []}
    metadata = importlib.metadata.metadata("manifold_nets")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("entry_points.txt") for name in files)
    scripts = importlib.metadata.entry_points(group="console_scripts", name="manifold-nets")
    assert [script.value for script in scripts] == ["manifold_nets.cli:main"]
    assert (Path(mn.__file__).parent / "py.typed").is_file()
