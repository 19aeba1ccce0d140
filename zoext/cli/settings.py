"""What determines a run: kept beside its checkpoints, so that resuming needs no arguments."""

from __future__ import annotations

from dataclasses import dataclass

TASKS = ("classification", "causal-lm")
DTYPES = ("float32", "bfloat16")
PROBES = ("auto", "streamed", "inplace")


@dataclass(frozen=True)
class Settings:
    """The arguments of ``zoext finetune`` and their defaults. Without model and data: the demo."""

    model: str | None = None
    data: str | None = None
    valid_data: str | None = None
    validation_fraction: float = 0.1
    task: str | None = None
    optimizer: str = "mezo"
    lr: float = 1e-6
    mu: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 1000
    batch_size: int = 16
    max_length: int = 256
    seed: int = 0
    dtype: str = "float32"
    device: str | None = None
    probe: str = "auto"
    trainable: str = ""
    eval_every: int = 100
    checkpoint_every: int = 100
