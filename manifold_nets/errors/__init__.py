"""The errors of the package, each building its own message from the facts it is given.

Every message names the parameter or file, the value found, the value expected, and the remedy.
"""

from __future__ import annotations

from manifold_nets.errors.analysis import (
    AnalysisError,
    DoublePrecisionError,
    ExampleInputsError,
    LossError,
    ParameterNameError,
    UnsupportedModelError,
)
from manifold_nets.errors.base import ArgumentTypeError, ManifoldNetsError, MissingExtraError, OptionError
from manifold_nets.errors.checkpoints import (
    CheckpointError,
    CheckpointFormatError,
    CheckpointMismatchError,
    CheckpointTensorError,
)
from manifold_nets.errors.constraints import (
    ConstraintError,
    DegenerateGroupError,
    JointSphereError,
    OffManifoldError,
    PartitionError,
    PlainStateError,
    ProjectionError,
)
from manifold_nets.errors.conversion import (
    ExportError,
    FunctionChangedError,
    NothingToConvertError,
    PlanError,
    ReportMismatchError,
    SelectionError,
)
from manifold_nets.errors.files import DiskFullError, OutputFileError
from manifold_nets.errors.models import (
    ModelBuildError,
    ModelExitError,
    ModelNotFoundError,
    ModelSpecError,
    StateDictMismatchError,
    WeightsFileError,
)
from manifold_nets.errors.optimizers import (
    ConstraintLostError,
    EuclideanStepError,
    LearningRateWarning,
    NativeKernelError,
    OptimizerStateError,
    ParameterGroupError,
    SparseGradientError,
    SphereOptionError,
    StepInputError,
    UnsupportedManifoldError,
)

__all__ = [
    "AnalysisError",
    "ArgumentTypeError",
    "CheckpointError",
    "CheckpointFormatError",
    "CheckpointMismatchError",
    "CheckpointTensorError",
    "ConstraintError",
    "ConstraintLostError",
    "DegenerateGroupError",
    "DiskFullError",
    "DoublePrecisionError",
    "EuclideanStepError",
    "ExampleInputsError",
    "ExportError",
    "FunctionChangedError",
    "JointSphereError",
    "LearningRateWarning",
    "LossError",
    "ManifoldNetsError",
    "MissingExtraError",
    "ModelBuildError",
    "ModelExitError",
    "ModelNotFoundError",
    "ModelSpecError",
    "NativeKernelError",
    "NothingToConvertError",
    "OffManifoldError",
    "OptimizerStateError",
    "OptionError",
    "OutputFileError",
    "ParameterGroupError",
    "ParameterNameError",
    "PartitionError",
    "PlainStateError",
    "PlanError",
    "ProjectionError",
    "ReportMismatchError",
    "SelectionError",
    "SparseGradientError",
    "SphereOptionError",
    "StateDictMismatchError",
    "StepInputError",
    "UnsupportedManifoldError",
    "UnsupportedModelError",
    "WeightsFileError",
]
