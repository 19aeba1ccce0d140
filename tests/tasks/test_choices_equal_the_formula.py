"""Candidates are scored by the mean log-probability of their tokens, however they are batched."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, AutoTokenizer

import zoext
from support.tiny_models import tiny_language_model
from zoext.cli._problem.models import quiet_transformers
from zoext.tasks import IGNORED, Answers, Choices, Encoder, Example, LabelWords, MultipleChoice, Row, Task

WORDS = ("Review:", "Sentiment:", "is", "not", "at", "all")
AUTO = {"causal": AutoModelForCausalLM, "masked": AutoModelForMaskedLM, "seq2seq": AutoModelForSeq2SeqLM}
ROWS: list[dict[str, Any]] = [
    {"text": "the day was kind", "label": 1, "choices": ["kind", "not so kind", "sour"], "answer": 1},
    {"text": "grim", "label": 0, "choices": ["grim", "sweet"], "answer": ["grim", "sweet"]},
    {"text": "so very very sour", "label": 0, "choices": ["the cat", "the day", "sour"], "answer": "sour"},
]
ONE_TOKEN, SEVERAL = {"0": " cruel", "1": " sweet"}, {"0": " not sweet at all", "1": " sweet"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    parent = tmp_path_factory.mktemp("models")
    return {kind: tiny_language_model(parent / kind, kind, words=WORDS) for kind in AUTO}


def prepared(folders: dict[str, Path], kind: str, dtype: torch.dtype = torch.float64) -> tuple[Any, Encoder]:
    with quiet_transformers():
        model = AUTO[kind].from_pretrained(folders[kind], dtype=dtype).eval()
        return model, Encoder(AutoTokenizer.from_pretrained(folders[kind]), kind, 40)


def task_of(name: str, kind: str, **options: Any) -> Task:
    if name == "choices":
        return MultipleChoice("Review: {text} Sentiment:", **options)
    template = "{text} is {mask}" if kind == "masked" else "Review: {text} Sentiment:"
    return LabelWords(template, ONE_TOKEN if name == "one token" else SEVERAL, **options)


@torch.no_grad()
def formula(model: Any, kind: str, row: Row) -> float:
    """The mean log-probability of the labels of one row alone, from all logits."""
    inputs: dict[str, Tensor] = {"input_ids": torch.tensor([row.tokens])}
    if kind == "seq2seq":
        inputs["labels"] = torch.tensor([row.labels])
    found = model(**inputs).logits[0].double().log_softmax(-1)
    places = [place for place, label in enumerate(row.labels) if label != IGNORED]
    before = int(kind == "causal")
    return sum(found[place - before, row.labels[place]].item() for place in places) / len(places)


def expected(model: Any, kind: str, examples: Sequence[Example]) -> tuple[list[float], list[float]]:
    """The loss and the accuracy of each example."""
    losses, right = [], []
    for example in examples:
        scores = torch.tensor([formula(model, kind, row) for row in example.rows], dtype=torch.float64)
        rights = [example.label, *example.also_right]
        losses.append(-scores.log_softmax(0)[rights].logsumexp(0).item())
        right.append(float(int(scores.argmax()) in (example.label, *example.also_right)))
    return losses, right


CASES = [
    *[(kind, name) for kind in ("causal", "seq2seq") for name in ("one token", "several", "choices")],
    ("masked", "one token"),
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_losses_and_accuracy(folders: dict[str, Path], kind: str, name: str) -> None:
    model, encoder = prepared(folders, kind)
    task = task_of(name, kind)
    examples = task.examples(ROWS, encoder)
    objective = task.objective(encoder)
    batch = objective.collate(examples)
    with torch.no_grad():
        scores = objective.scores(model, batch)
    losses, right = expected(model, kind, examples)
    assert scores.loss.tolist() == pytest.approx(losses, rel=1e-5)
    assert scores.metrics["accuracy"].tolist() == right
    assert scores.predictions.tolist() == [1, 1, 1]
    assert ("candidates" in batch) == (name == "one token")  # one row tells all candidates


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_batch_of_all_equals_examples_alone(folders: dict[str, Path], kind: str, name: str) -> None:
    model, encoder = prepared(folders, kind)
    task = task_of(name, kind)
    examples = task.examples(ROWS, encoder)
    objective = task.objective(encoder)
    with torch.no_grad():
        whole = objective.scores(model, objective.collate(examples)).loss
        alone = [objective.scores(model, objective.collate([each])).loss for each in examples]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(folders: dict[str, Path], dtype: torch.dtype) -> None:
    model, encoder = prepared(folders, "causal", dtype)
    task = task_of("choices", "causal")
    objective = task.objective(encoder)
    with torch.no_grad():
        scores = objective.scores(model, objective.collate(task.examples(ROWS, encoder)))
    losses, _ = expected(model, "causal", task.examples(ROWS, encoder))
    assert scores.loss.dtype == torch.float32
    assert scores.loss.tolist() == pytest.approx(losses, rel=1e-4 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize("name", ["one token", "several", "choices"])
def test_copies_of_a_batch(folders: dict[str, Path], name: str) -> None:
    model, encoder = prepared(folders, "causal")
    task = task_of(name, "causal")
    objective = task.objective(encoder)
    batch = objective.collate(task.examples(ROWS, encoder))
    with torch.no_grad():
        torch.testing.assert_close(
            objective.loss(model, batch, 3), objective.loss(model, batch).expand(3), rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("name", ["one token", "several"])
def test_batched_probes_find_the_losses_of_streamed_ones(folders: dict[str, Path], name: str) -> None:
    found = []
    for probe in ("streamed", "batched"):
        model, encoder = prepared(folders, "causal")
        task = task_of(name, "causal")
        objective = task.objective(encoder)
        batch = objective.collate(task.examples(ROWS, encoder))
        objective.prepare(model)
        optimizer = zoext.LOZO(model, lr=0.1, mu=0.05, rank=2, seed=5, probe=probe)
        if probe == "batched":
            closure: Any = lambda copies: objective.loss(model, batch, copies)  # noqa: B023, E731
        else:
            closure = lambda: objective.loss(model, batch)  # noqa: B023, E731
        for _ in range(2):
            optimizer.step(closure)
        assert optimizer.last_estimate is not None
        found.append(torch.cat([parameter.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_answer_is_trained_as_text(folders: dict[str, Path], kind: str) -> None:
    model, encoder = prepared(folders, kind)
    task = task_of("choices", kind, trains="answer")
    objective = task.objective(encoder)
    examples = task.examples(ROWS, encoder)
    assert isinstance(objective, Choices)
    assert isinstance(objective.training, Answers)
    with torch.no_grad():
        loss = objective.training.loss(model, objective.training.collate(examples)).item()
    rows = [example.rows[example.label or 0] for example in examples]
    counts = [sum(label != IGNORED for label in row.labels) for row in rows]
    sums = [-formula(model, kind, row) * count for row, count in zip(rows, counts, strict=True)]
    assert loss == pytest.approx(sum(sums) / sum(counts), rel=1e-5)
    with torch.no_grad():
        scores = objective.scores(model, objective.collate(examples))
    assert scores.mean_loss().item() == pytest.approx(loss, rel=1e-5)
    assert scores.metrics["accuracy"].tolist() == expected(model, kind, examples)[1]


def test_a_prior_is_subtracted(folders: dict[str, Path]) -> None:
    """Contextual calibration: the score of each candidate less its score without an input."""
    model, encoder = prepared(folders, "causal")
    task = task_of("several", "causal")
    assert isinstance(task, LabelWords)
    examples = task.examples(ROWS, encoder)
    empty = task.without_input(encoder)
    prior = torch.tensor([formula(model, "causal", row) for row in empty.rows])
    with torch.no_grad():
        calibrated = Choices(encoder.padding, "causal", prior=prior)
        scores = calibrated.candidates(model, calibrated.collate(examples))
    for number, example in enumerate(examples):
        for index, row in enumerate(example.rows):
            wanted = formula(model, "causal", row) - prior[index].item()
            assert scores[number, index].item() == pytest.approx(wanted, rel=1e-4, abs=1e-5)


def test_a_model_that_compact_losses_refuse(folders: dict[str, Path]) -> None:
    """A hook on the whole model may change its logits, so all of them are made."""
    model, encoder = prepared(folders, "causal")
    task = task_of("one token", "causal")
    objective, examples = task.objective(encoder), task.examples(ROWS, encoder)

    def doubled(module: Any, inputs: Any, output: Any) -> Any:
        output.logits = output.logits * 2
        return output

    model.register_forward_hook(doubled)
    with torch.no_grad():
        losses = objective.scores(model, objective.collate(examples)).loss
    assert losses.tolist() == pytest.approx(expected(model, "causal", examples)[0], rel=1e-5)


def test_answers_are_the_likeliest_candidates(folders: dict[str, Path]) -> None:
    model, encoder = prepared(folders, "causal")
    task = task_of("choices", "causal")
    examples = task.examples(ROWS, encoder)
    wanted = [max(range(len(e.rows)), key=lambda i: formula(model, "causal", e.rows[i])) for e in examples]
    assert task.objective(encoder).answers(model, examples, torch.device("cpu")) == wanted


@pytest.mark.parametrize("name", ["one token", "several"])
def test_all_probes_of_a_batch_see_the_same_labels(
    folders: dict[str, Path], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compact loss waits for a device once for each labels tensor, not for each of its forwards."""
    model, encoder = prepared(folders, "causal")
    task = task_of(name, "causal")
    objective = task.objective(encoder)
    seen: list[Tensor] = []
    for method in ("per_token", "logits"):
        real = getattr(zoext.CompactLoss, method)

        def watched(self: Any, batch: Any, copies: int, real: Any = real) -> Tensor:
            seen.append(batch["labels"])
            found: Tensor = real(self, batch, copies)
            return found

        monkeypatch.setattr(zoext.CompactLoss, method, watched)
    batch = objective.collate(task.examples(ROWS, encoder))
    zoext.MeZO(model, lr=1e-3).step(lambda: objective.loss(model, batch))
    assert len(seen) == 2
    assert seen[0] is seen[1]
