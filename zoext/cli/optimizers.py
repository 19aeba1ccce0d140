"""The optimizers that ``--optimizer`` knows by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

import zoext
from zoext.cli.errors import UserError
from zoext.cli.settings import Settings


@dataclass(frozen=True)
class Method:
    """An optimizer, called as ``make(model, lr=, mu=, weight_decay=, seed=, probe=)``, and its usual lr."""

    make: Callable[..., zoext.ZerothOrderOptimizer]
    #: The learning rate that serves it best on a task, as a multiple of MeZO's there.
    lr_scale: float = 1.0


OPTIMIZERS: dict[str, Method] = {
    "mezo": Method(zoext.MeZO),
}


def make(model: nn.Module, settings: Settings) -> zoext.ZerothOrderOptimizer:
    """The optimizer that the settings name, over the parameters of ``model`` that require grad."""
    try:
        return OPTIMIZERS[settings.optimizer].make(
            model,
            lr=settings.lr,
            mu=settings.mu,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            probe=settings.probe,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {settings.optimizer}: {error}") from None
