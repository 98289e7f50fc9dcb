"""Which weight-space symmetries a network has: structure from its graph, proof from the Euler certificate."""

from manifold_nets.symmetry.diagnose import diagnose
from manifold_nets.symmetry.report import Absorber, Certificate, ScaledAlong, SymmetryReport, WeightFinding

__all__ = ["Absorber", "Certificate", "ScaledAlong", "SymmetryReport", "WeightFinding", "diagnose"]
