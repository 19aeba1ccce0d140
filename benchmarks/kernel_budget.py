"""What the CUDA kernels cost by their machine code, and how fast that lets them be: no GPU needed.

    python benchmarks/kernel_budget.py --json kernel_budget.json

Counts the instructions of the loops over whole chunks in the built ``zoext/_cuda*.so``, and from them and
public peak rates predicts passes over weights in bfloat16 and float32. docs/performance.md explains both.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from machine_code import Kernel, Loop, ToolMissing, kernels

from zoext._benchmarking import arguments as options

PACKAGE = Path(__file__).parents[1] / "zoext"
THREADS = 256  # csrc/cuda/device/chunks.h, threads_per_chunk
SIZES = {"double": 8, "float": 4, "BFloat16": 2, "Half": 2}
#: Instructions that tell what a loop does: a root for two normals, a quotient for an element of Adam's step.
ROOT, QUOTIENT = "MUFU.RSQ", "MUFU.RCP"


@dataclass(frozen=True, slots=True)
class Gpu:
    """Public figures of a GPU: multiprocessors, GHz of the boost clock, GB/s of memory."""

    name: str
    architecture: str
    multiprocessors: int
    clock: float
    bandwidth: float


GPUS = (
    Gpu("A100 SXM 80 GB", "sm_80", 108, 1.41, 2039),
    Gpu("H100 SXM", "sm_90", 132, 1.98, 3352),
    Gpu("B200", "sm_100", 148, 1.98, 7700),
)
#: Results a clock of one multiprocessor, from the table of arithmetic throughput in the CUDA C++
#: programming guide. All architectures issue 4 warps' instructions of 32 threads. What a "multiplier"
#: computes is float32 and integer products and sums of products; only `integer multiplier` of these are
#: integer products.
RATES = {
    "sm_80": {"issue": 128, "multiplier": 64, "integer multiplier": 64, "integer": 64, "special": 16},
    "sm_90": {"issue": 128, "multiplier": 128, "integer multiplier": 64, "integer": 64, "special": 16},
    "sm_100": {"issue": 128, "multiplier": 128, "integer multiplier": 64, "integer": 64, "special": 16},
}


@dataclass(frozen=True)
class Budget:
    """What one kernel costs on one architecture; counts are of instructions a thread.

    Attributes:
        blocks: how many blocks of 256 threads the registers of a multiprocessor hold, of 8 at most.
        local: bytes of local memory a thread, spilled registers among them.
        elements: that a thread takes in one round of the loop over whole chunks.
        first: instructions of a round for one element, with one term or a window of one step, with no
            step at all where a kernel makes several, and for copies with no term and one copy. The rank of
            factored directions counts as zero.
        further: instructions for one more term, row of the window, step, or two copies with one term,
            rounded to nearest; None where that is not counted.
        narrowest: bytes of the narrowest access to global memory for weights and residuals in that loop.
        mix: how many of `first` each operation has, by its name in the machine code.
        units: how many of `first` each unit of the multiprocessor executes.
        further_units: the same for `further`.
    """

    architecture: str
    kernel: str
    registers: int
    blocks: int
    local: int
    elements: int
    first: float
    further: float | None
    narrowest: int
    mix: dict[str, float]
    units: dict[str, float]
    further_units: dict[str, float] | None

    @property
    def storage(self) -> int:
        """Bytes of an element."""
        return storage_of(self.kernel)

    @property
    def traffic(self) -> int:
        """Bytes of an element that a pass reads and writes."""
        return 2 * (self.storage + ("residual" in self.kernel))

    def cycles(self, further: int = 0) -> dict[str, float]:
        """Cycles an element that each unit of a multiprocessor is busy, with so many further terms."""
        total = Counter(self.units)
        for unit, count in (self.further_units or {}).items():
            total[unit] += further * count
        return {unit: total[unit] / rate for unit, rate in RATES[self.architecture].items()}


def storage_of(kernel: str) -> int:
    return SIZES[next(name for name in SIZES if re.search(rf"\b{name}\b", kernel))]


def mix(instructions: Sequence[str]) -> Counter[str]:
    """The instructions by operation, wide products apart from others."""
    return Counter(re.match(r"IMAD\.WIDE|\w+", line)[0] for line in instructions)  # type: ignore[index]


def unit_counts(instructions: Sequence[str]) -> Counter[str]:
    """How many of the instructions each unit executes; all of them are issued."""
    counts: Counter[str] = Counter(issue=len(instructions))
    for instruction in instructions:
        operation = instruction.split()[0].split(".")[0]
        if operation in ("FFMA", "FMUL", "FADD", "HFMA2"):
            counts["multiplier"] += 1
        elif operation == "IMAD":
            counts["multiplier"] += 1
            counts["integer multiplier"] += 1
        elif operation in ("MUFU", "I2F"):
            counts["special"] += 1
        elif not re.match(r"U[A-Z]|LD|ST|BRA|BSSY|BSYNC|S2|R2UR|CS2R|NOP|EXIT|WARPSYNC", operation):
            counts["integer"] += 1
    return counts


def whole_loop(kernel: Kernel) -> Loop | None:
    """The loop over the shares of a whole chunk: that which writes 16 bytes at a time and nothing less, but
    for 8 residuals of 8 weights in 16 bits. Of several the one that makes most of the noise."""
    widths = r"128|64" if re.search(r"BFloat16|Half", kernel.name) else r"128"

    def writes_at_once(loop: Loop) -> bool:
        writes = [line for line in kernel.code(loop) if line.startswith("STG")]
        return bool(writes) and all(re.match(rf"STG\S*\.({widths})\b", line) for line in writes)

    candidates = [loop for loop in kernel.loops() if writes_at_once(loop)]
    return max(candidates, key=lambda loop: loop.latch - loop.head, default=None)


def budget(kernel: Kernel) -> Budget | None:
    """None for a kernel that does not go over weights."""
    loop = whole_loop(kernel)
    if loop is None:
        return None
    noise = _noise_loop(kernel, loop)
    once = kernel.shortest_round(loop, _stops(kernel, loop, noise))
    term = kernel.shortest_round(noise, _stops_of_a_step(kernel, noise)) if noise else None
    accesses = [line for line in once if re.match(r"(LDG|STG)\S*(?<!CONSTANT) ", line)]
    weights = [line for line in once if re.match(r"STG\S*\.128", line)]
    elements = len(weights) * 16 // storage_of(kernel.name)
    return Budget(
        kernel.architecture,
        kernel.name,
        kernel.registers,
        min(65536 // (THREADS * -(-kernel.registers // 8) * 8), 2048 // THREADS),
        kernel.stack,
        elements,
        len(once) / elements,
        len(term) / elements if term else None,
        min(16 if ".128" in line else 8 if ".64" in line else 4 for line in accesses),
        {name: count / elements for name, count in mix(once).most_common()},
        {unit: count / elements for unit, count in unit_counts(once).items()},
        {unit: count / elements for unit, count in unit_counts(term).items()} if term else None,
    )


def _noise_loop(kernel: Kernel, whole: Loop) -> Loop | None:
    """The outermost loop within that makes normals: over terms, the rows of a window, or steps."""
    inner = [loop for loop in kernel.loops() if whole.holds(loop) and _makes_normals(kernel, loop)]
    return max(inner, key=lambda loop: loop.latch - loop.head, default=None)


def _stops(kernel: Kernel, whole: Loop, noise: Loop | None) -> list[int]:
    """What a round of the whole loop must pass: for a window its normals, and the move of Adam; for copies
    the writing of one."""
    if kernel.name.startswith("displace_copies<"):
        write = kernel.find(whole, "STG")
        return [] if write is None else [write]
    if not kernel.name.startswith("move_window<"):
        return []
    found = [kernel.find(noise, ROOT)] if noise else []
    if kernel.name.startswith("move_window<Adam"):
        found.append(kernel.find(Loop(noise.latch, whole.latch) if noise else whole, QUOTIENT))
    return [stop for stop in found if stop is not None]


def _stops_of_a_step(kernel: Kernel, noise: Loop) -> list[int]:
    """What a round of the loop that makes normals must pass: they, and the step of Adam that it may make."""
    root = kernel.find(noise, ROOT)
    assert root is not None, f"no root in the loop of {kernel.name} that makes normals"
    quotient = kernel.find(Loop(root, noise.latch), QUOTIENT)
    return [root] if quotient is None else [root, quotient]


def _makes_normals(kernel: Kernel, loop: Loop) -> bool:
    code = kernel.code(loop)
    return any(ROOT in line for line in code) and any("IMAD.WIDE" in line for line in code)


def budgets(shared_object: Path) -> list[Budget]:
    """Those of all kernels that go over weights."""
    found = (budget(kernel) for kernel in kernels(shared_object))
    return [each for each in found if each is not None]


# Predictions


@dataclass(frozen=True, slots=True)
class Prediction:
    """The least that a pass takes beside a copy of the same bytes, and what sets it.

    Attributes:
        of_copy: the time, with that of the copy as 1. Memory and all units work at their full rates at
            once here, and the shortest way through the code is taken: no pass is faster.
        bound: what is busy for all of that time, or for more than 85 % of it.
        elements_per_second: the same as a rate.
    """

    gpu: str
    operator: str
    dtype: str
    of_copy: float
    bound: tuple[str, ...]
    elements_per_second: float


#: Operators by the kernel that runs them and the terms, or steps, beyond those of its `first`.
PASSES = {
    "noise_axpy_, one term": ("displace<Dense<Normals, {}>, nearest, many>", 0),
    "noise_axpy_, four terms": ("displace<Dense<Normals, {}>, nearest, many>", 3),
    "noise_axpy_, stochastic rounding": ("displace<Dense<Normals, {}>, stochastic, many>", 0),
    "noise_axpy_, residuals": ("displace<Dense<Normals, {}>, residual, many>", 0),
    "noise_axpy_, 16 steps at once": ("displace_steps<Dense<Normals, {}> >", 16),
    "noise_axpy_, signs": ("displace<Dense<Signs, {}>, nearest, many>", 0),
    "noise_axpy_, signs, stochastic rounding": ("displace<Dense<Signs, {}>, stochastic, many>", 0),
    "noise_axpy_, signs, residuals": ("displace<Dense<Signs, {}>, residual, many>", 0),
    "noise_window_, ten steps": ("move_window<Adam, Dense<Normals, {}>, nearest>", 9),
}


def predict(found: Sequence[Budget]) -> list[Prediction]:
    by_name = {(each.architecture, each.kernel): each for each in found}
    predictions = []
    for gpu in GPUS:
        for operator, (kernel, further) in PASSES.items():
            for dtype, storage in (("bfloat16", "BFloat16"), ("float32", "float")):
                each = by_name.get((gpu.architecture, kernel.format(storage)))
                if each is None:  # float32 is not rounded, and an architecture may be left out
                    continue
                per_ns = gpu.multiprocessors * gpu.clock
                busy = {unit: cycles / per_ns for unit, cycles in each.cycles(further).items()}
                busy["memory"] = each.traffic / gpu.bandwidth
                longest = max(busy.values())
                units = sorted(busy, key=busy.__getitem__, reverse=True)
                bound = tuple(unit for unit in units if busy[unit] > 0.85 * longest)
                ratio = longest / busy["memory"]
                predictions.append(Prediction(gpu.name, operator, dtype, ratio, bound, 1e9 / longest))
    return predictions


# Report


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def as_rows(found: Sequence[Budget]) -> list[list[object]]:
    return [
        [
            each.kernel,
            each.architecture,
            each.registers,
            f"{each.blocks} of {2048 // THREADS}",
            each.local,
            f"{each.first:.1f}",
            "" if each.further is None else f"{each.further:.1f}",
            each.narrowest,
        ]
        for each in sorted(found, key=lambda each: (each.kernel, int(each.architecture[3:])))
    ]


def main() -> int:
    parser = options.parser_of(__doc__)
    options.add_json_argument(parser)
    parser.add_argument(
        "--shared-object", type=Path, metavar="FILE", help="default: that of the package beside this program"
    )
    arguments = parser.parse_args()
    built = arguments.shared_object or next(iter(sorted(PACKAGE.glob("_cuda*.so"))), None)
    if built is None:
        print(
            f"there is no _cuda*.so in {PACKAGE}: build it with CUDA, or pass --shared-object",
            file=sys.stderr,
        )
        return 2
    try:
        found = budgets(built)
    except ToolMissing as error:
        print(error, file=sys.stderr)
        return 2
    predictions = predict(found)
    head = ("kernel", "", "registers", "blocks", "local", "instructions", "further", "access")
    print(table(head, as_rows(found)), end="\n\n")
    rows = [
        [
            each.operator,
            each.dtype,
            each.gpu,
            f"{each.of_copy:.2f}",
            ", ".join(each.bound),
            f"{each.elements_per_second:.3g}",
        ]
        for each in predictions
    ]
    print(table(("pass", "", "", "time / copy, at least", "bound by", "elements/s, at most"), rows))
    if arguments.json:
        document: dict[str, Any] = {
            "kernels": [dataclasses.asdict(each) for each in found],
            "predictions": [dataclasses.asdict(each) for each in predictions],
        }
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
