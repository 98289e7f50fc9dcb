"""Find the models that a Python file defines by parsing it; no code of the file is run."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from manifold_nets.errors import ModelBuildError, ModelNotFoundError, described, listed
from manifold_nets.sources.spec import ModelSpec

__all__ = ["ModelCandidate", "code_run_by_import", "find_model", "find_models"]

# Bases of a class with a method `forward` that is no module.
_NO_MODULES = ("Function", "InplaceFunction", "Protocol", "ABC", "object")
# What other libraries make models with.
_MAKERS = re.compile(r"torchvision\.models\..*|timm\.create_model|transformers\..*\.from_(pretrained|config)")
_REST = inspect.Parameter
_TRAINING = ("backward", "step", "fit")
_MOVES = ("to", "cpu", "cuda", "float", "double", "half", "bfloat16", "eval", "train", "requires_grad_")
_DEFINITIONS = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Pass)

Arguments = tuple[tuple[str, ...], tuple[str, ...]]  # those that are required, and the others


@dataclass(frozen=True)
class ModelCandidate:
    """A model that a Python file defines.

    Args:
        name: the class, function or object.
        kind: ``"class"``, ``"function"`` or ``"object"``.
        required: arguments that it cannot do without.
        optional: its other arguments by name.
        uses: names of other candidates that occur in it.

    Example:
        >>> str(ModelCandidate("Net", "class", required=("width",)))
        'Net (class, needs width)'
    """

    name: str
    kind: str
    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    uses: frozenset[str] = frozenset()

    def __str__(self) -> str:
        if self.kind == "object":
            return f"{self.name} (an object)"
        needs = f"needs {', '.join(self.required)}" if self.required else "needs no arguments"
        return f"{self.name} ({self.kind}, {needs})"


def find_models(path: str | Path) -> tuple[ModelCandidate, ...]:
    r"""List the models that a Python file defines at its top level, without running it.

    These are subclasses of `torch.nn.Module` (also by way of other classes of the file, and classes with a method
    ``forward`` whose bases come from elsewhere), functions that return one by their annotation or their code, and
    objects made of one. Functions that train or that take a model, and what stands under
    ``if __name__ == "__main__"``, do not count.

    Raises:
        ModelNotFoundError: there is no such file.
        ModelBuildError: it is not valid Python code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "train.py"
        ...     _ = path.write_text("from torch import nn\ndef net(width):\n    return nn.Linear(width, 2)\n")
        ...     [str(candidate) for candidate in find_models(path)]
        ['net (function, needs width)']
    """
    return tuple(_Reader(_parsed(Path(path))).candidates.values())


def find_model(spec: ModelSpec, kwargs: Mapping[str, Any]) -> ModelSpec:
    r"""Name the one model of a file that can be built with these arguments.

    Candidates that another one uses are its parts and do not count.

    Raises:
        ModelNotFoundError: there is no such file, it has no model or several, or the one needs other arguments. The
            message lists what was found.
        ModelBuildError: it is not valid Python code.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "train.py"
        ...     _ = path.write_text("from torch import nn\ndef net(width):\n    return nn.Linear(width, 2)\n")
        ...     find_model(ModelSpec.parse(str(path)), {"width": 3}).name
        'net'
    """
    candidates = find_models(spec.place)
    used = {name for candidate in candidates for name in candidate.uses - {candidate.name}}
    whole = [candidate for candidate in candidates if candidate.name not in used]
    if len(whole) == 1 and not set(whole[0].required) - set(kwargs):
        return ModelSpec("file", spec.place, whole[0].name)
    if not candidates:
        found = "no subclass of torch.nn.Module, and no function that returns one, was found in it"
        raise ModelNotFoundError(spec, found, f"Name the callable that builds the model, as {spec.place}:NAME.")
    found = f"it defines {listed(candidates, limit=20)}"
    missing = sorted(set(whole[0].required) - set(kwargs)) if len(whole) == 1 else []
    remedy = f"Name one of them, as {spec.place}:{(whole or candidates)[0].name}"
    arguments = f", and give {', '.join(missing)} as keyword arguments (--kwargs on the command line)"
    raise ModelNotFoundError(spec, found, f"{remedy}{arguments if missing else ''}.")


def code_run_by_import(path: str | Path) -> tuple[str, ...]:
    """The lines at the top level of a Python file that do more than import and define, as importing it runs them."""
    found = []
    for statement in _parsed(Path(path)).body:
        is_text = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
        if isinstance(statement, _DEFINITIONS) or is_text or _is_guard(statement):
            continue
        calls = any(isinstance(node, (ast.Call, ast.For, ast.While)) for node in ast.walk(statement))
        if calls or not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            text = ast.unparse(statement).partition("\n")[0]
            found.append(f"line {statement.lineno}: {text if len(text) <= 60 else f'{text[:57]}...'}")
    return tuple(found)


def _parsed(path: Path) -> ast.Module:
    spec = ModelSpec("file", str(path), "")
    try:
        return ast.parse(path.read_bytes(), str(path))
    except OSError as error:
        found = f"{path} cannot be read ({error.strerror})"
        raise ModelNotFoundError(spec, found, "Write the path from the working directory.") from error
    except (SyntaxError, ValueError) as error:
        raise ModelBuildError(spec, f"it is not valid Python code ({described(error)})", "Correct it.") from error


def _is_guard(statement: ast.stmt) -> bool:
    """Whether a statement is ``if __name__ == …``, whose block importing does not run."""
    return isinstance(statement, ast.If) and any(
        isinstance(node, ast.Name) and node.id == "__name__" for node in ast.walk(statement.test)
    )


class _Reader:
    """Goes through the top level of a file, in order, as what comes later may use what came before."""

    def __init__(self, tree: ast.Module) -> None:
        self.candidates: dict[str, ModelCandidate] = {}
        self._imported: dict[str, str] = {}  # the full name behind each imported one
        for statement in _statements(tree.body):
            if isinstance(statement, (ast.Import, ast.ImportFrom)):
                self._note_imports(statement)
            elif isinstance(statement, ast.ClassDef) and self._is_module(statement):
                self._add(statement, "class", self._constructor(statement))
            elif isinstance(statement, ast.FunctionDef) and self._returns_module(statement):
                self._add(statement, "function", _arguments(statement.args))
            elif isinstance(statement, ast.Assign) and self._makes_module(statement.value):
                for target in statement.targets:
                    if isinstance(target, ast.Name):
                        self._add(statement, "object", ((), ()), target.id)

    def _note_imports(self, statement: ast.Import | ast.ImportFrom) -> None:
        module = f"{statement.module or ''}." if isinstance(statement, ast.ImportFrom) else ""
        for alias in statement.names:
            full = alias.name if alias.asname or module else alias.name.partition(".")[0]
            self._imported[alias.asname or (alias.name if module else full)] = f"{module}{full}"

    def _add(self, node: ast.stmt, kind: str, arguments: Arguments, name: str = "") -> None:
        name = name or node.name  # type: ignore[attr-defined]
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
        uses = frozenset(names & self.candidates.keys())
        self.candidates[name] = ModelCandidate(name, kind, *arguments, uses)

    def _constructor(self, node: ast.ClassDef) -> Arguments:
        """What the constructor of a class takes, its own or an inherited one."""
        for part in node.body:
            if isinstance(part, ast.FunctionDef) and part.name == "__init__":
                return _arguments(part.args, bound=1)
        for name in map(self._full_name, node.bases):
            if base := self.candidates.get(name):
                return base.required, base.optional
            if hasattr(nn, name.removeprefix("torch.nn.")):
                taken = inspect.signature(getattr(nn, name.removeprefix("torch.nn."))).parameters.values()
                named = {p.name: p.default for p in taken if p.kind not in (_REST.VAR_POSITIONAL, _REST.VAR_KEYWORD)}
                required = tuple(name for name, default in named.items() if default is _REST.empty)
                return required, tuple(name for name in named if name not in required)
        return (), ()

    def _full_name(self, node: ast.expr | None) -> str:
        """The dotted name of an expression with what its first part was imported as; empty where it is no name."""
        if isinstance(node, ast.Subscript):
            node = node.value
        if isinstance(node, ast.Constant) and isinstance(node.value, str):  # an annotation as text
            first, dot, rest = node.value.partition(".")
            return f"{self._imported.get(first, first)}{dot}{rest}"
        if isinstance(node, ast.Attribute):
            return f"{self._full_name(node.value)}.{node.attr}"
        return self._imported.get(node.id, node.id) if isinstance(node, ast.Name) else ""

    def _names_module(self, node: ast.expr | None) -> bool:
        """Whether an expression is a class of modules, or a function that makes one."""
        full = self._full_name(node)
        leaf = full.rpartition(".")[2]
        is_torch = full.startswith("torch.nn.") and leaf[:1].isupper() and not leaf.endswith(("Loss", "Parameter"))
        return full in self.candidates or is_torch or _MAKERS.fullmatch(full) is not None

    def _is_module(self, node: ast.ClassDef) -> bool:
        if any(self._names_module(base) for base in node.bases):
            return True
        names = [self._full_name(base) for base in node.bases]
        has_forward = any(isinstance(part, ast.FunctionDef) and part.name == "forward" for part in node.body)
        return has_forward and bool(names) and not any(name.rpartition(".")[2] in _NO_MODULES for name in names)

    def _makes_module(self, node: ast.expr | None) -> bool:
        while isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _MOVES:
            node = node.func.value  # Net().to("cpu")
        return isinstance(node, ast.Call) and self._names_module(node.func)

    def _returns_module(self, node: ast.FunctionDef) -> bool:
        own = list(_own_nodes(node))
        trains = any(isinstance(part, ast.Attribute) and part.attr in _TRAINING for part in own)
        changes = any(argument.arg in ("model", "module", "net", "network") for argument in node.args.args)
        if trains or changes or node.name.startswith("_"):
            return False
        if self._names_module(node.returns):
            return True
        made = {
            target.id
            for part in own
            if isinstance(part, ast.Assign) and self._makes_module(part.value)
            for target in part.targets
            if isinstance(target, ast.Name)
        }
        returned = [part.value for part in own if isinstance(part, ast.Return)]
        return any(self._makes_module(r) or (isinstance(r, ast.Name) and r.id in made) for r in returned)


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that define names of a module when it is imported, also those inside of try and if."""
    for statement in body:
        if isinstance(statement, (ast.If, ast.Try)) and not _is_guard(statement):
            handled = [part for handler in getattr(statement, "handlers", ()) for part in handler.body]
            yield from _statements([*statement.body, *handled, *statement.orelse])
        else:
            yield statement


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """The parts of a function without those of functions and classes inside of it."""
    for part in ast.iter_child_nodes(node):
        if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda)):
            yield part
            yield from _own_nodes(part)


def _arguments(arguments: ast.arguments, bound: int = 0) -> Arguments:
    """Names of the arguments that must be given, and of those that may; the first of a method is bound."""
    names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
    count = len(names) - len(arguments.defaults)
    required, optional = names[bound:count], names[max(count, bound) :]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        (required if default is None else optional).append(argument.arg)
    return tuple(required), tuple(optional)
