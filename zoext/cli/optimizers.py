"""The optimizers that ``--optimizer`` knows by name."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

import zoext
from zoext.cli.errors import UserError
from zoext.cli.settings import Settings

#: Each is called as ``(model, lr=, mu=, weight_decay=, seed=, probe=)``.
OPTIMIZERS: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "mezo": zoext.MeZO,
}


def make(model: nn.Module, settings: Settings) -> zoext.ZerothOrderOptimizer:
    """The optimizer that the settings name, over the parameters of ``model`` that require grad."""
    try:
        return OPTIMIZERS[settings.optimizer](
            model,
            lr=settings.lr,
            mu=settings.mu,
            weight_decay=settings.weight_decay,
            seed=settings.seed,
            probe=settings.probe,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"--optimizer {settings.optimizer}: {error}") from None
