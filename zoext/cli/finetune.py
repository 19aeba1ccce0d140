"""Fine-tunes a model of transformers with forward passes only.

Without --model and --data it is a demo: MiniLM, a pre-trained transformer, learns human ratings of
words, offline, in a few minutes on two processor cores.

DATA is a .csv or .jsonl file with the columns text and label (or text only, for a causal language
model), a .txt file with an example on each line, a folder that holds such files as train.* and
valid.*, or the name of a data set on the Hugging Face hub.

The folder OUT gets run.json (the settings), metrics.jsonl (a line for each step and each evaluation),
checkpoints/, curve.png and model/ (for from_pretrained of transformers).
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zoext.cli import checkpoint, demo, devices, metrics, optimizers, plot, problem
from zoext.cli.errors import UserError, require
from zoext.cli.interrupt import StopRequest
from zoext.cli.models import choose_trainable
from zoext.cli.progress import Progress
from zoext.cli.result import report, write_model
from zoext.cli.run_folder import RunFolder, fingerprint, unused
from zoext.cli.settings import DTYPES, TASKS, Settings
from zoext.cli.training import Training

HELP = "fine-tune a model; without arguments, a demo"

#: What may differ when a run is resumed: none of it changes what a step does.
RESUMABLE = {"steps", "device", "eval_every", "checkpoint_every"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options; one that is not given is not in the namespace."""
    parser.argument_default = argparse.SUPPRESS
    what = parser.add_argument_group("what to learn")
    what.add_argument("--model", metavar="M", help="a folder, or a name on the hub (default: the demo's)")
    what.add_argument(
        "--data", metavar="D", help="a file, a folder, or a name on the hub (default: the demo's)"
    )
    what.add_argument("--valid-data", metavar="D", help="held-out examples, in any of the same forms")
    what.add_argument(
        "--validation-fraction",
        type=_fraction,
        metavar="F",
        help="held out where there are none (default 0.1)",
    )
    what.add_argument("--task", choices=TASKS, help="default: classification if there are labels")
    what.add_argument(
        "--max-length", type=_count, metavar="N", help="tokens; longer texts are cut (default 256)"
    )
    what.add_argument(
        "--trainable", metavar="PATTERN", help="regular expression; parameters whose name matches move"
    )
    how = parser.add_argument_group("how to learn", "defaults, and in brackets those of the demo")
    how.add_argument("--optimizer", choices=tuple(optimizers.OPTIMIZERS), help="default mezo")
    for name, kind, text in _NUMBERS:
        how.add_argument(
            f"--{name}", type=kind, metavar="X" if kind is not _count else "N", help=_default(name, text)
        )
    how.add_argument("--seed", type=_seed, metavar="N", help="determines the whole run (default 0)")
    how.add_argument("--dtype", choices=DTYPES, help="of the weights (default float32)")
    how.add_argument(
        "--probe", choices=("auto", "streamed", "inplace"), help="how weights are displaced (default auto)"
    )
    how.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    run = parser.add_argument_group("the run")
    run.add_argument(
        "--out", type=Path, metavar="DIR", help="default: runs/demo-N or runs/finetune-N, the next free N"
    )
    run.add_argument("--resume", action="store_true", help="go on with the run in --out, bit for bit")
    run.add_argument("--overwrite", action="store_true", help="remove the run in --out and start a new one")
    run.add_argument("--quiet", action="store_true", help="print nothing but errors")


def _positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"must be finite and > 0, not {text}")
    return value


def _nonnegative(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value >= 0):
        raise argparse.ArgumentTypeError(f"must be finite and >= 0, not {text}")
    return value


def _seed(text: str) -> int:
    value = int(text)
    if not -(2**63) <= value < 2**64:
        raise argparse.ArgumentTypeError(f"must fit into 64 bits, not {text}")
    return value


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"must be between 0 and 1, not {text}")
    return value


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {text}")
    return value


for _kind in (_positive, _nonnegative, _fraction):
    _kind.__name__ = "number"  # what argparse calls a text that is none
_count.__name__ = _seed.__name__ = "integer"

