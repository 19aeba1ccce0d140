"""Compares optimizers on one task, each at its own best learning rate, at equal forward passes.

Without --model and --data the task is the demo: MiniLM learns human ratings of words. DATA is what
zoext finetune takes.

First each optimizer is swept over a grid of learning rates, as many for one as for another, MeZO's up to
4 times its usual one; where the best is at the edge, one more beyond it is tried. Half of the held-out
examples choose, the other half is reported. Then each runs with several seeds at the lr that won. Every
run stops at the last step that the budget of forward passes allows; all forwards of a step count. Seed by
seed the runs see the same batches in the same order, and those with more forwards a step see fewer of
them. A run whose held-out loss doubles or is not finite has diverged and loses.

The folder OUT gets comparison.json (the settings), runs.jsonl (a line for each evaluation and each end of
a run; the raw figures), table.md and curves.png. With --resume, options that only say which runs there
are, such as --optimizers and --seeds, may be other than before: what is done is not done again.
"""

from __future__ import annotations

import argparse

from zoext._runtime import atomic
from zoext.cli import devices, json_lines
from zoext.cli.claim import claimed
from zoext.cli.comparison import costs, figure, page, plan, records
from zoext.cli.comparison.arguments import add_arguments as add_arguments
from zoext.cli.comparison.folder import ComparisonFolder
from zoext.cli.comparison.progress import Progress
from zoext.cli.comparison.running import Running
from zoext.cli.comparison.settings import DEMO, ComparisonSettings
from zoext.cli.comparison.start import Start
from zoext.cli.comparison.summary import summarise
from zoext.cli.errors import UserError, reading, require, writing
from zoext.cli.interrupt import StopRequest
from zoext.cli.json_lines import Record
from zoext.cli.loading import load
from zoext.cli.resolving import Request

HELP = "compare optimizers at equal forward passes; without arguments, on the demo"

#: What may differ when a comparison is resumed: it says which runs there are, not what one of them does.
RESUMABLE = {
    *("optimizers", "lr", "lrs", "lr_factors", "forwards", "seeds"),
    *("sweep_forwards", "sweep_seeds"),
}


def run(arguments: argparse.Namespace) -> int:
    """Does all runs that are missing, then prints the table and writes everything below --out."""
    require(("transformers", "safetensors", "tqdm", "matplotlib"), "finetune")
    with reading():
        request = Request.of(arguments)
        with claimed(request.out, "compare") as path:
            return _run(request, ComparisonFolder(path))


def _run(request: Request, folder: ComparisonFolder) -> int:
    settings = request.settings(folder, DEMO if request.is_demo else ComparisonSettings(), RESUMABLE)
    settings.check()
    start, raw = _prepare(settings, folder, request)
    if not _finish(settings, start, folder, raw, request.quiet):
        print(f"stopped; to go on: zoext compare --out {folder.path} --resume")
        return 130
    text = _report(settings, start, folder)
    if not request.quiet:
        print(f"{text}\n{folder.table}\n{folder.curves}\n{folder.runs}")
    return 0


def _prepare(
    settings: ComparisonSettings, folder: ComparisonFolder, request: Request
) -> tuple[Start, list[Record]]:
    """Loads and measures everything; only then is the folder changed. Returns what is recorded so far."""
    device = devices.choose(settings.device)
    problem = load(settings.of_run(settings.optimizers[0], settings.lr, seed=0), device)
    start = Start(problem, settings.batch_size, device)
    raw: list[Record] = []
    if request.resume:
        raw = records.read(folder.runs)
        if folder.read_note()[1] != start.fingerprint:
            raise UserError(
                f"--out {folder.path}: its runs began with another model or saw other data; "
                "resume with the same, or give another --out"
            )
    if not request.quiet:
        _introduce(settings, start, folder)
    raw += costs.measure_missing(start, settings, records.costs(raw))
    if request.resume:
        folder.remove_leftovers()
        folder.write_note(settings, start.fingerprint)
    else:
        folder.start(settings, start.fingerprint, request.overwrite)
    json_lines.replace(folder.runs, raw)
    return start, raw


def _introduce(settings: ComparisonSettings, start: Start, folder: ComparisonFolder) -> None:
    print(
        f"{start.problem.title}, {settings.dtype} on {start.device}\n"
        f"{len(start.problem.train)} training examples; of those held out, {len(start.selection)} choose "
        f"the lr and {len(start.report)} are reported\n"
        f"{', '.join(settings.optimizers)}: {settings.forwards} forwards a run; "
        f"everything goes to {folder.path}"
    )


def _finish(
    settings: ComparisonSettings, start: Start, folder: ComparisonFolder, raw: list[Record], quiet: bool
) -> bool:
    """Does the runs that are missing, one by one; whether none is left."""
    done, cost = records.outcomes(raw), records.costs(raw)
    with StopRequest() as stop, Progress(quiet) as progress:
        while (following := plan.next_run(settings, done)) is not None:
            phase, run = following
            progress.begin(run, plan.forwards_to_do(settings, done))
            running = Running(phase, run, start, settings, folder, cost[run.method]["forwards_a_step"])
            outcome = running.finish(stop, progress)
            if outcome is None:
                return False
            done[run] = outcome
            progress.end(phase, run, outcome)
    return True


def _report(settings: ComparisonSettings, start: Start, folder: ComparisonFolder) -> str:
    """Writes the table and the picture, both from the raw records; returns the table."""
    summaries = summarise(settings, records.read(folder.runs))
    text = page.render(settings, start, summaries)
    with writing(folder.table):
        atomic.write_text(folder.table, text)
    figure.draw(folder.curves, summaries, start.problem.title)
    return text
