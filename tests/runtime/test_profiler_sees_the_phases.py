"""Profilers see the phases of a step as events, with every operator of zoext inside one of them."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile, record_function

import zoext
from support.interrupted_lines import is_interrupted, moments
from zoext._runtime import profiling
from zoext._runtime.profiling import Phase
from zoext.probes import _swap as swap
from zoext.probes import inplace, streamed

both_probes = pytest.mark.parametrize("probe", ["inplace", "streamed"])
Tree = list[tuple[str, "Tree"]]


class Model(nn.Module):
    """Linear layers, a table of which few rows are read, and a module that owns weights and others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 4)
        self.inner = nn.Linear(4, 4)
        self.head = nn.Linear(4, 2)
        self.shift = nn.Parameter(torch.zeros(4))

    def forward(self, index: Tensor) -> Tensor:
        return self.head(torch.tanh(self.inner(self.table(index) + self.shift)))


OWNERS = 4  # of weights: three children and the model itself


def model_and_closure() -> tuple[Model, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = Model()
    index = torch.tensor([3, 1, 4])
    return model, lambda: model(index).square().mean()


def copies_of(model: Model) -> Callable[[int], Tensor]:
    index = torch.tensor([3, 1, 4])
    return lambda copies: zoext.mean_per_copy(model(index.repeat(copies)).square(), copies)


def profiler() -> profile:
    return profile(activities=[ProfilerActivity.CPU])


def is_phase(event: FunctionEvent) -> bool:
    return event.name in set(Phase)


def ancestors(event: FunctionEvent) -> Iterator[FunctionEvent]:
    while (event := event.cpu_parent) is not None:
        yield event


def phases_below(events: list[FunctionEvent]) -> Tree:
    """The phases among events and what is below them, as (name, phases in it), in the order of time."""
    tree: Tree = []
    for event in sorted(events, key=lambda event: event.time_range.start):
        below = phases_below(event.cpu_children)
        tree += [(str(event.name), below)] if is_phase(event) else below
    return tree


def phases_of(seen: profile) -> Tree:
    return phases_below([event for event in seen.events() if event.cpu_parent is None])


def counts(seen: profile) -> Counter[str]:
    return Counter(str(event.name) for event in seen.events() if is_phase(event))


# What there is to see


def test_a_step_in_place() -> None:
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model, probe="inplace")
    with profiler() as seen:
        optimizer.step(closure)
    names = [Phase.PERTURB, Phase.FORWARD, Phase.PERTURB, Phase.FORWARD]
    assert phases_of(seen) == [(Phase.ESTIMATE, [(name, []) for name in names]), (Phase.UPDATE, [])]
    with profiler() as seen:
        optimizer.estimate(closure)  # restores theta itself
    assert phases_of(seen) == [(Phase.ESTIMATE, [(name, []) for name in [*names, Phase.RESTORE]])]


@pytest.mark.parametrize("watched", [True, False])
def test_a_streamed_step_perturbs_and_restores_every_module_within_the_forward(watched: bool) -> None:
    """The table, of which few rows are read, is perturbed after its forward unless operators are watched."""
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model, probe="streamed")
    for _ in range(0 if watched else 2):
        optimizer.step(closure)
    with profiler() as seen:
        optimizer.step(closure)
    own = [(Phase.PERTURB, []), (Phase.RESTORE, [])]
    # The model's own weight is away from its place while its children run.
    forward = (Phase.FORWARD, [own[0], *own * (OWNERS - 1), own[1]])
    assert phases_of(seen) == [(Phase.ESTIMATE, [forward, forward]), (Phase.UPDATE, [])]


@both_probes
@pytest.mark.parametrize("name", ["MeZO", "AdaMeZO", "AGZO", "LOZO", "MeZOGV", "MeZOGreedy"])
def test_counts_are_those_of_forwards_and_modules(name: str, probe: str) -> None:
    model, closure = model_and_closure()
    optimizer = getattr(zoext, name)(model, probe=probe)
    with profiler() as seen:
        optimizer.step(closure)
    count = counts(seen)
    forwards = optimizer.last_estimate.forwards
    assert count[Phase.FORWARD] == forwards
    assert count[Phase.ESTIMATE] == count[Phase.UPDATE] == 1
    if probe == "streamed":
        assert count[Phase.PERTURB] == count[Phase.RESTORE] == forwards * OWNERS
    else:
        displacing = forwards - (name == "AGZO")  # whose centre is at theta
        assert count[Phase.PERTURB] == displacing
        # The update restores where the last probe left theta, unless it is not linear.
        assert (name == "AdaMeZO") <= count[Phase.RESTORE] < displacing + (name == "AdaMeZO")


