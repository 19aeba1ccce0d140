"""The axis Direction: what does ``D(s)`` look like?

A direction knows how to add a combination ``sum_k c_k D(s_k)`` to parameters, how to write parameters
displaced by it somewhere else, and how to move them by the moments of a window of combinations. It
knows nothing of losses or of learning rates.
"""

from zoext.directions.activation_subspace import ActivationSubspace
from zoext.directions.base import Combination, Direction, Frame, Observer, Step, Terms, Window
from zoext.directions.dense import Gaussian, Rademacher
from zoext.directions.low_rank import LowRank

__all__ = [
    "ActivationSubspace",
    "Combination",
    "Direction",
    "Frame",
    "Gaussian",
    "LowRank",
    "Observer",
    "Rademacher",
    "Step",
    "Terms",
    "Window",
]
