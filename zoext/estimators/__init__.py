"""The axis Estimator: which probes, and which coefficients do their losses give?

An estimator is a generator of rounds: it yields probes that may be evaluated in any order, receives their
losses, and returns an estimate. It does not know how probes are evaluated, what a direction looks like or how
theta moves. Losses become coefficients by tensor expressions on the device of the losses; nothing here waits
for the host.
"""

from zoext.estimators.base import (
    Estimate,
    Estimator,
    ProbeFn,
    Round,
    Rounds,
    assemble,
    average,
    centre_first,
    evaluate,
    stacked,
)
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
    "ProbeFn",
    "Round",
    "Rounds",
    "assemble",
    "average",
    "centre_first",
    "evaluate",
    "stacked",
]
