"""Recomputes the weights of a recorded run, bit for bit and without a forward pass.

BASE is the model that the run began with: a folder or a name on the Hugging Face hub, as for zoext finetune
--model, or demo for a run of --demo words (write ./demo for a folder of that name). TRAJECTORY is the folder
of a run, trajectory.jsonl in it, or a recording of zoext.Trajectory. With several trajectories, all of runs
that began with BASE, their changes are added up. The device, the number of threads and the instruction set
may differ from the run's.

The folder DIR receives model and tokenizer, for from_pretrained of transformers, and replay.json, which
contains the path of each trajectory, the step it was replayed to, and the SHA-256 of its lines up to that
step. Each trajectory is read once at the beginning, so that a run may continue meanwhile. With --difference,
the folder receives difference.safetensors instead of a model: the tuned weights minus those of BASE, in
float32, for all parameters that changed. Elements are exact unless tuned and base weights differ so much in
magnitude that float32 must round; replay.json counts these.

With torchrun, each process replays a part of every weight.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from zoext._benchmarking.timing import threads
from zoext.cli import _options
from zoext.cli._errors import UserError, reading, require
from zoext.cli._problem import demo, models
from zoext.cli._ranks import Ranks
from zoext.cli._runs import replayed, sharding
from zoext.cli._runs.replayed import ReplayFolder
from zoext.trajectory import Part, TrajectoryError, read_until, replay_parts

EXAMPLES = """\
  zoext replay roberta-base runs/reviews --out runs/again
  zoext replay roberta-base runs/reviews --to-step 1000 --out runs/earlier
  zoext replay ./base runs/a runs/b --difference --out runs/both
"""

_DEMO = "demo"
_FILE = "trajectory.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options."""
    parser.add_argument("base", metavar="BASE", help="a folder, a name on the hub, or demo (words)")
    parser.add_argument(
        "trajectories",
        metavar="TRAJECTORY",
        type=Path,
        nargs="+",
        help="the folder of a run, or a file",
    )
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--to-step", metavar="N", type=_options.whole, help="stop after step N of the run (default: its last)"
    )
    parser.add_argument("--difference", action="store_true", help="write the change instead of the model")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    _options.add_threads(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace the replay in --out")
    parser.add_argument("--quiet", action="store_true", help="print only errors")


def run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    """Reads, checks and replays everything, then writes --out."""
    require(("transformers", "safetensors"), "finetune")
    if arguments.to_step is not None and len(arguments.trajectories) > 1:
        raise UserError(
            "--to-step: several trajectories are added up as a whole; give one, or omit --to-step"
        )
    with reading():
        try:
            with threads(arguments.threads):
                return _run(arguments, ranks)
        except ValueError as error:  # TrajectoryError among them
            raise UserError(_in_terms_of_options(str(error))) from None


def _run(arguments: argparse.Namespace, ranks: Ranks) -> int:
    folder = ReplayFolder(arguments.out)
    folder.check_free(arguments.overwrite)
    trajectories = [_trajectory(path) for path in arguments.trajectories]
    folder.check_spares([Path(arguments.base), *trajectories])
    device = _options.choose_device(arguments.device, ranks)
    say = _Progress(arguments.quiet)
    # Once, and before BASE is loaded, which may take long: the run may continue meanwhile.
    parts = _read_all(trajectories, arguments.to_step, ranks)

    say(f"loading {arguments.base}")
    model, tokenizer = _load(arguments.base, parts)
    if ranks.count > 1:
        sharding.shard(model, device, ranks.count)
    else:
        model.to(device)
    names = {parameter.name for part in parts for parameter in part.header.parameters}
    before = replayed.copies(model, names) if arguments.difference else {}
    for part in parts:
        say(f"replaying {len(part.steps)} steps of {part.path}")
    replay_parts(model, parts)

    say(f"writing {folder.path}")
    record = {"base": arguments.base, "trajectories": [_note(part) for part in parts]}
    if arguments.difference:
        difference = replayed.difference_of(model, before, ranks)
        ranks.first(folder.write_difference, difference, record, arguments.overwrite)
    else:
        sharding.gather(model, ranks)
        ranks.first(folder.write_model, model, tokenizer, record, arguments.overwrite)
    say("done")
    return 0


def _trajectory(path: Path) -> Path:
    """The trajectory at ``path``, which may be the folder of a run."""
    if not path.is_dir():
        return path
    if not (path / _FILE).is_file():
        raise UserError(f"{path}: contains no {_FILE}; give the folder of a run, or a trajectory")
    return path / _FILE


class _Progress:
    """Prints lines to stderr with the seconds since it was created."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        if not self._quiet:
            print(f"{time.monotonic() - self._began:6.1f} s  {text}", file=sys.stderr)


def _read_all(paths: Sequence[Path], to_step: int | None, ranks: Ranks) -> list[Part]:
    """The trajectories up to ``to_step``, or to the last step that the first rank finds, on all ranks."""
    parts: list[Part] = []

    def read_first() -> str:
        parts.extend(_read(path, to_step) for path in paths)
        return " ".join(str(part.end) for part in parts)

    ends = ranks.shared("ends", read_first).split()
    return parts or [_read(path, int(end)) for path, end in zip(paths, ends, strict=True)]


def _read(path: Path, to_step: int | None) -> Part:
    try:
        return read_until(path, to_step)
    except TrajectoryError:
        raise
    except ValueError as error:  # about to_step, whose name it begins with
        raise UserError(f"--to-step{str(error).removeprefix('to_step')}") from None


def _note(part: Part) -> dict[str, Any]:
    """The entry of a trajectory in replay.json."""
    return {"path": str(part.path), "sha256": part.sha256, "step": part.end}


def _load(name: str, parts: Sequence[Part]) -> tuple[Any, Any | None]:
    """The base model and its tokenizer, built as the first run that recorded how did it.

    Replaying checks that the model has the weights that each run began with.
    """
    known = [(part.path, found) for part in parts if (found := models.base_of(part.header, str(part.path)))]
    for path, found in known:
        if found.demo != (name == _DEMO):
            wanted = "demo" if found.demo else "the model that its run began with"
            raise UserError(f"BASE {name}: {path} was recorded from another model; give {wanted}")
        if found.demo and found != demo.base(found.dtype, found.seed):
            raise TrajectoryError(f"{path}: notes: task and classes must be those of the demo")
    if known:
        chosen = known[0][1]
        return demo.load_model(chosen) if chosen.demo else models.load(name, chosen)
    dtype = parts[0].header.parameters[0].dtype.removeprefix("torch.")
    if name == _DEMO:
        return demo.load_model(demo.base(dtype, seed=0))
    return models.load_own(name, getattr(torch, dtype))


def _in_terms_of_options(error: str) -> str:
    """Rewrites the remedy at the end of an error of the library; names of files and parameters precede it."""
    error = re.sub(r"to_step=(\d+ or fewer)\Z", r"--to-step \1", error)
    return re.sub(r"record the run with frames=True\Z", "record the run with --record-frames", error)
