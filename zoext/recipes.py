"""Named optimizers: each fills the three axes and their defaults."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypedDict, Unpack

from torch import nn

from zoext.directions import Gaussian
from zoext.estimators import CentralDifference
from zoext.optimizer import ZerothOrderOptimizer
from zoext.probes import Probe
from zoext.updates import SGD


class Options(TypedDict, total=False):
    """What every recipe passes on to ``ZerothOrderOptimizer``."""

    probe: str | Probe
    nonfinite: str


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (arXiv 2305.17333, algorithm 1).

        p = (L(theta + mu z) - L(theta - mu z)) / (2 mu),   theta <- theta - lr (p z + weight_decay theta)

    with z ~ N(0, I) from the step's seed. Two forwards a step; with ``samples=n`` the mean over n
    directions, 2n forwards. The paper's grid for full fine-tuning: lr 1e-6 and 1e-7, mu 1e-3.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        mu: float = 1e-3,
        weight_decay: float = 0.0,
        seed: int = 0,
        *,
        samples: int = 1,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            direction=Gaussian(),
            estimator=CentralDifference(samples=samples),
            update=SGD(),
            lr=lr,
            mu=mu,
            weight_decay=weight_decay,
            seed=seed,
            **options,
        )
