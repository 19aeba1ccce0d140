"""A prompt and the answer that is generated after it fit into the positions of the model."""

from __future__ import annotations

from typing import Any

import pytest

from support.letters import Letters
from zoext.tasks import Chat, Completion, Encoder, Generation, RowError, Task

LONG = {"text": "abcdefghijkl", "answers": "yes", "completion": "yes"}


class Chatting(Letters):
    chat_template = "as it is"

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
        return "".join(message["content"] for message in messages)


def encoder(kind: str = "causal", max_length: int = 64, positions: int | None = 16) -> Encoder:
    return Encoder(Chatting(), kind, max_length, positions)


def read(task: Task, ours: Encoder, *, answered: bool) -> str:
    (example,) = task.examples([LONG], ours, answered=answered)
    (row,) = example.rows
    return "".join(map(chr, row.tokens[: row.unlabelled]))


@pytest.mark.parametrize("answered", [True, False])
@pytest.mark.parametrize(("new", "prompt"), [(9, "Q abcd?"), (2, "Q abcdefghijk?"), (1, "Q abcdefghijkl?")])
def test_the_longest_column_is_cut(answered: bool, new: int, prompt: str) -> None:
    """With 16 positions, whether or not a reference follows, which takes 5 tokens and is not read."""
    ours = encoder()
    found = read(Generation("Q {text}?", max_new_tokens=new), ours, answered=answered)
    assert found == prompt
    assert len(found) + new <= 16
    assert (ours.cuts.rows, ours.cuts.for_room) == ((0, 0) if new == 1 else (1, 1))


@pytest.mark.parametrize("answered", [True, False])
def test_rows_that_are_too_long_anyway(answered: bool) -> None:
    ours = encoder(max_length=8, positions=100)
    assert read(Generation("Q {text}?"), ours, answered=answered) == ("Q ?" if answered else "Q abcde?")
    assert (ours.cuts.rows, ours.cuts.for_room) == (1, 0)


def test_completions_that_are_not_generated_need_no_room() -> None:
    task = Completion("{text}", max_new_tokens=12)
    assert read(task, encoder(), answered=True) == "abcdefghijkl"
    assert read(task, encoder(), answered=False) == "abcd"


def test_conversations_lose_their_beginning() -> None:
    row = {"messages": [{"role": "user", "content": "abcdefghijkl"}]}
    ours = encoder()
    (example,) = Chat(max_new_tokens=11).examples([row], ours, answered=False)
    assert "".join(map(chr, example.tokens)) == "hijkl"
    assert (ours.cuts.rows, ours.cuts.lost, ours.cuts.for_room, ours.cuts.part) == (1, 7, 1, "beginning")


def test_a_template_without_room() -> None:
    with pytest.raises(RowError, match=r"row 1: its prompt leaves no room for 12 new tokens.*16 positions"):
        Generation("Question: {text}", max_new_tokens=12).examples([LONG], encoder(), answered=False)


@pytest.mark.parametrize(("kind", "most"), [("causal", 15), ("seq2seq", 16)])
def test_more_new_tokens_than_positions(kind: str, most: int) -> None:
    def examples(new: int) -> None:
        Generation("{text}", max_new_tokens=new).examples([{"text": "a", "answers": "b"}], encoder(kind))

    examples(most)
    with pytest.raises(ValueError, match=f"max_new_tokens must be at most {most}, as the model has 16"):
        examples(most + 1)


def test_answers_to_examples_without_room() -> None:
    task, ours = Completion("{text}", max_new_tokens=12), encoder()
    examples = task.examples([LONG], ours)
    model: Any = None  # which is not called
    with pytest.raises(ValueError, match=r"12 tokens and max_new_tokens=12 exceed the 16 positions"):
        task.objective(ours).answers(model, examples, "cpu")


def test_a_model_without_a_limit() -> None:
    task = Generation("Q {text}?", max_new_tokens=1000)
    assert read(task, encoder(positions=None), answered=True) == "Q abcdefghijkl?"
