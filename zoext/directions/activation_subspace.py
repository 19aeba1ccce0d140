"""Directions in the subspace that the activations of linear layers span."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from zoext._parameters import wrappers
from zoext._parameters.parameters import Parameters
from zoext._runtime.arguments import check_count
from zoext.directions._layers import Layer, Stack, linear_layers, scripted_layers, stacks
from zoext.directions.activations import ActivationObserver
from zoext.directions.base import Frame, Observer, Step
from zoext.directions.factored import Factored, warn_of_narrow

BALANCES = ("paper", "matched", "freeze")


@dataclass(frozen=True)
class ActivationSubspace(Factored):
    """``D(s) = R(s) A^T`` for the weights of linear layers (AGZO, arXiv 2601.17261); dense normals elsewhere.

    The gradient of a linear layer's weight is ``Q H^T`` with H (d_in x tokens) the layer's input, so its
    rows lie in the span of H. A (d_in x rank) is an orthonormal basis of the leading part of that span,
    found by power iteration during a forward at theta; R (d_out x rank) has standard normal entries. H is
    not kept. A one-sided difference uses that forward as its centre; an estimator without a centre needs
    one more forward. All estimates of a step, such as those of its micro-batches, share the basis of the
    first.

    Over data-parallel ranks, A is a basis of the leading part of the inputs of all ranks, whose tokens count
    alike. Each rank keeps ``2 rank + 6`` vectors of its own inputs, from which all find the same bits. A
    weight that only some ranks use has the basis of theirs.

    Linear layers are ``nn.Linear`` and the ``Conv1D`` of transformers. A parameter [experts, d_out, d_in] or
    [experts, d_in, d_out] is a stack of them. A weight that another kind of module also uses (a head tied to
    an embedding) has dense directions. A weight that is multiplied outside its layer gets the basis of what
    it is multiplied with. One that is only read there in other ways is dense, and one that the forward does
    not use has a zero direction.

    Args:
        rank: columns of A. A layer with d_in below that has a basis of rank d_in, which a UserWarning tells
            when the optimizer is built.
        power_iterations: products with the Gram matrix H H^T.
        mask: name of the argument of the model's forward that is 0 at padding, shape [batch, positions].
            The basis leaves padding out. None includes all positions.
        balance: "paper" (default) is the paper's rule, with which the dense directions of the other
            parameters make up nearly all of the squared norm. "matched" scales ``R A^T`` by
            ``sqrt(d_in / rank)``, so that every parameter's direction has the same norm as in MeZO.
            "freeze" leaves the other parameters unchanged; they do not decay either.

    Raises:
        ValueError: for arguments out of range, if no module is given, for a module without trainable
            linear layers, and for linear layers compiled by torch.jit.
    """

    rank: int = 1
    power_iterations: int = 3
    mask: str | None = "attention_mask"
    balance: str = "paper"

    watches = True

    def __post_init__(self) -> None:
        check_count("rank", self.rank)
        check_count("power_iterations", self.power_iterations, 0)
        if self.balance not in BALANCES:
            raise ValueError(f"balance must be one of {', '.join(BALANCES)}, not {self.balance!r}")
        if self.mask is not None and not isinstance(self.mask, str):
            raise TypeError(f"mask must be the name of an argument of the model's forward, not {self.mask!r}")

    @property
    def dense_scale(self) -> float:  # type: ignore[override]
        return 0.0 if self.balance == "freeze" else 1.0

    def check(self, module: nn.Module | None, groups: Sequence[Parameters]) -> None:
        layers, _ = self._weights(module, groups)
        warn_of_narrow(self.rank, ((layer.name, layer.width) for layer in layers))
        if self.mask not in (None, "attention_mask") and module is not None:
            arguments = inspect.signature(wrappers.unwrapped(module).forward).parameters
            takes_any = any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values())
            if self.mask not in arguments and not takes_any:
                raise ValueError(
                    f"mask must be an argument of the module's forward, not {self.mask!r}; it has "
                    f"{', '.join(arguments)}. None lets padding count"
                )

    def frame(self, step: Step) -> Frame:
        raise RuntimeError("ActivationSubspace makes its frame out of a forward: use observer()")

    def observer(self, module: nn.Module | None, step: Step) -> Observer:
        layers, stacked = self._weights(module, step.groups)
        assert module is not None
        return ActivationObserver(
            module,
            layers,
            stacked,
            step.seed,
            rank=self.rank,
            iterations=self.power_iterations,
            mask=self.mask,
            match_norms=self.balance == "matched",
            is_part=step.is_part,
        )

    def _weights(
        self, module: nn.Module | None, groups: Sequence[Parameters]
    ) -> tuple[list[Layer], list[Stack]]:
        if module is None:
            raise ValueError(
                "ActivationSubspace needs the nn.Module whose activations it watches: pass the module as "
                "params, or probe=zoext.StreamedProbe(module) with parameter groups"
            )
        if name := next(scripted_layers(module, groups), None):
            raise ValueError(
                f"ActivationSubspace cannot observe the activations of {name}, which torch.jit has compiled: "
                "train the module it was made from, freeze it with requires_grad_(False), or use another "
                "direction"
            )
        layers, stacked = linear_layers(module, groups), stacks(module, groups)
        if not layers and not stacked:
            raise ValueError(
                "ActivationSubspace needs a linear layer whose weight requires grad, and the module has "
                "none; unfreeze some, or use another direction"
            )
        return layers, stacked
