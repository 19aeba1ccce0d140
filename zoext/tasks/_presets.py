"""The eleven tasks of the MeZO study (arXiv 2305.17333, appendix E.2), with its templates and label words.

The templates are those of its published code (large_models/templates.py), which says where they come from:
most are from PromptSource, COPA's and ReCoRD's from GPT-3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from zoext.tasks._generation import Generation
from zoext.tasks._labels import LabelWords, MultipleChoice
from zoext.tasks._task import Record, Task

_YES_NO = {"0": "Yes", "1": "No"}
_NO_YES = {"0": "No", "1": "Yes"}
_TRUTH = {"true": "True", "1": "True", "false": "False", "0": "False"}


@dataclass(frozen=True)
class Preset:
    """A task with its data set.

    Attributes:
        task: made once, as published.
        source: the name of the data set on the Hugging Face hub, and of its configuration.
        columns: those that the data set must have.
        answer: the one of them with the right answers, which rows that are to be answered need not have.
        arrange: makes the columns that the task reads of those of the data set.
    """

    task: Task
    source: tuple[str, ...]
    columns: tuple[str, ...]
    answer: str
    arrange: Callable[[Record], Mapping[str, Any]] = dict


def _copa(row: Record) -> Mapping[str, Any]:
    joint = {"effect": " so", "cause": " because"}[row["question"]]
    choices = [_uncapitalized(row["choice1"]), _uncapitalized(row["choice2"])]
    return {
        "premise": row["premise"].rstrip().removesuffix(".") + joint,
        "choices": choices,
        "answer": row.get("label"),
    }


def _uncapitalized(text: str) -> str:
    first, space, rest = text.partition(" ")
    return text if first == "I" else first.lower() + space + rest


def _boolq(row: Record) -> Mapping[str, Any]:
    question = row["question"]
    question = question[:1].upper() + question[1:] + ("" if question.endswith("?") else "?")
    label = _TRUTH.get(str(row.get("answer")).lower(), row.get("answer"))
    return {"passage": row["passage"], "question": question, "label": label}


def _wsc(row: Record) -> Mapping[str, Any]:
    return {**row, "span2_text": row["span2_text"].lower()}


def _record(row: Record) -> Mapping[str, Any]:
    """Each candidate completes the query, as in GPT-3's form of the task."""

    def completed(entity: str) -> str:
        return str(row["query"]).replace("@placeholder", entity)

    return {
        "passage": row["passage"].replace("@highlight\n", "- "),
        "choices": [completed(entity) for entity in row["entities"]],
        "answer": [completed(entity) for entity in dict.fromkeys(row.get("answers") or ())],
    }


def _squad(row: Record) -> Mapping[str, Any]:
    return {**row, "question": row["question"].strip(), "answers": _listed(row.get("answers"), "text")}


def _drop(row: Record) -> Mapping[str, Any]:
    return {**row, "question": row["question"].strip(), "answers": _listed(row.get("answers_spans"), "spans")}


def _listed(answers: Any, name: str) -> Any:
    """The texts of answers, which the data set keeps beside their places, or a list of them."""
    return answers[name] if isinstance(answers, Mapping) else answers


def _super_glue(name: str, template: str, words: Mapping[str, str], *columns: str, **options: Any) -> Preset:
    return Preset(LabelWords(template, words), ("super_glue", name), (*columns, "label"), "label", **options)


PRESETS: dict[str, Preset] = {
    "sst2": Preset(
        LabelWords("{sentence} It was", {"0": " terrible", "1": " great"}),
        ("glue", "sst2"),
        ("sentence", "label"),
        "label",
    ),
    "rte": _super_glue(
        "rte",
        '{premise}\nDoes this mean that "{hypothesis}" is true? Yes or No?\n',
        _YES_NO,
        "premise",
        "hypothesis",
    ),
    "cb": _super_glue(
        "cb",
        'Suppose {premise} Can we infer that "{hypothesis}"? Yes, No, or Maybe?\n',
        {"0": "Yes", "1": "No", "2": "Maybe"},
        "premise",
        "hypothesis",
    ),
    "boolq": Preset(
        LabelWords("{passage} {question}\n", {"True": "Yes", "False": "No"}),
        ("boolq",),
        ("passage", "question", "answer"),
        "answer",
        _boolq,
    ),
    "wsc": _super_glue(
        "wsc.fixed",
        '{text}\nIn the previous sentence, does the pronoun "{span2_text}" refer to {span1_text}? '
        "Yes or No?\n",
        _NO_YES,
        "text",
        "span1_text",
        "span2_text",
        arrange=_wsc,
    ),
    "wic": _super_glue(
        "wic",
        'Does the word "{word}" have the same meaning in these two sentences? Yes, No?\n'
        "{sentence1}\n{sentence2}\n",
        _NO_YES,
        "word",
        "sentence1",
        "sentence2",
    ),
    "multirc": _super_glue(
        "multirc",
        '{paragraph}\nQuestion: {question}\nI found this answer "{answer}". Is that correct? Yes or No?\n',
        _NO_YES,
        "paragraph",
        "question",
        "answer",
    ),
    "copa": Preset(
        MultipleChoice("{premise}", trains="answer"),
        ("super_glue", "copa"),
        ("premise", "question", "choice1", "choice2", "label"),
        "label",
        _copa,
    ),
    "record": Preset(
        MultipleChoice("{passage}\n-", trains="answer"),
        ("super_glue", "record"),
        ("passage", "query", "entities", "answers"),
        "answers",
        _record,
    ),
    "squad": Preset(
        Generation("Title: {title}\nContext: {context}\nQuestion: {question}\nAnswer:"),
        ("squad",),
        ("title", "context", "question", "answers"),
        "answers",
        _squad,
    ),
    "drop": Preset(
        Generation("Passage: {passage}\nQuestion: {question}\nAnswer:"),
        ("drop",),
        ("passage", "question", "answers_spans"),
        "answers_spans",
        _drop,
    ),
}


def preset(name: str) -> Preset:
    """The task ``name`` of the MeZO study.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in PRESETS:
        raise ValueError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
