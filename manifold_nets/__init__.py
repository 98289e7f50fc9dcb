"""Find the weight-space symmetries of a PyTorch network, and train it on the manifold that removes them.

Importing this package imports neither torch nor geoopt: each public name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manifold_nets import comparison, errors, layers, monitor, optim, sources
    from manifold_nets.comparison import Comparison, compare
    from manifold_nets.constraining import Constrained, constrain, unconstrain
    from manifold_nets.constraints import joint_spheres, restore
    from manifold_nets.conversion import balance, conversion_record, convert, load, project, save
    from manifold_nets.conversion.plan import plan  # in a package, its module would hide a function of that name
    from manifold_nets.conversion.revert import revert
    from manifold_nets.conversion.verify import verify
    from manifold_nets.groups import Partition
    from manifold_nets.joint_sphere import JointSphere
    from manifold_nets.manifold import SphereProduct
    from manifold_nets.monitor import Monitor
    from manifold_nets.optim.param_groups import param_groups
    from manifold_nets.symmetry import LearningRates, SymmetryReport, matched_learning_rates
    from manifold_nets.symmetry.diagnose import diagnose

__all__ = [
    "Comparison",
    "Constrained",
    "JointSphere",
    "LearningRates",
    "Monitor",
    "Partition",
    "SphereProduct",
    "SymmetryReport",
    "balance",
    "compare",
    "comparison",
    "constrain",
    "conversion_record",
    "convert",
    "diagnose",
    "errors",
    "joint_spheres",
    "layers",
    "load",
    "matched_learning_rates",
    "monitor",
    "optim",
    "param_groups",
    "plan",
    "project",
    "restore",
    "revert",
    "save",
    "sources",
    "unconstrain",
    "verify",
]

_NAMES = {
    "comparison": ("Comparison", "compare"),
    "constraining": ("Constrained", "constrain", "unconstrain"),
    "constraints": ("joint_spheres", "restore"),
    "conversion": ("balance", "conversion_record", "convert", "load", "plan", "project", "revert", "save", "verify"),
    "groups": ("Partition",),
    "joint_sphere": ("JointSphere",),
    "manifold": ("SphereProduct",),
    "monitor": ("Monitor",),
    "optim": ("param_groups",),
    "symmetry": ("LearningRates", "SymmetryReport", "diagnose", "matched_learning_rates"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


if not TYPE_CHECKING:  # so that type checkers report names that do not exist

    def __getattr__(name: str) -> Any:
        """Import a public name, or a module of the package, when it is first used."""
        path = f"{__name__}.{_MODULE_OF.get(name, name)}"
        missing = AttributeError(f"module {__name__!r} has no attribute {name!r}")
        if name.startswith("_"):
            raise missing
        try:
            module = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if error.name != path:
                raise
            raise missing from None
        value = globals()[name] = getattr(module, name) if name in _MODULE_OF else module
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_NAMES})
