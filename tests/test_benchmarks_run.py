"""Every benchmark runs and writes figures that a program can read. Nothing here looks at speed."""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from zoext.benchmarking.dense_pass import DensePass, opt_shapes, usual_perturb
from zoext.benchmarking.memory import peak
from zoext.benchmarking.report import Report, at_least, at_most
from zoext.benchmarking.timing import Spread, interleaved
from zoext.cli import bench

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
TINY = ["--layers", "1", "--width", "32", "--vocabulary", "70", "--threads", "1", "--repeats", "2"]
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")


def read(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def check(document: dict, names: set[str]) -> None:
    figures = document["figures"]
    assert names <= figures.keys()
    for name, figure in figures.items():
        assert figure["rounds"], name
        assert all(math.isfinite(value) for value in figure["rounds"]), name
        assert figure["minimum"] <= figure["median"] <= figure["maximum"], name
        assert figure["unit"] in {"ms", "x", "%", "MiB"}, name
        if figure["unit"] in {"ms", "x"}:
            assert figure["minimum"] > 0, name
    assert document["settings"]["vocabulary"] == 70
    assert document["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (
            "dense_pass",
            [
                "usual loop / fused pass",
                "signs / plain pass",
                "fused pass, one thread / fused pass",
                "16 steps in one call / in 16 calls",
            ],
        ),
        ("adam_update", ["plain update / fused update", "fused update / noise only"]),
        ("factored_pass", ["fused pass / plain pass, rank 1", "plain / fused Adam step"]),
        ("power_iteration", ["power iterations in a forward", "plain / fused power iterations"]),
        ("mezo_step", ["MeZO, streamed, outside forwards", "MeZO, inplace, outside forwards"]),
        ("agzo_forward", ["forward with hooks, rank 1 / forward"]),
        (
            "step_memory",
            [
                "MeZO, inplace, beyond a forward",
                "AdaMeZO, streamed, beyond a forward",
                "AGZO less its bases / MeZO, streamed, with weights",
            ],
        ),
    ],
)
def test_program_writes_finite_figures(program: str, names: list[str], tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / f"{program}.py"), *TINY, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check(read(out), {f"{dtype}: {name}" for dtype in DTYPES for name in names})
    assert all(name in done.stdout for name in names)


def test_roundings_of_both_dtypes_in_16_bits_are_compared(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "dense_pass.py"), *TINY, "--json", str(out)]
    subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    roundings = ("stochastic rounding", "with residuals")
    names = {
        f"{dtype}: fused pass, {how} / fused pass" for dtype in ("bfloat16", "float16") for how in roundings
    }
    check(read(out), names)


