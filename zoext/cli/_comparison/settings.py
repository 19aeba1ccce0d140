"""Settings and output folder of a comparison."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from zoext.cli._errors import UserError
from zoext.cli._problem import demo
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.cli._runs.folder import OutputFolder
from zoext.cli._schedules import CONSTANT, check_warmup
from zoext.cli._settings import AddArguments, CommonSettings, Settings

EVALUATIONS = 10  # per run by default, not counting the one at the start


def methods_of_papers() -> tuple[str, ...]:
    """The methods as published, which are compared by default."""
    return tuple(name for name, method in OPTIMIZERS.items() if not method.variant)


@dataclass(frozen=True)
class ComparisonSettings(CommonSettings):
    """The options of ``zoext compare`` and their defaults; ``lr`` is the centre of MeZO's grid."""

    optimizers: tuple[str, ...] = field(default_factory=methods_of_papers)
    lrs: dict[str, float] = field(default_factory=dict)
    lr_factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    schedules: tuple[str, ...] = (CONSTANT,)
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
        option = "--forwards" if self.sweep_forwards is None else "--sweep-forwards"
        self.check_accumulation()
        check_warmup(self.warmup, option, self.sweep_budget)

    @property
    def sweep_budget(self) -> int:
        """Forward passes per run of the sweep."""
        return self.forwards if self.sweep_forwards is None else self.sweep_forwards

    @property
    def evaluation_interval(self) -> int:
        """Forward passes between evaluations."""
        return self.eval_every or max(1, self.forwards // EVALUATIONS)

    def default_lr(self, method: str) -> float:
        """The centre of the method's grid."""
        return self.lrs.get(method, self.lr * OPTIMIZERS[method].lr_scale)

    def grid(self, method: str) -> tuple[float, ...]:
        """The learning rates of the method's sweep, ascending; all methods have equally many."""
        return tuple(self.default_lr(method) * factor for factor in self.lr_factors)

    def of_run(self, method: str, lr: float, seed: int, schedule: str = CONSTANT) -> Settings:
        """The settings of one run; its number of steps follows from its budget of forward passes."""
        common = {f.name: getattr(self, f.name) for f in dataclasses.fields(CommonSettings)}
        return Settings(**{**common, "lr": lr}, optimizer=method, seed=seed, schedule=schedule)


#: The demo: as many forward passes as MeZO, which takes two per step, spends in finetune --demo words.
DEMO = ComparisonSettings(
    **{f.name: getattr(demo.SETTINGS, f.name) for f in dataclasses.fields(CommonSettings)},
    forwards=2 * demo.SETTINGS.steps,
)


class ComparisonFolder(OutputFolder[ComparisonSettings]):
    """The folder of ``zoext compare``: settings, raw records, table and figure."""

    def __init__(self, path: Path, add_arguments: AddArguments, launch: str | None = None) -> None:
        results = ("runs.jsonl", "table.md", "curves.png")
        super().__init__(path, "comparison.json", results, ComparisonSettings, add_arguments, launch)
        self.runs, self.table, self.curves = (path / name for name in results)
