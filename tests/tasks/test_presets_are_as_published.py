"""The eleven tasks of the MeZO study: prompts and answers as its published code makes them."""

from __future__ import annotations

from typing import Any

import pytest

from support.letters import Letters
from zoext.tasks import IGNORED, PRESETS, Encoder, Generation, LabelWords, MultipleChoice, preset

#: By task: a row of its data set, the prompt, the candidates or the answer, and the right ones.
CASES: dict[str, tuple[dict[str, Any], str, list[str], list[int]]] = {
    "sst2": (
        {"sentence": "a gem .", "label": 1},
        "a gem . It was",
        [" terrible", " great"],
        [1],
    ),
    "rte": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 0},
        'It rains.\nDoes this mean that "It is wet." is true? Yes or No?\n',
        ["Yes", "No"],
        [0],
    ),
    "cb": (
        {"premise": "It rains.", "hypothesis": "It is wet.", "label": 2},
        'Suppose It rains. Can we infer that "It is wet."? Yes, No, or Maybe?\n',
        ["Yes", "No", "Maybe"],
        [2],
    ),
    "boolq": (
        {"passage": "Ice is cold.", "question": "is ice cold", "answer": True},
        "Ice is cold. Is ice cold?\n",
        ["Yes", "No"],
        [0],
    ),
    "wsc": (
        {"text": "Ann met Bo and He left.", "span1_text": "Bo", "span2_text": "He", "label": 1},
        'Ann met Bo and He left.\nIn the previous sentence, does the pronoun "he" refer to Bo? Yes or No?\n',
        ["No", "Yes"],
        [1],
    ),
    "wic": (
        {"word": "bank", "sentence1": "A bank.", "sentence2": "By the bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "A bank.\nBy the bank.\n",
        ["No", "Yes"],
        [0],
    ),
    "multirc": (
        {"paragraph": "It rains.", "question": "What falls?", "answer": "rain", "label": 1},
        'It rains.\nQuestion: What falls?\nI found this answer "rain". Is that correct? Yes or No?\n',
        ["No", "Yes"],
        [1],
    ),
    "copa": (
        {
            "premise": "The man fell.",
            "question": "cause",
            "choice1": "The floor was wet.",
            "choice2": "I pushed him.",
            "label": 0,
        },
        "The man fell because",
        [" the floor was wet.", " I pushed him."],
        [0],
    ),
    "record": (
        {
            "passage": "Ann met Bo.\n@highlight\nThey talked.",
            "query": "Later @placeholder left.",
            "entities": ["Ann", "Bo", "Cy"],
            "answers": ["Bo", "Ann", "Bo"],
        },
        "Ann met Bo.\n- They talked.\n-",
        [" Later Ann left.", " Later Bo left.", " Later Cy left."],
        [1, 0],
    ),
    "squad": (
        {
            "title": "Ice",
            "context": "Ice is cold.",
            "question": " What is cold? ",
            "answers": {"text": ["Ice", "ice"]},
        },
        "Title: Ice\nContext: Ice is cold.\nQuestion: What is cold?\nAnswer:",
        [" Ice\n"],
        [],
    ),
    "drop": (
        {
            "passage": "Ice is cold.",
            "question": "What is?",
            "answers_spans": {"spans": ["Ice"], "types": ["span"]},
        },
        "Passage: Ice is cold.\nQuestion: What is?\nAnswer:",
        [" Ice\n"],
        [],
    ),
}


def test_every_preset_is_here() -> None:
    assert PRESETS.keys() == CASES.keys()
    assert len(PRESETS) == 11


@pytest.mark.parametrize("name", CASES)
def test_rows_to_answer_need_no_answers(name: str) -> None:
    row, prompt, answers, right = CASES[name]
    found = preset(name)
    asked = {column: value for column, value in row.items() if column != found.answer}
    assert found.answer in found.columns
    encoder = Encoder(Letters(), "causal", 4096)
    (example,) = found.task.examples([found.arrange(asked)], encoder, answered=False)
    texts = ["".join(map(chr, each.tokens)) for each in example.rows]
    assert texts == ([prompt + answer for answer in answers] if right else [prompt])


@pytest.mark.parametrize("name", CASES)
def test_prompt_and_answers(name: str) -> None:
    row, prompt, answers, right = CASES[name]
    found = preset(name)
    assert set(found.columns) <= row.keys()
    (example,) = found.task.examples([found.arrange(row)], Encoder(Letters(), "causal", 4096))
    texts = ["".join(map(chr, each.tokens)) for each in example.rows]
    labels = [sum(label != IGNORED for label in each.labels) for each in example.rows]
    assert texts == [prompt + answer for answer in answers]
    assert labels == [len(answer) for answer in answers]
    if right:
        assert [example.label, *example.also_right] == right
    else:
        assert example.references[0] == answers[0].strip()


def test_which_are_trained_as_text() -> None:
    """COPA and ReCoRD train the answer, the other choices among candidates (mezo.sh)."""
    trains = {
        name: found.task.trains
        for name, found in PRESETS.items()
        if isinstance(found.task, LabelWords | MultipleChoice)
    }
    assert {name for name, how in trains.items() if how == "answer"} == {"copa", "record"}
    assert {name for name, found in PRESETS.items() if isinstance(found.task, Generation)} == {
        "squad",
        "drop",
    }


def test_an_unknown_preset() -> None:
    with pytest.raises(ValueError, match="no preset 'sst3'; there are sst2, rte"):
        preset("sst3")


@pytest.mark.parametrize(("answer", "index"), [("True", 0), ("false", 1), (0, 1), (True, 0), ("1", 0)])
def test_boolq_from_files_of_text(answer: Any, index: int) -> None:
    found = preset("boolq")
    row = {"passage": "Ice.", "question": "is it?", "answer": answer}
    (example,) = found.task.examples([found.arrange(row)], Encoder(Letters(), "causal", 999))
    assert example.label == index


def test_boolq_with_another_answer() -> None:
    found = preset("boolq")
    row = {"passage": "Ice.", "question": "is it?", "answer": "maybe"}
    with pytest.raises(ValueError, match="label is 'maybe', which has no label word"):
        found.task.examples([found.arrange(row)], Encoder(Letters(), "causal", 999))


def test_answers_in_a_list() -> None:
    row = {"title": "Ice", "context": "Ice.", "question": "What?", "answers": ["Ice", "ice"]}
    assert preset("squad").arrange(row)["answers"] == ["Ice", "ice"]
