"""Finding the weight-space symmetries of a neural network and training it on the manifold that removes them."""

import warnings

with warnings.catch_warnings():
    # Importing geoopt scripts a few functions, and torch warns about that; nothing a user of this package can act on.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import geoopt  # noqa: F401

from manifold_nets import errors, sources
from manifold_nets.constraints import restore
from manifold_nets.groups import Partition
from manifold_nets.manifold import SphereProduct

__all__ = ["Partition", "SphereProduct", "errors", "restore", "sources"]
