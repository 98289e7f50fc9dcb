"""Torchvision imported beside a torch that it was not built for."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import importlib.machinery
import logging
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType

import torch

__all__ = ["import_torchvision", "torchvision_repaired"]

_log = logging.getLogger(__name__)
_declared_operators: list[torch.library.Library] = []


def import_torchvision() -> ModuleType:
    """Import torchvision, also where its wheel was built for another device than torch.

    A torchvision wheel carries compiled operators. Beside a torch built for another device they do not load, and the
    import fails where torchvision registers Python code for them (``operator torchvision::nms does not exist``).
    Declaring the names of these operators is enough for every model made of torch's own operators; the compiled ones
    (non-maximum suppression, RoI pooling, deformable convolution) stay unavailable. A warning is logged once.

    Models of all sources are loaded with the same repair, whoever imports torchvision.

    Raises:
        ModuleNotFoundError: torchvision is not installed.
        RuntimeError: the import fails for another reason.
    """
    with torchvision_repaired():
        return importlib.import_module("torchvision")


@contextlib.contextmanager
def torchvision_repaired() -> Iterator[None]:
    """Let torchvision be imported within a block as `import_torchvision` does, by whatever code imports it."""
    finder = _TorchvisionFinder()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _TorchvisionFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision where Python does, and runs it again after declaring each operator that it misses."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            execute = functools.partial(_execute_repaired, spec.loader.exec_module)
            spec.loader.exec_module = execute  # type: ignore[method-assign]
        return spec


def _execute_repaired(execute: Callable[[ModuleType], None], module: ModuleType) -> None:
    declared: list[str] = []
    while True:
        try:
            execute(module)
            break
        except RuntimeError as error:
            found = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error))
            if found is None or found[1] in declared:
                raise
            declared.append(found[1])
            _declare_operator(found[1])
            for name in [name for name in sys.modules if name.startswith("torchvision.")]:
                del sys.modules[name]
    if declared:
        _log.warning(
            "this torchvision was built for another torch: its models work, but its compiled operators (%s, …) do not",
            ", ".join(declared),
        )


def _declare_operator(name: str) -> None:
    # The schema is never called; the object is kept because the declaration goes when it does.
    library = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
    library.define(f"{name}(Tensor x) -> Tensor")  # type: ignore[no-untyped-call]
    _declared_operators.append(library)
