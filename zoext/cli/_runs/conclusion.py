"""The end of a run: which step's model is written, what the run came to, and what to do next."""

from __future__ import annotations

from zoext.cli import _json
from zoext.cli._runs import outcome, records, results
from zoext.cli._runs.best import Source, best_of
from zoext.cli._runs.records import Record
from zoext.cli._runs.training import Training
from zoext.cli._schedules import CONSTANT


def conclude(training: Training, quiet: bool, as_json: bool) -> None:
    """Writes and reports what the run has come to; JSON is printed even if ``quiet``."""
    folder = training.folder
    metrics = records.read_metrics(folder.metrics)
    results.draw_curve(folder.curve, metrics, training.problem.title)
    if not training.is_done:
        _report_stop(training, as_json)
        return
    evaluations = [record for record in metrics if "valid_loss" in record]
    source = Source(folder, training.problem, training.settings.model, training.is_replayable)
    kept = _step_to_keep(training, evaluations, source)
    # In this order: a copy is put into the model, which has the last weights until then.
    model = training.problem.model if kept == training.step else source.model(kept)
    results.write_model(folder.model, model, training.problem.tokenizer)
    remarks = _remarks(training, evaluations, source, kept)
    if as_json:
        print(_json.text_of(_record(training, evaluations, kept, remarks)))
    elif not quiet:
        print(results.report(metrics, folder, kept))
        print("\n".join(remarks))


def _report_stop(training: Training, as_json: bool) -> None:
    path = training.folder.path
    resume = f"zoext finetune --out {path} --resume"
    if as_json:
        print(_json.text_of({"out": str(path), "finished": False, "step": training.step, "resume": resume}))
    else:
        print(f"stopped after step {training.step}; to continue: {resume}")


def _record(training: Training, evaluations: list[Record], kept: int, remarks: list[str]) -> Record:
    folder = training.folder
    return {
        "out": str(folder.path),
        "finished": True,
        "step": training.step,
        "model": str(folder.model),
        "model_step": kept,
        "trajectory": str(folder.trajectory) if training.is_replayable else None,
        "evaluations": evaluations,
        "remarks": remarks,
    }


def _step_to_keep(training: Training, evaluations: list[Record], source: Source) -> int:
    """The best step whose model can be had, or the last step."""
    if training.settings.keep == "last":
        return training.step
    had = [record for record in evaluations if record["step"] == training.step or source.has(record["step"])]
    best = best_of(had)
    return training.step if best is None else int(best["step"])


def _remarks(training: Training, evaluations: list[Record], source: Source, kept: int) -> list[str]:
    settings, path = training.settings, training.folder.path
    remarks = []
    if training.stopped_early:
        remarks.append(
            f"stopped at step {training.step} of {settings.steps}: no lower held-out loss in "
            f"{settings.patience} evaluations; to continue: zoext finetune --out {path} --resume --patience "
            f"{2 * (settings.patience or 0)}"
        )
    best = best_of(evaluations)
    if best is not None and best["step"] != kept:
        remarks.append(_about_best(training, source, best))
    advice = training.without_slope or outcome.advice(evaluations[0], evaluations[-1], settings)
    if advice is not None:
        remarks.append(advice)
    elif not training.stopped_early and settings.schedule == settings.mu_schedule == CONSTANT:
        more = 2 * settings.steps
        remarks.append(f"to train on: zoext finetune --out {path} --resume --steps {more}")
    if training.is_replayable and source.trajectory_begin == 0:
        base = settings.model or "demo"
        again = path.with_name(f"{path.name}-again")
        remarks.append(f"to reproduce the model: {_replay(base, training, kept)} --out {again}")
    return remarks


def _about_best(training: Training, source: Source, best: Record) -> str:
    """How to get the model of the best step, which was not written."""
    step, path = best["step"], training.folder.path
    said = f"the lowest held-out loss was {best['valid_loss']:.4f} at step {step}"
    if not source.has(step):
        return f"{said}, whose model is lost: the trajectory does not lead to it"
    return f"{said}; to get that model: zoext finetune --out {path} --resume --keep best"


def _replay(base: str, training: Training, step: int) -> str:
    command = f"zoext replay {base} {training.folder.trajectory}"
    return command if step == training.step else f"{command} --to-step {step}"
