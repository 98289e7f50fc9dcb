"""Save a model with its manifolds to a file, and load the file into a newly built model."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from manifold_nets._geoopt import geoopt
from manifold_nets.constraints import (
    ConstrainedWeight,
    attach,
    constrained_weights,
    detach,
    everywhere,
    is_converted,
    is_defined,
    joint_spheres,
    note_converted,
    note_defined,
    trusted_values,
)
from manifold_nets.conversion import storage
from manifold_nets.conversion.moves import MOVES, moves_within
from manifold_nets.conversion.projection import convert_when_loaded, way_back
from manifold_nets.conversion.remedies.dead_biases import absent_bias, put_back_bias, remove_bias, removed_biases
from manifold_nets.documents import printable
from manifold_nets.errors import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    OffManifoldError,
    listed,
)
from manifold_nets.joint_sphere import JointSphereMember, by_joint_sphere
from manifold_nets.layers import UNIT_NORM_LAYERS
from manifold_nets.manifold import SphereProduct
from manifold_nets.models import holders

__all__ = ["contents_to_save", "load", "load_contents", "save", "unchanged_on_failure"]

_WHY = "It was trained by an optimizer that ignores the manifold, averaged, cast to another dtype, or edited."


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model's `state_dict` and the manifolds of its constrained weights to one safetensors file.

    The tensors have their usual names, so any safetensors reader can read them; the partitions, the exact radii, the
    format version and a checksum are in the file's metadata. Tied tensors are stored once, with their other names.
    Non-contiguous tensors and other memory formats are stored in row-major order. The file is written completely or not
    at all: it is written to a temporary file beside ``path``, flushed, and renamed. The same model always gives the
    same bytes.

    Only weights on a `SphereProduct` keep their manifold. Gradients, the training mode and the optimizer are not part
    of the file; also save ``optimizer.state_dict()`` to resume training.

    Args:
        model: the model; it is not changed.
        path: the file to write. An existing file is replaced.

    Raises:
        OffManifoldError: the norm of a group differs from its radius by more than a few machine epsilons of its dtype.
        CheckpointError: an entry of the `state_dict` is on the meta device, sparse, sharded, a lazy parameter, of a
            dtype that safetensors does not support, or not a tensor.
        FileNotFoundError: the folder of ``path`` does not exist.

    Example:
        >>> import tempfile, torch, manifold_nets as mn
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mn.save(mn.layers.UnitNormLinear(4, 3), f"{folder}/layer.safetensors")
        ...     layer = mn.load(torch.nn.Linear(4, 3), f"{folder}/layer.safetensors")
        >>> layer.weight.manifold
        SphereProduct(3 filters of 4, radius 1) manifold
    """
    storage.write(path, contents_to_save(model, path))


