"""Shows the installation and what it finds on this machine, to be pasted into a bug report."""

from __future__ import annotations

import argparse
import json
import platform

import torch

import zoext
from zoext import _C, ops

EXAMPLES = """\
  zoext info
  zoext info > installation.txt
  zoext info --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the option."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Prints one line per fact."""
    if arguments.json:
        print(json.dumps(dict(_facts())))
        return 0
    for name, value in _facts():
        print(f"{name + ':':<18}{value}")
    return 0


def _facts() -> list[tuple[str, str]]:
    return [
        ("zoext", zoext.__version__),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
        ("Python", f"{platform.python_version()} on {platform.platform()}"),
        ("compiler", _C.compiler()),
        ("instruction sets", f"{', '.join(_C.available_instruction_sets())}; in use: {_C.instruction_set()}"),
        ("CUDA operators", ops.cuda_missing or "loaded"),
        ("devices", ", ".join(_devices())),
        ("threads", str(torch.get_num_threads())),
    ]


def _devices() -> list[str]:
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [
        "cpu",
        *(f"cuda:{i} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)" for i, gpu in enumerate(gpus)),
    ]
