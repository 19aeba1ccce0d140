"""Every operator on a GPU: bytes per second against a copy by the device, and time against plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from adam_update import HORIZON, AdamUpdate
from factored_linear import COPIES, FactoredLinears
from factored_pass import FactoredPass
from gpu_timing import timed
from power_iteration import PowerIterations

from zoext import ops
from zoext._benchmarking.dense_pass import SCALE, STEPS, DensePass, Shape
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import Measurement

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COPY = "device copy"


@dataclass(frozen=True)
class Group:
    """Cases that are timed in turn.

    Attributes:
        name: what the group's figures are called by.
        cases: the work, by name.
        traffic: the bytes that an operator cannot help but read and write, for those that memory limits.
        rivals: pairs of names: what takes its time, and the operator that does the same.
        launches: the cases of one launch each, which are too short for milliseconds.
    """

    name: str
    cases: dict[str, Callable[[], None]]
    traffic: dict[str, int] = field(default_factory=dict)
    rivals: Sequence[tuple[str, str]] = ()
    launches: Sequence[str] = ()


class DenseOperators:
    """What ``DensePass`` has not: other operators over its parameters, and the same from torch."""

    def __init__(self, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> None:
        self.work = DensePass(shapes, dtype, device)
        self._one = torch.zeros(self.work.elements, dtype=dtype, device=device)
        sizes = [parameter.numel() for parameter in self.work.parameters]
        self._out = [piece.view(shape) for piece, shape in zip(self._one.split(sizes), shapes, strict=True)]
        self._places = range(len(shapes)), [ops.span_of(tensor) for tensor in self._out]
        self._term = torch.tensor([1], device=device), torch.tensor([SCALE], device=device)
        self._decay = torch.zeros((), device=device)
        self._stacks = [tensor.new_empty((COPIES, *tensor.shape)) for tensor in self._out]
        self._opposite = torch.tensor([[SCALE], [-SCALE]], device=device)

    def write(self) -> None:
        ops.normal_(self._out, self._term[0], *self._places)

    def copy(self) -> None:
        ops.noise_copy_(self._out, self.work.parameters, *self._term, *self._places)

    def copies(self) -> None:
        """Theta plus and minus a direction."""
        terms = self._term[0], self._opposite
        ops.noise_copies_(self._stacks, self.work.parameters, *terms, *self._places)

    def copy_after_copy(self) -> None:
        for coefficients in self._opposite:
            terms = self._term[0], coefficients
            ops.noise_copy_(self._out, self.work.parameters, *terms, *self._places)

    def one_tensor(self) -> None:
        """The same number of elements in a single tensor."""
        ops.noise_axpy_([self._one], *self._term, self._decay, [0], [ops.span_of(self._one)])

    def foreach(self) -> None:
        """As few launches as torch needs: a tensor of normals for each parameter, then one sum of all."""
        parameters = self.work.parameters
        normals = [
            torch.normal(mean=0.0, std=1.0, size=p.shape, dtype=p.dtype, device=p.device) for p in parameters
        ]
        torch._foreach_add_(parameters, normals, alpha=SCALE)


def dense(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Group:
    more = DenseOperators(shapes, dtype, device)
    work = more.work
    at_once, one_by_one = (f"noise_axpy_, {STEPS} steps {how}" for how in ("at once", "one by one"))
    operators: dict[str, Callable[[], None]] = {
        "noise_axpy_": work.fused,
        "noise_axpy_, one tensor": more.one_tensor,
        "noise_axpy_, 4 seeds": partial(work.fused, terms=4),
        "noise_axpy_, signs": partial(work.fused, distribution=ops.Distribution.SIGN),
        "noise_copy_": more.copy,
        f"noise_copies_, {COPIES} copies": more.copies,
        at_once: work.steps_at_once,
    }
    size = work.elements * dtype.itemsize
    traffic = dict.fromkeys((COPY, *operators), 2 * size) | {"normal_": size}
    traffic[f"noise_copies_, {COPIES} copies"] = (1 + COPIES) * size
    if dtype.itemsize == 2:
        stochastic, residual = "noise_axpy_, stochastic rounding", "noise_axpy_, residuals"
        operators[stochastic] = partial(work.fused, rounding=ops.Rounding.STOCHASTIC)
        operators[residual] = partial(work.fused, rounding=ops.Rounding.RESIDUAL)
        traffic |= {stochastic: 2 * size, residual: 2 * (size + work.elements)}
    others = {
        COPY: work.copy,
        "normals alone, in the cache": work.noise_only,
        "baseline": work.baseline,
        "torch.normal and foreach": more.foreach,
        "normal_": more.write,
        one_by_one: work.steps_one_by_one,
        "noise_copy_, copy after copy": more.copy_after_copy,
    }
    rivals = [(name, "noise_axpy_") for name in ("baseline", "torch.normal and foreach")]
    rivals.append((one_by_one, at_once))
    rivals.append(("noise_copy_, copy after copy", f"noise_copies_, {COPIES} copies"))
    return Group("dense", others | operators, traffic, rivals)


def bias(width: int, dtype: torch.dtype, device: torch.device) -> Group:
    """What a streamed probe pays for a small module, however small: a launch that displaces its weights."""
    name = "noise_copy_, a bias"
    return Group("small", {name: DenseOperators([(width,)], dtype, device).copy}, launches=[name])


def adam(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Group:
    update = AdamUpdate(list(shapes), dtype, device)
    fused, plain = f"noise_window_, {HORIZON} steps", f"AdaMeZO in torch, {HORIZON} steps"
    traffic = dict.fromkeys((COPY, fused), 2 * update.work.elements * dtype.itemsize)
    cases = {COPY: update.work.copy, plain: update.plain, fused: update.fused}
    return Group("Adam", cases, traffic, [(plain, fused)])


def factored(shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device) -> Group:
    matrices = [shape for shape in shapes if len(shape) == 2]
    work = FactoredPass(matrices, dtype, device)
    out = [torch.empty_like(matrix) for matrix in work.matrices]
    operators: dict[str, Callable[[], None]] = {
        "factored_axpy_, rank 1": partial(work.fused, 1),
        "factored_axpy_, rank 2": partial(work.fused, 2),
        "factored_copy_, rank 1": partial(work.fused_copy, out, 1),
        f"factored_window_, rank 2, {HORIZON} steps": work.fused_adam,
    }
    others = {
        COPY: work.work.copy,
        "addmm_, rank 1": partial(work.plain, 1),
        "addmm_, rank 2": partial(work.plain, 2),
        f"Adam step in torch, rank 2, {HORIZON} steps": work.plain_adam,
    }
    traffic = dict.fromkeys((COPY, *operators), 2 * work.work.elements * dtype.itemsize)
    axpy_1, axpy_2, _, fused_adam = operators
    _, addmm_1, addmm_2, plain_adam = others
    rivals = [(addmm_1, axpy_1), (addmm_2, axpy_2), (plain_adam, fused_adam)]
    return Group("factored", others | operators, traffic, rivals)


def bases(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> Group:
    work = PowerIterations(layers, width, dtype, device)
    fused, plain = "power_iteration", "power iteration in torch"
    return Group("bases", {plain: work.plain, fused: work.fused}, rivals=[(plain, fused)])


def linears(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> Group:
    work = FactoredLinears(layers, width, dtype, device)
    fused, plain = f"factored_linear_, {COPIES} copies", "displacements in torch"
    cases: dict[str, Callable[[], object]] = {"linear layers": work.linears, plain: work.plain_displacements}
    return Group(
        "linear layers",
        cases | {fused: work.displacements},
        rivals=[(plain, fused), ("linear layers", fused)],
    )


def measure(
    report: Report, make: Callable[[], Group], dtype: str, *, repeats: int, device: torch.device
) -> None:
    """Makes a group, times it and adds its figures; what the memory is too small for becomes a note."""
    torch.cuda.empty_cache()
    try:
        group = make()
    except torch.OutOfMemoryError as error:
        report.note(f"{dtype}: some operators were left out, since the free memory is too small: {error}")
        return
    label = f"{dtype}, {group.name}"
    timings = timed(group.cases, repeats=repeats, device=device)
    for case in timings.left_out:
        report.note(f"{label}: {case} was left out, since the free memory is too small")
    for case, part in timings.bound_by_launches().items():
        report.note(
            f"{label}: {case} is bound by launches, not by the device: the host takes {part:.0%} of its time"
        )
    add_figures(report, label, group, timings.seconds)


def add_figures(report: Report, label: str, group: Group, times: dict[str, Measurement]) -> None:
    report.add_times(label, times)
    speeds = {name: _per_second(group.traffic[name], times[name]) for name in group.traffic if name in times}
    for name, speed in speeds.items():
        report.add(f"{label}: {name}, read and written", speed, "GB/s")
        if name != COPY:
            share = Measurement(tuple(100 * part for part in (speed / speeds[COPY]).rounds))
            report.add(f"{label}: {name}, of the copy's speed", share, "%")
    for name in group.launches:
        if name in times:
            microseconds = Measurement(tuple(1e6 * seconds for seconds in times[name].rounds))
            report.add(f"{label}: {name}, a launch", microseconds, "us")
    for rival, operator in group.rivals:
        if rival in times and operator in times:
            report.add(f"{label}: {rival} / {operator}", times[rival] / times[operator], "x")


def _per_second(size: int, times: Measurement) -> Measurement:
    """In GB/s."""
    return Measurement(tuple(size / 1e9 / seconds for seconds in times.rounds))
