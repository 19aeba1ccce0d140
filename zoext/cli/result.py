"""What is left of a run: the model, and a few lines on what it learned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zoext._runtime import atomic
from zoext.cli.errors import writing
from zoext.cli.evaluation import Evaluation
from zoext.cli.json_lines import Record
from zoext.cli.models import quiet_transformers
from zoext.cli.problem import Problem
from zoext.cli.run_folder import RunFolder


def write_model(path: Path, problem: Problem) -> None:
    """Writes model and tokenizer into the folder ``path``, for from_pretrained of transformers."""
    # There is one if the run ended before, and was resumed with more steps.
    with writing(path), quiet_transformers(), atomic.new_folder(path, replace=True) as temporary:
        problem.model.save_pretrained(temporary)
        problem.tokenizer.save_pretrained(temporary)


def report(records: Sequence[Record], folder: RunFolder) -> str:
    """Held-out loss and accuracy before and after, with standard errors over examples.

    Where former metrics were damaged or lost, the first that there are stand for before.
    """
    evaluations = [record for record in records if "valid_loss" in record]
    before, after = (Evaluation.of_record(record) for record in (evaluations[0], evaluations[-1]))
    step = evaluations[0]["step"]
    begin = f"at step {step}" if step else "before"
    files = {"model": folder.model, "curve": folder.curve, "trajectory": folder.trajectory}
    return "\n".join(
        [
            f"held-out, {begin}: {before}\nheld-out, {'after:':<{len(begin) + 1}} {after}",
            *(f"{name}: {path}" for name, path in files.items() if path.exists()),
        ]
    )
