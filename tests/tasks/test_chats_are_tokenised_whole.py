"""A conversation has the tokens of its whole text, and labels on what the assistant says alone.

SentencePiece tokenizers put a space before each text, which is spurious within a conversation.
"""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from zoext.tasks import IGNORED, Chat, Encoder, RowError

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}<u>{{ m.content }}</s>{% else %}"
    "<a>{{ m.content }}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}<a>{% endif %}"
)
MESSAGES = [
    {"role": role, "content": content}
    for role, content in (
        ("user", "hi"),
        ("assistant", "good day"),
        ("user", "so"),
        ("assistant", " x"),
        ("user", "and"),
    )
]


def sentencepiece(**pairs: str) -> Any:
    """Letters, and merges of them, after a space that is put before the text."""
    letters = [chr(code) for code in range(32, 127) if chr(code) != " "]
    vocabulary = ["</s>", "\u2581", *letters, *pairs]
    inner = Tokenizer(
        models.BPE({token: i for i, token in enumerate(vocabulary)}, [tuple(pair) for pair in pairs])
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class Slow:
    """As ``inner``, but without the places of tokens, as tokenizers in Python are."""

    is_fast = False
    pad_token_id = eos_token_id = 0

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self.chat_template = inner.chat_template
        self.apply_chat_template = inner.apply_chat_template

    def __call__(self, texts: Any, **options: Any) -> Any:
        assert "return_offsets_mapping" not in options
        return self._inner(texts, **options)


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("pairs", [{}, {">g": "", "y<": ""}])
def test_the_tokens_of_the_whole_text(is_fast: bool, pairs: dict[str, str]) -> None:
    """Also where the tokenizer merges the ends of an answer with what surrounds it.

    What it merges at the beginning belongs to the answer, and at the end to what follows.
    """
    tokenizer = sentencepiece(**pairs)
    encoder = Encoder(tokenizer if is_fast else Slow(tokenizer), "causal", 100)
    (example,) = Chat().examples([{"messages": MESSAGES}], encoder)
    (row,) = example.rows
    whole = "<u>hi</s><a>good day</s><u>so</s><a> x</s>"
    assert list(row.tokens) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    prompt, answer = tokenizer(["<u>hi</s><a>", "good day</s>"], add_special_tokens=False)["input_ids"]
    apart = [*prompt, *answer]  # which is what this test is about
    assert list(row.tokens[: len(apart)]) != apart
    text = tokenizer.convert_ids_to_tokens(label for label in row.labels if label != IGNORED)
    answers = "good\u2581day</s>\u2581x</s>"
    assert "".join(text) == (f">{answers}" if pairs else answers)
    assert all(label in (IGNORED, token) for token, label in zip(row.tokens, row.labels, strict=True))


def test_training_and_asking_begin_with_the_same_tokens() -> None:
    encoder = Encoder(sentencepiece(), "causal", 100)
    (trained,) = Chat().examples([{"messages": MESSAGES[:2]}], encoder)
    (asked,) = Chat().examples([{"messages": MESSAGES[:2]}], encoder, answered=False)
    assert trained.rows[0].tokens[: len(asked.tokens)] == asked.tokens
    assert trained.rows[0].unlabelled == len(asked.tokens)


def test_a_prompt_that_ends_in_a_space() -> None:
    """Tokenizers of subwords take it to the word that follows, so it is not asked for apart."""
    tokenizer = sentencepiece(**{"\u2581g": ""})
    tokenizer.chat_template = TEMPLATE.replace("<a>", "<a> ")
    encoder = Encoder(tokenizer, "causal", 100)
    (trained,) = Chat().examples([{"messages": MESSAGES[:2]}], encoder)
    (asked,) = Chat().examples([{"messages": MESSAGES[:2]}], encoder, answered=False)
    assert trained.rows[0].tokens[: len(asked.tokens)] == asked.tokens
    assert trained.rows[0].unlabelled == len(asked.tokens)


def test_the_last_answer_is_generated() -> None:
    encoder = Encoder(sentencepiece(), "causal", 100)
    (trained,) = Chat().examples([{"messages": MESSAGES}], encoder)
    (asked,) = Chat().examples([{"messages": MESSAGES[:-1]}], encoder, answered=False)
    assert trained.rows[0].tokens[: trained.rows[0].before_last_answer] == asked.tokens


def test_a_greeting_answers_nothing() -> None:
    encoder = Encoder(sentencepiece(), "causal", 100)
    greeting = {"role": "assistant", "content": "good"}
    (row,) = (
        example.rows[0] for example in Chat().examples([{"messages": [greeting, *MESSAGES[:2]]}], encoder)
    )
    text = "".join(encoder.tokenizer.convert_ids_to_tokens(row.tokens[row.unlabelled :]))
    assert text == "good\u2581day</s>"
    for answered in (True, False):
        with pytest.raises(RowError, match=r"messages (has no answer|holds nothing)"):
            Chat().examples([{"messages": [greeting]}], encoder, answered=answered)


def test_tools_are_described_to_the_model() -> None:
    """Before the conversation, and not as something to learn."""
    tokenizer = sentencepiece()
    tokenizer.chat_template = "{% for t in tools or [] %}({{ t.name }}){% endfor %}" + TEMPLATE
    encoder = Encoder(tokenizer, "causal", 100)
    row = {"messages": MESSAGES[:2], "tools": [{"name": "add"}, {"name": "sub"}]}
    plain = {"messages": MESSAGES[:2], "tools": None}
    chat = Chat()
    found = [example.rows[0] for example in chat.examples([row, plain], encoder)]
    for tokens, text in zip(found, ("(add)(sub)", ""), strict=True):
        whole = f"{text}<u>hi</s><a>good day</s>"
        assert list(tokens.tokens) == tokenizer(whole, add_special_tokens=False)["input_ids"]
    first, second = ([label for label in row.labels if label != IGNORED] for row in found)
    assert first == second
    (asked,) = chat.examples([row], encoder, answered=False)
    begun = tokenizer("(add)(sub)<u>hi</s><a>", add_special_tokens=False)["input_ids"]
    assert list(asked.rows[0].tokens) == begun
    assert chat.key(row) != chat.key(plain)


@pytest.mark.parametrize("tools", ["add", [1], {"name": "add"}])
def test_tools_that_are_none(tools: Any) -> None:
    row = {"messages": MESSAGES[:2], "tools": tools}
    with pytest.raises(RowError, match=r"row 1: tools is .* it must be a list of objects, one for each tool"):
        Chat().examples([row], Encoder(sentencepiece(), "causal", 100))
