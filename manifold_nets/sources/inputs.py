"""Example inputs of a model: read from a file, or drawn in the shapes that a model of transformers or timm asks for."""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from manifold_nets.errors import ExampleInputsError, described
from manifold_nets.float64 import map_tensors
from manifold_nets.models import dtype_of

__all__ = ["guess_inputs", "read_inputs"]

_IMAGE_SIZE, _TEXT_LENGTH, _SAMPLES, _FRAMES = 224, 16, 16000, 100
# What numpy calls arrays that `numpy.savez` got without a name.
_POSITIONAL = re.compile(r"(?:arr_)?(\d+)")
# Files of text and images whose text holds placeholders of the images, which only their processor can write.
_PLACEHOLDERS = ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "audio_token_index")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


# ---- from a file -----------------------------------------------------------------------------------------------------


def read_inputs(path: str | Path, dtype: torch.dtype | None = None) -> Inputs:
    """Read example inputs from a file; nothing of it is unpickled.

    Args:
        path: ``.npz`` or ``.safetensors``, whose arrays are keyword inputs by their names, or positional inputs where
            they are called 0, 1, … or arr_0, arr_1, …; ``.npy``, one positional input; or ``.pt``, read with
            ``weights_only=True``: a tensor, a tuple or list of positional inputs, a dict of keyword inputs, or
            ``((positional, …), {keyword: …})``.
        dtype: what floating-point inputs are cast to; as they are if left out.

    Returns:
        Positional and keyword inputs.

    Raises:
        ExampleInputsError: the file is of another kind, or cannot be read.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/inputs.npz", np.zeros((2, 3)), mask=np.ones((2, 3)))
        ...     positional, keywords = read_inputs(f"{folder}/inputs.npz", torch.float32)
        >>> [tuple(x.shape) for x in positional], keywords["mask"].dtype
        ([(2, 3)], torch.float32)
    """
    path = Path(path)
    try:
        content = _content(path)
    except Exception as error:
        # The readers go by what a file says of itself; in a damaged one that may be anything.
        raise ExampleInputsError(f"{path}, which cannot be read ({described(error)})") from error

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    positional, keywords = map_tensors(cast, _sorted_out(path, content))
    return tuple(positional), dict(keywords)


def _content(path: Path) -> Any:
    ending = path.suffix.lower()
    if ending == ".npy":
        return torch.from_numpy(np.load(path, allow_pickle=False))
    if ending == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    if ending == ".safetensors":
        return safetensors.torch.load_file(path)
    if ending in (".pt", ".pth"):
        return torch.load(path, map_location="cpu", weights_only=True)
    raise ValueError(f"{ending or 'no ending'} is not one of .npz, .npy, .pt, .pth and .safetensors")


def _sorted_out(path: Path, content: Any) -> Inputs:
    if isinstance(content, dict) and all(isinstance(name, str) for name in content):
        numbers = {name: int(found[1]) for name in content if (found := _POSITIONAL.fullmatch(name))}
        keywords = {name: value for name, value in content.items() if name not in numbers}
        return tuple(content[name] for name in sorted(numbers, key=numbers.__getitem__)), keywords
    if isinstance(content, Tensor):
        return (content,), {}
    if isinstance(content, (tuple, list)):
        if len(content) == 2 and isinstance(content[0], (tuple, list)) and isinstance(content[1], dict):
            return tuple(content[0]), content[1]
        return tuple(content), {}
    raise ExampleInputsError(f"{path} with a {type(content).__name__}")


# ---- from the configuration of a model -------------------------------------------------------------------------------


