"""Adam whose moments are replayed from seeds and never stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoext._runtime.arguments import check_count
from zoext.ops import Rule
from zoext.updates._window import Weights, WindowUpdate, checked_betas, checked_eps, decaying


@dataclass(frozen=True)
class AdamReplay(WindowUpdate):
    """Adam over the last ``horizon`` gradient estimates (AdaMeZO, arXiv 2605.00650, section 3).

        m = (1 - b1) sum_lag b1^lag g_lag,   v = (1 - b2) sum_lag b2^lag g_lag^2,   lag = 0 .. n - 1
        theta <- theta - lr m / sqrt(v + eps) - lr weight_decay theta

    with n = min(step, horizon), so the first steps have a shorter window and are otherwise the same.
    ``g_lag`` is the whole gradient estimate of a step, whatever the number of its terms. It is never
    stored: the update redraws the directions of the window, element by element in registers. Terms
    whose loss was not finite enter the window as zero; a step without any other term moves nothing.

    Args:
        betas: (b1, b2), each in [0, 1). b2 = 0 means momentum only: theta <- theta - lr m.
        horizon: steps in the window; an update draws ``horizon`` numbers per element.
        eps: added to v under the root, in units of a squared gradient.
        bias_correction: divide m and v by the mass of the window, 1 - b^n. False is the form in the
            paper, whose step at b2 = .999 and horizon 10 is 6.5 times too long.

    Raises:
        ValueError: for arguments out of range.
    """

    rule: ClassVar[Rule] = Rule.ADAM

    betas: tuple[float, float] = (0.7, 0.9)
    horizon: int = 10
    eps: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas(self.betas))
        check_count("horizon", self.horizon)
        object.__setattr__(self, "eps", checked_eps(self.eps))

    @property
    def _is_momentum_only(self) -> bool:
        return self.betas[1] == 0

    @property
    def kernel_eps(self) -> float:
        return 1.0 if self._is_momentum_only else self.eps  # with v = 0 the root is 1

    def weights(self, count: int) -> Weights:
        first, second = (decaying(beta, count, self.bias_correction) for beta in self.betas)
        return Weights(first, [0.0] * count if self._is_momentum_only else second)
