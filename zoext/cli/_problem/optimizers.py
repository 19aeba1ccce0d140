"""The optimizers that ``--optimizer`` knows by name, and their ``--options``."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

import zoext
from zoext.cli._errors import UserError
from zoext.cli._ranks import ALONE, Ranks
from zoext.cli._settings import Settings
from zoext.directions.activation_subspace import BALANCES


@dataclass(frozen=True)
class Method:
    """An optimizer, called as ``make(model, lr=, mu=, weight_decay=, seed=, ...)``."""

    make: Callable[..., zoext.ZerothOrderOptimizer]
    #: What it does, in a phrase.
    description: str
    #: Forward passes per step with the default options.
    forwards: int
    #: Its best learning rate on a task, as a multiple of MeZO's.
    lr_scale: float = 1.0
    #: Whether it differs from the paper's method; a variant is compared only if it is asked for.
    variant: bool = False


# The scales come from short runs on the demo and on the fables of docs/methods.md. They only centre the grid
# of a sweep.
OPTIMIZERS: dict[str, Method] = {
    "mezo": Method(zoext.MeZO, "SGD along one random direction", 2),
    "adamezo": Method(zoext.AdaMeZO, "Adam with moments replayed from a window of seeds", 2, lr_scale=10),
    "agzo": Method(zoext.AGZO, "directions in the subspaces spanned by the activations", 2, lr_scale=4),
    "lozo": Method(zoext.LOZO, "low-rank directions; one factor is redrawn lazily", 2),
    "mezo-gv": Method(zoext.MeZOGV, "along the better minus the worse of 4 candidates", 6),
    "mezo-greedy": Method(zoext.MeZOGreedy, "along the best of 4 candidates", 5),
    "mezo-momentum": Method(partial(zoext.AdaMeZO, betas=(0.7, 0.0)), "mezo with momentum", 2, variant=True),
    **{
        f"agzo-{balance}": Method(
            partial(zoext.AGZO, balance=balance),
            f"agzo with balance={balance}",
            2,
            lr_scale=0.05 if balance == "matched" else 4,
            variant=True,
        )
        for balance in BALANCES[1:]
    },
    "agzo-central": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.ActivationSubspace(),
            estimator=zoext.CentralDifference(),
        ),
        "agzo with central differences",
        3,
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
        "agzo with momentum",
        2,
        lr_scale=4,
        variant=True,
    ),
    "mezo-gv-centered": Method(
        partial(zoext.MeZOGV, weighting="centered"),
        "mezo-gv, weighted by centered losses",
        6,
        variant=True,
    ),
    "fzoo": Method(
        partial(
            zoext.ZerothOrderOptimizer,
            direction=zoext.Rademacher(),
            estimator=zoext.ForwardDifference(samples=8),
            update=zoext.SGD(normalized=True),
        ),
        "normalized SGD along 8 directions of random signs",
        9,
        lr_scale=1e-2,
        variant=True,
    ),
}


def table() -> str:
    """A line for each method: its name, the forward passes of a step and what it does."""
    width = max(map(len, OPTIMIZERS))
    return "\n".join(
        f"{name:{width}}  {method.forwards}  {method.description}" for name, method in OPTIMIZERS.items()
    )


#: Arguments of an optimizer that ``--options`` does not set.
_RESERVED = {
    *("params", "lr", "mu", "weight_decay", "seed", "probe", "precision"),
    *("direction", "estimator", "update", "options"),
    *("process_group", "probe_group"),
    "defer",  # a checkpoint is a merge, so a run that a signal stops would go on with other bits
}


def make(model: nn.Module, settings: Settings, ranks: Ranks = ALONE) -> zoext.ZerothOrderOptimizer:
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
            **ranks.optimizer_options(settings.parallel),
            **_options_for(construct, settings.options),
        )
    except (TypeError, ValueError) as error:
        if ranks.batch_parts(settings.parallel) < ranks.count and "probe_group" in str(error):
            raise UserError(
                "--parallel probes: probes in place restore weights up to rounding, which differs between "
                "processes; give --probe streamed or --parallel data"
            ) from None
        raise UserError(f"--optimizer {settings.optimizer}: {error}") from None


def _options_for(construct: Callable[..., Any], given: Mapping[str, str]) -> dict[str, Any]:
    """Converts each value to the type of the argument's default; tuples are written ``a/b``.

    Raises:
        ValueError: for an unknown name or a value of another type.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(construct).parameters.items()
        if name not in _RESERVED and parameter.default is not parameter.empty
    }
    unknown = sorted(given.keys() - known.keys())
    if unknown:
        has = ", ".join(known) if known else "none"
        raise ValueError(f"it has no option {unknown[0]}; its options: {has}")
    return {name: _typed(name, value, known[name]) for name, value in given.items()}


def _typed(name: str, value: str, default: Any) -> Any:
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        if isinstance(default, tuple):
            return tuple(float(part) for part in value.split("/"))
        if isinstance(default, int | float):
            return type(default)(value)
    except (ValueError, KeyError):
        form = "/".join(map(str, default)) if isinstance(default, tuple) else default
        raise ValueError(f"option {name} must be of the form of {form}, not {value}") from None
    return None if value == "none" else value
