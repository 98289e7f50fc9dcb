"""Finding the weight-space symmetries of a neural network and training it on the manifold that removes them."""

import warnings

with warnings.catch_warnings():
    # Importing geoopt scripts a few functions, and torch warns about that; nothing a user of this package can act on.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    import geoopt  # noqa: F401

from manifold_nets import comparison, errors, layers, optim, sources
from manifold_nets.comparison import Comparison, compare
from manifold_nets.constraints import joint_spheres, restore
from manifold_nets.conversion import balance, conversion_record, convert, load, plan, project, revert, save, verify
from manifold_nets.groups import Partition
from manifold_nets.joint_sphere import JointSphere
from manifold_nets.manifold import SphereProduct
from manifold_nets.optim import param_groups
from manifold_nets.symmetry import SymmetryReport, diagnose
from manifold_nets.symmetry.learning_rates import LearningRates, matched_learning_rates

__all__ = [
    "Comparison",
    "JointSphere",
    "LearningRates",
    "Partition",
    "SphereProduct",
    "SymmetryReport",
    "balance",
    "compare",
    "comparison",
    "conversion_record",
    "convert",
    "diagnose",
    "errors",
    "joint_spheres",
    "layers",
    "load",
    "matched_learning_rates",
    "optim",
    "param_groups",
    "plan",
    "project",
    "restore",
    "revert",
    "save",
    "sources",
    "verify",
]
