"""Fine-tunes a model of transformers with forward passes only.

Without --model and --data it is a demo: MiniLM, a pre-trained transformer, learns human ratings of
words, offline, in a few minutes on two processor cores.

DATA is a .csv or .jsonl file with the columns text and label (or text only, for a causal language
model), a .txt file with an example on each line, a folder that holds such files as train.* and
valid.*, or the name of a data set on the Hugging Face hub.

The folder OUT gets run.json (the settings), metrics.jsonl (a line for each step and each evaluation),
checkpoints/, curve.png, model/ (for from_pretrained of transformers) and trajectory.jsonl, from which
zoext replay makes the model again.
"""

from __future__ import annotations

import argparse
import dataclasses

from zoext.cli import checkpoint, demo, devices, metrics, optimizers, plot
from zoext.cli.arguments import add_arguments as add_arguments
from zoext.cli.claim import claimed
from zoext.cli.errors import UserError, reading, require
from zoext.cli.interrupt import StopRequest
from zoext.cli.loading import load
from zoext.cli.optimizers import OPTIMIZERS
from zoext.cli.output_folder import fingerprint
from zoext.cli.progress import Progress
from zoext.cli.recording import Recording, check, obstacle
from zoext.cli.resolving import Request
from zoext.cli.result import report, write_model
from zoext.cli.run_folder import RunFolder
from zoext.cli.settings import Settings
from zoext.cli.training import Training

HELP = "fine-tune a model; without arguments, a demo"

#: What may differ when a run is resumed: none of it changes what a step does.
RESUMABLE = {"steps", "device", "eval_every", "checkpoint_every", "checkpoint"}


def run(arguments: argparse.Namespace) -> int:
    """Trains, evaluates before and after, and writes everything below --out."""
    require(("transformers", "safetensors", "tqdm", "matplotlib"), "finetune")
    with reading():
        request = Request.of(arguments)
        with claimed(request.out, "demo" if request.is_demo else "finetune") as path:
            return _run(request, RunFolder(path))


def _run(request: Request, folder: RunFolder) -> int:
    settings = request.settings(folder, _usual(request), RESUMABLE)
    training, recording = _prepare(settings, folder, request)
    with recording, StopRequest() as stop:
        if not request.quiet:
            _introduce(training)
        with Progress(training.step, settings.steps, request.quiet) as progress:
            training.run(recording, stop, progress)
    records = metrics.read(folder.metrics)
    plot.draw(folder.curve, records, training.problem.title)
    if training.step < settings.steps:
        print(f"stopped after step {training.step}; to go on: zoext finetune --out {folder.path} --resume")
        return 130
    write_model(folder.model, training.problem)
    if not request.quiet:
        print(report(records, folder))
    return 0


def _prepare(settings: Settings, folder: RunFolder, request: Request) -> tuple[Training, Recording]:
    """Loads and checks everything; only then is the folder changed."""
    device = devices.choose(settings.device)
    loaded = load(settings, device)
    optimizer = optimizers.make(loaded.model, settings)
    check(settings, optimizer)
    training = Training(loaded, optimizer, settings, folder, device)
    data = fingerprint(loaded.train, loaded.valid)
    if not request.resume:
        folder.start(settings, data, request.overwrite)
        return training, training.begin()
    if folder.read_note()[1] != data:
        raise UserError(
            f"--out {folder.path}: its run saw other data; resume with the same data and tokenizer"
        )
    saved = checkpoint.load_newest(folder.checkpoints)
    if saved is not None and saved.reached.step > settings.steps:
        at = saved.reached.step
        raise UserError(f"--steps {settings.steps}: the run in {folder.path} is at step {at} already")
    recording = training.resume(saved)
    folder.remove_leftovers()
    folder.write_note(settings, data)
    return training, recording


def _usual(request: Request) -> Settings:
    """What holds for options that are not given; the lr is that of the optimizer, in its own size."""
    usual = demo.SETTINGS if request.is_demo else Settings()
    chosen = request.given.get("optimizer", usual.optimizer)
    return dataclasses.replace(usual, lr=usual.lr * OPTIMIZERS[chosen].lr_scale)


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
    if (reason := obstacle(settings, training.optimizer)) is not None:
        print(f"the trajectory cannot be replayed: {reason}")
