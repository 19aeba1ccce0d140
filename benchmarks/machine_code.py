"""The machine code of the CUDA kernels: its instructions, loops and resources, without a GPU.

Reads what nvcc left in a shared object, with ``cuobjdump`` and ``nvdisasm`` (of the CUDA toolkit, or
the packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm) and ``c++filt`` of the C++ compiler.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

#: How c++filt prints template arguments that have names in the sources.
ENUMERATORS = {
    "(Rounding)0": "nearest",
    "(Rounding)1": "stochastic",
    "(Rounding)2": "residual",
    "(Room)0": "few",
    "(Room)1": "many",
}


class ToolMissing(Exception):
    """A program that reads machine code is not there; the message says what to install."""


@dataclass(frozen=True, slots=True)
class Loop:
    """The instructions ``head`` to ``latch``, the last of which branches back to the first."""

    head: int
    latch: int

    def holds(self, other: Loop) -> bool:
        return self != other and self.head <= other.head and other.latch <= self.latch


@dataclass(frozen=True)
class Kernel:
    """A kernel of one architecture.

    Attributes:
        architecture: like "sm_90".
        name: without parameters and namespaces.
        instructions: in the order of their addresses, without the guarding ``@P0``.
        guarded: for each, whether it has such a guard.
        targets: for each, the number of the instruction that it may branch to, or -1.
        registers, stack, shared: registers a thread, bytes of local memory a thread and of shared
            memory a block.
    """

    architecture: str
    name: str
    instructions: Sequence[str]
    guarded: Sequence[bool]
    targets: Sequence[int]
    registers: int
    stack: int
    shared: int

    def loops(self) -> list[Loop]:
        """All loops, one for each branch backwards."""
        return [Loop(target, i) for i, target in enumerate(self.targets) if 0 <= target <= i]

    def code(self, loop: Loop) -> Sequence[str]:
        return self.instructions[loop.head : loop.latch + 1]

    def find(self, loop: Loop, text: str) -> int | None:
        """The number of the first instruction in a loop that begins with ``text``."""
        numbers = range(loop.head, loop.latch + 1)
        return next((i for i in numbers if self.instructions[i].startswith(text)), None)

    def shortest_round(self, loop: Loop, by_way_of: Sequence[int] = ()) -> list[str]:
        """The fewest instructions from the head of a loop back to it, by way of some of them in this order:
        what runs where no other loop within turns and no special case holds."""
        path = [loop.head]
        for start, stop in pairwise([loop.head, *by_way_of, loop.latch]):
            path += self._shortest_path(loop, start, stop)[1:]
        return [self.instructions[i] for i in path]

    def _shortest_path(self, loop: Loop, start: int, stop: int) -> list[int]:
        came_from = {start: start}
        queue = deque([start])
        while stop not in came_from:
            i = queue.popleft()
            for successor in self._successors(i):
                if loop.head <= successor <= loop.latch and successor not in came_from:
                    came_from[successor] = i
                    queue.append(successor)
        path = [stop]
        while path[-1] != start:
            path.append(came_from[path[-1]])
        return path[::-1]

    def _successors(self, i: int) -> Iterator[int]:
        instruction, goes_on = self.instructions[i], True
        operation = instruction.split(".")[0].split()[0]
        if operation in ("BRA", "CALL"):
            # Without a label it is a function for special cases, as square_root and divide have them.
            if self.targets[i] >= 0:
                yield self.targets[i]
            # A second predicate stands before the label: BRA P0, `(.L_x_2)
            goes_on = self.guarded[i] or re.search(r"BRA\S* !?U?P", instruction) is not None
        elif operation in ("EXIT", "RET"):
            goes_on = self.guarded[i]
        if goes_on:
            yield i + 1


def kernels(shared_object: Path) -> list[Kernel]:
    """All kernels in a shared object, for each architecture that it has machine code for."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        _run("cuobjdump", "-xelf", "all", str(shared_object.resolve()), folder=folder)
        for cubin in sorted(Path(folder).glob("*.cubin")):
            resources = _resources(_run("cuobjdump", "-res-usage", str(cubin)))
            text = _run("nvdisasm", "-c", str(cubin))
            match = re.search(r"\.target\s+(sm_\d+)", text)
            assert match, f"nvdisasm names no architecture in {cubin.name}"
            sections = re.split(r"^//-+ \.text\.(\S+) -+$", text, flags=re.MULTILINE)
            for mangled, section in zip(sections[1::2], sections[2::2], strict=True):
                found.append(_kernel(match[1], mangled, section, resources[mangled]))
    return found


def tool(name: str) -> str:
    """The path of a program of the CUDA toolkit, or of the Python package that has it."""
    places = [Path(sysconfig.get_paths()["purelib"]) / "nvidia"]
    packaged = [str(path) for place in places for path in sorted(place.glob(f"*/bin/{name}"))]
    installed = shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")
    if path := next(iter([*packaged, *([installed] if installed else [])]), None):
        return path
    raise ToolMissing(
        f"there is no {name}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm, "
        "or install the CUDA toolkit"
    )


def _run(name: str, *arguments: str, folder: str | None = None) -> str:
    done = subprocess.run([tool(name), *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(arguments)} failed: {done.stderr.strip()}")
    return done.stdout


def _resources(text: str) -> dict[str, dict[str, int]]:
    pattern = r"Function (\S+):\s*\n\s*(REG:.*)"
    return {
        name: {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d\])?):(\d+)", usage)}
        for name, usage in re.findall(pattern, text)
    }


def _kernel(architecture: str, mangled: str, section: str, usage: dict[str, int]) -> Kernel:
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in section.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(lines)
        elif instruction := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            lines.append(instruction[1])
    targets = []
    for line in lines:
        # ptxas also calls where it leaves a loop for good.
        target = re.search(r"\b(?:BRA|CALL)\b.*?(\.L_x_\d+)", line)
        targets.append(labels[target[1]] if target else -1)
    return Kernel(
        architecture,
        _readable(mangled),
        [re.sub(r"^@!?U?P\w+\s+", "", line) for line in lines],
        [line.startswith("@") for line in lines],
        targets,
        registers=usage["REG"],
        stack=usage["STACK"] + usage["LOCAL"],
        shared=usage["SHARED"],
    )


def _readable(mangled: str) -> str:
    if shutil.which("c++filt") is None:
        raise ToolMissing("there is no c++filt: install the compiler's binutils")
    name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
    name = re.sub(r"\(anonymous namespace\)::|zoext::cuda::|zoext::rules::|zoext::|^void ", "", name)
    for printed, meant in ENUMERATORS.items():
        name = name.replace(printed, meant)
    depth = 0
    for i, character in enumerate(name):  # up to the parameters
        depth += {"<": 1, ">": -1}.get(character, 0)
        if character == "(" and depth == 0:
            return name[:i]
    return name
