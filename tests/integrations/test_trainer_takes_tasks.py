"""ZOTrainer with the objective of a task takes the steps of a loop by hand, and evaluates as it does."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import zoext
from support.tiny_models import BAD, GOOD, OTHER, tiny_bert, tiny_language_model
from support.trainers import arguments, logs, weights
from zoext import tasks
from zoext.cli._problem.models import quiet_transformers
from zoext.integrations.transformers import ZOTrainer

ROWS = [
    {
        "text": f"the {other} was {word}" + " so" * (number % 3),
        "label": label,
        "answers": word,
        "question": other,
    }
    for number, (word, label) in enumerate([(word, 1) for word in GOOD] + [(word, 0) for word in BAD])
    for other in OTHER
]
TASKS: dict[str, tasks.Task] = {
    "words": tasks.LabelWords("{text} Label:", {"0": " grim", "1": " kind"}),
    "words of several tokens": tasks.LabelWords("{text}", {"0": " so grim", "1": " kind"}),
    "words as text": tasks.LabelWords("{text} Label:", {"0": " so grim", "1": " kind"}, trains="answer"),
    "completions": tasks.Completion("the {question} was", completion="answers", joint=" "),
    "generation": tasks.Generation("the {question} was", max_new_tokens=3),
    "texts": tasks.Text(),
    "a head": tasks.Classification(["0", "1"]),
}
SIZE, STEPS = 4, 3


class InOrder(IterableDataset[tasks.Example]):
    def __init__(self, examples: list[tasks.Example]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[tasks.Example]:
        return iter(self.examples)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_language_model(folder / "causal", words=("Label:",))
    tiny_bert(folder / "classifier")
    return folder


def prepared(folders: Path, name: str) -> tuple[Any, tasks.Objective, list[tasks.Example]]:
    """A model, and the objective and the examples of a task."""
    is_head = name == "a head"
    folder = folders / ("classifier" if is_head else "causal")
    auto = AutoModelForSequenceClassification if is_head else AutoModelForCausalLM
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0} if is_head else {}
    with quiet_transformers():
        model = auto.from_pretrained(folder, **still).eval()
    model.config.pad_token_id = 0
    encoder = tasks.Encoder(AutoTokenizer.from_pretrained(folder), tasks.kind_of(model.config), 16)
    if is_head:
        encoder.kind = tasks.CLASSIFIER
    return model, TASKS[name].objective(encoder), TASKS[name].examples(ROWS, encoder)


def by_hand(model: Any, objective: tasks.Objective, examples: list[tasks.Example], size: int) -> list[float]:
    optimizer = zoext.MeZO(model, lr=2e-2, mu=2e-3, seed=5)
    training, losses = objective.training, []
    training.prepare(model)
    model.train()
    for step in range(STEPS):
        batch = training.collate(examples[step * size : (step + 1) * size])
        losses.append(float(optimizer.step(partial(training.loss, model, batch))))
    return losses


@pytest.mark.parametrize("name", TASKS)
def test_a_run_is_that_of_a_loop(folders: Path, name: str, tmp_path: Path) -> None:
    model, objective, examples = prepared(folders, name)
    plain, *_ = prepared(folders, name)
    trainer = ZOTrainer(
        model, arguments(tmp_path, max_steps=STEPS), train_dataset=InOrder(examples), objective=objective
    )
    trainer.train()
    assert logs(trainer, "loss") == pytest.approx(by_hand(plain, objective, examples, SIZE), rel=1e-6)
    assert torch.equal(weights(model), weights(plain))


@pytest.mark.parametrize("probe", ["streamed", "batched"])
def test_micro_batches_are_one_batch(folders: Path, probe: str, tmp_path: Path) -> None:
    """Of completions, whose micro-batches have different numbers of predictions."""
    model, objective, examples = prepared(folders, "words as text")
    plain, *_ = prepared(folders, "words as text")
    chosen = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": STEPS}
    options = {"zo_optimizer": "LOZO", "zo_options": {"probe": probe}}
    trainer = ZOTrainer(
        model, arguments(tmp_path, **chosen, **options), train_dataset=InOrder(examples), objective=objective
    )
    trainer.train()
    optimizer, training = zoext.LOZO(plain, lr=2e-2, mu=2e-3, seed=5), objective.training
    losses = []
    for step in range(STEPS):
        batch = training.collate(examples[step * 6 : (step + 1) * 6])
        losses.append(float(optimizer.step(partial(training.loss, plain, batch))))
    assert logs(trainer, "loss") == pytest.approx(losses, rel=1e-4)


METRICS = {
    "words": {"accuracy"},
    "words as text": {"accuracy"},
    "completions": set(),
    "generation": {"exact_match", "f1"},
    "a head": {"accuracy"},
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_are_those_of_the_objective(folders: Path, name: str, tmp_path: Path) -> None:
    model, objective, examples = prepared(folders, name)
    trainer = ZOTrainer(
        model,
        arguments(tmp_path, per_device_eval_batch_size=7, eval_strategy="steps", eval_steps=2, max_steps=2),
        train_dataset=examples,
        eval_dataset={"all": examples, "first": examples[:5]},
        objective=objective,
    )
    trainer.train()
    model.eval()
    for part, some in (("all", examples), ("first", examples[:5])):
        with torch.no_grad():
            scores = [objective.scores(model, objective.collate([each])) for each in some]
        loss = sum(float(each.loss) for each in scores) / sum(int(each.predictions) for each in scores)
        assert logs(trainer, f"eval_{part}_loss") == [pytest.approx(loss, rel=1e-5)]
        for metric in METRICS[name]:
            found = {**scores[0].metrics, **objective.examine(model, some[:1], "cpu")}
            assert metric in found
            values = [
                {**each.metrics, **objective.examine(model, [example], "cpu")}[metric]
                for each, example in zip(scores, some, strict=True)
            ]
            wanted = sum(map(float, values)) / len(values)
            assert logs(trainer, f"eval_{part}_{metric}") == [pytest.approx(wanted)]
    assert trainer.evaluate(examples[:5])["eval_loss"] == pytest.approx(loss, rel=1e-5)


class OwnLoss(ZOTrainer):
    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        return super().compute_loss(*arguments, **options)


@pytest.mark.parametrize(
    ("kind", "options", "given", "expected"),
    [
        (ZOTrainer, {}, {"data_collator": list}, "data_collator: the objective has its own; leave out"),
        (ZOTrainer, {}, {"compute_metrics": dict}, "compute_metrics: the objective has its own"),
        (ZOTrainer, {"label_smoothing_factor": 0.1}, {}, "label_smoothing_factor: an objective has labels"),
        (ZOTrainer, {"zo_compact_loss": False}, {}, "zo_compact_loss=False: an objective chooses"),
        (
            ZOTrainer,
            {"train_sampling_strategy": "group_by_length"},
            {},
            "train_sampling_strategy: batches by",
        ),
        (ZOTrainer, {"bf16_full_eval": True}, {}, "bf16_full_eval: an objective evaluates the weights"),
        (OwnLoss, {}, {}, "objective: OwnLoss has a compute_loss of its own"),
    ],
)
def test_what_an_objective_takes_the_place_of(
    folders: Path, tmp_path: Path, kind: Any, options: dict[str, Any], given: dict[str, Any], expected: str
) -> None:
    model, objective, examples = prepared(folders, "words")
    with pytest.raises(ValueError, match=expected):
        kind(model, arguments(tmp_path, **options), train_dataset=examples, objective=objective, **given)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "texts"])
def test_examples_without_answers_have_no_loss(folders: Path, tmp_path: Path, name: str) -> None:
    model, objective, answered = prepared(folders, name)
    encoder = tasks.Encoder(AutoTokenizer.from_pretrained(folders / "causal"), tasks.CAUSAL, 16)
    asked = TASKS[name].examples(ROWS[:3], encoder, answered=False)
    trainer = ZOTrainer(model, arguments(tmp_path), train_dataset=answered, objective=objective)
    with pytest.raises(ValueError, match=r"no right answer.*objective\.answers"):
        trainer.predict(asked)
    with pytest.raises(ValueError, match="no right answer"):
        ZOTrainer(model, arguments(tmp_path), train_dataset=asked, objective=objective)


def test_data_sets_of_something_else(folders: Path, tmp_path: Path) -> None:
    model, objective, _ = prepared(folders, "words")
    wrong = r"examples of task\.examples\(rows, encoder\), not dict"
    with pytest.raises(TypeError, match=wrong):
        ZOTrainer(model, arguments(tmp_path), None, ROWS, objective=objective)  # by position
    trainer = ZOTrainer(model, arguments(tmp_path), eval_dataset=ROWS, objective=objective)
    with pytest.raises(TypeError, match=wrong):
        trainer.evaluate()
    with pytest.raises(ValueError, match="eval_dataset: has no examples"):
        trainer.evaluate([])
    with pytest.raises(TypeError, match="multiple values for argument 'model'"):
        ZOTrainer(model, arguments(tmp_path), model=model, objective=objective)
