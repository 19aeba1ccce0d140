"""What the machine code of the CUDA kernels may cost; no GPU is needed to see it.

docs/performance.md says what follows from these figures, and why registers do not fill a multiprocessor.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import zoext

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))
machine_code = pytest.importorskip("machine_code", reason=f"{BENCHMARKS} is not there")
kernel_budget = pytest.importorskip("kernel_budget")

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
#: The instructions an element that a kernel may take, by its name: with one term (without a step, where it
#: makes several, and without a term of copies), with one more term, row of the window or step, and the
#: blocks that a multiprocessor has registers for. The first name that fits counts.
MOST = [
    (r"write<\w+, Normals>", 36, None, 6),
    (r"write<\w+, Signs>", 13, None, 6),
    (r"displace<Dense<Normals, double>", 40, 38, 3),
    (r"displace<Dense<Normals, \w+>, nearest", 40, 38, 5),
    (r"displace<Dense<Normals, \w+>", 49, 38, 5),
    (r"displace<Dense<Signs, \w+>, nearest", 19, None, 3),
    (r"displace<Dense<Signs, Half>", 21, None, 3),
    (r"displace<Dense<Signs, \w+>", 20, None, 3),
    (r"displace<Factored", 22, None, 3),
    (r"displace_copies<Normals, double", 17, 49, 2),
    (r"displace_copies<Normals, \w+, nearest", 12, 46, 3),
    (r"displace_copies<Normals, ", 23, 44, 3),
    (r"displace_copies<Signs, double", 17, None, 2),
    (r"displace_copies<Signs, float", 10, None, 3),
    (r"displace_copies<Signs, \w+, nearest", 9, None, 2),
    (r"displace_copies<Signs, ", 20, None, 2),
    (r"displace_steps<Dense<Normals, double>", 4, 44, 3),
    (r"displace_steps<Dense<Normals", 5, 46, 4),
    (r"displace_steps<", 12, None, 2),
    (r"move_window<Adam, Dense<Normals, double>", 98, 49, 3),
    (r"move_window<Adam, Dense<Normals, \w+>, nearest>", 78, 46, 4),
    (r"move_window<Adam, Dense<Normals, \w+>, stochastic>", 91, 46, 4),
    (r"move_window<Adam, .*double", 61, None, 2),
    (r"move_window<Adam, .*, nearest>", 43, None, 2),
    (r"move_window<Adam, .*, stochastic>", 49, None, 2),
    (r"move_window<\w+, Dense<Normals, double>", 61, 49, 3),
    (r"move_window<\w+, Dense<Normals, \w+>, nearest>", 56, 46, 4),
    (r"move_window<\w+, Dense<Normals, \w+>, stochastic>", 67, 46, 4),
    (r"move_window<.*, nearest>", 12, None, 2),
    (r"move_window<.*, stochastic>", 18, None, 2),
    (r"move_windows<Adam, Dense<Normals, double>", 4, 96, 2),
    (r"move_windows<Adam, Dense<Normals", 5, 77, 2),
    (r"move_windows<Adam, .*double", 11, 54, 2),
    (r"move_windows<Adam, ", 11, 38, 2),
    (r"move_windows<ScalarAdam, Dense<Normals, double>", 4, 77, 2),
    (r"move_windows<ScalarAdam, Dense<Normals", 5, 66, 2),
    (r"move_windows<ScalarAdam, .*double", 12, 39, 2),
    (r"move_windows<ScalarAdam, ", 11, 28, 2),
    (r"move_windows<Sign, Dense<Normals", 5, 53, 2),
    (r"move_windows<Sign, ", 11, None, 2),  # has neither normals nor a root to know the loop by
]
#: What a pass may take with one of the roundings that lose nothing, with that to the nearest as 1.
MOST_OF_NEAREST = {
    ("stochastic", "BFloat16"): 1.19,
    ("stochastic", "Half"): 1.25,
    ("residual", "BFloat16"): 1.2,
    ("residual", "Half"): 1.25,
}


def built() -> Path | None:
    return next(iter(sorted(Path(zoext.__file__).parent.glob("_cuda*.so"))), None)


@pytest.fixture(scope="module")
def kernels() -> list:
    shared_object = built()
    if shared_object is None:
        pytest.skip("the CUDA operators are not built")
    try:
        return machine_code.kernels(shared_object)
    except machine_code.ToolMissing as error:
        skip_unless_in_ci(str(error))


def skip_unless_in_ci(reason: str) -> NoReturn:
    """CI builds all architectures and installs all tools: there a budget that is not looked at fails."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.mark.cuda
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_kernels_keep_to_their_budget(kernels: list, architecture: str) -> None:
    chosen = [kernel for kernel in kernels if kernel.architecture == architecture]
    if not chosen:
        skip_unless_in_ci(f"the CUDA operators are not built for {architecture}")
    spilled = [kernel.name for kernel in chosen if kernel.stack]
    assert not spilled, f"these kernels use local memory: {spilled}"
    budgets = [budget for budget in map(kernel_budget.budget, chosen) if budget]
    assert len(budgets) == 164, (
        "write, displace (for few and many), copies, windows by three rules, and steps of these"
    )
    for budget in budgets:
        first, further, blocks = next(most for name, *most in MOST if re.match(name, budget.kernel))
        has_residuals = "residual" in budget.kernel or (
            re.match("displace_steps|move_windows", budget.kernel) and budget.storage == 2
        )
        narrowest = 8 if has_residuals else 16
        assert budget.narrowest == narrowest, f"{budget}: accesses of {budget.narrowest} bytes"
        assert budget.first <= first, f"{budget}: more than {first} instructions"
        assert (budget.further is None) == (further is None), budget
        assert further is None or budget.further <= further, f"{budget}: more than {further} instructions"
        assert budget.blocks >= blocks, f"{budget}: room for {budget.blocks} blocks, not for {blocks}"


