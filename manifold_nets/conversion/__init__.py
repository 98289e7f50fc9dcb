"""Put a network's weights on spheres and convert it back: plan, apply, verify, revert, save, load."""

from manifold_nets.conversion.actions import REMEDIES, Action, ConversionPlan
from manifold_nets.conversion.apply import BalanceRecord, ConversionRecord, balance, conversion_record, convert
from manifold_nets.conversion.checkpoint import load, save
from manifold_nets.conversion.plan import EditedPlan, edited_plan, plan, write_plan
from manifold_nets.conversion.projection import project
from manifold_nets.conversion.revert import revert
from manifold_nets.conversion.verify import Verification, verify

__all__ = [
    "REMEDIES",
    "Action",
    "BalanceRecord",
    "ConversionPlan",
    "ConversionRecord",
    "EditedPlan",
    "Verification",
    "balance",
    "conversion_record",
    "convert",
    "edited_plan",
    "load",
    "plan",
    "project",
    "revert",
    "save",
    "verify",
    "write_plan",
]
