"""The final weights of runs, in files, until learning rates have been chosen and the test data read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from manifold_nets.comparison.results import RunResult
from manifold_nets.comparison.selection import choose
from manifold_nets.comparison.settings import RunKey, Settings
from manifold_nets.conversion.storage import read_tensors, tensors_checksum
from manifold_nets.files import atomic_file

__all__ = ["keep_weights", "kept_weights", "prune_weights", "weights_file"]


def weights_file(folder: Path, key: RunKey) -> Path:
    """The file for a run: its optimizer, and digits that tell runs apart.

    Example:
        >>> weights_file(Path("out"), RunKey("sgd", 0.1, 0)).name
        'sgd-36a97cd0877d.safetensors'
    """
    digits = hashlib.sha256(json.dumps(key.to_dict(), sort_keys=True).encode()).hexdigest()[:12]
    return folder / f"{''.join(c if c.isalnum() or c in '-_' else '_' for c in key.optimizer)}-{digits}.safetensors"


def keep_weights(folder: Path, key: RunKey, weights: Mapping[str, Tensor]) -> None:
    """Write the final weights of a run, which is named in the metadata, with a checksum."""
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(weights_file(folder, key)) as temporary:
        save_file(dict(weights), temporary, metadata=_metadata(key, weights))


def kept_weights(folder: Path, key: RunKey) -> dict[str, Tensor] | None:
    """Read the final weights of a run; None where there is no file, or one that is damaged."""
    try:
        with weights_file(folder, key).open("rb") as file:
            weights, metadata = read_tensors(file)
    except Exception:  # noqa: BLE001 (the reader goes by what the file says of itself, and may raise anything)
        return None
    return weights if metadata == _metadata(key, weights) else None


def _metadata(key: RunKey, weights: Mapping[str, Tensor]) -> dict[str, str]:
    run = {"run": str(key)}
    dense = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    return {"run": json.dumps({**run, "checksum": tensors_checksum(dense, run)})}


def prune_weights(folder: Path, settings: Settings, results: Mapping[RunKey, RunResult], last: RunKey) -> None:
    """Delete the weights of trials that can no longer be chosen for the optimizer of the run that ended last.

    Among the trials whose runs have all ended only the best so far may still be chosen.
    """
    ended = []
    for trial in settings.trials(last.optimizer, last.initial_scale):
        rate, decay = trial
        keys = [RunKey(last.optimizer, rate, seed, last.initial_scale, decay) for seed in settings.seeds]
        if all(key in results for key in keys):
            ended.append((trial, keys))
    if len(ended) < 2:
        return
    best = choose(settings, results, last.optimizer, last.initial_scale, trials=[trial for trial, _ in ended])
    for trial, keys in ended:
        for key in keys if trial != best.trial else ():
            weights_file(folder, key).unlink(missing_ok=True)
