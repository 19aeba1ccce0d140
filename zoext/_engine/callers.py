"""Frameworks that call the optimizer as one that uses gradients, told by who calls.

What they do next cannot be known otherwise, and importing zoext imports none of them.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from types import FrameType
from typing import Any

from torch import Tensor

_CHECKPOINTS = "torch.distributed.checkpoint.state_dict"


def initializes_state(groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether ``step()`` is called by ``torch.distributed.checkpoint``, to create the state.

    It sets all learning rates to zero, and expects that nothing moves.
    """
    if any(isinstance(lr := group["lr"], Tensor) and lr.device.type != "cpu" for group in groups):
        return False  # its zero is a float, or a tensor on the host
    if any(float(group["lr"]) != 0 for group in groups):
        return False
    return any(frame.f_globals.get("__name__") == _CHECKPOINTS for frame in _callers())


def check_not_skipping(closure: object) -> None:
    """Raises a RuntimeError if a framework passes on the closures of some micro-batches only.

    Accelerate and Lightning run the backward of every micro-batch, and call ``step`` for the last of a group.
    """
    loop = "one micro-batch in {} only, so that no probe sees the others; "
    if (steps := _accumulated_by_accelerate()) > 1:
        raise RuntimeError(
            f"step(closure): Accelerate runs the closure of {loop.format(steps)}"
            "make the accelerator a zoext.integrations.accelerate.ZOAccelerator and pass the batch to step, "
            "or call zoext.unwrap(optimizer).estimate(closure) for each and optimizer.step() at the end"
        )
    trainer = getattr(_module_of_lightning(closure), "trainer", None)
    if (steps := getattr(trainer, "accumulate_grad_batches", 1)) > 1:
        raise RuntimeError(
            f"step(closure): Lightning runs the closure of {loop.format(steps)}"
            "name zoext.integrations.lightning.ZOModuleMixin before the LightningModule, as in "
            "class Model(ZOModuleMixin, LightningModule)"
        )


def _accumulated_by_accelerate() -> int:
    """How many micro-batches the caller, the optimizer of Accelerate, has a group of; 1 for other callers."""
    accelerate = sys.modules.get("accelerate.optimizer")
    if accelerate is None:
        return 1
    is_caller = _is_called_by(accelerate.AcceleratedOptimizer.step)
    return int(accelerate.GradientState().num_steps) if is_caller else 1


def _is_called_by(function: Any) -> bool:
    return any(frame.f_code is function.__code__ for frame in _callers())


def _callers() -> Iterator[FrameType]:
    """The next frames above; in between are this module, the optimizer, and wrappers by torch."""
    frame = inspect.currentframe()
    for _ in range(10):
        frame = frame.f_back if frame is not None else None
        if frame is not None:
            yield frame


def _module_of_lightning(closure: object) -> Any:
    """The LightningModule whose closure this is, if Lightning passes one under automatic optimization."""
    if not isinstance(closure, functools.partial) or closure.func.__name__ != "_wrap_closure":
        return None
    module = closure.args[0] if closure.args else None
    return module if getattr(module, "automatic_optimization", False) else None


def check_not_trainer() -> None:
    """Raises a RuntimeError if the step of transformers' ``Trainer`` called, itself or through Accelerate.

    Only that step itself is looked for: one that a subclass defines may well be without a backward.
    """
    transformers = sys.modules.get("transformers.trainer")
    if transformers is not None and _is_called_by(transformers.Trainer.training_step):
        raise RuntimeError(
            "transformers.Trainer would compute gradients, which a forward-only optimizer does not use. "
            "Replace it by zoext.integrations.transformers.ZOTrainer, which takes the same arguments, or "
            "add ZOTrainerMixin to your subclass: class Mine(ZOTrainerMixin, SFTTrainer)"
        )
