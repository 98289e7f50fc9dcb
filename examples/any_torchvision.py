"""Import this before Lightning or transformers, which import torchvision where it is installed.

A torchvision that was built for another torch cannot be imported by itself; with this it can.
"""

import contextlib

import manifold_nets as mn

with contextlib.suppress(ModuleNotFoundError):
    mn.sources.import_torchvision()