def test_zoext_bench_writes_finite_figures(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "figures.json"
    generator, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert bench.run(parser.parse_args([*TINY, "--json", str(out)])) == 0
    check(read(out), {f"{dtype}: usual loop / fused pass" for dtype in DTYPES})
    assert torch.equal(torch.random.get_rng_state(), generator)
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--repeats", "0", "at least 1, not 0"),
        ("--device", "cpux", "cpu, cuda or cuda:N, not cpux"),
        (
            "--json",
            "no/such/folder.json",
            "a file in a folder that can be written to, not no/such/folder.json",
        ),
    ],
)
def test_options_out_of_range_are_named(
    option: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    with pytest.raises(SystemExit):
        parser.parse_args([option, value])
    assert f"argument {option}: must be {message}" in capsys.readouterr().err


def test_every_program_is_tested_and_described() -> None:
    programs = {
        path.stem for path in BENCHMARKS.glob("*.py") if "argparse.ArgumentParser(" in path.read_text()
    }
    assert programs == {
        "agzo_forward",
        "adam_update",
        "dense_pass",
        "factored_pass",
        "gpu",
        "kernel_budget",
        "mezo_step",
        "power_iteration",
        "step_memory",
    }
    page = (BENCHMARKS / "README.md").read_text()
    assert all(f"{program}.py" in page for program in programs)


def test_shapes_are_those_of_opt_125m() -> None:
    transformers = pytest.importorskip("transformers", reason="compares with the model of transformers")
    with torch.device("meta"):
        model = transformers.OPTForCausalLM(transformers.OPTConfig())
    theirs = [tuple(parameter.shape) for parameter in model.parameters()]
    assert sorted(opt_shapes()) == sorted(theirs)
    assert len(theirs) == 196
    assert sum(map(math.prod, opt_shapes())) == 125_239_296


def test_usual_loop_is_the_formula_of_the_peers() -> None:
    theta = [torch.linspace(-1, 1, 35).reshape(5, 7), torch.ones(3, dtype=torch.float64)]
    torch.manual_seed(11)
    noise = [torch.normal(0.0, 1.0, tensor.shape, dtype=tensor.dtype) for tensor in theta]
    expected = [tensor + -2.0 * z * 0.25 for tensor, z in zip(theta, noise, strict=True)]
    usual_perturb(theta, 11, -2.0, 0.25)
    for got, want in zip(theta, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_do_the_same_work(dtype: torch.dtype) -> None:
    work = DensePass([(5, 7), (3,), (64, 33)], dtype, CPU)
    for name in ("usual loop", "fused pass"):
        before = [parameter.clone() for parameter in work.parameters]
        work.rivals()[name]()
        for now, then in zip(work.parameters, before, strict=True):
            assert not torch.equal(now, then), name
    assert work.elements == 35 + 3 + 64 * 33
    assert sum(piece.numel() for piece in work._pieces) >= work.elements
    assert work._bytes.nbytes == work.elements * dtype.itemsize


def test_factored_rivals_move_weights_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from factored_pass import FactoredPass

    def moved(name: str, *arguments: int) -> list[torch.Tensor]:
        torch.manual_seed(3)
        work = FactoredPass([(5, 7), (64, 33)], torch.float32, CPU)
        before = [matrix.clone() for matrix in work.matrices]
        getattr(work, name)(*arguments)
        return [now - then for now, then in zip(work.matrices, before, strict=True)]

    for names, arguments in (
        (("plain", "fused"), (1,)),
        (("plain", "fused"), (2,)),
        (("plain_adam", "fused_adam"), ()),
    ):
        for plain, fused in zip(*(moved(name, *arguments) for name in names), strict=True):
            assert (plain != 0).float().mean() > 0.9
            torch.testing.assert_close(plain, fused, rtol=1e-2, atol=1e-8)


def test_adam_rivals_move_weights_by_steps_of_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """They draw other noise, so only the size of their steps can be compared."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from adam_update import AdamUpdate

    sizes = []
    for name in ("plain", "fused"):
        update = AdamUpdate([(300, 400)], torch.float32, CPU)
        before = update.parameters[0].clone()
        getattr(update, name)()
        sizes.append((update.parameters[0] - before).square().mean().sqrt().item())
    assert sizes[0] == pytest.approx(sizes[1], rel=0.02)


def test_rivals_find_the_same_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from power_iteration import PowerIterations

    work = PowerIterations(1, 32, torch.float32, CPU)
    assert [tuple(rows.shape) for rows in work.activations] == [(256, 32)] * 3 + [(256, 128)]
    for rows in work.activations:
        rows[:, 5] *= 20
    torch.manual_seed(3)
    for plain, fused in zip(work.plain(), work.fused(), strict=True):
        torch.testing.assert_close((plain @ fused.T).abs(), torch.ones(1, 1), rtol=1e-4, atol=0)


def test_rounds_are_interleaved_after_a_warm_up() -> None:
    ran: list[str] = []
    times = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3, device=CPU)
    assert "".join(ran) == "ab" * 4
    assert {name: len(spread.rounds) for name, spread in times.items()} == {"a": 3, "b": 3}
    ran.clear()
    interleaved({"a": lambda: ran.append("a")}, repeats=3, device=CPU, seconds=0)
    assert "".join(ran) == "aa"
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        interleaved({}, repeats=0, device=CPU)


def test_ratios_are_taken_round_by_round() -> None:
    ratio = Spread((2.0, 30.0, 4.0)) / Spread((1.0, 10.0, 4.0))
    assert ratio.rounds == (2.0, 3.0, 1.0)
    assert ratio.median == 2.0
    assert Spread((1.0, 5.0)).larger_of(Spread((2.0, 3.0))).rounds == (2.0, 5.0)


def test_table_says_whether_a_bar_is_met() -> None:
    report = Report("a title", {})
    report.add("fast enough", Spread((11.0, 13.0, 14.0)), "x", at_least(12))
    report.add("too slow", Spread((2.0, 2.5, 1.0)), "x", at_most(1.5))
    lines = {line.split("  ")[0]: line for line in str(report).splitlines()}
    assert lines["fast enough"].endswith(">= 12 met")
    assert lines["too slow"].endswith("<= 1.5 MISSED")


def test_figures_of_one_name_are_refused_and_notes_are_kept(tmp_path: Path) -> None:
    report = Report("a title", {})
    report.add("twice", Spread((1.0,)), "x")
    with pytest.raises(ValueError, match="there is a figure called 'twice' already"):
        report.add("twice", Spread((2.0,)), "x")
    report.note("one thing was left out")
    report.finish(tmp_path / "figures.json")
    assert str(report).endswith("\none thing was left out")
    assert read(tmp_path / "figures.json")["notes"] == ["one thing was left out"]


def test_peak_of_memory_is_that_of_the_second_run() -> None:
    kept = [torch.zeros(2**18)]

    def replace_and_use() -> None:
        kept[0] = kept[0] + 1  # 1 MiB more while both are there
        (torch.zeros(2**19, dtype=torch.float64) + 1).sum()  # 4 MiB twice

    assert peak(replace_and_use, CPU) == pytest.approx(8 * 2**20, abs=4096)
