"""Former place of `manifold_nets.optim.backends`."""

from manifold_nets.optim.backends import build, native

__all__ = ["build", "native"]
