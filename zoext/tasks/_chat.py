"""Conversations in the chat template of a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from zoext.tasks._encoding import Encoder
from zoext.tasks._generating import Completions
from zoext.tasks._kinds import CAUSAL
from zoext.tasks._objective import Objective
from zoext.tasks._rows import IGNORED, Example, Row
from zoext.tasks._task import Record, Task, of_rows
from zoext.tasks._templates import RowError

Tools = list[dict[str, Any]] | None


class Chat(Task):
    """Conversations, in the chat template of the tokenizer: the loss is that of all that the assistant says.

    Args:
        messages: the column with the list of messages, each a dict with "role" and "content".
        tools: the column with the list of tools that the template describes to the model, each a dict; a row
            may lack it.
        max_new_tokens: the length of an answer that is generated. Default 50.
    """

    kinds = (CAUSAL,)

    def __init__(self, messages: str = "messages", *, tools: str = "tools", max_new_tokens: int = 50) -> None:
        self.messages, self.tools, self.max_new_tokens = messages, tools, max_new_tokens

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.messages,)

    def key(self, row: Record) -> str:
        return repr((_before_answer(self._checked(row.get(self.messages))), self._tools_of(row)))

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
        if not messages:
            raise RowError(f"{self.messages} holds nothing that the assistant could answer")
        # As it is trained: tokenizers of subwords take a space to the word that follows.
        tools = self._tools_of(row)
        text = _rendered(encoder.tokenizer, messages, tools, add_generation_prompt=True).rstrip(" ")
        (tokens,) = encoder.tokens_of([text])
        most = encoder.most_before(self.max_new_tokens)
        if len(tokens) > most:
            for_room = most < min(encoder.max_length, len(tokens))
            encoder.cuts.count(len(tokens), most, for_room=for_room, part="beginning")
        return Row(tuple(tokens[-most:]))

    def _row(self, row: Record, encoder: Encoder) -> Row:
        messages = self._checked(row.get(self.messages))
        if not any(message["role"] == "assistant" for message in messages[1:]):
            raise RowError(f"{self.messages} has no answer of the assistant, so there is nothing to learn")
        text, spans = self._text_and_answers(messages, self._tools_of(row), encoder)
        tokens, labels = encoder.labelled(text, spans)
        if len(tokens) > encoder.max_length:
            encoder.cuts.count(len(tokens), encoder.max_length)
            tokens, labels = tokens[: encoder.max_length], labels[: encoder.max_length]
        if all(label == IGNORED for label in labels[1:]):
            raise RowError(f"its first {encoder.max_length} tokens hold no answer; allow longer rows")
        return Row(tuple(tokens), tuple(labels))

    def _text_and_answers(
        self, messages: list[dict[str, str]], tools: Tools, encoder: Encoder
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation up to its last answer, and the places of all answers in it."""
        text, spans = "", []
        for count, message in enumerate(messages, 1):
            if message["role"] != "assistant" or count == 1:  # a greeting answers nothing
                continue
            upto = _rendered(encoder.tokenizer, messages[:count], tools)
            start = _rendered(encoder.tokenizer, messages[: count - 1], tools, add_generation_prompt=True)
            if not (start.startswith(text) and upto.startswith(start)):
                raise RowError(
                    "the chat template of the tokenizer changes earlier messages when others follow; "
                    "give data with the columns prompt and completion"
                )
            spans.append((len(start), len(upto)))
            text = upto
        return text, spans

    def _tools_of(self, row: Record) -> Tools:
        tools = row.get(self.tools)
        if tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            return tools or None
        raise RowError(f"{self.tools} is {tools!r}: it must be a list of objects, one for each tool")

    def _checked(self, messages: Any) -> list[dict[str, str]]:
        if not isinstance(messages, list):
            raise RowError(
                f"{self.messages} is {messages!r}: it must be a list of messages with role and content"
            )
        for number, message in enumerate(messages, 1):
            if not (isinstance(message, dict) and "role" in message and "content" in message):
                raise RowError(f"{self.messages}: message {number} is {message!r}: it needs role and content")
            if not isinstance(message["content"], str):
                raise RowError(
                    f"{self.messages}: the content of message {number} is {message['content']!r}, not a "
                    "text; write one, which may be empty beside tool_calls"
                )
        return messages


def _before_answer(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    """The conversation without what the assistant says last."""
    end = len(messages)
    while end and messages[end - 1]["role"] == "assistant":
        end -= 1
    return messages[:end]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], tools: Tools, **options: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, **options))
    except Exception as error:  # of the template, which is a program
        raise RowError(f"the chat template of the tokenizer refuses it: {error}") from None
