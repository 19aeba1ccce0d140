"""The options of ``zoext finetune``."""

from __future__ import annotations

import argparse

from zoext.cli import demo, method_options, numbers, options
from zoext.cli.optimizers import OPTIMIZERS
from zoext.cli.settings import CHECKPOINTS, PRECISIONS, Settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; one that is not given is not in the namespace."""
    parser.argument_default = argparse.SUPPRESS
    defaults = options.Defaults(Settings(), demo.SETTINGS)
    options.add_task(parser, defaults)
    how = parser.add_argument_group("how to learn", "defaults, and in brackets those of the demo")
    how.add_argument("--optimizer", choices=tuple(OPTIMIZERS), help=f"default {Settings.optimizer}")
    how.add_argument(
        "--options",
        type=method_options.parse,
        metavar="NAME=VALUE,...",
        help="of the optimizer, as in rank=4,balance=still or betas=0.9/0.99,horizon=20",
    )
    defaults.add(how, "lr", numbers.positive, "X", "learning rate; the default is MeZO's, others scale it")
    defaults.add(how, "steps", numbers.count, "N", "optimizer steps")
    defaults.add(how, "seed", numbers.seed, "N", "determines the whole run")
    options.add_step(how, defaults)
    how.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="what becomes of the part of an update that weights of 16 bits cannot hold: lost, rounded up or "
        f"down by chance, or kept in another byte (default {Settings.precision})",
    )
    run = parser.add_argument_group("the run")
    defaults.add(run, "eval-every", numbers.count, "N", "steps between evaluations")
    defaults.add(run, "checkpoint-every", numbers.count, "N", "steps between checkpoints")
    run.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="what a checkpoint holds: the weights, or only how far the trajectory has come, from which "
        f"resuming replays them (default {Settings.checkpoint})",
    )
    run.add_argument(
        "--record-frames",
        action="store_true",
        help="record the bases of AGZO beside the trajectory; without them it cannot be replayed",
    )
    options.add_output(run, "runs/demo-N or runs/finetune-N", "bit for bit")
