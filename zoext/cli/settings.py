"""What determines a run: kept beside its checkpoints, so that resuming needs no arguments."""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = ("classification", "causal-lm")
DTYPES = ("float32", "bfloat16", "float16")
PROBES = ("auto", "streamed", "inplace")
PRECISIONS = ("nearest", "stochastic", "residual")
CHECKPOINTS = ("weights", "trajectory")


@dataclass(frozen=True)
class CommonSettings:
    """What ``zoext finetune`` and ``zoext compare`` share. Without model and data: the demo."""

    model: str | None = None
    data: str | None = None
    valid_data: str | None = None
    validation_fraction: float = 0.1
    task: str | None = None
    max_length: int = 256
    trainable: str = ""
    lr: float = 1e-6
    mu: float = 1e-3
    weight_decay: float = 0.0
    batch_size: int = 16
    dtype: str = "float32"
    probe: str = "auto"
    device: str | None = None

    @property
    def is_demo(self) -> bool:
        return self.model is None and self.data is None


@dataclass(frozen=True)
class Settings(CommonSettings):
    """The arguments of ``zoext finetune`` and their defaults."""

    optimizer: str = "mezo"
    options: dict[str, str] = field(default_factory=dict)
    steps: int = 1000
    precision: str = "stochastic"
    seed: int = 0
    eval_every: int = 100
    checkpoint_every: int = 100
    checkpoint: str = "weights"
    record_frames: bool = False