def guess_inputs(
    model: nn.Module,
    *,
    batch_size: int = 4,
    shapes: Sequence[Sequence[int]] = (),
    token_ids: int | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Draw keyword inputs for a model of transformers or timm: images, texts or sounds, as its configuration asks.

    Args:
        model: a model with a ``config`` of transformers, or a ``pretrained_cfg`` of timm.
        batch_size: how many examples.
        shapes: shapes without the batch to draw instead of those of the first inputs.
        token_ids: token ids are below this; by default below the size of the vocabulary.
        generator: source of the random numbers.

    Raises:
        ExampleInputsError: nothing is known about what the model takes.

    Example:
        >>> import types
        >>> net = nn.Identity()
        >>> net.pretrained_cfg = {"input_size": (3, 32, 32)}
        >>> guess_inputs(net, batch_size=2)["input"].shape
        torch.Size([2, 3, 32, 32])
    """
    wanted = _shapes(model)
    if not wanted:
        raise ExampleInputsError(f"none, and nothing in {type(model).__name__} tells what it takes")
    if len(shapes) > len(wanted):
        raise ExampleInputsError(f"{len(shapes)} shapes; the model takes {', '.join(wanted)}")
    wanted |= dict(zip(wanted, map(tuple, shapes), strict=False))
    config = getattr(model, "config", None)
    inputs: dict[str, Tensor] = {}
    for name, shape in wanted.items():
        if name.endswith("input_ids"):
            inputs[name] = _texts(config, (batch_size, *shape), token_ids, generator)
            mask = name.removesuffix("input_ids") + "attention_mask"
            if mask == "attention_mask" and mask in _parameters(model):
                inputs[mask] = torch.ones_like(inputs[name])
        else:
            drawn = torch.randn((batch_size, *shape), generator=generator, dtype=torch.float64)
            inputs[name] = drawn.to(dtype_of(model))
    return inputs


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes without the batch of the inputs that a model needs."""
    config, timm = getattr(model, "config", None), getattr(model, "pretrained_cfg", None)
    if config is None or not hasattr(config, "to_dict"):
        size = (timm or {}).get("input_size")
        name = next(iter(_parameters(model)), "x")
        return {name: tuple(size)} if size else {}
    taken, main = _parameters(model), getattr(model, "main_input_name", "input_ids")
    vision, audio, text = (_part(config, kind) for kind in ("vision", "audio", "text"))
    found: dict[str, tuple[int, ...]] = {}
    has_placeholders = any(hasattr(config, name) for name in _PLACEHOLDERS)
    if "input_ids" in taken and _value(text, "vocab_size") and main in ("input_ids", "pixel_values"):
        found["input_ids"] = (_text_length(text),)
    has_images = vision is not config or _value(config, "image_size")
    if "pixel_values" in taken and (main == "pixel_values" or (has_images and not has_placeholders)):
        found["pixel_values"] = _image(vision)
    if "input_features" in taken and (main == "input_features" or (audio is not config and not has_placeholders)):
        found["input_features"] = _features(audio)
    if main == "input_values" and main in taken:
        found[main] = _sound(config)
    if "decoder_input_ids" in taken and _value(config, "is_encoder_decoder"):
        found["decoder_input_ids"] = (_text_length(text),)
    return found


def _parameters(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _part(config: Any, kind: str) -> Any:
    """The configuration of one of the models that a model of several is made of, or the whole."""
    names = (f"{kind}_config", f"{kind}_encoder", "encoder" if kind != "text" else "decoder")
    parts = (getattr(config, name, None) for name in names)
    return next((part for part in parts if hasattr(part, "to_dict")), config)


def _value(config: Any, *names: str) -> Any:
    """The first of several attributes that is set."""
    return next((value for name in names if (value := getattr(config, name, None))), None)


def _text_length(config: Any) -> int:
    longest = _value(config, "max_position_embeddings", "max_target_positions", "n_positions")
    return min(_TEXT_LENGTH, longest if isinstance(longest, int) and longest > 0 else _TEXT_LENGTH)


def _image(config: Any) -> tuple[int, ...]:
    size = _value(config, "image_size", "img_size") or _IMAGE_SIZE
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = _value(config, "num_channels", "in_channels", "in_chans") or 3
    frames = _value(config, "num_frames")
    return (*([frames] if frames else []), channels, height, width)


def _features(config: Any) -> tuple[int, ...]:
    """Spectra: by frequency and time, as Whisper has them, or by time and frequency."""
    if bands := _value(config, "num_mel_bins"):
        positions = _value(config, "max_source_positions")
        is_whisper = getattr(config, "model_type", "") in ("whisper", "qwen2_audio_encoder")
        return (bands, 2 * positions) if is_whisper and positions else (_FRAMES, bands)
    return (_FRAMES, _value(config, "input_feat_per_channel", "feature_projection_input_dim", "input_dim") or 80)


def _sound(config: Any) -> tuple[int, ...]:
    """Samples, with channels where there may be several, or the spectra that some models call so too."""
    if hasattr(config, "frequency_stride"):
        return (_value(config, "max_length") or _FRAMES, _value(config, "num_mel_bins"))
    channels = _value(config, "audio_channels")
    return (channels, _SAMPLES) if channels else (_SAMPLES,)


def _texts(config: Any, shape: tuple[int, ...], token_ids: int | None, generator: torch.Generator | None) -> Tensor:
    """Random ids without the special ones, and an end of the text where the model knows one."""
    text = _part(config, "text")
    count = token_ids or _value(text, "vocab_size")
    special = [_value(text, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")]
    plain = torch.tensor([i for i in range(min(count, 2**16)) if i not in special] or [0])
    ids = plain[torch.randint(len(plain), shape, generator=generator)]
    end = special[-1]
    if isinstance(end, int) and end < count:
        ids[..., -1] = end
    return ids
