"""Where all runs of a comparison begin, and how they are judged."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch

from zoext.cli import weights
from zoext.cli.errors import UserError
from zoext.cli.evaluation import evaluate
from zoext.cli.json_lines import Record
from zoext.cli.objectives import Example
from zoext.cli.output_folder import fingerprint
from zoext.cli.problem import Problem


class Start:
    """A model at its first weights, and two halves of the held-out examples.

    A learning rate that is chosen for its loss on some examples looks better on these than it is. So one
    half chooses and the other is reported.

    Attributes:
        evaluation: what ``evaluate`` gives at the first weights.
        fingerprint: a hash of examples and weights; a comparison that is resumed must find the same.

    Raises:
        UserError: if there are too few held-out examples, or the loss of one half is not finite.
    """

    def __init__(self, problem: Problem, batch_size: int, device: torch.device) -> None:
        self.problem = problem
        self.device = device
        self.selection, self.report = halves(problem.valid)
        self._batch_size = batch_size
        self._weights = weights.copy_of(problem.model)
        self.fingerprint = f"{fingerprint(problem.train, problem.valid)} {weights.digest(problem.model)}"
        self.evaluation = self.evaluate()
        if not math.isfinite(self.evaluation["selection_loss"] + self.evaluation["report_loss"]):
            raise UserError(
                "the held-out loss is not finite before the first step; give another --model, or "
                "--dtype float32"
            )

    def reset(self) -> None:
        weights.put(self.problem.model, self._weights)

    def evaluate(self) -> Record:
        """Loss and accuracy of the model as it is, on either half, with standard errors over examples."""
        record: Record = {}
        for part, examples in (("selection", self.selection), ("report", self.report)):
            problem = self.problem
            result = evaluate(problem.model, problem.objective, examples, self._batch_size, self.device)
            record |= result.record(part)
        return record


def halves(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Splits by a hash of the tokens, so that equal texts are in the same half, wherever this is done."""
    order = sorted({example.tokens for example in examples}, key=_digest)
    if len(order) < 4:  # two in each half: fewer have no standard error
        raise UserError(
            f"only {len(order)} distinct held-out texts, too few for one half to choose the learning rate "
            "and the other to be reported; give a larger --validation-fraction or --valid-data"
        )
    first = set(order[: len(order) // 2])
    parts: tuple[list[Example], list[Example]] = ([], [])
    for example in examples:
        parts[example.tokens not in first].append(example)
    return parts


def _digest(tokens: tuple[int, ...]) -> bytes:
    return hashlib.blake2b(repr(tokens).encode(), digest_size=16).digest()
