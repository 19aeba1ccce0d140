"""Chooses the task by the columns of a table and the head of a model, or as the user asks."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from zoext.cli._errors import UserError
from zoext.cli._problem.data import LABEL, Label, Table, with_labels
from zoext.cli._settings import CommonSettings
from zoext.tasks import (
    CLASSIFIER,
    ENCODER,
    MASKED,
    PRESETS,
    Chat,
    Classification,
    Completion,
    Generation,
    LabelWords,
    MultipleChoice,
    Task,
    Template,
    Text,
)

#: Kinds of data whose rows have labels.
LABELLED = ("classification", "label-words")

_NUMBER = re.compile(r"\s*[-+]?\d+(\.\d*)?\s*")

#: What asks for labels if no template is given.
_PROMPT, _MASKED_PROMPT = "{text}\nLabel:", "{text} Label: {mask}"
_PROMPT_OF_A_PAIR = "{text}\n{text2}\nLabel:"

#: Kinds of data by the columns that tell them.
_BY_COLUMNS = (
    ("chat", {"messages"}),
    ("completion", {"prompt", "completion"}),
    ("multiple-choice", {"choices", "answer"}),
    ("generation", {"question", "answers"}),
)
#: The same for rows that are to be answered, which lack the answers.
_BY_ASKING_COLUMNS = (
    ("chat", {"messages"}),
    ("completion", {"prompt"}),
    ("multiple-choice", {"question", "choices"}),
    ("generation", {"question"}),
)
#: What the column with the completions may be called.
_COMPLETIONS = ("completion", "answer", "output", "response")
#: The options of the data that each task reads.
_READ = {
    "label-words": {"template", "label_words", "text_column", "label_column", "loss"},
    "classification": {"text_column", "label_column"},
    "causal-lm": {"text_column"},
    "completion": {"template", "text_column", "max_new_tokens"},
    "chat": {"max_new_tokens"},
    "multiple-choice": {"template", "text_column", "loss"},
    "generation": {"template", "text_column", "max_new_tokens"},
    "squad": {"max_new_tokens"},
    "drop": {"max_new_tokens"},
}
_USUAL = CommonSettings()
_HEADS = {"causal": "causal-lm", "masked": "masked-lm", "seq2seq": "seq2seq-lm", "encoder": "masked-lm"}


def name_of(settings: CommonSettings, table: Table, kind: str, answered: bool = True) -> str:
    """The kind of the data: what ``--task`` says, or else what the columns and the head of the model say.

    Rows that are not ``answered`` may lack the columns with the answers.

    Raises:
        UserError: for columns that tell nothing.
    """
    if settings.task is not None:
        return settings.task
    columns = set(table.columns)
    for name, needed in _BY_COLUMNS:
        if needed <= columns:
            return name
    if settings.label_words or (LABEL in columns and settings.template is not None):
        return "label-words"
    if settings.template is not None and columns & set(_COMPLETIONS):
        return "completion"
    if {"text", LABEL} <= columns:
        return "classification" if kind in (CLASSIFIER, ENCODER) else "label-words"
    if "text" in columns:
        return "causal-lm"
    for name, needed in () if answered else _BY_ASKING_COLUMNS:
        if needed <= columns:
            return name
    if "conversations" in columns:
        raise UserError(
            f"{table.source}: has the column conversations; call it messages, each a list of messages with "
            "role (user or assistant) and content"
        )
    raise UserError(
        f"{table.source}: no column 'text'; it has {', '.join(table.columns)}: name the column with "
        "--text-column and that of the labels with --label-column, give a --template with columns in braces, "
        "or rename columns to text and label, prompt and completion, or messages"
    )


def head_of(name: str, kind: str) -> str:
    """The head that a model of this kind gets, one of ``HEADS``."""
    return "classification" if name == "classification" else _HEADS.get(kind, "causal-lm")


def with_columns(table: Table, settings: CommonSettings, answered: bool = True) -> Table:
    """The table with its columns named as tasks expect them: text, text2 and label.

    Rows that are not ``answered`` need no labels.
    """
    names: dict[str, str] = {}
    if settings.text_column is not None:
        columns = settings.text_column.split(",")
        if len(columns) > 2 or len(set(columns)) < len(columns):
            raise UserError(
                f"--text-column {settings.text_column}: give one column, or two for pairs, each once"
            )
        names |= dict(zip(columns, ("text", "text2"), strict=False))
    label = settings.label_column
    if label is not None and (answered or label in table.columns):
        if label in names:
            raise UserError(f"--label-column {label}: is --text-column as well; name two columns")
        if label not in table.columns:
            raise UserError(
                f"--label-column {label}: {table.source} has no such column; it has "
                f"{', '.join(table.columns)}"
            )
        names[label] = LABEL
    return table.renamed({old: new for old, new in names.items() if old != new})


def task_of(name: str, settings: CommonSettings, table: Table, kind: str, classes: Collection[str]) -> Task:
    """The task for the table.

    Args:
        classes: the labels that occur, in the order of the outputs of a classifier.

    Raises:
        UserError: for options that contradict each other, the columns or the model.
    """
    try:
        task = _task(name, settings, table, kind, classes)
    except ValueError as error:
        raise UserError(in_terms_of_options(str(error))) from None
    _check_options(name, settings)
    missing = [column for column in task.columns if column not in table.columns]
    if missing:
        given = "" if settings.template is None else f"--template {settings.template!r}: "
        raise UserError(
            f"{given}{table.source}: no column {missing[0]!r}; it has {', '.join(table.columns)}: rename one "
            "of them, or name the column with --text-column or in --template"
        )
    return task


def _task(name: str, settings: CommonSettings, table: Table, kind: str, classes: Collection[str]) -> Task:
    template, new_tokens = settings.template, settings.max_new_tokens
    match name:
        case "label-words":
            return _label_words(settings, table, kind, classes)
        case "classification":
            columns = [column for column in ("text", "text2") if column in table.columns]
            return Classification(list(classes), text=columns or ["text"])
        case "completion":
            answer = _first(table, *_COMPLETIONS)
            return Completion(template or "{prompt}", completion=answer, max_new_tokens=new_tokens)
        case "chat":
            return Chat(max_new_tokens=new_tokens)
        case "multiple-choice":
            return MultipleChoice(template or "{question}\nAnswer:", trains=settings.loss)
        case "generation":
            template = template or "Question: {question}\nAnswer:"
            answers = _first(table, "answers", "answer")
            return Generation(template, answers=answers, max_new_tokens=new_tokens)
        case "causal-lm":
            return Text()
    published = PRESETS[name].task
    if isinstance(published, Generation):
        return Generation(published.template, answers=published.answers, max_new_tokens=new_tokens)
    return published


def _label_words(settings: CommonSettings, table: Table, kind: str, classes: Collection[str]) -> LabelWords:
    usual = _MASKED_PROMPT if kind == MASKED else _PROMPT_OF_A_PAIR if "text2" in table.columns else _PROMPT
    template = Template(settings.template or usual)
    words = settings.label_words or {name: name for name in classes}
    missing = sorted(set(classes) - words.keys())
    if missing:
        raise UserError(
            f"--label-words: no word for the label {missing[0]!r} of {table.source}; give "
            f"{missing[0]}=WORD too"
        )
    spaced = {name: _spaced(word, template) for name, word in words.items()}
    return LabelWords(template, spaced, trains=settings.loss)


def _spaced(word: str, template: Template) -> str:
    """The word with what separates it from the template, unless it begins with a space itself."""
    return word if word[:1].isspace() else template.joint + word.strip()


def _first(table: Table, *names: str) -> str:
    """The first of the columns that the table has, or the first name."""
    return next((name for name in names if name in table.columns), names[0])


def labelled(table: Table) -> Table:
    """The table, whose rows must have labels.

    Raises:
        UserError: for a table without, or a label that is no class.
    """
    if LABEL not in table.columns:
        raise UserError(
            f"{table.source}: needs a column 'label'; it has {', '.join(table.columns)}: name it with "
            "--label-column, or for plain text: --task causal-lm"
        )
    return with_labels(table)


def labels_of(table: Table) -> set[Label]:
    """The labels that occur."""
    return {row[LABEL] for row in table.rows}


def in_terms_of_options(error: str) -> str:
    """An error of a task, which begins with an argument, with the option that sets it."""
    names = {"template ": "--template ", "words: ": "--label-words: ", "max_new_tokens ": "--max-new-tokens "}
    for argument, option in names.items():
        if error.startswith(argument):
            return option + error.removeprefix(argument)
    return error


def settled(name: str, task: Task, settings: CommonSettings, classes: Collection[str]) -> dict[str, Any]:
    """The settings that the data and the model have decided, so that they need not be asked again.

    Those that were given stay as they were given: a run that is resumed compares them.
    """
    if name in PRESETS:
        return {}
    found: dict[str, Any] = {"task": name}
    if isinstance(task, LabelWords):
        found["label_words"] = settings.label_words or {name: name for name in classes}
    if isinstance(task, LabelWords | Completion | MultipleChoice | Generation):
        found["template"] = settings.template or task.template.text
    return found


def _check_options(name: str, settings: CommonSettings) -> None:
    """Raises a UserError for an option that the task does not read."""
    for option in ("template", "label_words", "text_column", "label_column", "loss", "max_new_tokens"):
        given, usual = getattr(settings, option), getattr(_USUAL, option)
        if given != usual and option not in _READ.get(name, frozenset()):
            flag = "--" + option.replace("_", "-")
            raise UserError(f"{flag}: --task {name} does not read it; leave it out, or give another --task")


def words_are_numbers(task: Task) -> bool:
    """Whether the answers to a prompt are numbers of classes, which tell a language model nothing."""
    return isinstance(task, LabelWords) and all(_NUMBER.fullmatch(word) for word in task.words.values())


def what_is_left_out(settings: CommonSettings, name: str, table: Table) -> list[str]:
    """What to tell of a table that is read as plain text, as nobody said, although it has more columns."""
    others = [column for column in table.columns if column != "text"]
    if settings.task is not None or name != "causal-lm" or not others:
        return []
    return [
        f"plain text is trained; of the other columns, {', '.join(others)}, none is read: name that of the "
        "labels, if there is one, with --label-column"
    ]


def described(task: Any) -> str:
    """The task as it is shown before a run."""
    if isinstance(task, LabelWords):
        words = ", ".join(map(repr, task.words.values()))
        return f"prompt {task.template.text!r}, answered by {words}"
    if isinstance(task, Completion | MultipleChoice | Generation):
        return f"prompt {task.template.text!r}"
    return ""
