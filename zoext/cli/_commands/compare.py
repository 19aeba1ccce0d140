"""Compares optimizers on one task, each at its own best learning rate, at equal forward passes.

Without --model and --data the task is that of zoext finetune --demo words: MiniLM learns human ratings of
words. DATA is the same as for zoext finetune.

First, each optimizer is swept over a grid of as many learning rates, MeZO's up to 4 times its default; if
the best is at the edge, one more beyond it is tried. Half of the held-out examples select the learning rate,
the other half is reported. Then each optimizer runs with several seeds at the selected learning rate. Every
run stops at the last step that its budget of forward passes allows; all forward passes of a step count. Runs
with the same seed see the same batches in the same order, and those with more forward passes per step see
fewer batches. A run whose held-out loss doubles or is not finite has diverged and loses.

The folder OUT receives comparison.json (the settings), runs.jsonl (the raw figures: a line per evaluation
and per end of a run), table.md and curves.png. With --resume, options that only select the runs, such as
--optimizers and --seeds, may change, and no finished run is repeated.
"""

from __future__ import annotations

import argparse
import dataclasses

from zoext._benchmarking.timing import threads
from zoext._runtime import atomic
from zoext.cli import _json, _options, _resuming
from zoext.cli._comparison import plan, records, report
from zoext.cli._comparison.results import record_of, summarise
from zoext.cli._comparison.running import Progress, Running
from zoext.cli._comparison.settings import (
    DEMO,
    EVALUATIONS,
    ComparisonFolder,
    ComparisonSettings,
    methods_of_papers,
)
from zoext.cli._comparison.start import Start, measure_missing
from zoext.cli._errors import reading, require, writing
from zoext.cli._options import Request
from zoext.cli._problem import load, optimizers
from zoext.cli._problem.optimizers import OPTIMIZERS
from zoext.cli._problem.steps import with_batch_that_fits
from zoext.cli._ranks import Ranks
from zoext.cli._runs.claim import claimed
from zoext.cli._runs.records import Record, replace
from zoext.cli._schedules import SHAPES
from zoext.cli._settings import LORA_LR
from zoext.cli._terminal import StopRequest

EXAMPLES = """\
  zoext compare --optimizers mezo,adamezo,lozo --forwards 2000 --seeds 3 --out runs/comparison
  zoext compare --out runs/comparison --resume --optimizers mezo,adamezo,lozo,agzo
  zoext compare --model ./my-causal-lm --data stories.txt --lr 1e-4 --out runs/stories
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options; those that are not given are absent from the namespace."""
    parser.argument_default = argparse.SUPPRESS
    general = ComparisonSettings()
    defaults = _options.Defaults(general, DEMO)
    _options.add_task(parser, defaults)
    what = parser.add_argument_group("comparison", "defaults, and in brackets those of the demo on words")
    what.add_argument(
        "--optimizers",
        type=_methods,
        metavar="NAME,...",
        help=f"some of the optimizers below (default {','.join(methods_of_papers())})",
    )
    defaults.add(what, "forwards", _options.count, "N", "forward passes per run")
    defaults.add(
        what, "seeds", _options.count, "N", "runs of each optimizer at its best lr, with seeds 0 ... N-1"
    )
    _options.add_step(what, defaults)
    sweep = parser.add_argument_group("learning rate sweep")
    defaults.add(sweep, "lr", _options.positive, "X", "centre of MeZO's grid; other methods scale it")
    sweep.add_argument(
        "--lrs",
        type=_lrs,
        metavar="NAME=X,...",
        help="centres of grids by method, in place of those from --lr",
    )
    factors = ",".join(f"{factor:g}" for factor in general.lr_factors)
    sweep.add_argument(
        "--lr-factors",
        type=_factors,
        metavar="X,...",
        help=f"the grid, as multiples of its centre (default {factors})",
    )
    sweep.add_argument(
        "--sweep-forwards",
        type=_options.count,
        metavar="N",
        help="forward passes per run (default --forwards)",
    )
    defaults.add(sweep, "sweep-seeds", _options.count, "N", "runs at each lr, with seeds 0 ... N-1")
    sweep.add_argument(
        "--schedules",
        type=_schedules,
        metavar="NAME,...",
        help=f"of lr, out of {', '.join(SHAPES)}: each optimizer is swept with all of them and keeps the "
        f"best (default {','.join(general.schedules)})",
    )
    _options.add_lr_schedule(sweep, defaults, "forward passes")
    run = parser.add_argument_group("run")
    run.add_argument(
        "--eval-every",
        type=_options.count,
        metavar="N",
        help=f"forward passes between evaluations (default --forwards / {EVALUATIONS})",
    )
    _options.add_output(run, "runs/compare-N", "without repeating finished runs")
    parser.add_argument_group("optimizers, with the forward passes of a step", optimizers.table())