_NUMBERS: tuple[tuple[str, Callable[[str], float], str], ...] = (
    ("lr", _positive, "learning rate"),
    ("mu", _positive, "scale of the displacement"),
    ("weight-decay", _nonnegative, "decoupled"),
    ("steps", _count, "optimizer steps"),
    ("batch-size", _count, "examples a step"),
    ("eval-every", _count, "steps between evaluations"),
    ("checkpoint-every", _count, "steps between checkpoints"),
)


def _default(option: str, text: str) -> str:
    field = option.replace("-", "_")
    usual, in_demo = getattr(Settings(), field), getattr(demo.SETTINGS, field)
    return f"{text} (default {usual:g}" + (")" if usual == in_demo else f" [{in_demo:g}])")


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates before and after, and writes everything below --out."""
    require(("transformers", "safetensors", "tqdm", "matplotlib"), "finetune")
    given = vars(arguments)
    out: Path | None = given.pop("out", None)
    resume, overwrite, quiet = (given.pop(name, False) for name in ("resume", "overwrite", "quiet"))
    settings, folder = _resolve(given, out, resume, overwrite)
    training = _prepare(settings, folder, resume)
    if not quiet:
        _introduce(training)
    with StopRequest() as stop, Progress(training.step, settings.steps, quiet) as progress:
        training.run(stop, progress)
    records = metrics.read(folder.metrics)
    plot.draw(folder.curve, records, training.problem.title)
    if training.step < settings.steps:
        print(f"stopped after step {training.step}; to go on: zoext finetune --out {folder.path} --resume")
        return 130
    write_model(folder.model, training.problem)
    if not quiet:
        print(report(records, folder))
    return 0


def _resolve(
    given: dict[str, Any], out: Path | None, resume: bool, overwrite: bool
) -> tuple[Settings, RunFolder]:
    """The settings of the run and its folder, which may or may not hold a run; nothing is written yet."""
    if resume and (out is None or overwrite):
        raise UserError(
            "--resume needs --out DIR" if out is None else "--resume and --overwrite exclude each other"
        )
    is_demo = "model" not in given and "data" not in given
    folder = RunFolder(out or unused(Path("runs"), "demo" if is_demo else "finetune"))
    if not resume:
        if folder.holds_run and not overwrite:
            raise UserError(f"--out {out}: holds a run already; give --resume, --overwrite or another folder")
        return dataclasses.replace(demo.SETTINGS if is_demo else Settings(), **given), folder
    settings, _ = folder.read_settings()
    for name, value in given.items():
        if name not in RESUMABLE and value != getattr(settings, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {value}: the run in {out} has {getattr(settings, name)}; "
                f"leave {option} out to resume it"
            )
    return dataclasses.replace(settings, **given), folder


def _prepare(settings: Settings, folder: RunFolder, resume: bool) -> Training:
    """Loads and checks everything; only then is the folder changed."""
    device = devices.choose(settings.device)
    loaded = (
        demo.load(settings) if settings.model is None and settings.data is None else problem.load(settings)
    )
    choose_trainable(loaded.model, settings.trainable)
    loaded.model.to(device)
    optimizer = optimizers.make(loaded.model, settings)
    training = Training(loaded, optimizer, settings, folder, device)
    data = fingerprint(loaded.train, loaded.valid)
    if not resume:
        folder.start(settings, data)
        return training
    if folder.read_settings()[1] != data:
        raise UserError(
            f"--out {folder.path}: its run saw other data; resume with the same data and tokenizer"
        )
    saved = checkpoint.load_newest(folder.checkpoints)
    if saved is not None and saved.step > settings.steps:
        raise UserError(f"--steps {settings.steps}: the run in {folder.path} is at step {saved.step} already")
    training.resume(saved)
    folder.remove_leftovers()
    folder.note(settings, data)
    return training


def _introduce(training: Training) -> None:
    model, settings = training.problem.model, training.settings
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    moving = sum(size for size, moves in sizes if moves)
    print(
        f"{training.problem.title}\n"
        f"{len(training.problem.train)} training and {len(training.problem.valid)} held-out examples\n"
        f"{moving:,} of {sum(size for size, _ in sizes):,} parameters move; "
        f"{settings.dtype} on {training.device}\n"
        f"{settings.optimizer}: lr {settings.lr:g}, mu {settings.mu:g}, batch {settings.batch_size}, "
        f"seed {settings.seed}; everything goes to {training.folder.path}"
    )