@pytest.mark.cuda
@pytest.mark.parametrize("storage", ["BFloat16", "Half"])
@pytest.mark.parametrize("rounding", ["stochastic", "residual"])
def test_roundings_that_lose_nothing_cost_little(kernels: list, rounding: str, storage: str) -> None:
    found = {(each.architecture, each.name): each for each in kernels}
    for architecture in {each.architecture for each in kernels}:
        nearest, other = (
            kernel_budget.budget(
                found[architecture, f"displace<Dense<Normals, {storage}>, {how}, many>"]
            ).first
            for how in ("nearest", rounding)
        )
        assert other <= MOST_OF_NEAREST[rounding, storage] * nearest, (architecture, other, nearest)


@pytest.mark.cuda
def test_the_counted_path_makes_noise(kernels: list) -> None:
    """One root for two normals, ten rounds of two products for four: else something else was counted."""
    seen = 0
    for budget in filter(None, map(kernel_budget.budget, kernels)):
        if "Normals" not in budget.kernel or "move_windows" in budget.kernel:  # whose steps have roots, too
            continue
        is_in_the_loop = any(kind in budget.kernel for kind in ("window", "steps", "copies"))
        counts = budget.further_units if is_in_the_loop else budget.units
        seen += 1
        conversions = 1.5 if budget.architecture == "sm_80" else 0  # three for two normals, in that unit
        assert counts["special"] == 0.5 + conversions, budget
        assert counts["integer multiplier"] >= 5, budget
    assert seen >= 16


@pytest.mark.cuda
def test_nothing_is_approximated(kernels: list) -> None:
    """Of the approximate functions only those that a correction follows: roots and quotients. An estimate
    of a root is corrected by what its square lacks to the number whose root it is; elsewhere, where
    ptxas wrote that too, it moves registers about."""
    for kernel in kernels:
        lines = kernel.instructions
        for i, line in enumerate(lines):
            if not line.startswith("MUFU"):
                continue
            function, _, number = line.split()[:3]
            assert function in {"MUFU.RSQ", "MUFU.RCP", "MUFU.RSQ64H", "MUFU.RCP64H"}, (kernel.name, line)
            if function == "MUFU.RSQ" and kernel.name.startswith(("write", "displace")):
                lack = rf"FFMA R\d+, -(R\d+)(\.reuse)?, \1(\.reuse)?, {number}\b"
                assert any(re.match(lack, later) for later in lines[i : i + 150]), (kernel.name, line)


