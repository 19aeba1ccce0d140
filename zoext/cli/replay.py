"""Makes the weights of a recorded run again, bit for bit and without a forward pass.

BASE is the model that the run began with: a folder or a name on the Hugging Face hub, as for zoext finetune
--model, or demo (a folder of that name is ./demo). TRAJECTORY is trajectory.jsonl in the folder of a run, or
what zoext.Trajectory recorded. With several, all of runs that began with BASE, their changes are added up.
The device, the number of threads and the instruction set may be others than the run's.

The folder DIR gets model and tokenizer, for from_pretrained of transformers, and replay.json, which says
what was replayed: the path of each trajectory, the step it was replayed to, and the SHA-256 of its lines up
to that step, as they were read once at the beginning; a run that goes on meanwhile changes neither. With
--difference it gets difference.safetensors instead of a model: the tuned weights less those of BASE, in
float32, of all parameters that moved. It is exact, but for elements whose tuned and base weights are of so
different magnitudes that float32 must round; replay.json has their number.
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

from zoext.cli import base, demo, devices, difference, models, numbers
from zoext.cli.errors import UserError, reading, require
from zoext.cli.replay_folder import ReplayFolder
from zoext.trajectory import Part, TrajectoryError, read_until, replay_parts

HELP = "base model and trajectory to tuned model, bit for bit"

DEMO = "demo"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``zoext replay``."""
    parser.add_argument("base", metavar="BASE", help="a folder, a name on the hub, or demo")
    parser.add_argument("trajectories", metavar="TRAJECTORY", type=Path, nargs="+", help="what to replay")
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="the folder to write")
    parser.add_argument(
        "--to-step", metavar="N", type=numbers.whole, help="stop after step N of the run (default: its last)"
    )
    parser.add_argument("--difference", action="store_true", help="write the change and not the model")
    parser.add_argument("--device", metavar="D", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="replace the replay in --out")
    parser.add_argument("--quiet", action="store_true", help="print nothing but errors")


def run(arguments: argparse.Namespace) -> int:
    """Reads, checks and replays everything, then writes --out."""
    require(("transformers", "safetensors"), "finetune")
    if arguments.to_step is not None and len(arguments.trajectories) > 1:
        raise UserError("--to-step: several trajectories are added up as a whole; give one, or leave it out")
    with reading():
        try:
            return _run(arguments)
        except ValueError as error:  # TrajectoryError among them
            raise UserError(_in_terms_of_options(str(error))) from None


def _run(arguments: argparse.Namespace) -> int:
    folder = ReplayFolder(arguments.out)
    folder.check_free(arguments.overwrite)
    folder.check_spares([Path(arguments.base), *arguments.trajectories])
    device = devices.choose(arguments.device)
    say = _Progress(arguments.quiet)
    # Once, and before BASE is loaded, which may take long: a run may go on writing meanwhile.
    parts = [_read(path, arguments.to_step) for path in arguments.trajectories]

    say(f"loading {arguments.base}")
    model, tokenizer = _load(arguments.base, parts)
    model.to(device)
    names = {parameter.name for part in parts for parameter in part.header.parameters}
    before = difference.copies(model, names) if arguments.difference else {}
    for part in parts:
        say(f"replaying {len(part.steps)} steps of {part.path}")
    replay_parts(model, parts)

    say(f"writing {folder.path}")
    record = {"base": arguments.base, "trajectories": [_note(part) for part in parts]}
    if arguments.difference:
        folder.write_difference(difference.of(model, before), record, arguments.overwrite)
    else:
        folder.write_model(model, tokenizer, record, arguments.overwrite)
    say("done")
    return 0


class _Progress:
    """Lines on stderr, with the seconds since the first."""

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self._began = time.monotonic()

    def __call__(self, text: str) -> None:
        if not self._quiet:
            print(f"{time.monotonic() - self._began:6.1f} s  {text}", file=sys.stderr)


def _read(path: Path, to_step: int | None) -> Part:
    try:
        return read_until(path, to_step)
    except TrajectoryError:
        raise
    except ValueError as error:  # of that argument, whose name it begins with
        raise UserError(f"--to-step{str(error).removeprefix('to_step')}") from None


def _note(part: Part) -> dict[str, Any]:
    """What replay.json says of a trajectory."""
    return {"path": str(part.path), "sha256": part.sha256, "step": part.end}


def _load(name: str, parts: Sequence[Part]) -> tuple[Any, Any | None]:
    """The model that the runs began with and its tokenizer, built as the first run that says how did it.

    Replaying checks that it has the weights that each of them began with.
    """
    known = [(part.path, found) for part in parts if (found := base.of_header(part.header, str(part.path)))]
    for path, found in known:
        if found.demo != (name == DEMO):
            wanted = "demo" if found.demo else "the model that its run began with"
            raise UserError(f"BASE {name}: {path} is of a run of another model; give {wanted}")
        if found.demo and found != demo.base(found.dtype, found.seed):
            raise TrajectoryError(f"{path}: notes: task and classes must be those of the demo")
    if known:
        chosen = known[0][1]
        return demo.load_model(chosen) if chosen.demo else models.load(name, chosen)
    dtype = parts[0].header.parameters[0].dtype.removeprefix("torch.")
    if name == DEMO:
        return demo.load_model(demo.base(dtype, seed=0))
    return models.load_own(name, getattr(torch, dtype))


def _in_terms_of_options(error: str) -> str:
    """An error of the library, whose remedy is at its end; before that are names of files and parameters."""
    error = re.sub(r"to_step=(\d+ or fewer)\Z", r"--to-step \1", error)
    return re.sub(r"record the run with frames=True\Z", "record the run with --record-frames", error)
