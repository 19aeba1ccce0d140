"""benchmarks/gpu.py finds a wrong bit before it times anything, and then times every operator."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from support.cuda_comparison import MARKS, fakegpu
from support.recorded_graph import RecordedGraph
from zoext import ops
from zoext._benchmarking.memory import cuda_peaks
from zoext._benchmarking.report import Report
from zoext._benchmarking.timing import interleaved
from zoext.graphs import graphed_step as graphs
from zoext.probes import streamed

CPU = torch.device("cpu")
TINY = ["--size", "1x32x70", "--elements", "1003", "--batch", "2", "--tokens", "8"]
TINY += ["--threads", "1", "--repeats", "1"]
OPERATORS = [
    name.removeprefix("zoext::") for name in torch._C._dispatch_get_all_op_names() if "zoext::" in name
]

#: Those that go over activations, which have no chunks.
OF_ACTIVATIONS = {"power_iteration", "factored_linear_"}


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports the parts of the program."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return __import__


def corrupt(monkeypatch: pytest.MonkeyPatch, on: Callable[[Tensor], bool]) -> None:
    """Has ``noise_axpy_`` get one element wrong, by one unit in the last place, where ``on`` says so."""
    right = ops.noise_axpy_

    def wrong(theta: list[Tensor], *arguments: Any, **options: Any) -> None:
        right(theta, *arguments, **options)
        if theta[3].dtype == torch.bfloat16 and on(theta[3]):
            theta[3].view(torch.int16)[17] ^= 1

    monkeypatch.setattr(ops, "noise_axpy_", wrong)


def test_every_operator_is_compared_and_differs_from_nothing(modules: Callable[[str], ModuleType]) -> None:
    checks = list(modules("gpu_correctness").checks(1003))
    assert {check.name.split(",")[0] for check in checks} == set(OPERATORS)
    assert len({check.name for check in checks}) == len(checks)
    for check in checks:
        assert any(result.isfinite().any() for result in check.results(CPU)), check.name
        assert check.difference(CPU) is None, check.name


def chunks_of(operator: str, arguments: Sequence[Any]) -> set[tuple[str, str]]:
    """Which kinds of chunks an operator was given: whole ones or edges alone, indices below 2^32 or above.

    A chunk of 8,192 elements can be whole where ``is_whole_chunk`` and, of factors, ``is_regular`` in
    csrc/cuda say so; of two such lengths there is one that is, whatever the dtype and the distribution.
    """
    lists = 2 if operator.endswith(("copy_", "copies_")) else 1
    places = zip(*arguments[:lists], strict=True)
    rights = arguments[lists + 1] if operator.startswith("factored") else [torch.empty(8)] * len(arguments[0])
    return {
        (
            "whole"
            if all(tensor.data_ptr() % 16 == 0 for tensor in (*tensors, right))
            and base % 8 == 0
            and right.shape[-1] % 8 == 0
            and 2 * 8192 <= tensors[-1].numel() <= run
            and (operator != "noise_copies_" or tensors[-1].numel() % 8 == 0)
            else "edges",
            "high" if base >= 2**32 else "low",
        )
        for tensors, right, (base, run, _) in zip(places, rights, arguments[-1], strict=True)
    }


@pytest.mark.parametrize("elements", [1, 1003, 20_000])
def test_whole_chunks_and_edges_are_compared(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, elements: int
) -> None:
    """Whole chunks, of which a real layer is made, take another loop than edges."""
    seen: dict[str, set[tuple[str, str]]] = {}

    def look_at(operator: str) -> Callable[..., None]:
        def run(*arguments: Any, **options: Any) -> None:
            seen[operator] = chunks_of(operator, arguments)

        return run

    for operator in {*OPERATORS} - OF_ACTIVATIONS:
        monkeypatch.setattr(ops, operator, look_at(operator))
    for check in modules("gpu_correctness").checks(elements):
        seen.clear()
        check.results(CPU)
        for operator, chunks in seen.items():
            # Below 2^32 dense directions have nothing of their own; rows begin at zero in nearly all layers.
            wanted = {("whole", "high"), ("edges", "low")}
            wanted |= {("whole", "low")} if operator.startswith("factored") else {("edges", "high")}
            assert wanted <= chunks, check.name
        assert len(seen) == (check.name.split(",")[0] not in OF_ACTIVATIONS), check.name


def test_a_wrong_bit_is_found_and_its_place_named(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []
    corrupt(monkeypatch, lambda theta: calls.append(theta) or len(calls) % 2 == 1)  # the first of each pair
    found = {check.name: check.difference(CPU) for check in modules("gpu_correctness").checks(1003)}
    wrong = {name: text for name, text in found.items() if text}
    assert {name for name in found if name.startswith("noise_axpy_, bfloat16")} == wrong.keys()
    assert all(text.startswith("tensor 3, element 17: ") for text in wrong.values())
    assert all(text.endswith("as on the CPU (1 of 8193 differ)") for text in wrong.values())


def test_a_nan_is_any_nan_but_zeros_have_signs(modules: Callable[[str], ModuleType]) -> None:
    first_difference = modules("gpu_correctness").first_difference
    patterns = torch.tensor([0x7FC00000, 0x7FFFFFFF, 0], dtype=torch.int32)
    numbers, others = patterns.view(torch.float32), patterns.flip(0)[[1, 2, 0]].view(torch.float32)
    assert first_difference(numbers, others) is None
    assert first_difference(torch.tensor([0.0, -0.0]), torch.zeros(2)).startswith("element 1: -0.0, not 0.0")


def test_without_a_gpu_it_says_so_in_a_line(
    modules: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert modules("gpu").main(TINY) == 2
    printed = capsys.readouterr()
    assert not printed.out
    what = "is a CPU build" if torch.version.cuda is None else "sees no GPU"
    assert printed.err.startswith(f"gpu.py: torch {torch.__version__} {what}: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "--device: must be cuda or cuda:N, not cpu"),
        (["--size", "12x768"], "--size: must be 125m, 1.3b, 7b or LAYERSxWIDTHxVOCABULARY, not 12x768"),
        (["--size", "1x0x70"], "--size: must be 125m, 1.3b, 7b or LAYERSxWIDTHxVOCABULARY, not 1x0x70"),
        (["--elements", "0"], "--elements: must be at least 1, not 0"),
        (
            ["--repeats", "15"],
            "--repeats: must be at most 14, not 15: a streamed probe watches its 32nd step; --parts kernels",
        ),
    ],
)
def test_options_out_of_range_are_named(
    modules: Callable[[str], ModuleType],
    options: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit, match="2"):
        modules("gpu").main(options)
    assert f"argument {message}" in capsys.readouterr().err


def test_operators_can_be_timed_more_often_than_steps(modules: Callable[[str], ModuleType]) -> None:
    assert modules("gpu").arguments_of(["--repeats", "99", "--parts", "kernels"]).repeats == 99


@pytest.mark.parametrize(("found", "parts"), [(None, ("kernels",)), ("a spec", ("kernels", "steps"))])
def test_without_transformers_only_kernels_are_timed(
    modules: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    found: str | None,
    parts: tuple[str, ...],
) -> None:
    gpu = modules("gpu")
    monkeypatch.setattr(gpu, "find_spec", lambda name: found)
    assert gpu.arguments_of([]).parts == parts
    assert gpu.arguments_of(["--parts", "steps"]).parts == ["steps"]


def test_no_step_that_is_watched_is_timed(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    mezo_step = modules("mezo_step")
    watching = streamed._watching
    watched: list[int] = []
    monkeypatch.setattr(streamed, "_watching", lambda *given: watched.append(taken) or watching(*given))
    model = nn.Linear(3, 1)
    optimizer = zoext.MeZO(model, probe="streamed")
    taken = 0

    def step() -> None:
        nonlocal taken
        taken += 1
        optimizer.step(lambda: model(torch.ones(2, 3)).sum())

    for _ in range(mezo_step.WATCHED_STEPS):
        step()
    interleaved({"a step": step}, repeats=mezo_step.MOST_REPEATS, device=CPU)
    assert set(watched) == {1, 2, 4, 8, 16}
    step()
    assert taken in watched


def test_more_rounds_of_a_step_are_refused(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["mezo_step.py", "--repeats", "15"])
    with pytest.raises(SystemExit, match="2"):
        modules("mezo_step").main()
    assert "argument --repeats: must be at most 14, not 15" in capsys.readouterr().err


def test_what_is_timed_of_a_graph_are_replays(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graphs, "CudaGraph", RecordedGraph)
    gpu_steps = modules("gpu_steps")
    for name in gpu_steps.GRAPHED:
        model, x = nn.Linear(3, 1), torch.ones(2, 3)
        forwards: list[int] = []
        model.register_forward_hook(lambda *_, forwards=forwards: forwards.append(0))
        step = gpu_steps.graphed_step(gpu_steps.RECIPES[name], model, lambda model=model, x=x: model(x).sum())
        before, theta = len(forwards), model.weight.clone()
        step()
        assert len(forwards) == before > 0, name
        assert not torch.equal(model.weight, theta), name


@pytest.mark.parametrize(("name", "millions"), [("125m", 125), ("1.3b", 1316), ("7b", 6658)])
def test_sizes_are_those_of_opt(modules: Callable[[str], ModuleType], name: str, millions: int) -> None:
    from zoext._benchmarking.dense_pass import opt_shapes

    size = modules("gpu").SIZES[name]
    shapes = opt_shapes(layers=size.layers, width=size.width, vocabulary=size.vocabulary)
    assert round(sum(map(math.prod, shapes)) / 1e6) == millions


@pytest.fixture
def quick(modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    """One run a sample, one dtype, and steps that were not warmed up."""
    monkeypatch.setattr(modules("gpu_timing"), "SAMPLE_SECONDS", 1e-9)
    monkeypatch.setattr(modules("gpu_kernels"), "DTYPES", (torch.bfloat16,))
    monkeypatch.setattr(modules("gpu_steps"), "WATCHED_STEPS", 1)


def with_marks(test: Callable[..., None]) -> Callable[..., None]:
    for mark in MARKS:
        test = mark(test)
    return test


@with_marks
@pytest.mark.usefixtures("quick")
def test_all_is_measured(modules: Callable[[str], ModuleType], tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="the decoder is that of transformers")
    out = tmp_path / "gpu.json"
    assert modules("gpu").main([*TINY, "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    figures = document["figures"]
    for name, figure in figures.items():
        assert all(math.isfinite(value) for value in figure["rounds"]), name
        assert figure["unit"] in {"ms", "x", "us", "GB/s", "%", "MiB"}, name
        assert figure["minimum"] > 0 or figure["unit"] in {"%", "MiB"}, name
    timed = {
        name.partition(": ")[2].split(",")[0] for name, figure in figures.items() if figure["unit"] == "ms"
    }
    assert set(OPERATORS) <= timed
    assert {name for name, figure in figures.items() if figure["unit"] == "x"} >= {
        "bfloat16, dense: baseline / noise_axpy_",
        "bfloat16, dense: torch.normal and foreach / noise_axpy_",
        "1x32x70, bfloat16: baseline step / MeZO, streamed",
    }
    assert "bfloat16, Adam: noise_window_, 10 steps, of the copy's speed" in figures
    bias = "bfloat16, small: noise_copy_, a bias"
    assert figures[f"{bias}, a launch"]["median"] == pytest.approx(1e3 * figures[bias]["median"])
    for name in ("MeZO, streamed", "MeZO, inplace", "AdaMeZO, streamed"):
        label = "1x32x70, bfloat16: " + name
        assert f"{label}, reserved beyond a forward" in figures
        left_out = [
            note for note in document["notes"] if note.startswith(f"{label} from a graph was left out: ")
        ]
        if fakegpu is None:
            assert not left_out
            assert f"{label}, graphed / eager" in figures
        else:  # it has no graphs
            assert "the driver refused to capture" in left_out[0]
            assert not any(figure.startswith(f"{label}, graphed") for figure in figures)
    assert document["notes"][0] == "All bits of 208 checks on 1003 elements are those of the CPU."
    assert document["environment"]["GPU"] == torch.cuda.get_device_name()
    assert document["settings"]["size"] == "1x32x70"


@with_marks
@pytest.mark.usefixtures("quick")
def test_steps_from_a_graph_are_measured(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("transformers", reason="the decoder is that of transformers")
    gpu_steps = modules("gpu_steps")
    graph = graphs.CudaGraph if fakegpu is None else RecordedGraph
    replay, replays = graph.replay, []
    monkeypatch.setattr(graph, "replay", lambda self: replays.append(0) or replay(self))
    if fakegpu is not None:  # it is slow
        monkeypatch.setattr(graphs, "CudaGraph", graph)
        monkeypatch.setattr(gpu_steps, "GRAPHED", gpu_steps.GRAPHED[:2])
        monkeypatch.setattr(
            gpu_steps, "RECIPES", {name: gpu_steps.RECIPES[name] for name in gpu_steps.GRAPHED}
        )
        monkeypatch.setattr(gpu_steps, "STEPS_TO_A_GRAPH", 4)
    monkeypatch.setattr(modules("gpu"), "compare", lambda *_: (0, []))
    out = tmp_path / "gpu.json"
    assert modules("gpu").main([*TINY, "--parts", "steps", "--json", str(out)]) == 0
    document = json.loads(out.read_text())
    assert not any("graph" in note for note in document["notes"])
    for name in gpu_steps.GRAPHED:
        label = "1x32x70, bfloat16: " + name
        assert document["figures"][f"{label}, graphed"]["unit"] == "ms"
        assert document["figures"][f"{label}, graphed / eager"]["unit"] == "x"
        assert document["figures"][f"{label}, graphed, beyond a forward"]["unit"] == "MiB"
        assert document["figures"][f"{label}, graphed, reserved beyond a forward"]["unit"] == "MiB"
    # Two makings of a graph to see its memory, one to time it; then a round to warm up, and one to be timed.
    without = {name: 13 if name.startswith("AdaMeZO") else 3 for name in gpu_steps.GRAPHED}
    assert len(replays) == sum(3 * (gpu_steps.STEPS_TO_A_GRAPH - steps) + 2 for steps in without.values())


@with_marks
def test_memory_that_is_held_is_counted_beside_what_is_handed_out() -> None:
    peaks = cuda_peaks(lambda: torch.zeros(3 * 2**20, device="cuda"), torch.device("cuda"))
    assert peaks.allocated == 12 * 2**20
    assert peaks.reserved >= peaks.allocated


@with_marks
def test_nothing_is_timed_where_a_bit_is_wrong(
    modules: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    corrupt(monkeypatch, lambda theta: theta.is_cuda)
    arguments = [*TINY, "--parts", "kernels", "--json", str(tmp_path / "gpu.json")]
    assert modules("gpu").main(arguments) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Not the bits of the CPU:"
    assert len(lines) == 1 + 12
    assert all(line.startswith("noise_axpy_, bfloat16, ") for line in lines[1:])
    assert all(": tensor 3, element 17: " in line for line in lines[1:])
    assert not list(tmp_path.iterdir())


@with_marks
@pytest.mark.usefixtures("quick")
def test_what_the_memory_is_too_small_for_is_left_out(modules: Callable[[str], ModuleType]) -> None:
    def too_large(*arguments: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    device = torch.device("cuda")
    fine = torch.zeros(1, device=device)
    timings = modules("gpu_timing").timed(
        {"large": too_large, "small": lambda: fine.add_(1)}, repeats=3, device=device
    )
    assert timings.left_out == ["large"]
    assert len(timings.seconds["small"].rounds) == len(timings.launching["small"].rounds) == 3
    report = Report("a title", {})
    modules("gpu_kernels").measure(report, too_large, "bfloat16", repeats=2, device=device)
    assert str(report).endswith("left out, since the free memory is too small: no room")


class Clock:
    """Stands still but for launches: the first after a wait finds an empty queue, the others a full one."""

    def __init__(self, *, launch: float, queue: float) -> None:
        self._now = 0.0
        self._launch = launch
        self._queue = queue
        self._is_full = False

    def perf_counter(self) -> float:
        return self._now

    def synchronize(self) -> None:
        self._is_full = False

    def launch_one(self) -> None:
        self._now += max(self._launch, self._queue) if self._is_full else self._launch
        self._is_full = True


@with_marks
@pytest.mark.parametrize(("part", "is_noted"), [(0.8, False), (0.95, True)])
def test_a_time_that_is_the_hosts_is_noted(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, part: float, is_noted: bool
) -> None:
    """A full queue, in which the host waits as long as the device takes, does not make it the host's time."""
    clock = Clock(launch=part * 1e-3, queue=1e-3)
    monkeypatch.setattr(modules("gpu_timing"), "time", clock)
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda begin, end: 50 * 1.0)  # of 50 runs
    monkeypatch.setattr(torch.cuda, "synchronize", clock.synchronize)
    report = Report("a title", {})
    gpu_kernels = modules("gpu_kernels")
    monkeypatch.setattr(modules("gpu_timing"), "_runs", lambda case: 50)
    group = gpu_kernels.Group("a group", {"a case": clock.launch_one})
    gpu_kernels.measure(report, lambda: group, "bfloat16", repeats=3, device=torch.device("cuda"))
    note = "bfloat16, a group: a case is bound by launches, not by the device: the host takes 95% of its time"
    assert str(report).endswith(note) == is_noted
    assert "bound by" not in str(report) or is_noted


@with_marks
def test_no_ratio_is_made_of_times_that_the_device_does_not_see(
    modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda.Event, "elapsed_time", lambda begin, end: 0.0)
    with pytest.raises(RuntimeError, match="events show no time for 1000 runs of nothing"):
        modules("gpu_timing").timed({"nothing": lambda: None}, repeats=1, device=torch.device("cuda"))
