"""The sign of a momentum that is replayed from seeds and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoext._runtime.arguments import check_count
from zoext.ops import Rule
from zoext.updates._window import Weights, WindowUpdate, check_beta, decaying


@dataclass(frozen=True)
class SignReplay(WindowUpdate):
    """The sign of the momentum over the last ``horizon`` estimates (Signum, arXiv 1802.04434, algorithm 2).

        m = (1 - beta) sum_lag beta^lag g_lag,   lag = 0 .. n - 1
        theta <- theta - lr sign(m) - lr weight_decay theta

    with n = min(step, horizon) and sign(0) = 0: all elements move by lr, however large the estimates are.
    Signum sums m over all steps, this update over a window, which leaves out ``beta^horizon`` of the mass: a
    third by default. m is replayed from seeds at every step and never stored. Terms whose loss was not
    finite enter the window as zero; a step without any other term moves nothing. There is no bias correction,
    since the sign does not depend on it.

    Args:
        beta: decay of the momentum per step, in [0, 1). With 0 the step is that of ZO-signSGD, the sign of
            the newest estimate.
        horizon: steps in the window; an update draws ``horizon`` numbers per element.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = zoext.ZerothOrderOptimizer(
        ...     model, lr=1e-3, mu=1e-3, update=zoext.SignReplay(beta=0.9, horizon=5)
        ... )
        >>> loss = optimizer.step(lambda: model(torch.ones(3, 4)).square().mean())
    """

    rule: ClassVar[Rule] = Rule.SIGN

    beta: float = 0.9
    horizon: int = 10

    def __post_init__(self) -> None:
        check_beta("beta", self.beta)
        check_count("horizon", self.horizon)

    def weights(self, count: int) -> Weights:
        return Weights(decaying(self.beta, count, bias_correction=False), [0.0] * count)
