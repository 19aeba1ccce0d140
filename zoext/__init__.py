"""Forward-only (zeroth-order) fine-tuning for PyTorch."""

from zoext import noise
from zoext.directions import Direction, Gaussian, Rademacher
from zoext.estimators import CentralDifference, Estimate, Estimator, ForwardDifference
from zoext.optimizer import ZerothOrderOptimizer
from zoext.probes import InplaceProbe, Probe, StreamedProbe
from zoext.recipes import MeZO
from zoext.swap import StreamedProbeError
from zoext.updates import SGD, Update

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "CentralDifference",
    "Direction",
    "Estimate",
    "Estimator",
    "ForwardDifference",
    "Gaussian",
    "InplaceProbe",
    "MeZO",
    "Probe",
    "Rademacher",
    "StreamedProbe",
    "StreamedProbeError",
    "Update",
    "ZerothOrderOptimizer",
    "noise",
]