def _methods(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= OPTIMIZERS.keys():
        raise argparse.ArgumentTypeError(
            f"must be names out of {', '.join(OPTIMIZERS)}, once each, not {text}"
        )
    return names


def _factors(text: str) -> tuple[float, ...]:
    return tuple(sorted({_options.positive(part) for part in text.split(",")}))


def _schedules(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if len(set(names)) < len(names) or not set(names) <= set(SHAPES):
        raise argparse.ArgumentTypeError(f"must be names out of {', '.join(SHAPES)}, once each, not {text}")
    return names


def _lrs(text: str) -> dict[str, float]:
    pairs = [part.partition("=") for part in text.split(",")]
    unknown = [name for name, _, _ in pairs if name not in OPTIMIZERS]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"must be NAME=X,... with names out of {', '.join(OPTIMIZERS)}, not {text}"
        )
    return {name: _options.positive(lr) for name, _, lr in pairs}


def run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Does all missing runs, prints the table and writes everything below --out."""
    require(("transformers", "safetensors", "tqdm", "matplotlib"), "finetune")
    with reading():
        request = Request.of(arguments, add_arguments)
        with claimed(request.out, "compare", ranks) as path:
            folder = ComparisonFolder(path, add_arguments, ranks.launch)
            return _run(_resuming.continued(request, folder), folder, ranks)


def _run(request: Request, folder: ComparisonFolder, ranks: Ranks) -> int:
    defaults = DEMO if request.is_demo else ComparisonSettings()
    if "lora" in request.given:
        defaults = dataclasses.replace(defaults, lr=defaults.lr * LORA_LR)
    settings = _resuming.settings_of(request, folder, defaults, _resuming.COMPARE_CHANGES)
    settings.check()
    with threads(settings.threads):
        return _compare(settings, request, folder, ranks)


def _compare(settings: ComparisonSettings, request: Request, folder: ComparisonFolder, ranks: Ranks) -> int:
    settings, start, raw = _prepare(settings, folder, request, ranks)
    if (code := _finish(settings, start, folder, raw, request.quiet)) != 0:
        ranks.first(_report_stop, folder, request.json)
        return code
    ranks.first(_report, settings, start, folder, request)
    return 0


def _report_stop(folder: ComparisonFolder, as_json: bool) -> None:
    resume = f"zoext compare --out {folder.path} --resume"
    if as_json:
        print(_json.text_of({"out": str(folder.path), "finished": False, "resume": resume}))
    else:
        print(f"stopped; to continue: {resume}")


def _prepare(
    settings: ComparisonSettings, folder: ComparisonFolder, request: Request, ranks: Ranks
) -> tuple[ComparisonSettings, Start, list[Record]]:
    """Loads and measures everything before it changes the folder; returns the records so far as well."""
    device = _options.choose_device(settings.device, ranks)
    problem = load(settings.of_run(settings.optimizers[0], settings.lr, seed=0), device)
    if not request.resume:
        settings = with_batch_that_fits(settings, request.given, len(problem.train))
    start = Start(problem, settings.at_once, device, ranks)
    raw: list[Record] = []
    if request.resume:
        raw = records.read(folder.runs)
        _resuming.check_inputs(folder, start.fingerprint, "model or data")
    if not request.quiet:
        _introduce(settings, start, folder)
    raw += measure_missing(start, settings, records.costs(raw))
    ranks.wait()  # all have read what the first one changes now
    ranks.first(_write_start, settings, folder, request, start.fingerprint, raw)
    return settings, start, raw


def _write_start(
    settings: ComparisonSettings,
    folder: ComparisonFolder,
    request: Request,
    fingerprint: str,
    raw: list[Record],
) -> None:
    if request.resume:
        folder.remove_leftovers()
        folder.write_note(settings, fingerprint)
    else:
        folder.start(settings, fingerprint, request.overwrite)
    replace(folder.runs, raw)


def _introduce(settings: ComparisonSettings, start: Start, folder: ComparisonFolder) -> None:
    print(
        f"{start.problem.title}, {settings.dtype} on {start.device}\n"
        f"{len(start.problem.train)} training examples; of the held-out ones, {len(start.selection)} select "
        f"the lr and {len(start.report)} are reported\n"
        f"{', '.join(settings.optimizers)}: {settings.forwards} forward passes per run; "
        f"output in {folder.path}"
    )


def _finish(
    settings: ComparisonSettings, start: Start, folder: ComparisonFolder, raw: list[Record], quiet: bool
) -> int:
    """Does the missing runs one by one; returns the exit code: 0 if all are done."""
    done, cost = records.outcomes(raw), records.costs(raw)
    with StopRequest(start.ranks) as stop, Progress(quiet) as progress:
        while (following := plan.next_run(settings, done)) is not None:
            phase, run = following
            progress.begin(run, plan.forwards_to_do(settings, done))
            running = Running(phase, run, start, settings, folder, cost[run.method]["forwards_a_step"])
            outcome = running.finish(stop, progress)
            if outcome is None:
                return stop.exit_code
            done[run] = outcome
            progress.end(phase, run, outcome)
    return 0


def _report(settings: ComparisonSettings, start: Start, folder: ComparisonFolder, request: Request) -> None:
    """Writes the table and the figure, both from the raw records, and prints the results."""
    summaries = summarise(settings, records.read(folder.runs))
    text = report.page(settings, start, summaries)
    with writing(folder.table):
        atomic.write_text(folder.table, text)
    report.draw_curves(folder.curves, summaries, start.problem.title)
    files = {"table": folder.table, "curves": folder.curves, "runs": folder.runs}
    if request.json:
        paths = {name: str(path) for name, path in files.items()}
        methods = [record_of(summary) for summary in summaries]
        print(_json.text_of({"out": str(folder.path), "finished": True, **paths, "methods": methods}))
    elif not request.quiet:
        print("\n".join([text, *map(str, files.values())]))
