"""Prompts with completions, conversations, plain texts, and texts for a classification head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoext.tasks._answers import Answers, Classes
from zoext.tasks._encoding import Encoder
from zoext.tasks._generating import Completions
from zoext.tasks._kinds import CAUSAL, CLASSIFIER, ENCODER, SEQ2SEQ
from zoext.tasks._objective import Objective
from zoext.tasks._prompts import Prompt
from zoext.tasks._rows import IGNORED, Example, Row
from zoext.tasks._task import PromptedTask, Record, Task, of_rows
from zoext.tasks._templates import RowError, Template, text_of


class Completion(PromptedTask):
    """Prompts and what is to follow them: the loss is that of the completion's tokens and of its end.

        >>> zoext.tasks.Completion()
        >>> zoext.tasks.Completion("Question: {question}\\nAnswer:", completion="answer", joint=" ")

    Args:
        template: the prompt, with columns in braces. Default: the column "prompt".
        completion: the column with the completion.
        joint: what stands between prompt and completion. Default: nothing.
        max_new_tokens: the length of an answer that is generated. Default 50.
    """

    kinds = (CAUSAL, SEQ2SEQ)

    def __init__(
        self,
        template: str | Template = "{prompt}",
        *,
        completion: str = "completion",
        joint: str = "",
        max_new_tokens: int = 50,
    ) -> None:
        super().__init__(template)
        self.completion, self.joint, self.max_new_tokens = completion, joint, max_new_tokens

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        if not answered:
            prompts = of_rows(rows, lambda row: Prompt(self.template.pieces(row)))
            return [Example(found) for found in encoder.asked(prompts)]
        return [Example(found) for found in encoder.answered(of_rows(rows, self._prompt))]

    def _prompt(self, row: Record) -> Prompt:
        return Prompt(self.template.pieces(row), [self.joint + text_of(row, self.completion)], ends=True)

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Completions(encoder, self.max_new_tokens)


class Chat(Task):
    """Conversations, in the chat template of the tokenizer: the loss is that of all that the assistant says.

    Args:
        messages: the column with the list of messages, each a dict with "role" and "content".
        max_new_tokens: the length of an answer that is generated. Default 50.
    """

    kinds = (CAUSAL,)

    def __init__(self, messages: str = "messages", *, max_new_tokens: int = 50) -> None:
        self.messages, self.max_new_tokens = messages, max_new_tokens

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.messages,)

    def key(self, row: Record) -> str:
        return repr(_before_answer(self._checked(row.get(self.messages))))

    def check(self, encoder: Encoder) -> None:
        super().check(encoder)
        if not encoder.tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; give a model that was tuned for chats, or data with the "
                "columns prompt and completion"
            )

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        self.check(encoder)
        make = self._row if answered else self._asked
        return [Example((row,)) for row in of_rows(rows, lambda row: make(row, encoder))]

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Completions(encoder, self.max_new_tokens)

    def _asked(self, row: Record, encoder: Encoder) -> Row:
        """The conversation up to the answer that is wanted, without its beginning if it is too long."""
        messages = _before_answer(self._checked(row.get(self.messages)))
        text = _rendered(encoder.tokenizer, messages, add_generation_prompt=True)
        return Row(tuple(encoder.tokens_of([text])[0][-encoder.max_length :]))

    def _row(self, row: Record, encoder: Encoder) -> Row:
        messages = self._checked(row.get(self.messages))
        if not any(message["role"] == "assistant" for message in messages):
            raise RowError(f"{self.messages} has no message of the assistant, so there is nothing to learn")
        text, labelled = "", []
        tokens: list[int] = []
        labels: list[int] = []
        for count, message in enumerate(messages, 1):
            is_answer = message["role"] == "assistant"
            upto = _rendered(encoder.tokenizer, messages[:count])
            if is_answer:
                start = _rendered(encoder.tokenizer, messages[: count - 1], add_generation_prompt=True)
                labelled.append((len(start), len(upto)))
                if not (start.startswith(text) and upto.startswith(start)):
                    raise RowError(
                        "the chat template of the tokenizer changes earlier messages when others follow; "
                        "give data with the columns prompt and completion"
                    )
                text = upto
        begin = 0
        for first, last in labelled:  # pieces are tokenised alone, as in a conversation that goes on
            for piece, is_answer in ((text[begin:first], False), (text[first:last], True)):
                found = encoder.tokens_of([piece])[0] if piece else []
                tokens += found
                labels += found if is_answer else [IGNORED] * len(found)
            begin = last
        if len(tokens) > encoder.max_length:
            encoder.cuts.count(len(tokens), encoder.max_length)
            tokens, labels = tokens[: encoder.max_length], labels[: encoder.max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise RowError(f"its first {encoder.max_length} tokens hold no answer; allow longer rows")
        return Row(tuple(tokens), tuple(labels))

    def _checked(self, messages: Any) -> list[dict[str, str]]:
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("content"), str) and "role" in message
            for message in messages
        ):
            raise RowError(f"{self.messages} must be a list of messages with role and content")
        return messages


def _before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation without what the assistant says last."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # of the template, which is a program
        raise RowError(f"the chat template of the tokenizer refuses it: {error}") from None


class Text(Task):
    """Plain texts: the loss of each token given those before it.

    Args:
        text: the column with the text.
    """

    kinds = (CAUSAL,)

    def __init__(self, text: str = "text") -> None:
        self.text = text

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.text,)

    def key(self, row: Record) -> str:
        return text_of(row, self.text)

    def check(self, encoder: Encoder) -> None:
        if encoder.kind == SEQ2SEQ:
            raise ValueError(
                "a sequence-to-sequence model learns what follows an input, not plain text; give data with "
                "the columns prompt and completion"
            )
        if encoder.kind not in self.kinds:
            raise ValueError(
                "an encoder sees the tokens that it would have to predict, so it cannot learn plain text; "
                "give a causal language model, or data with the columns text and label"
            )

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        """Texts of a single token are left out: the first token is not predicted."""
        self.check(encoder)
        encoded = encoder.texts(of_rows(rows, self.key))
        kept = [Example((Row(row.tokens, row.tokens),)) for row in encoded if len(row.tokens) > 1]
        if rows and not kept:
            raise RowError("every text has fewer than two tokens, so there is nothing to predict")
        return kept

    def objective(self, encoder: Encoder) -> Objective:
        self.check(encoder)
        return Answers(encoder.padding, encoder.kind)


class Classification(Task):
    """Texts, or pairs of texts, with labels for a classification head.

    A head that the model was not saved with begins with random weights, which takes far more steps to train
    than ``LabelWords`` does.

    Args:
        classes: the labels, in the order of the outputs of the head.
        text: the column, or the two columns, with the text.
        label: the column with the labels.
    """

    kinds = (CLASSIFIER, ENCODER)

    def __init__(
        self, classes: Sequence[str], *, text: Sequence[str] = ("text",), label: str = "label"
    ) -> None:
        if not 1 <= len(text) <= 2:
            raise ValueError(f"text must name one column or two, not {text!r}")
        self.classes, self.text, self.label = tuple(classes), tuple(text), label

    @property
    def columns(self) -> tuple[str, ...]:
        return self.text

    def key(self, row: Record) -> str:
        return "\0".join(text_of(row, column) for column in self.text)

    def check(self, encoder: Encoder) -> None:
        """Any model can get a classification head."""

    def examples(self, rows: Sequence[Record], encoder: Encoder, *, answered: bool = True) -> list[Example]:
        texts = of_rows(rows, lambda row: [text_of(row, column) for column in self.text])
        labels = of_rows(rows, self._index) if answered else [None] * len(rows)
        encoded = encoder.texts(*zip(*texts, strict=True))
        return [Example((found,), label) for found, label in zip(encoded, labels, strict=True)]

    def _index(self, row: Record) -> int:
        label = row.get(self.label)
        if str(label) not in self.classes:
            raise RowError(
                f"{self.label} is {label!r}, which is no class; there are {', '.join(self.classes)}"
            )
        return self.classes.index(str(label))

    def objective(self, encoder: Encoder) -> Objective:
        return Classes(encoder.padding)
