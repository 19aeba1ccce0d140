"""The direction axis: how ``D(s)`` is drawn.

A direction adds a combination ``sum_k c_k D(s_k)`` to parameters, writes displaced parameters to other
tensors, and moves parameters by the moments of a window of combinations. It does not depend on losses or
learning rates.
"""

from zoext.directions._subspaces import kind_of
from zoext.directions.activation_subspace import ActivationSubspace
from zoext.directions.base import Combination, Direction, Drawn, Frame, Observer, Step, Terms, Window
from zoext.directions.dense import Gaussian, Rademacher
from zoext.directions.low_rank import LowRank

__all__ = [
    "ActivationSubspace",
    "Combination",
    "Direction",
    "Drawn",
    "Frame",
    "Gaussian",
    "LowRank",
    "Observer",
    "Rademacher",
    "Step",
    "Terms",
    "Window",
    "kind_of",
]
