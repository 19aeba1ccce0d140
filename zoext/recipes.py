"""Named optimizers. Each sets the axes in which it differs from MeZO, the default of all three."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

from torch import nn

from zoext.directions import ActivationSubspace, LowRank
from zoext.estimators import CentralDifference, Estimator, ForwardDifference, GreedyPool, GuidingVector
from zoext.optimizer import ZerothOrderOptimizer
from zoext.probes import Probe
from zoext.updates import AdamReplay

if TYPE_CHECKING:  # a build of torch may lack it
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh


class Options(TypedDict, total=False):
    """Options that every recipe passes to ``ZerothOrderOptimizer``, which defines their defaults."""

    mu: float
    weight_decay: float
    seed: int
    probe: str | Probe
    reduction: str
    process_group: ProcessGroup | DeviceMesh | str | None
    probe_group: ProcessGroup | None
    nonfinite: str
    precision: str


class MeZO(ZerothOrderOptimizer):
    """Memory-efficient zeroth-order SGD (arXiv 2305.17333, algorithm 1).

        p = (L(theta + mu z) - L(theta - mu z)) / (2 mu),   theta <- theta - lr (p z + weight_decay theta)

    with z ~ N(0, I) from the step's seed. Two forwards per step; ``samples=n`` averages over n
    directions, with 2n forwards. The paper's grid for full fine-tuning is lr 1e-6 and 1e-7 with mu 1e-3.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        samples: int = 1,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, estimator=CentralDifference(samples=samples), lr=lr, **options)


class AdaMeZO(ZerothOrderOptimizer):
    """MeZO with Adam's moments, replayed from the seeds of a window (arXiv 2605.00650).

        m = (1 - b1) sum_lag b1^lag g_lag,   v = (1 - b2) sum_lag b2^lag g_lag^2,   g = p z
        theta <- theta - lr m / sqrt(v + eps) - lr weight_decay theta

    over the last ``horizon`` steps; ``bias_correction`` divides the moments by the mass of the window.
    Two forwards per step and no memory for moments; each update generates ``horizon`` normals per element.
    ``samples=n`` averages over n directions, with 2n forwards and n times as many normals. lr
    acts as in Adam: the length of a step hardly depends on the slope. The published code's lr 1e-7 has an
    unexplained factor of 100, hence the default of 1e-5. ``betas=(b, 0)`` means momentum only.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.7, 0.9),
        horizon: int = 10,
        eps: float = 1e-8,
        bias_correction: bool = True,
        samples: int = 1,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            estimator=CentralDifference(samples=samples),
            update=AdamReplay(betas=betas, horizon=horizon, eps=eps, bias_correction=bias_correction),
            lr=lr,
            **options,
        )


class AGZO(ZerothOrderOptimizer):
    """Zeroth-order SGD in the subspaces of the activations (arXiv 2601.17261).

        A = basis of the layer's input H (d_in x rank),   Delta = R A^T,   R ~ N(0, 1)
        g = (L(theta + mu Delta) - L(theta)) / mu,   theta <- theta - lr (g Delta + weight_decay theta)

    for the weights of linear layers, dense normals for all else; see ``ActivationSubspace`` for ``mask`` and
    ``balance``. Two forwards per step, because A is computed during the forward at theta; ``samples=n``
    averages over n directions, with n + 1 forwards. ``estimator`` replaces the difference. The paper's mu of
    1e-7 is a few units in the last place of a float32 loss; 1e-4 to 1e-3 is better.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        rank: int = 1,
        power_iterations: int = 3,
        mask: str | None = "attention_mask",
        balance: str = "paper",
        samples: int = 1,
        estimator: Estimator | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            direction=ActivationSubspace(
                rank=rank, power_iterations=power_iterations, mask=mask, balance=balance
            ),
            estimator=_estimator(estimator, ForwardDifference, samples),
            lr=lr,
            **options,
        )


class MeZOGV(ZerothOrderOptimizer):
    """MeZO along a guiding vector (arXiv 2601.04710, algorithms 1 and 2); see ``GuidingVector``.

    ``pool_size + 2`` forwards per step. At equal lr it moves like MeZO with 2 to 2.5 times the lr: compare it
    with MeZO at that lr.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        pool_size: int = 4,
        elite_ratio: float = 0.5,
        weighting: str = "ranked",
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            estimator=GuidingVector(pool_size=pool_size, elite_ratio=elite_ratio, weighting=weighting),
            lr=lr,
            **options,
        )


class MeZOGreedy(ZerothOrderOptimizer):
    """MeZO along the best direction of a pool (arXiv 2601.04710, algorithms 3 and 4); see ``GreedyPool``.

    ``pool_size + 1`` forwards per step, or ``pool_size + 2`` with ``reuse=False``, as in the paper.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        pool_size: int = 4,
        reuse: bool = True,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, estimator=GreedyPool(pool_size=pool_size, reuse=reuse), lr=lr, **options)


class LOZO(ZerothOrderOptimizer):
    """MeZO along low-rank directions with a lazily redrawn factor (arXiv 2410.07698); see ``LowRank``.

        c = (L(theta + mu U V^T) - L(theta - mu U V^T)) / (2 mu),   theta <- theta - lr c U V^T / rank

    for matrices, dense normals for vectors. Two forwards per step; ``samples=n`` averages over n directions,
    with 2n forwards. ``estimator`` replaces the difference. ``defer=True`` writes matrices once in
    ``refresh_interval`` steps.
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float = 1e-6,
        *,
        rank: int = 2,
        refresh_interval: int = 50,
        scale: str = "paper",
        defer: bool = False,
        samples: int = 1,
        estimator: Estimator | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            params,
            direction=LowRank(rank=rank, refresh_interval=refresh_interval, scale=scale, defer=defer),
            estimator=_estimator(estimator, CentralDifference, samples),
            lr=lr,
            **options,
        )


def _estimator(
    given: Estimator | None, kind: type[CentralDifference | ForwardDifference], samples: int
) -> Estimator:
    if given is None:
        return kind(samples=samples)
    if samples != 1:
        raise ValueError(
            f"samples={samples} belongs to the {kind.__name__} that estimator={given} replaces; leave it "
            "out, or give it to the estimator"
        )
    return given