def test_phases_are_inside_the_event_that_torch_makes_of_a_step() -> None:
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model)
    with profiler() as seen:
        optimizer.step(closure)
    for event in filter(is_phase, seen.events()):
        assert [*ancestors(event)][-1].name == "Optimizer.step#MeZO.step"


def test_micro_batches_are_estimates_of_their_own() -> None:
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model)
    with profiler() as seen:
        optimizer.estimate(closure)
        optimizer.estimate(closure)
        optimizer.step()
    assert [name for name, _ in phases_of(seen)] == [Phase.ESTIMATE, Phase.ESTIMATE, Phase.UPDATE]


def test_every_operator_is_an_event_within_a_phase() -> None:
    seen_operators: set[str] = set()
    for direction in (zoext.Gaussian(), zoext.ActivationSubspace(), zoext.LowRank()):
        for update, probe in (
            (zoext.SGD(), "streamed"),
            (zoext.AdamReplay(), "inplace"),
            (zoext.SGD(), "batched"),
        ):
            model, closure = model_and_closure()
            if probe == "batched":
                closure = copies_of(model)
                model.shift.requires_grad_(False)  # or the model itself would run copy by copy
            optimizer = zoext.ZerothOrderOptimizer(model, direction=direction, update=update, probe=probe)
            with profiler() as seen:
                optimizer.step(closure)
            operators = [event for event in seen.events() if event.name.startswith("zoext::")]
            assert all(any(map(is_phase, ancestors(event))) for event in operators)
            seen_operators |= {event.name for event in operators}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("zoext::")}
    assert seen_operators == registered


# What it must not do


@both_probes
def test_profiling_changes_no_bit(probe: str) -> None:
    (plain, loss_of_plain), (profiled, loss_of_profiled) = model_and_closure(), model_and_closure()
    optimizers = [zoext.MeZO(model, lr=0.1, probe=probe) for model in (plain, profiled)]
    for _ in range(3):
        optimizers[0].step(loss_of_plain)
        with profiler():
            optimizers[1].step(loss_of_profiled)
    for a, b in zip(plain.parameters(), profiled.parameters(), strict=True):
        assert torch.equal(a, b)


def test_nothing_is_made_while_nobody_looks() -> None:
    assert len({id(profiling.record(phase)) for phase in Phase}) == 1


class Refused(Exception):
    pass


def refuse(module: nn.Module, args: Any) -> None:
    raise Refused


@both_probes
def test_an_exception_leaves_no_event_open(probe: str) -> None:
    """Whatever follows an event that was not closed would be inside of it."""
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model, probe=probe)
    model.head.register_forward_pre_hook(refuse)
    with profiler() as seen:
        with pytest.raises(Refused):
            optimizer.step(closure)
        with record_function("afterwards"):
            pass
    assert counts(seen)[Phase.FORWARD] == 1
    assert counts(seen)[Phase.RESTORE] == (OWNERS if probe == "streamed" else 1)
    (afterwards,) = (event for event in seen.events() if event.name == "afterwards")
    assert not list(ancestors(afterwards))


@both_probes
def test_an_interrupt_at_any_line_leaves_no_event_open(probe: str) -> None:
    """SIGINT before lines of a probe and of the events themselves, while a profiler looks."""
    files = {inplace.__file__, streamed.__file__, swap.__file__, profiling.__file__}

    def estimate() -> None:
        model, closure = model_and_closure()
        zoext.MeZO(model, probe=probe).estimate(closure)

    estimate()  # what is prepared once is prepared
    stops = moments(estimate, files)[::4]
    with profiler() as seen:
        for stop_at in stops:
            assert is_interrupted(estimate, stop_at, files), stop_at
            with record_function("afterwards"):
                pass
    assert len(stops) > 10
    afterwards = [event for event in seen.events() if event.name == "afterwards"]
    assert len(afterwards) == len(stops)
    assert not any(list(ancestors(event)) for event in afterwards)


