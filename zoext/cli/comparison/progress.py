"""What a comparison shows while it runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from zoext.cli.comparison.plan import FINAL
from zoext.cli.comparison.records import Outcome, Run


class Progress:
    """A bar over the forward passes of all runs left, with the run that is on; ``quiet`` shows nothing."""

    def __init__(self, quiet: bool) -> None:
        from tqdm import tqdm

        self._quiet = quiet
        self._bar = tqdm(total=0, unit="forward", disable=quiet, dynamic_ncols=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self._bar.close()

    def begin(self, run: Run, to_do: int) -> None:
        """``run`` is next; with it, ``to_do`` forwards are left."""
        self._bar.total = self._bar.n + to_do
        self._bar.set_description_str(describe(run))

    def step(self, forwards: int) -> None:
        self._bar.update(forwards)

    def end(self, phase: str, run: Run, outcome: Outcome) -> None:
        """A line above the bar on the run that is done: its loss where that counts in this phase."""
        if self._quiet:
            return
        name = "report_loss" if phase == FINAL else "selection_loss"
        losses = [evaluation[name] for evaluation in outcome.evaluations]
        result = outcome.end["diverged"] or f"held-out loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        self._bar.write(f"{phase}: {describe(run)}: {result}")


def describe(run: Run) -> str:
    return f"{run.method} lr {run.lr:.3g} seed {run.seed}"
