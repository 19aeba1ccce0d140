"""Exceptions of a model while it is trained or evaluated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from zoext.cli._errors import TRACEBACK, UserError, first_line

#: What allocators of processors say; those of GPUs raise an exception of their own.
_OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
#: Packages whose exceptions are not the model's: ours say what to do, and a collective fails if a rank ends.
_NOT_OF_MODELS = ("zoext.", "torch.distributed.")


@contextmanager
def of_model(when: str) -> Iterator[None]:
    """Turns an exception of the model inside the block into a UserError that begins with ``when``."""
    try:
        yield
    except (UserError, FloatingPointError):
        raise
    except Exception as error:
        if not _is_of_model(error):
            raise
        remedy = _remedy(error)
        advice = "" if remedy is None else f"; {remedy}"
        raise UserError(
            f"{when}: the model raised {type(error).__name__}: {first_line(error).rstrip('.')}{advice}; "
            f"{TRACEBACK}=1 shows the traceback"
        ) from error


def not_finite(error: FloatingPointError) -> str:
    """What the library says about a loss that is not finite, without its remedy, which is for programs."""
    return str(error).partition(". ")[0]


def _is_of_model(error: Exception) -> bool:
    at = error.__traceback__
    while at is not None and at.tb_next is not None:
        at = at.tb_next
    raised_in = "" if at is None else f"{at.tb_frame.f_globals.get('__name__', '')}."
    return not f"{type(error).__module__}.".startswith("zoext.") and not raised_in.startswith(_NOT_OF_MODELS)


def _remedy(error: Exception) -> str | None:
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(
        text in str(error) for text in _OUT_OF_MEMORY
    ):
        return "start again with --overwrite and a smaller --batch-size or --max-length"
    if isinstance(error, IndexError):
        return (
            "if a token or a position is beyond those of the model, start again with --overwrite and a "
            "smaller --max-length, or with the tokenizer of the model"
        )
    return None
