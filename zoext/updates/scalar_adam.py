"""Adam with one second moment for all elements: that of the projected gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoext._runtime.arguments import check_count
from zoext.ops import Rule
from zoext.updates._window import Weights, WindowUpdate, checked_betas, checked_eps, decaying


@dataclass(frozen=True)
class ScalarAdam(WindowUpdate):
    """Adam with a scalar second moment, of the projected gradient p of each step (MEAZO).

        m = (1 - b1) sum_lag b1^lag g_lag,   v = (1 - b2) sum_lag b2^lag p_lag^2,   lag = 0 .. n - 1
        theta <- theta - lr m / (sqrt(v) + eps) - lr weight_decay theta

    with n = min(step, horizon). ``p_lag`` is the sum of the coefficients of ``g_lag``: with q directions,
    whose coefficients are p_i / q, it is the mean of their projected gradients. As with Adam, the length of a
    step does not depend on the scale of the loss. Only estimates with a nonzero weight in m are redrawn; with
    b1 = 0 that is the newest one, and a step costs no more than one of SGD.

    MEAZO keeps v over all steps and has no momentum (b1 = 0, the default here). This update sums v over a
    window, which leaves out ``b2^horizon`` of its mass; ``bias_correction`` divides by the remaining mass,
    ``1 - b2^n``. Terms whose loss was not finite enter the window as zero; a step without any other term
    moves nothing.

    If coefficients cancel, p vanishes and the step gets arbitrarily long: optimizers reject this update with
    ``GuidingVector``, whose coefficients always sum to zero.

    Args:
        betas: (b1, b2), each in [0, 1).
        horizon: steps in the window; an update draws one number per element, or ``horizon`` where b1 > 0.
        eps: added to the root of v, in units of a projected gradient.
        bias_correction: divide m and v by the mass of the window, 1 - b^n.

    Raises:
        ValueError: for arguments out of range.

    Example:
        >>> model = torch.nn.Linear(4, 2)
        >>> optimizer = zoext.ZerothOrderOptimizer(
        ...     model, lr=1e-3, mu=1e-3, update=zoext.ScalarAdam(betas=(0.0, 0.99), horizon=100)
        ... )
        >>> loss = optimizer.step(lambda: model(torch.ones(3, 4)).square().mean())
    """

    rule: ClassVar[Rule] = Rule.SCALAR_ADAM
    sums_coefficients = True

    betas: tuple[float, float] = (0.0, 0.9)
    horizon: int = 10
    eps: float = 1e-8
    bias_correction: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", checked_betas(self.betas))
        check_count("horizon", self.horizon)
        object.__setattr__(self, "eps", checked_eps(self.eps))

    @property
    def kernel_eps(self) -> float:
        return self.eps

    def weights(self, count: int) -> Weights:
        return Weights(*(decaying(beta, count, self.bias_correction) for beta in self.betas))
