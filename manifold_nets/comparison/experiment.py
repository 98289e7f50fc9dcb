"""What the names in the settings stand for: the task, the model and the optimizers, checked before the first run."""

from __future__ import annotations

import hashlib
import importlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from manifold_nets.comparison.errors import SettingsError
from manifold_nets.comparison.models import ModelSource, build_model, is_built_in
from manifold_nets.comparison.optimizers import OPTIMIZERS, OptimizerSpec, optimizer_spec
from manifold_nets.comparison.settings import Settings
from manifold_nets.comparison.tasks import TASK_NAMES, Subset, Task, load_task
from manifold_nets.errors import MissingExtraError

__all__ = ["Experiment", "derived_seed", "foreign_code", "packed", "require_device", "unpacked"]


def derived_seed(seed: int, *purpose: object) -> int:
    """A seed for one purpose, in [0, 2⁶³), independent of those for other purposes.

    Example:
        >>> derived_seed(0, "order", 1) == derived_seed(0, "order", 1) != derived_seed(0, "order", 2)
        True
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def foreign_code(settings: Settings) -> tuple[str, ...]:
    """The task, model and optimizers of the settings that name code outside of this package.

    Example:
        >>> foreign_code(Settings(("sgd", "mine.py:Lion"), (0.1,), (0,), 1, model="net.py:net"))
        ('net.py:net', 'mine.py:Lion')
    """
    task = () if settings.task.partition(":")[0] in TASK_NAMES else (settings.task,)
    model = () if is_built_in(settings.model) else (settings.model,)
    return (*task, *model, *(name for name in settings.optimizers if name not in OPTIMIZERS))


@dataclass(frozen=True)
class Experiment:
    """What the names in `Settings` stand for.

    Args:
        task: the task, with its data on the processor.
        model: name of the model, or a callable that makes it.
        optimizers: by name.
    """

    task: Task
    model: ModelSource
    optimizers: Mapping[str, OptimizerSpec]

    @classmethod
    def from_settings(cls, settings: Settings, own: Mapping[str, Any] | None = None) -> Experiment:
        """Look everything up by name.

        Args:
            settings: with the names.
            own: what cannot be looked up by name: ``"task"``, ``"model"``, and ``"optimizer NAME"``.

        Raises:
            ManifoldNetsError: a name is unknown, or the data are not there.
        """
        own = own or {}
        task = own["task"] if "task" in own else load_task(settings.task, data=settings.data)
        found = {name: own.get(f"optimizer {name}") or optimizer_spec(name) for name in settings.optimizers}
        return cls(task, own.get("model", settings.model), found)

    def reduced(self, subset: tuple[int, int] | None, *, setting: str = "subset") -> Experiment:
        """The same with fewer training and validation examples, the same ones for every seed; all test examples stay.

        Args:
            subset: how many; all when None.
            setting: what an error names.

        Raises:
            SettingsError: there are fewer.
        """
        if subset is None:
            return self
        parts = dict(self.task.parts)
        for name, count in zip(("train", "validation"), subset, strict=True):
            if count > len(parts[name]):
                raise SettingsError(setting, subset, f"at most {len(parts[name])} {name} examples")
            order = torch.Generator().manual_seed(derived_seed(0, "subset", name))
            parts[name] = Subset(parts[name], torch.randperm(len(parts[name]), generator=order)[:count])
        return replace(self, task=replace(self.task, parts=parts))

    def check(self, settings: Settings) -> None:
        """Refuse settings that cannot work here, before anything is written.

        Raises:
            SettingsError: the device is not there, or ``subset`` or ``tune_on`` asks for more examples than there are.
            TaskSourceError: the model does not fit the task.
        """
        require_device(settings)
        self.reduced(settings.subset)
        if settings.tune_on is not None:
            self.reduced(settings.tune_on[:2], setting="tune_on")
        build_model(self.model, self.task, seed=0)


def require_device(settings: Settings) -> None:
    """Refuse a device that torch does not know or this machine does not have.

    Not part of `Settings`, which are also read on other machines.

    Raises:
        SettingsError: there is no such device.

    Example:
        >>> require_device(Settings(optimizers=("sgd",), learning_rates=(0.1,), seeds=(0,), epochs=1, device="cpu"))
    """
    name: object = settings.device
    if not isinstance(name, str) or not _is_available(name):
        found = ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count())))
        raise SettingsError("device", name, f"a device that torch has on this machine, such as {', '.join(found)}")


def _is_available(name: str) -> bool:
    try:
        device = torch.device(name)
        if device.type == "cuda":
            # Only asked: an allocation would take memory of the device for as long as this process lives.
            return torch.cuda.is_available() and (device.index or 0) < torch.cuda.device_count()
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        return False
    return device.type != "meta"  # which holds no values


def packed(workers: int, own: Mapping[str, Any]) -> dict[str, bytes]:
    """Pickle what other processes cannot look up, piece by piece, so that an error names the one that cannot be sent.

    Functions and classes of the running script, which no other process can import, are sent whole.

    Args:
        workers: number of processes, for the error.
        own: see `Experiment.from_settings`.

    Raises:
        SettingsError: a piece cannot be sent; it is named.
        MissingExtraError: cloudpickle is not installed.
    """
    try:
        cloudpickle = importlib.import_module("cloudpickle") if own else pickle
    except ModuleNotFoundError as error:
        raise MissingExtraError("cloudpickle", "several workers", "compare") from error
    pieces = {}
    for name, piece in own.items():
        try:
            pieces[name] = cloudpickle.dumps(piece)
        except Exception as error:
            cause = f"{type(error).__name__}: {error}"
            found = f"{workers}, with {name}, which cannot be sent to another process ({cause})"
            remedy = "1; or name it as file.py:NAME, which each worker imports for itself"
            raise SettingsError("workers", found, remedy) from error
    return pieces


def unpacked(own: Mapping[str, bytes]) -> dict[str, Any]:
    """The reverse of `packed`, in a worker.

    Raises:
        RuntimeError: a piece cannot be unpickled here; it is named.
    """
    found = {}
    for name, piece in own.items():
        try:
            found[name] = pickle.loads(piece)
        except Exception as error:
            raise RuntimeError(
                f"{name} cannot be made again in a worker ({type(error).__name__}: {error}); use one worker, or name "
                "it as file.py:NAME"
            ) from error
    return found
