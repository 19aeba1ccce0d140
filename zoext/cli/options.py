"""The options that ``zoext finetune`` and ``zoext compare`` share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from zoext.cli import numbers
from zoext.cli.settings import DTYPES, PROBES, TASKS, CommonSettings


@dataclass(frozen=True)
class Defaults:
    """What holds for an option that is not given: usually, and in the demo."""

    usual: CommonSettings
    demo: CommonSettings

    def add(
        self,
        group: argparse._ArgumentGroup,
        option: str,
        kind: Callable[[str], object],
        metavar: str,
        text: str,
    ) -> None:
        """Adds ``--option``, a number whose defaults its help names."""
        field = option.replace("-", "_")
        usual, in_demo = getattr(self.usual, field), getattr(self.demo, field)
        default = f"{usual:g}" if usual == in_demo else f"{usual:g} [{in_demo:g}]"
        group.add_argument(f"--{option}", type=kind, metavar=metavar, help=f"{text} (default {default})")


def add_task(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """Model, data, and which parameters move."""
    group = parser.add_argument_group("what to learn")
    group.add_argument("--model", metavar="M", help="a folder, or a name on the hub (default: the demo's)")
    group.add_argument(
        "--data", metavar="D", help="a file, a folder, or a name on the hub (default: the demo's)"
    )
    group.add_argument("--valid-data", metavar="D", help="held-out examples, in any of the same forms")
    defaults.add(
        group, "validation-fraction", numbers.fraction, "F", "held out of the data where it has no such part"
    )
    group.add_argument("--task", choices=TASKS, help="default: classification if there are labels")
    defaults.add(group, "max-length", numbers.count, "N", "tokens; longer texts are cut")
    group.add_argument(
        "--trainable",
        metavar="PATTERN",
        help="regular expression; parameters whose name matches move (default all [all but embeddings])",
    )


def add_step(group: argparse._ArgumentGroup, defaults: Defaults) -> None:
    """What every step does besides its learning rate, and where."""
    defaults.add(group, "mu", numbers.positive, "X", "scale of the displacement")
    defaults.add(group, "weight-decay", numbers.nonnegative, "X", "decoupled")
    defaults.add(group, "batch-size", numbers.count, "N", "examples a step")
    usual = defaults.usual
    group.add_argument("--dtype", choices=DTYPES, help=f"of the weights (default {usual.dtype})")
    group.add_argument("--probe", choices=PROBES, help=f"how weights are displaced (default {usual.probe})")
    group.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")


def add_output(group: argparse._ArgumentGroup, out: str, resume: str) -> None:
    """The folder, and what to do about a run that is in it."""
    group.add_argument("--out", type=Path, metavar="DIR", help=f"default: {out}, the next free N")
    group.add_argument("--resume", action="store_true", help=f"go on with the run in --out, {resume}")
    group.add_argument("--overwrite", action="store_true", help="remove the run in --out and start a new one")
    group.add_argument("--quiet", action="store_true", help="print nothing but errors and how to resume")