@both_probes
def test_a_profiler_may_start_and_stop_within_a_closure(probe: str) -> None:
    model, closure = model_and_closure()
    optimizer = zoext.MeZO(model, probe=probe)
    seen = profiler()
    forwards = 0

    def profiled_from_the_first_forward_to_the_second() -> Tensor:
        nonlocal forwards
        forwards += 1
        (seen.start if forwards == 1 else seen.stop)()
        return closure()

    before = copy.deepcopy(model)
    optimizer.estimate(profiled_from_the_first_forward_to_the_second)
    assert forwards == 2
    assert counts(seen)[Phase.FORWARD] == 1
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # dynamo's own import
@pytest.mark.parametrize("profiled_step", [0, 1])
@both_probes
def test_a_compiled_model_steps_as_without_a_profiler(probe: str, profiled_step: int) -> None:
    """The profiler looks on while the model is compiled, or while it runs."""

    def losses(profiled: int | None) -> list[float]:
        torch._dynamo.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
        compiled = torch.compile(model, backend="eager")
        optimizer = zoext.MeZO(model, lr=0.1, probe=probe)
        found = []
        for step in range(2):
            with torch.autograd.profiler.profile(enabled=step == profiled):
                found.append(optimizer.step(lambda: compiled(torch.ones(1, 4)).square().mean()).item())
        return found

    assert losses(profiled_step) == losses(None)


# NVTX


NVTX_STEP = """
import torch, zoext
model = torch.nn.Linear(4, 2, device="cuda")
x = torch.ones(1, 4, device="cuda")
optimizer = zoext.MeZO(model, probe="{probe}")
with torch.autograd.profiler.emit_nvtx():
    optimizer.step(lambda: model(x).square().mean())
"""


@pytest.fixture(scope="module")
def nvtx_log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library that prints the ranges of the process that loads it: see ``tests/csrc/nvtx_log.cpp``."""
    if torch.version.cuda is None:
        pytest.skip("torch is a CPU build")
    from torch.utils.cpp_extension import CUDA_HOME

    folders = [Path(CUDA_HOME or "/usr/local/cuda") / "include"]
    folders += Path(torch.__file__).parents[1].glob("nvidia/**/include")
    compiler = os.environ.get("CXX", "c++")
    if not shutil.which(compiler) or not any((folder / "nvtx3").is_dir() for folder in folders):
        pytest.skip("needs a C++ compiler and the headers of NVTX")
    library = tmp_path_factory.mktemp("nvtx") / "nvtx_log.so"
    source = Path(__file__).parents[1] / "csrc" / "nvtx_log.cpp"
    options = ["-shared", "-fPIC", *(f"-I{folder}" for folder in folders)]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    return library


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, real or simulated")
@both_probes
def test_phases_and_operators_are_ranges_of_nvtx(probe: str, nvtx_log: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NVTX_STEP.format(probe=probe)],
        env={**os.environ, "NVTX_INJECTION64_PATH": str(nvtx_log)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    opened: list[str] = []
    ranges: list[list[str]] = []
    for line in done.stdout.splitlines():
        if line == "-":
            opened.pop()
        elif line.startswith("+"):
            opened.append(line[1:].split(",")[0])
            ranges.append(list(opened))
    assert not opened
    of_a_step = ["Optimizer.step#MeZO.step", Phase.ESTIMATE]
    if probe == "streamed":
        within = [*of_a_step, Phase.FORWARD]
        assert ranges.count(within) == 2
        assert ranges.count([*within, Phase.PERTURB]) == ranges.count([*within, Phase.RESTORE]) == 2
        # The first step is watched, and whoever watches sees an operator twice: by name the outer one counts.
        perturbing = [names[4:] for names in ranges if names[:4] == [*within, Phase.PERTURB]]
        assert perturbing.count(["zoext::noise_copy_"]) == 2
    else:
        phases = [names[2] for names in ranges if names[:2] == of_a_step and len(names) == 3]
        names = [Phase.PERTURB, Phase.FORWARD, Phase.PERTURB, Phase.FORWARD]  # the update restores
        assert [name for name in phases if name in set(Phase)] == names
        assert [*of_a_step, Phase.PERTURB, "zoext::noise_axpy_"] in ranges
    assert ["Optimizer.step#MeZO.step", Phase.UPDATE, "zoext::noise_axpy_"] in ranges