def contents_to_save(model: nn.Module, path: str | os.PathLike[str]) -> storage.Contents:
    """What a checkpoint of a model holds."""
    tensors, aliases = _unique(_storable(model, path))
    manifolds, defined = {}, []
    for weight in constrained_weights(model):
        stored = aliases.get(weight.name, weight.name)
        if stored not in tensors:
            raise CheckpointError(
                path,
                f"{weight.name} is constrained but missing from the state_dict. Remove the state_dict hook that "
                "renames or drops it.",
            )
        manifolds[stored] = weight.manifold
        defined += [stored] * is_defined(weight)
    joint_spheres(model)  # refuses a model with some weights of a joint sphere only
    _require_points(tensors, manifolds, model)
    removed, conversions = tuple(removed_biases(model)), {prefix: moves for prefix, _, moves in moves_within(model)}
    return storage.Contents(tensors, manifolds, aliases, removed, conversions, tuple(defined))


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a checkpoint of `save` into a newly built model, and put its weights back on their manifolds.

    The model may be the plain architecture or a converted one. Everything is checked before the model is changed:
    names, shapes, dtypes and tied tensors of file and model must agree, and the constrained weights must lie on their
    spheres. Then the values are copied in place; device and memory format stay those of the model.

    The manifolds become those of the file. A weight that is already on the same manifold keeps its parameter object, so
    an optimizer that holds it stays valid. Every other constrained weight becomes a new `geoopt.ManifoldParameter`, and
    a weight that is constrained in the model but not in the file becomes a plain parameter. So build optimizers after
    loading. Tied weights stay tied. Biases that conversion had removed before saving are removed from the model, and
    biases that the model lacks but the file holds are put back. A plain `state_dict` loaded later is converted, as
    after `convert`. Nothing is unpickled.

    Args:
        model: the saved architecture, in the same dtype; its values are overwritten.
        path: a file written by `save`.

    Returns:
        The same model.

    Raises:
        CheckpointFormatError: the file is truncated, damaged, of another format, or of a newer format version.
        CheckpointMismatchError: file and model differ; the message lists the differences.
        OSError: the file does not exist or cannot be read.

    Example:
        >>> import tempfile, manifold_nets as mn
        >>> layer = mn.layers.UnitNormLinear(4, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     mn.save(layer, f"{folder}/layer.safetensors")
        ...     loaded = mn.load(torch.nn.Linear(4, 3), f"{folder}/layer.safetensors")
        >>> bool((loaded.weight == layer.weight).all()), loaded.weight.manifold
        (True, SphereProduct(3 filters of 4, radius 1) manifold)
    """
    return load_contents(model, path, storage.read(path))


def load_contents(model: nn.Module, path: str | os.PathLike[str], contents: storage.Contents) -> nn.Module:
    """The same as `load`, for a file that is already in memory."""
    differences = [printable(text) for text in _differences(model, contents)]
    if differences:
        raise _mismatch(path, model, differences)
    try:
        _require_points(contents.tensors, contents.manifolds)
    except OffManifoldError as error:
        raise CheckpointFormatError(path, f"a weight off its sphere: {error}", "Save the model again.") from None
    stored = contents.expanded()
    # The values lie on the spheres of the file, which the model gets once nothing can fail any more.
    with unchanged_on_failure(model), trusted_values(), torch.no_grad():
        for name, place in removed_biases(model).items():
            if name in stored:
                put_back_bias(*place)
        # Biases that the file lacks are removed afterwards as well.
        found = model.load_state_dict(stored, strict=False)
        untaken = [*found.unexpected_keys, *(set(found.missing_keys) - set(contents.removed))]
        if untaken:
            raise _mismatch(path, model, [f"hooks of the model did not take {listed(sorted(untaken))}"])
    for name in contents.removed:
        prefix, _, leaf = name.rpartition(".")
        module = model.get_submodule(prefix)
        if module._parameters.get(leaf) is not None:
            remove_bias(module, leaf)
    _set_manifolds(model, contents)
    for prefix, moves in contents.conversions.items():
        converted = model.get_submodule(prefix.rstrip("."))
        converted.__dict__[MOVES] = moves
        convert_when_loaded(converted)
    return model


def _mismatch(path: str | os.PathLike[str], model: nn.Module, differences: list[str]) -> CheckpointMismatchError:
    return CheckpointMismatchError(
        path,
        f"does not fit this {type(model).__name__}, which was not changed: {'; '.join(differences)}. Build the model "
        "with the same arguments and dtype as the saved one, and save and load the bare module rather than one "
        "wrapped by torch.compile or a parallel trainer.",
        differences,
    )


@contextmanager
def unchanged_on_failure(model: nn.Module) -> Iterator[None]:
    """Undo a block's changes to values and biases of a model if it fails, for instance in a hook of the model."""
    tensors = {id(t): t for t in itertools.chain(nn.Module.parameters(model), model.buffers())}.values()
    saved = [(tensor, tensor.detach().clone()) for tensor in tensors if not nn.parameter.is_lazy(tensor)]
    removed = removed_biases(model).values()
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        for module, leaf in removed:
            if module._parameters.get(leaf) is not None:
                remove_bias(module, leaf)
        raise


def _storable(model: nn.Module, path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Return the entries of the state_dict; raise an error that names an entry that safetensors cannot hold."""
    state: Mapping[str, object] = model.state_dict()
    for name, value in state.items():
        fault = unusual(value)
        if fault is None and isinstance(value, Tensor) and value.dtype not in _DTYPES:
            fault = f"of {value.dtype}; cast it to a dtype that safetensors supports"
        if fault is not None:
            raise CheckpointError(path, f"{name} is {fault}. A checkpoint holds dense tensors that have values.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def unusual(value: object) -> str | None:
    """Return why an entry of a state_dict can be neither stored nor loaded, and what to do; None if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}; keep it out of the state_dict"
    if nn.parameter.is_lazy(value):
        return "a lazy parameter without a shape; run the model once first"
    if hasattr(value, "__tensor_flatten__"):
        return f"a {type(value).__name__}; gather or dequantize it first, and load before sharding or quantizing"
    if value.layout != torch.strided:
        return f"a {value.layout} tensor; call to_dense() on it first"
    return "on the meta device; give it values first, by model.to_empty(device=…)" if value.is_meta else None


# The dtypes of safetensors 0.4 and later.
_DTYPES = frozenset(
    getattr(torch, name)
    for name in "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 bool "
    "int64 int32 int16 int8 uint8 uint16 uint32 uint64".split()
)


def _unique(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return each tensor once, contiguous and in main memory, and the first name for every further name."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[object, str] = {}
    storages: set[int] = set()
    for name, value in state.items():
        stored = first.setdefault(_place(value) or name, name)
        if stored != name:
            aliases[name] = stored
            continue
        dense = value.detach().resolve_conj().resolve_neg().cpu().contiguous()
        # Two tensors may overlap without being tied; safetensors wants each in a storage of its own.
        if dense.untyped_storage().data_ptr() in storages:
            dense = dense.clone()
        storages.add(dense.untyped_storage().data_ptr())
        tensors[name] = dense
    return tensors, aliases


def _place(tensor: Tensor) -> tuple[object, ...] | None:
    """Identify the memory of a tensor: equal for tied tensors; None if it has no entries."""
    if unusual(tensor) or tensor.numel() == 0:
        return None
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _require_points(
    tensors: Mapping[str, Tensor], manifolds: Mapping[str, SphereProduct], model: nn.Module | None = None
) -> None:
    """Raise `OffManifoldError` if a norm is off by more than rounding; the message says what to do with a model."""

    def remedy(name: str) -> Callable[[], str]:
        return lambda: "" if model is None else f"{_WHY} {way_back(model, name)}"

    for name, manifold in manifolds.items():
        if not isinstance(manifold, JointSphereMember):
            rtol = _rounding(tensors[name], manifold)
            manifold.require_point(tensors[name], name, rtol=rtol, remedy=remedy(name))
    for joint, names in by_joint_sphere((manifold, name) for name, manifold in manifolds.items()).items():
        points = [tensors[name] for name in names.values()]
        joint.require_point(points, rtol=_rounding(points[0], joint.sphere), remedy=remedy(names[0]))


def _rounding(stored: Tensor, manifold: SphereProduct) -> float:
    """Largest relative deviation of a norm that rounding can cause.

    The optimizers stay below 4 machine epsilons and a cast adds at most half of one; 8 leaves a safety margin for both.
    If a radius is so small that entries are subnormal, each entry also has an absolute error.
    """
    limits = torch.finfo(stored.dtype)
    subnormal = limits.tiny * limits.eps * math.sqrt(manifold.partition.group_size) / float(manifold.radii.min())
    return 8 * limits.eps + subnormal


def _differences(model: nn.Module, contents: storage.Contents) -> list[str]:
    """Return the differences between a file and a model; an empty list if the file can be loaded."""
    in_file = contents.expanded()
    returning = _returning_biases(model, in_file)
    in_model = {**model.state_dict(), **returning}
    parameters = {*returning, *(name for name, _ in model.named_parameters(remove_duplicate=False))}
    missing = in_model.keys() - in_file.keys() - set(contents.removed)
    extra = in_file.keys() - in_model.keys()
    found = []
    if missing:
        found.append(f"the file lacks {listed(sorted(missing))}")
    if extra:
        found.append(f"the model lacks {listed(sorted(extra))}")
    places = dict(model.named_modules(remove_duplicate=False))
    for name in contents.removed:
        prefix, _, leaf = name.rpartition(".")
        if prefix not in places or leaf != "bias" or leaf not in places[prefix]._parameters:
            found.append(f"{name!r} is a removed bias in the file, but not a bias of the model")
    strange = [prefix for prefix in contents.conversions if prefix and prefix[:-1] not in places]
    if strange:
        found.append(f"the model lacks the converted modules {listed(prefix[:-1] for prefix in strange)}")
    shared = [name for name in in_model if name in in_file]
    constrained = [name for name in contents.manifolds if name in in_model and name not in parameters]
    texts = [f"{name}: {text}" for name in shared if (text := _difference(in_file[name], in_model[name]))]
    found += _cut(texts + [f"{name}: constrained in the file, not a parameter of the model" for name in constrained])
    return found + _cut(_ties(contents.aliases, {name: in_model[name] for name in shared}))


def _difference(stored: Tensor, present: object) -> str | None:
    fault = unusual(present)
    if fault is not None or not isinstance(present, Tensor):
        return fault
    if stored.shape != present.shape:
        return f"shape {tuple(stored.shape)} in the file, {tuple(present.shape)} in the model"
    if stored.dtype != present.dtype:
        return f"{stored.dtype} in the file, {present.dtype} in the model"
    if present.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode in the model, so it cannot be overwritten; make the model outside of that mode"
    if any(size > 1 and stride == 0 for size, stride in zip(present.shape, present.stride(), strict=True)):
        return "an expanded view in the model, which cannot be overwritten"
    return None


def _ties(aliases: Mapping[str, str], present: Mapping[str, object]) -> list[str]:
    """Return which tensors are tied only in the file or only in the model."""
    in_file: dict[object, set[str]] = {}
    in_model: dict[object, set[str]] = {}
    for name, value in present.items():
        in_file.setdefault(aliases.get(name, name), set()).add(name)
        in_model.setdefault((isinstance(value, Tensor) and _place(value)) or name, set()).add(name)
    return [
        f"{', '.join(sorted(names))} are one tensor in the {where}, but not in the {other}"
        for where, other, own, others in (("file", "model", in_file, in_model), ("model", "file", in_model, in_file))
        for names in sorted(own.values(), key=sorted)
        if len(names) > 1 and names not in others.values()
    ]


def _returning_biases(model: nn.Module, in_file: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The biases that loading will put back, by all their names."""
    made: dict[tuple[nn.Module, str], Tensor] = {}
    places = {name: place for name, place in removed_biases(model).items() if name in in_file}
    return {name: made.setdefault(place, absent_bias(*place)) for name, place in places.items()}


def _set_manifolds(model: nn.Module, contents: storage.Contents) -> None:
    """Constrain exactly the weights that the file constrains; keep parameter objects that fit."""
    wanted = contents.manifolds
    present = {contents.aliases.get(weight.name, weight.name): weight for weight in constrained_weights(model)}
    kept = {name for name, weight in present.items() if name in wanted and _is_on(weight, wanted[name])}
    # The weights of a joint sphere share one object: all keep it, or all get another one.
    split = {getattr(wanted[name], "joint", None) for name in wanted.keys() - kept} - {None}
    places = holders(model)
    for name in {**present, **wanted}:
        manifold = wanted.get(name)
        if name in kept and getattr(manifold, "joint", None) not in split:
            continue
        defined = name in present and not is_converted(present[name])

        def change(
            module: nn.Module, leaf: str, manifold: SphereProduct | None = manifold, name: str = name, d: bool = defined
        ) -> None:
            if manifold is None:
                detach(module, leaf)
                return
            attach(module, leaf, manifold)
            if name in contents.defined:
                note_defined(module, leaf)
            elif not d and not isinstance(module, tuple(UNIT_NORM_LAYERS.values())):
                note_converted(module, leaf, None)

        prefix, _, leaf = name.rpartition(".")
        everywhere(places[id(model.get_submodule(prefix).get_parameter(leaf))], change)


def _is_on(weight: ConstrainedWeight, manifold: SphereProduct) -> bool:
    """Whether a parameter object lies on the given manifold."""
    return isinstance(weight.parameter, geoopt.ManifoldParameter) and manifold.to_dict() == weight.manifold.to_dict()


def _cut(texts: list[str], limit: int = 8) -> list[str]:
    return texts if len(texts) <= limit else [*texts[:limit], f"and {len(texts) - limit} more of these"]
