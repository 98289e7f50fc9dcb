"""The package as a whole: its public names, what it imports, what it ships, and what its files say about each other."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import click
import pytest
from helpers import ROOT, tomllib

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


def completion(words: list[str]) -> dict[str, str]:
    """The environment in which bash asks for the words that may follow some others."""
    line = {"COMP_WORDS": shlex.join(["manifold-nets", *words]), "COMP_CWORD": str(len(words))}
    return {"_MANIFOLD_NETS_COMPLETE": "bash_complete", **line}


@pytest.mark.parametrize("command", ["", *main.commands])
def test_help_version_and_completion_import_no_torch(command: str) -> None:
    start = "from manifold_nets.cli import main; "
    asked = [command, "--help"] if command else ["--help"]
    found = imported(f"{start}main({asked})")
    assert "click" in found
    assert found & HEAVY == set()
    assert imported(f"{start}main(['--version'])") & HEAVY == set()
    words = [command] if command else []
    for parameter in main.commands[command].params if command else []:
        values = getattr(parameter.type, "choices", None) or ["1"] * parameter.nargs
        words += [*parameter.opts[-1:], *([] if parameter.type.name == "boolean" else values[: parameter.nargs])]
        if isinstance(parameter, click.Argument):
            words[-2:] = ["torchvision:resnet18"]
    assert imported(f"{start}main(prog_name='manifold-nets')", **completion([*words, "--"])) & HEAVY == set()


BASH = """
eval "$(_MANIFOLD_NETS_COMPLETE=bash_source {program})"
COMP_WORDS=({words}) COMP_CWORD={number}
compopt() {{ echo compopt "$@"; }}
_manifold_nets_completion {program}
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    ("words", "expected"),
    [("conv", ["convert"]), ("diagnose --mem", ["--memory"]), ("diagnose --memory s", ["small"]),
     ("diagnose nets/", ["compopt -o default", ""]), ("convert x.py:f --weights ''", ["compopt -o default", ""])],
)  # fmt: skip
def test_bash_completes_commands_options_and_files(words: str, expected: list[str]) -> None:
    program = Path(sys.executable).with_name("manifold-nets")
    if not program.is_file():
        pytest.skip("the command is not installed beside Python")
    script = BASH.format(program=program, words=f"manifold-nets {words}", number=len(words.split()))
    done = subprocess.run(["bash", "--norc", "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == expected, done.stderr


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "manifold_nets", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-1] == importlib.metadata.version("manifold_nets")


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


# Takes away what Python lacks on Windows, after the imports of packages that tell the systems apart by themselves.
NOT_ON_WINDOWS = """
import builtins, importlib, io, os, pathlib, signal, socket, sys
for name in {needed}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
of_signal = ["SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGUSR1"]
for module, names in ((os, {of_os}), (signal, of_signal), (socket, ["AF_UNIX"])):
    for name in names:
        vars(module).pop(name, None)
for name in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[name] = None

def without_proc(plain):
    def opened(path, *args, **options):
        if str(path).startswith(("/proc", "/dev")):
            raise FileNotFoundError(path)
        return plain(path, *args, **options)
    return opened

builtins.open = io.open = without_proc(open)
os.open = without_proc(os.open)
for name in {modules}:
    importlib.import_module(name)
"""
NEEDED = [
    "torch",
    "torch._dynamo",
    "geoopt",
    "scipy.stats",
    "sympy",
    "rich.progress",
    "jsonschema",
    "sqlalchemy",
    "matplotlib.figure",
]
NEEDED += ["pymanopt", "cloudpickle", "subprocess", "tempfile", "multiprocessing", "concurrent.futures", "asyncio"]
OF_OS = (
    "chown fchmod fchown fork forkpty getegid geteuid getgid getloadavg getpgid getppid getuid killpg lchown mkfifo "
    "nice posix_fallocate pread pwrite register_at_fork sched_getaffinity sched_setaffinity setsid statvfs sysconf "
    "uname O_CLOEXEC O_DIRECTORY O_DSYNC O_NOFOLLOW O_NONBLOCK O_SYNC"
).split()
USED = """
import warnings
import manifold_nets as mn
from torch import nn
from manifold_nets.comparison.results import machine_in_words
from manifold_nets.optim.backends import build, native

build.PLATFORM = build.Platform.of("win32", "AMD64")
build_net = lambda: nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
inputs = torch.randn(5, 4)
net = mn.convert(build_net(), inputs)
optimizer = mn.optim.RiemannianSGD(mn.param_groups(net, sphere_lr=0.1), lr=0.1)
net(inputs).sum().backward()
with warnings.catch_warnings(record=True) as caught:
    optimizer.step()
assert [str(w.message).partition(". Optimizer")[0].endswith("(no build for this system)") for w in caught] == [True]
mn.save(net, "net.safetensors")
mn.load(build_net(), "net.safetensors")
assert "cores" in machine_in_words()
"""


def on_windows(folder: Path, names: list[str], then: str = "") -> subprocess.CompletedProcess[str]:
    start = NOT_ON_WINDOWS.format(needed=NEEDED, of_os=OF_OS, modules=names)
    command = [sys.executable, "-c", f"{start}\nimport torch\n{then}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)


@pytest.mark.slow
def test_nothing_asks_for_what_windows_lacks(tmp_path: Path) -> None:
    done = on_windows(tmp_path, modules(), USED)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("asked", ["import fcntl", "os.geteuid", "open('/proc/cpuinfo')", "signal.SIGKILL"])
def test_what_windows_lacks_would_be_noticed(asked: str, tmp_path: Path) -> None:
    (tmp_path / "planted.py").write_text(f"import os, signal\n{asked}\n")
    start = NOT_ON_WINDOWS.format(needed=[], of_os=OF_OS, modules=["planted"])
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(("ImportError", "ModuleNotFound", "AttributeError", "FileNotFound"))


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


def test_the_extras_of_the_contract_exist_and_are_documented() -> None:
    extras = project()["project"]["optional-dependencies"]
    assert {"pymanopt", "compare", "vision", "train", "hf", "lightning", "monitor", "dev", "all"} <= extras.keys()
    everything = set(re.findall(r"\[(.+)\]", extras["all"][0])[0].split(","))
    assert everything == extras.keys() - {"all", "dev", "docs"}
    table = text_of("docs/index.md").partition("| extra |")[2].partition("\n\n")[0].splitlines()[1:]
    documented = [name for row in table for name in re.findall(r"`(\w+)`", row.split("|")[1])]
    assert sorted(documented) == sorted(extras)


def brought(extra: str) -> set[str]:
    """The packages that an extra brings, in lower case."""
    found = set()
    for requirement in project()["project"]["optional-dependencies"][extra]:
        inner = re.fullmatch(r"manifold_nets\[(.+)\]", requirement)
        found |= set().union(*map(brought, inner[1].split(","))) if inner else requirement_names([requirement])
    return found


def wrong_remedies(source: str) -> list[str]:
    """Where a text names an extra that does not exist, or one that does not bring the package that is missing."""
    extras = project()["project"]["optional-dependencies"]
    named = {name for names in re.findall(r"manifold.nets\[([a-z,]+)\]", source) for name in names.split(",")}
    wrong = sorted(named - extras.keys())
    for node in ast.walk(ast.parse(source)):
        place = {"MissingExtraError": 0, "library": 1}.get(getattr(getattr(node, "func", None), "id", ""))
        if isinstance(node, ast.Call) and place is not None:
            values = [getattr(argument, "value", None) for argument in node.args]
            package, extra = values[place], values[2]
            # Where the package is a variable, the extra still stands there.
            if extra not in extras or (package is not None and package.lower() not in brought(extra)):
                wrong.append(f"{package} from {extra}")
    return wrong


def test_errors_name_extras_that_bring_what_is_missing() -> None:
    sources = [path.read_text(encoding="utf-8") for path in Path(mn.__file__).parent.rglob("*.py")]
    assert [wrong for source in sources for wrong in wrong_remedies(source)] == []
    assert sum(source.count("MissingExtraError(") for source in sources) > 5
    assert wrong_remedies("'pip install manifold_nets[gone]'") == ["gone"]
    assert wrong_remedies("MissingExtraError('timm', 'x', 'gone')") == ["timm from gone"]
    assert wrong_remedies("MissingExtraError('timm', 'x', 'onnx')") == ["timm from onnx"]
    assert wrong_remedies("library(spec, 'timm', 'onnx')") == ["timm from onnx"]


def test_classifiers_are_those_of_the_python_that_is_required() -> None:
    metadata = project()["project"]
    minors = [int(minor) for minor in re.findall(r"Python :: 3\.(\d+)", "\n".join(metadata["classifiers"]))]
    assert f">=3.{minors[0]}" == metadata["requires-python"]
    assert minors == list(range(minors[0], minors[-1] + 1))


def test_workflows_cover_every_system_and_every_python_with_targets_that_exist() -> None:
    yaml = pytest.importorskip("yaml")
    tests, publish = (yaml.safe_load(text_of(f".github/workflows/{name}.yml"))["jobs"] for name in ("tests", "publish"))
    classifiers = "\n".join(project()["project"]["classifiers"])
    rows = tests["versions"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in rows} == set(re.findall(r"Python :: (3\.\d+)", classifiers))
    assert {row["os"] for row in rows} == {"ubuntu-latest", "macos-latest", "windows-latest"}
    floor = re.search(r"torch>=([\d.]+)", " ".join(project()["project"]["dependencies"]))
    assert floor is not None
    assert any(str(row["torch"]).startswith(f"{floor[1]}.") for row in rows)
    targets = set(re.findall(r"^([a-z-]+):", text_of("Makefile"), re.MULTILINE))
    assert {"test-versions", *tests["systems"]["strategy"]["matrix"]["target"]} <= targets
    assert tests["versions"]["steps"][-1]["run"].startswith("make test-versions PAIRS=")
    assert "make test-wheel DIST=" in publish["build"]["steps"][2]["run"]
    assert publish["publish"]["permissions"] == {"id-token": "write"}


def test_what_a_wheel_must_carry() -> None:
    files = {str(path) for path in importlib.metadata.files("manifold_nets") or []}
    metadata = importlib.metadata.metadata("manifold_nets")
    assert metadata["License-Expression"] == "Apache-2.0"
    assert any(name.endswith("entry_points.txt") for name in files)
    scripts = importlib.metadata.entry_points(group="console_scripts", name="manifold-nets")
    assert [script.value for script in scripts] == ["manifold_nets.cli:main"]
    assert (Path(mn.__file__).parent / "py.typed").is_file()
