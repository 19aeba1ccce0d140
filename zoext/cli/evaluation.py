"""The held-out loss and accuracy, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from zoext.cli.objectives import Example, Objective


@dataclass(frozen=True)
class Estimated:
    """A mean and its standard error over examples."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Evaluation:
    loss: Estimated
    accuracy: Estimated | None

    def __str__(self) -> str:
        accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy}"
        return f"loss {self.loss}{accuracy}"

    def record(self, part: str = "valid") -> dict[str, float]:
        """The flat form for a file of records: "valid_loss", "valid_loss_error" and so on."""
        record = {f"{part}_loss": self.loss.value, f"{part}_loss_error": self.loss.error}
        if self.accuracy is not None:
            record |= {
                f"{part}_accuracy": self.accuracy.value,
                f"{part}_accuracy_error": self.accuracy.error,
            }
        return record

    @classmethod
    def of_record(cls, record: dict[str, float]) -> Evaluation:
        """The inverse of ``record``."""
        loss = Estimated(record["valid_loss"], record["valid_loss_error"])
        if "valid_accuracy" not in record:
            return cls(loss, None)
        return cls(loss, Estimated(record["valid_accuracy"], record["valid_accuracy_error"]))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
) -> Evaluation:
    """Runs the model over ``examples``, those of similar length together to save padding."""
    by_length = sorted(examples, key=lambda example: len(example.tokens))
    scores = [
        objective.scores(model, objective.collate(by_length[start : start + batch_size], device))
        for start in range(0, len(by_length), batch_size)
    ]
    predictions = torch.cat([score.predictions for score in scores])
    return Evaluation(
        ratio(torch.cat([score.loss for score in scores]), predictions),
        ratio(torch.cat([score.correct for score in scores]), predictions)
        if objective.reports_accuracy
        else None,
    )


def ratio(sums: Tensor, counts: Tensor) -> Estimated:
    """The mean over all predictions and its standard error over examples.

    Predictions of one example depend on each other, so the examples are the sample: the linearised
    variance of a ratio estimator (Cochran, Sampling Techniques, section 6.3), with n - 1 in place of n.
    Where every count is 1 this is the usual standard error of a mean.
    """
    sums, counts = sums.double(), counts.double()
    mean = (sums.sum() / counts.sum()).item()
    n = len(sums)
    if n < 2:
        return Estimated(mean, math.nan)
    spread = ((sums - mean * counts).square().sum() * n / (n - 1)).sqrt()
    return Estimated(mean, (spread / counts.sum()).item())
