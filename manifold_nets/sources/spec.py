"""Where a model comes from, as written on a command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

from manifold_nets.errors import ModelSpecError

__all__ = ["LIBRARIES", "ModelSpec"]

LIBRARIES = ("torchvision", "timm", "hf")
# What timm itself writes in front of a name of the hub, and in front of a folder.
_TIMM_SOURCES = ("hf-hub:", "local-dir:")


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from, as written on a command line: ``PLACE:NAME``, or a Python file alone.

    Args:
        kind: ``"torchvision"``, ``"timm"``, ``"hf"``, ``"file"`` or ``"module"``.
        place: the library, the path of the file, or the dotted name of the module.
        name: the architecture, the folder, or the (dotted) attribute that is called; empty for a file alone, in which
            `find_model` looks for a model.

    Example:
        >>> ModelSpec.parse("torchvision:resnet18").kind
        'torchvision'
        >>> ModelSpec.parse("nets/small.py:build")
        ModelSpec(kind='file', place='nets/small.py', name='build')
    """

    kind: str
    place: str
    name: str

    @classmethod
    def parse(cls, text: str) -> ModelSpec:
        """Read ``package.module:callable``, ``file.py:callable``, ``file.py`` or a library and a name in it.

        Raises:
            ModelSpecError: the text has none of these forms.
        """
        library, _, name = text.partition(":")
        if library in LIBRARIES and name:
            has_source = library == "timm" and name.startswith(_TIMM_SOURCES) and name not in _TIMM_SOURCES
            if ":" in name and library != "hf" and not has_source:
                raise ModelSpecError(text)
            return cls(library, library, name)
        place, _, name = text.rpartition(":")
        if text.endswith(".py") and (not place or re.fullmatch("[A-Za-z]", place)):
            return cls("file", text, "")
        dotted = name if place.endswith(".py") else f"{place}.{name}"
        if not place or not all(part.isidentifier() for part in dotted.split(".")):
            raise ModelSpecError(text)
        return cls("file" if place.endswith(".py") else "module", place, name)

    @property
    def knows_inputs(self) -> bool:
        """Whether models of this kind say what inputs they take, for `guess_inputs`."""
        return self.kind in ("hf", "timm")

    def __str__(self) -> str:
        return f"{self.place}:{self.name}" if self.name else self.place