@pytest.mark.cuda
def test_the_program_writes_its_figures(
    kernels: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    read: list[Path] = []  # in place of reading once more, which takes a minute
    monkeypatch.setattr(kernel_budget, "kernels", lambda path: read.append(path) or kernels)
    monkeypatch.setattr(sys, "argv", ["kernel_budget.py", "--json", str(tmp_path / "budget.json")])
    assert kernel_budget.main() == 0
    assert read == [built()]
    document = json.loads((tmp_path / "budget.json").read_text())
    assert {kernel["kernel"] for kernel in document["kernels"]} <= {kernel.name for kernel in kernels}
    assert all(prediction["of_copy"] >= 1 for prediction in document["predictions"])
    assert "displace<Dense<Normals, BFloat16>, nearest, many>" in capsys.readouterr().out


def test_nothing_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(kernel_budget, "PACKAGE", tmp_path)
    monkeypatch.setattr(sys, "argv", ["kernel_budget.py"])
    assert kernel_budget.main() == 2
    assert "build it with CUDA" in capsys.readouterr().err


def test_a_prediction_by_hand() -> None:
    """On an H100, 128 instructions a clock: 40 of an element take 1.196 ps, its 4 bytes 1.193 ps."""
    units = {"issue": 40.0, "multiplier": 20.0, "integer multiplier": 5.0, "integer": 10.0, "special": 0.5}
    budget = kernel_budget.Budget(
        "sm_90",
        "displace<Dense<Normals, BFloat16>, nearest, many>",
        registers=48,
        blocks=5,
        local=0,
        elements=8,
        first=40,
        further=40,
        narrowest=16,
        mix={},
        units=units,
        further_units=units,
    )
    one, four = (each for each in kernel_budget.predict([budget]) if each.gpu == "H100 SXM")
    assert one.operator == "noise_axpy_, one term"
    assert one.bound == ("issue", "memory")
    assert one.of_copy == pytest.approx(40 / 128 / (132 * 1.98) * 3352 / 4)
    assert four.of_copy == pytest.approx(4 * one.of_copy)
    assert four.bound == ("issue",)
    assert four.elements_per_second == pytest.approx(1e9 * 132 * 1.98 * 128 / 160)


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @!P0 BRA `(.L_x_2) ;
        /*0030*/                   MUFU.RSQ R0, R5 ;
.L_x_1:
        /*0040*/                   FFMA R4, R4, R5, R4 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/               @P2 EXIT ;
.L_x_2:
        /*0070*/                   STG.E.128 desc[UR4][R2.64], R4 ;
        /*0080*/                   BRA P3, `(.L_x_0) ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   BRA `(.L_x_3);
"""


def test_a_listing_is_read() -> None:
    usage = {"REG": 40, "STACK": 0, "LOCAL": 8, "SHARED": 0}
    try:
        kernel = machine_code._kernel("sm_90", "_Z5writev", LISTING, usage)
    except machine_code.ToolMissing as error:
        pytest.skip(str(error))
    assert (kernel.name, kernel.registers, kernel.stack) == ("write", 40, 8)
    inner, outer, trap = kernel.loops()
    assert outer.holds(inner)
    assert not inner.holds(outer)
    assert (trap.head, trap.latch) == (10, 10)
    names = [line.split()[0] for line in kernel.shortest_round(outer)]
    assert names == ["LDG.E.128", "BRA", "STG.E.128", "BRA"]
    names = [line.split()[0] for line in kernel.shortest_round(outer, [kernel.find(outer, "MUFU")])]
    assert names == ["LDG.E.128", "BRA", "MUFU.RSQ", "FFMA", "BRA", "EXIT", "STG.E.128", "BRA"]
    assert kernel_budget.whole_loop(kernel) == outer
