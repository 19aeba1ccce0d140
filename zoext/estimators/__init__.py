"""The estimator axis: which probes to evaluate, and how their losses become coefficients.

An estimator is a generator of rounds: it yields probes that may be evaluated in any order, receives their
losses, and returns an estimate. It is independent of how probes are evaluated, directions are drawn and theta
is updated. Coefficients are computed by tensor expressions on the device of the losses; nothing here
synchronizes with the host.
"""

from zoext.estimators.base import (
    Estimate,
    Estimator,
    ProbeFn,
    Round,
    Rounds,
    assemble,
    centre_first,
    checked_reduction,
    deviation,
    evaluate,
    reduced,
    stacked,
)
from zoext.estimators.differences import CentralDifference, ForwardDifference
from zoext.estimators.greedy_pool import GreedyPool
from zoext.estimators.guiding_vector import GuidingVector
from zoext.estimators.population import Population

__all__ = [
    "CentralDifference",
    "Estimate",
    "Estimator",
    "ForwardDifference",
    "GreedyPool",
    "GuidingVector",
    "Population",
    "ProbeFn",
    "Round",
    "Rounds",
    "assemble",
    "centre_first",
    "checked_reduction",
    "deviation",
    "evaluate",
    "reduced",
    "stacked",
]
