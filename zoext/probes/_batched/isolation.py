"""Checks that the copies of a batch do not see each other, and that each has its own loss.

Two forwards at theta with as many copies as a probe has: one that is observed, in which all losses must be
equal, and one in which the layers' outputs are altered in the first copy alone, which may change no other
loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from zoext.directions import Combination
from zoext.probes._batched.errors import BatchedProbeError
from zoext.probes._reads import reads_nothing


class GatheredReads(TorchFunctionMode):
    """Sees parameters that are read, of which ``ReadGuard`` knows those that FSDP2 does not gather.

    Attributes:
        read: the ids of parameters that were read while their modules did not run.
    """

    def __init__(self, running: set[int]) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._running = running

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not reads_nothing(func):
            for value in tree_iter((args, kwargs)):
                if isinstance(value, nn.Parameter) and id(value) not in self._running:
                    self.read.add(id(value))
        return func(*args, **kwargs)


_DRAWS_MASKS = ("bernoulli", "native_dropout", "_fused_dropout", "dropout")
_SAMPLES = ("multinomial", "exponential_", "categorical")


class Operators(TorchDispatchMode):
    """Notes operators that draw random numbers.

    Attributes:
        samples: whether something was sampled, such as tokens, which may differ between copies.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.samples = False

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func.name().partition("::")[2].partition(".")[0]
        self.samples = self.samples or name in _SAMPLES
        if name.startswith(_DRAWS_MASKS) or _drops_attention(func, args, kwargs):
            raise BatchedProbeError(
                f"the closure drops out values by {name}, outside of nn.Dropout, with another mask for each "
                "copy; call model.eval(), or set its dropout to 0"
            )
        return func(*args, **kwargs)


def _drops_attention(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    if "scaled_dot_product" not in func.name():
        return False
    for number, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            return bool(kwargs.get("dropout_p", args[number] if number < len(args) else 0.0))
    return False


@contextmanager
def unwritten_buffers(root: nn.Module) -> Iterator[dict[str, Tensor | None]]:
    """A block that raises if buffers are written to. Those that it assigns are yielded and taken back."""
    before = [
        (module, name, f"{prefix}.{name}" if prefix else name, buffer, buffer._version)
        for prefix, module in root.named_modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    assigned: dict[str, Tensor | None] = {}
    try:
        yield assigned
    finally:
        for module, name, full, buffer, _ in before:
            if (now := module._buffers.get(name)) is not buffer:
                assigned[full] = now
                module._buffers[name] = buffer
    if written := [full for _, _, full, buffer, version in before if buffer._version != version]:
        raise _shared_buffers(written)


def check_assigned(before: dict[str, Tensor | None], after: dict[str, Tensor | None]) -> None:
    """Raises if buffers that two forwards assign depend on activations, which one of them altered."""
    written = [name for name in before | after if not _equal(before.get(name), after.get(name))]
    if written:
        raise _shared_buffers(written)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _shared_buffers(names: Sequence[str]) -> BatchedProbeError:
    return BatchedProbeError(f"the forward writes to buffers, which all copies share: {', '.join(names[:3])}")


@contextmanager
def unwritten(combination: Combination) -> Iterator[None]:
    """A block that raises at its end if theta was written to in it."""
    groups = [parameters for parameters, _ in combination.terms]
    before = [[owner._version for owner in parameters.owners] for parameters in groups]
    yield
    for parameters, versions in zip(groups, before, strict=True):
        for owner, name, version in zip(parameters.owners, parameters.names, versions, strict=True):
            if owner._version != version:
                raise BatchedProbeError(
                    f"the closure wrote to {name}, and the change outlasts the step; update weights between "
                    "steps"
                )


def tolerance_of(model: nn.Module) -> float:
    """How far rounding may move a loss if other rows of a batch change: relative to the loss."""
    tensors = (*model.parameters(), *model.buffers())
    is_wide = all(each.is_floating_point() and each.dtype.itemsize > 2 for each in tensors if each.dim() > 1)
    return 1e-4 if is_wide else 1e-2  # packed weights are no floats


def check_equal(losses: Tensor, samples: bool, tolerance: float) -> None:
    """Raises if the losses of equal copies, [C], differ, unless something was sampled."""
    if not samples and not _close(losses, losses[:1].expand_as(losses), tolerance).all():
        raise BatchedProbeError(
            f"at equal weights, copies of the batch have different losses {_shown(losses)}: the closure must "
            "repeat one batch with zoext.repeat(batch, copies), and draw random numbers before it does"
        )


def check_apart(before: Tensor, after: Tensor, names: Sequence[str], tolerance: float) -> None:
    """Raises if altering the first copy changed the losses, [C], of others."""
    mixed = ~_close(before, after, tolerance)[1:]
    if mixed.any():
        layers = ", ".join(names[:3])
        raise BatchedProbeError(
            f"copies of the batch see each other: altering the first one in {layers} ... changed other "
            f"losses, {_shown(before)} to {_shown(after)}. The closure must return the loss of each copy, "
            "with zoext.mean_per_copy(losses, copies), and no module may mix examples"
        )


def _close(one: Tensor, other: Tensor, tolerance: float) -> Tensor:
    same = (one == other) | (one.isnan() & other.isnan())
    return same | ((one - other).abs() <= tolerance * one.abs())


def _shown(losses: Tensor) -> str:
    values = losses.tolist()
    shown = ", ".join(f"{loss:.4g}" for loss in (values if len(values) < 9 else values[:4] + values[-4:]))
    return f"[{shown}]" if len(values) < 9 else f"[{shown}], the first and last of {len(values)}"
