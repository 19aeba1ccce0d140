"""Optimizers at equal numbers of forward passes on real tasks, with a pre-trained language model.

    python benchmarks/tasks.py --model MODEL --data FOLDER --out OUT --threads 1 --json tasks.json

MODEL is a folder of transformers or a GGUF file of a causal model. FOLDER has ``sst2_train.csv``,
``sst2_test.csv`` and the same of ``trec``, with the columns ``text`` and ``label``.

For each task, with and without prompt, each method first sweeps learning rates and schedules in short runs on
the first seed; the lowest loss on the validation half of the held-out rows wins. Then it runs once per seed,
and is scored on the other half. A backward pass counts as two forwards, a Jacobian-vector product as one.

Finished runs are lines of ``OUT/runs.jsonl``. The same command after an interruption does what is missing,
also with more seeds, methods or tasks. ``--table-only`` shows what is there. The program prints tables in
Markdown and writes them to ``OUT/tables.md``, with the learning curves in ``OUT/curves.png``.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import task_report
import torch
from opt_model import require_transformers
from task_data import QUESTIONS
from task_methods import METHODS
from task_plan import Plan, Record, Run, Setting, Start
from task_runs import Bench, Protocol
from task_store import Store

from zoext._benchmarking import arguments as options
from zoext._benchmarking.machine import environment
from zoext._benchmarking.timing import threads
from zoext.cli._errors import UserError
from zoext.cli._schedules import SHAPES
from zoext.cli._settings import DTYPES
from zoext.tasks import RowError

PROMPTS = {"with": True, "without": False}


def parser() -> argparse.ArgumentParser:
    """The options of the program."""
    found = options.parser_of(__doc__)
    found.add_argument("--model", required=True, help="folder or GGUF file of a causal language model")
    found.add_argument("--data", required=True, metavar="FOLDER")
    found.add_argument("--out", type=Path, required=True, metavar="OUT", help="folder of the results")
    _add_names(found, "--tasks", QUESTIONS)
    _add_names(found, "--prompts", PROMPTS)
    _add_names(found, "--methods", METHODS)
    options.add_count(found, "--seeds", 3, "how many, each with its own data")
    options.add_count(found, "--forwards", 2000, "of a run that is reported")
    options.add_count(found, "--sweep-forwards", 500, "of a run of a sweep")
    found.add_argument(
        "--lr", type=float, default=1e-5, help="middle of MeZO's sweep; others scale it; default: %(default)s"
    )
    found.add_argument(
        "--sweep",
        type=_factors,
        default=(0.3, 1.0, 3.0),
        metavar="X,X",
        help="multiples of lr; default: .3,1,3",
    )
    found.add_argument(
        "--schedules",
        type=_names_among(SHAPES),
        default=["constant", "linear"],
        help="default: constant,linear",
    )
    found.add_argument("--mu", type=float, default=1e-3, help="of zeroth-order methods; default: %(default)s")
    found.add_argument("--trainable", default="", metavar="REGEX", help="names of parameters; default: all")
    found.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="of the weights; default: %(default)s"
    )
    options.add_count(found, "--per-class", 16, "training examples of each label")
    options.add_count(found, "--held-out", 400, "validation and test examples together")
    options.add_count(found, "--batch-size", 16, "examples")
    options.add_count(found, "--max-length", 64, "tokens of a prompt; longer texts are cut")
    options.add_count(found, "--evaluations", 4, "on the validation half in a run that is reported")
    found.add_argument("--table-only", action="store_true", help="report the finished runs and run nothing")
    options.add_threads_and_json_arguments(found)
    return found


def _add_names(found: argparse.ArgumentParser, option: str, known: Collection[str]) -> None:
    names = list(known)
    found.add_argument(option, type=_names_among(names), default=names, help=f"default: {','.join(names)}")


def _names_among(known: Collection[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return list(dict.fromkeys(found))

    return names


def _factors(text: str) -> tuple[float, ...]:
    found = tuple(float(each) for each in text.split(","))
    if min(found) <= 0:
        raise argparse.ArgumentTypeError(f"must be positive numbers, not {text}")
    return found


def plan_of(arguments: argparse.Namespace) -> Plan:
    """What the options ask to compare.

    Raises:
        UserError: if a step of a method takes more forward passes than a run may.
    """
    for option in ("forwards", "sweep_forwards"):
        for name in arguments.methods:
            if METHODS[name].forwards > getattr(arguments, option):
                raise UserError(
                    f"--{option.replace('_', '-')} {getattr(arguments, option)}: a step of {name} takes "
                    f"{METHODS[name].forwards}; give at least as many"
                )
    prompts = [PROMPTS[name] for name in arguments.prompts]
    return Plan(
        settings=tuple(Setting(task, prompted) for task in arguments.tasks for prompted in prompts),
        centres={name: arguments.lr * METHODS[name].lr_scale for name in arguments.methods},
        factors=arguments.sweep,
        schedules=tuple(arguments.schedules),
        seeds=tuple(range(arguments.seeds)),
        sweep_forwards=arguments.sweep_forwards,
        forwards=arguments.forwards,
    )


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """What all runs of the folder share."""
    names = [field.name for field in dataclasses.fields(Protocol)]
    protocol = Protocol(**{name: getattr(arguments, name) for name in names})
    smallest = protocol.per_class * min(len(QUESTIONS[task].words) for task in arguments.tasks)
    if protocol.batch_size > smallest:
        raise UserError(
            f"--batch-size {protocol.batch_size}: there are only {smallest} training examples; give as many "
            "or fewer, or a larger --per-class"
        )
    return protocol


def execute(plan: Plan, protocol: Protocol, store: Store) -> None:
    """Runs what is missing."""
    if plan.next(store.done) is None:
        return
    bench = Bench(protocol)
    while (missing := plan.next(store.done)) is not None:
        if isinstance(missing, Start):
            line = store.add(missing, bench.start(missing))
        else:
            line = store.add(missing, bench.run(missing))
        print(_described(missing, line), file=sys.stderr, flush=True)


def _described(identity: Run | Start, line: Record) -> str:
    setting = Setting(identity.task, identity.prompted)
    if isinstance(identity, Start):
        return f"{setting}, zero-shot, seed {identity.seed}: {_scores(line['validation'])}"
    scores = "diverged" if line["diverged"] else _scores(line["curve"][-1])
    return (
        f"{setting}, {identity.phase}, {identity.method}, lr {identity.lr:.2g}, {identity.schedule}, "
        f"seed {identity.seed}: {scores}"
    )


def _scores(scores: dict[str, Any]) -> str:
    return f"validation loss {scores['loss']:.4f}, accuracy {100 * scores['accuracy']:.1f} %"


def report(plan: Plan, store: Store, arguments: argparse.Namespace) -> None:
    """Prints and writes all results."""
    text = task_report.table(plan, store.done)
    print(text)
    (arguments.out / "tables.md").write_text(text + "\n", encoding="utf-8")
    task_report.draw_curves(plan, store.done, arguments.out / "curves.png")
    if arguments.json is not None:
        settings = options.settings_of(arguments)
        task_report.write_json(arguments.json, plan, store.done, settings, environment(torch.device("cpu")))


def main(given: Sequence[str] | None = None) -> None:
    """Runs the program with these options, by default those of the command line."""
    arguments = parser().parse_args(given)
    require_transformers()
    try:
        plan, protocol = plan_of(arguments), protocol_of(arguments)
        store = Store(arguments.out, dataclasses.asdict(protocol))
        if not arguments.table_only:
            with threads(arguments.threads), torch.random.fork_rng(devices=[]):
                execute(plan, protocol, store)
        report(plan, store, arguments)
    except (UserError, RowError) as error:
        sys.exit(f"tasks.py: {error}")


if __name__ == "__main__":
    main()
