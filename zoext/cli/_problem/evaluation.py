"""Held-out loss and other metrics, with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from zoext.cli._ranks import ALONE, Ranks
from zoext.tasks import Example, Objective


@dataclass(frozen=True)
class Estimated:
    """A mean and its standard error over examples, which is not a number for a single example."""

    value: float
    error: float

    def __str__(self) -> str:
        return f"{self.value:.4f}" + ("" if math.isnan(self.error) else f" ± {self.error:.4f}")


@dataclass(frozen=True)
class Evaluation:
    """The result of ``evaluate``: the loss, and the metrics of the objective by name.

    Attributes:
        sums: per example, the sum of its losses and the number of predictions, float64 [2, N], in an order
            that depends on the examples only.
    """

    loss: Estimated
    metrics: Mapping[str, Estimated] = field(default_factory=dict)
    sums: Tensor = field(default_factory=lambda: torch.zeros(2, 0), compare=False, repr=False)

    def __str__(self) -> str:
        return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in self._named())

    def _named(self) -> list[tuple[str, Estimated]]:
        return [("loss", self.loss), *self.metrics.items()]

    def record(self, part: str = "valid") -> dict[str, float]:
        """The flat form for a JSON line: "valid_loss", "valid_loss_error" and so on."""
        record = {}
        for name, found in self._named():
            record[f"{part}_{name}"] = found.value
            record[f"{part}_{name}_error"] = found.error
        return record

    @classmethod
    def of_record(cls, record: Mapping[str, float], part: str = "valid") -> Evaluation:
        """The inverse of ``record``."""
        start, end = f"{part}_", "_error"
        names = [
            key.removeprefix(start).removesuffix(end)
            for key in record
            if key.startswith(start) and key.endswith(end)
        ]
        found = {
            name: Estimated(record[f"{start}{name}"], record[f"{start}{name}{end}"])
            for name in names
            if f"{start}{name}" in record
        }
        return cls(found.pop("loss"), found)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    objective: Objective,
    examples: Sequence[Example],
    batch_size: int,
    device: torch.device,
    ranks: Ranks = ALONE,
) -> Evaluation:
    """Evaluates the model on ``examples``, batched by length to reduce padding.

    Batches are dealt out over ranks, which gives the bits of one process.
    """
    by_length = sorted(examples, key=lambda example: example.length)
    names = objective.metrics
    found = torch.zeros(2 + len(names), len(by_length), dtype=torch.float64, device=device)
    for start in ranks.share_of(range(0, len(by_length), batch_size)):
        some = slice(start, start + batch_size)
        scores = objective.scores(model, objective.collate(by_length[some], device))
        metrics = {**scores.metrics, **objective.examine(model, by_length[some], device)}
        columns = [scores.loss, scores.predictions, *(metrics[name] for name in names)]
        found[:, some] = torch.stack([column.to(device).double() for column in columns])
    loss, predictions, *metrics_found = ranks.sum(found)
    ones = torch.ones_like(predictions)
    return Evaluation(
        ratio(loss, predictions),
        {name: ratio(value, ones) for name, value in zip(names, metrics_found, strict=True)},
        torch.stack([loss, predictions]),
    )


def ratio(sums: Tensor, counts: Tensor) -> Estimated:
    """The mean over all predictions and its standard error over examples.

    Predictions of one example are dependent, so the examples are the sample: the linearised variance of a
    ratio estimator (Cochran, Sampling Techniques, section 6.3), with n - 1 in place of n. If every count is
    1, it equals the standard error of the mean.
    """
    sums, counts = sums.double(), counts.double()
    mean = (sums.sum() / counts.sum()).item()
    n = len(sums)
    if n < 2:
        return Estimated(mean, math.nan)
    residual = ((sums - mean * counts).square().sum() * n / (n - 1)).sqrt()
    return Estimated(mean, (residual / counts.sum()).item())
