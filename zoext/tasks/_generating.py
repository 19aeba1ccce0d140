"""Greedy generation of the answers to prompts."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from zoext.tasks._answers import Answers
from zoext.tasks._encoding import Encoder
from zoext.tasks._kinds import CAUSAL, SEQ2SEQ
from zoext.tasks._rows import Example

LINE = "\n"


def generate(
    model: Any,
    encoder: Encoder,
    examples: Sequence[Example],
    max_new_tokens: int,
    device: torch.device | str,
    *,
    one_line: bool = False,
) -> list[str]:
    """What ``model`` continues the prompts of examples with, greedily, up to the end of the sequence.

    With ``one_line`` also up to the end of the first line.
    """
    prompts = [_prompt_of(example, encoder.kind) for example in examples]
    longest = max(map(len, prompts))
    positions = encoder.positions if encoder.kind == CAUSAL else None
    if positions is not None and longest + max_new_tokens > positions:
        raise ValueError(
            f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the {positions} "
            "positions of the model; make the examples with answered=False, or give fewer new tokens"
        )
    # Left of the prompts, so that all of them end where the generation begins.
    tokens = [[encoder.padding] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    found = model.generate(
        input_ids=torch.tensor(tokens, device=device),
        attention_mask=torch.tensor(mask, device=device),
        generation_config=_greedy(model, encoder, max_new_tokens, one_line),
    )
    if encoder.kind == CAUSAL:
        found = found[:, longest:]
    texts = encoder.tokenizer.batch_decode(found, skip_special_tokens=True)
    return [text.lstrip().partition(LINE)[0].strip() if one_line else text.strip() for text in texts]


def _greedy(model: Any, encoder: Encoder, max_new_tokens: int, one_line: bool) -> Any:
    """Greedy generation that ends where the model or its tokenizer says.

    Penalties and beams that models are saved with would change what is the likeliest next token.
    """
    saved = model.generation_config
    known = saved.eos_token_id if isinstance(saved.eos_token_id, list) else [saved.eos_token_id]
    ends = [encoder.tokenizer.eos_token_id, *known]
    if one_line and len(line := encoder.tokens_of([LINE])[0]) == 1:
        ends += line
    kept = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
    return importlib.import_module("transformers").GenerationConfig(
        do_sample=False,
        num_beams=1,
        max_new_tokens=max_new_tokens,
        pad_token_id=encoder.padding,
        eos_token_id=sorted({end for end in ends if end is not None}) or None,
        **{name: getattr(saved, name, None) for name in kept},
    )


def _prompt_of(example: Example, kind: str) -> tuple[int, ...]:
    """The tokens of the first row before its answer, the last one of a conversation."""
    row = example.rows[0]
    return row.tokens if kind == SEQ2SEQ else row.tokens[: row.before_last_answer]


class Completions(Answers):
    """The loss of completions; its answers are what the model generates.

    Args:
        encoder: of the model's tokenizer.
        max_new_tokens: the length of a generated answer.
    """

    def __init__(self, encoder: Encoder, max_new_tokens: int) -> None:
        super().__init__(encoder.padding, encoder.kind)
        self._encoder = encoder
        self._max_new_tokens = max_new_tokens

    def answers(self, model: nn.Module, examples: Sequence[Example], device: torch.device | str) -> list[str]:
        return generate(model, self._encoder, examples, self._max_new_tokens, device)
