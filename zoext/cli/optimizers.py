"""The optimizers that ``--optimizer`` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import nn

import zoext
from zoext.cli import method_options
from zoext.cli.errors import UserError
from zoext.cli.settings import Settings


@dataclass(frozen=True)
class Method:
    """An optimizer, called as ``make(model, lr=, mu=, weight_decay=, seed=, ...)``, and its usual lr."""

    make: Callable[..., zoext.ZerothOrderOptimizer]
    #: The learning rate that serves it best on a task, as a multiple of MeZO's there.
    lr_scale: float = 1.0
    #: Not a method as its paper has it: compared only where it is asked for.
    variant: bool = False


# The scales come from short runs on the demo and on the fables of docs/methods.md. They centre the grids
# of a sweep, which then finds out.
OPTIMIZERS: dict[str, Method] = {
    "mezo": Method(zoext.MeZO),
    "adamezo": Method(zoext.AdaMeZO, lr_scale=10),
    "agzo": Method(zoext.AGZO, lr_scale=4),
    "lozo": Method(zoext.LOZO),
    "mezo-gv": Method(zoext.MeZOGV),
    "mezo-greedy": Method(zoext.MeZOGreedy),
    "mezo-momentum": Method(partial(zoext.AdaMeZO, betas=(0.7, 0.0)), variant=True),
    "agzo-matched": Method(partial(zoext.AGZO, balance="matched"), lr_scale=0.05, variant=True),
    "agzo-still": Method(partial(zoext.AGZO, balance="still"), lr_scale=4, variant=True),
    "agzo-central": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.ActivationSubspace(),
            estimator=zoext.CentralDifference(),
        ),
        lr_scale=4,
        variant=True,
    ),
    "agzo-momentum": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.ActivationSubspace(),
            estimator=zoext.ForwardDifference(),
            update=zoext.AdamReplay(betas=(0.7, 0.0)),
        ),
        lr_scale=4,
        variant=True,
    ),
    "mezo-gv-centered": Method(partial(zoext.MeZOGV, weighting="centered"), variant=True),
    "fzoo": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.Rademacher(),
            estimator=zoext.ForwardDifference(samples=8),
            update=zoext.SGD(normalized=True),
        ),
        lr_scale=1e-2,
        variant=True,
    ),
}


def make(model: nn.Module, settings: Settings) -> zoext.ZerothOrderOptimizer:
    """The optimizer that the settings name, over the parameters of ``model`` that require grad."""
    construct = OPTIMIZERS[settings.optimizer].make
    try:
        return construct(
            model,
            lr=settings.lr,
            mu=settings.mu,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            probe=settings.probe,
            precision=settings.precision,
            **method_options.typed(construct, settings.options),
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {settings.optimizer}: {error}") from None
