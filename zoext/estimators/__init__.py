"""The axis Estimator: which probes, and which coefficients do their losses give?

Losses become coefficients by tensor expressions on the device where the losses are; nothing here
waits for the host. An estimator knows nothing of what a direction looks like or of how theta moves.
"""

from zoext.estimators.base import Estimate, Estimator, Probe, average
from zoext.estimators.differences import CentralDifference, ForwardDifference
from zoext.estimators.greedy_pool import GreedyPool
from zoext.estimators.guiding_vector import GuidingVector

__all__ = [
    "CentralDifference",
    "Estimate",
    "Estimator",
    "ForwardDifference",
    "GreedyPool",
    "GuidingVector",
    "Probe",
    "average",
]
