"""Generated answers: exact match and F1 of known pairs, and a model that generates what it was given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from support.letters import Letters
from support.tiny_models import tiny_language_model
from zoext.cli._problem.models import quiet_transformers
from zoext.tasks import Encoder, Generation, exact_match, f1

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("answer", "references", "exact", "overlap"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0, 1.0),
        ("tall Eiffel tower", ["the Eiffel Tower", "Paris"], 0.0, 0.8),
        ("in Paris", ["Paris"], 0.0, 2 / 3),
        ("Rome", ["Paris", "London"], 0.0, 0.0),
        ("a", ["an"], 1.0, 1.0),  # articles alone
        ("", ["Paris"], 0.0, 0.0),
        ("so so so", ["so"], 0.0, 0.5),
    ],
)
def test_known_answers(answer: str, references: list[str], exact: float, overlap: float) -> None:
    assert exact_match(answer, references) == exact
    assert f1(answer, references) == pytest.approx(overlap)


class Reciter:
    """Continues every prompt with the words of a queue."""

    generation_config = SimpleNamespace(eos_token_id=[3, 7], repetition_penalty=5.0, num_beams=4)

    def __init__(self, words: list[list[int]]) -> None:
        self.words = words

    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, **options: Any) -> torch.Tensor:
        config = options["generation_config"]
        assert (config.do_sample, config.num_beams, config.repetition_penalty) == (False, 1, None)
        assert config.eos_token_id == [0, 3, 7, ord("\n")]
        for row, mask in zip(input_ids.tolist(), attention_mask.tolist(), strict=True):
            assert sum(mask) == len([token for token in row if token])  # prompts end at the right
            assert mask[-1] == 1
        width = max(map(len, self.words))
        rows = [row + [0] * (width - len(row)) for row in self.words]
        return torch.cat([input_ids, torch.tensor(rows)], 1)


def test_what_a_model_recites() -> None:
    encoder = Encoder(Letters(), "causal", 100)
    task = Generation("Question: {question}\nAnswer:")
    rows = [
        {"question": "Where?", "answers": ["Paris", "in Paris"]},
        {"question": "Where is it then?", "answers": "Rome"},
    ]
    examples = task.examples(rows, encoder)
    objective = task.objective(encoder)
    model: Any = Reciter([[ord(c) for c in " in paris.\nQuestion: "], [ord(c) for c in " London or Rome"]])
    assert objective.answers(model, examples, CPU) == ["in paris.", "London or Rome"]
    found = objective.examine(model, examples, CPU)
    assert found["exact_match"].tolist() == [1.0, 0.0]
    assert found["f1"].tolist() == pytest.approx([1.0, 0.5])
    assert objective.metrics == ("exact_match", "f1")


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_a_model_generates_alone_what_it_generates_in_a_batch(tmp_path: Path, kind: str) -> None:
    folder = tiny_language_model(tmp_path, kind)
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSeq2SeqLM
    with quiet_transformers():
        model = auto.from_pretrained(folder).eval()
    encoder = Encoder(AutoTokenizer.from_pretrained(folder), kind, 30)
    task = Generation("the {text}", answers="answer", max_new_tokens=5)
    rows = [{"text": "cat", "answer": "kind"}, {"text": "day was so very", "answer": "grim"}]
    examples, objective = task.examples(rows, encoder), task.objective(encoder)
    whole = objective.answers(model, examples, CPU)
    assert whole == [objective.answers(model, [each], CPU)[0] for each in examples]
    tokens = torch.tensor([encoder.tokens_of(["the day was so very"])[0]])
    with torch.no_grad():  # greedily, by hand
        if kind == "causal":
            for _ in range(5):
                tokens = torch.cat([tokens, model(tokens).logits[:, -1].argmax(-1, keepdim=True)], 1)
            words = encoder.tokenizer.decode(tokens[0, 5:], skip_special_tokens=False)
            assert words.partition("[EOS]")[0].split()[: len(whole[1].split())] == whole[1].split()


def test_training_is_the_loss_of_the_first_reference() -> None:
    encoder = Encoder(Letters(), "causal", 100)
    task = Generation("{question}", answers="answers")
    (example,) = task.examples([{"question": "Q", "answers": ["ab", "c"]}], encoder)
    batch = task.objective(encoder).training.collate([example])
    assert "".join(map(chr, batch["input_ids"][0].tolist())) == "Q ab\n"
    assert batch["labels"][0].tolist() == [-100, *map(ord, " ab\n")]
    assert SimpleNamespace(**batch).attention_mask.tolist() == [[1] * 5]
