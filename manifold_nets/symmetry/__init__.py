"""Find the weight-space symmetries of a network: derived from its graph, certified by its gradients."""

from manifold_nets.symmetry.diagnose import diagnose
from manifold_nets.symmetry.learning_rates import LearningRates, matched_learning_rates
from manifold_nets.symmetry.report import (
    Absorber,
    Certificate,
    FamilyMember,
    ScaledAlong,
    SymmetryFamily,
    SymmetryReport,
    WeightFinding,
)

__all__ = [
    "Absorber",
    "Certificate",
    "FamilyMember",
    "LearningRates",
    "ScaledAlong",
    "SymmetryFamily",
    "SymmetryReport",
    "WeightFinding",
    "diagnose",
    "matched_learning_rates",
]
