"""The public names of zoext. Importing them imports torch and registers the operators."""

from zoext import _reference as _reference  # registers the operators for devices without kernels
from zoext import losses, noise, tasks
from zoext._engine import LoRAFactors, OpenRound
from zoext.adapters import export_adapter
from zoext.directions import ActivationSubspace, Direction, Gaussian, LowRank, Rademacher
from zoext.estimators import (
    CentralDifference,
    Estimate,
    Estimator,
    ForwardDifference,
    GreedyPool,
    GuidingVector,
    Population,
    Round,
)
from zoext.graphs import GraphedStep
from zoext.losses import CompactLoss, mean_per_copy, repeat
from zoext.optimizer import ZerothOrderOptimizer, unwrap
from zoext.probes import (
    BatchedProbe,
    BatchedProbeError,
    InplaceProbe,
    Probe,
    StreamedProbe,
    StreamedProbeError,
)
from zoext.recipes import AGZO, LOZO, AdaMeZO, MeZO, MeZOGreedy, MeZOGV
from zoext.side_paths import SidePath, attach_side_paths, detach_side_paths
from zoext.trajectory import Follower, Trajectory, TrajectoryError, replay
from zoext.updates import SGD, AdamReplay, LinearUpdate, ScalarAdam, SignReplay, Update

__all__ = [
    "AGZO",
    "LOZO",
    "SGD",
    "ActivationSubspace",
    "AdaMeZO",
    "AdamReplay",
    "BatchedProbe",
    "BatchedProbeError",
    "CentralDifference",
    "CompactLoss",
    "Direction",
    "Estimate",
    "Estimator",
    "Follower",
    "ForwardDifference",
    "Gaussian",
    "GraphedStep",
    "GreedyPool",
    "GuidingVector",
    "InplaceProbe",
    "LinearUpdate",
    "LoRAFactors",
    "LowRank",
    "MeZO",
    "MeZOGV",
    "MeZOGreedy",
    "OpenRound",
    "Population",
    "Probe",
    "Rademacher",
    "Round",
    "ScalarAdam",
    "SidePath",
    "SignReplay",
    "StreamedProbe",
    "StreamedProbeError",
    "Trajectory",
    "TrajectoryError",
    "Update",
    "ZerothOrderOptimizer",
    "attach_side_paths",
    "detach_side_paths",
    "export_adapter",
    "losses",
    "mean_per_copy",
    "noise",
    "repeat",
    "replay",
    "tasks",
    "unwrap",
]
