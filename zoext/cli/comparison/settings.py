"""What determines a comparison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from zoext.cli import demo
from zoext.cli.errors import UserError
from zoext.cli.optimizers import OPTIMIZERS
from zoext.cli.settings import CommonSettings, Settings

EVALUATIONS = 10  # of a run beside that of the start


def of_papers() -> tuple[str, ...]:
    """The methods as their papers have them: what is compared by default."""
    return tuple(name for name, method in OPTIMIZERS.items() if not method.variant)


@dataclass(frozen=True)
class ComparisonSettings(CommonSettings):
    """The arguments of ``zoext compare`` and their defaults; ``lr`` is MeZO's usual one on the task."""

    optimizers: tuple[str, ...] = field(default_factory=of_papers)
    lrs: dict[str, float] = field(default_factory=dict)
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    forwards: int = 2000
    seeds: int = 3
    sweep_forwards: int | None = None
    sweep_seeds: int = 1
    eval_every: int | None = None

    def check(self) -> None:
        """Raises a UserError for options that contradict each other."""
        if self.sweep_forwards is not None and self.sweep_forwards > self.forwards:
            raise UserError(
                f"--sweep-forwards {self.sweep_forwards}: more than the {self.forwards} of --forwards; "
                "give as many or fewer"
            )

    @property
    def sweep_budget(self) -> int:
        return self.forwards if self.sweep_forwards is None else self.sweep_forwards

    @property
    def evaluation_interval(self) -> int:
        return self.eval_every or max(1, self.forwards // EVALUATIONS)

    def usual_lr(self, method: str) -> float:
        """The centre of the method's grid."""
        return self.lrs.get(method, self.lr * OPTIMIZERS[method].lr_scale)

    def grid(self, method: str) -> tuple[float, ...]:
        """The learning rates of the method's sweep, rising: as many for one as for another."""
        return tuple(self.usual_lr(method) * factor for factor in self.lr_factors)

    def of_run(self, method: str, lr: float, seed: int) -> Settings:
        """The settings of one run, but for its steps: it ends by its forwards."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(CommonSettings)}
        return Settings(**{**common, "lr": lr}, optimizer=method, seed=seed)


#: The demo's: its task, and twice as many forwards as it has steps, since a step of MeZO takes two.
DEMO = ComparisonSettings(
    **{f.name: getattr(demo.SETTINGS, f.name) for f in dataclasses.fields(CommonSettings)},
    forwards=2 * demo.SETTINGS.steps,
)
