"""A model of the shape of OPT with random weights, and a batch for it. Downloads nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

BATCH, TOKENS = 4, 64


def require_transformers() -> None:
    """Ends the program, saying what to do, where there is no transformers."""
    if find_spec("transformers") is None:
        sys.exit("this benchmark needs transformers: pip install 'zoext[finetune]'")


def random_opt(arguments: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """An OPT decoder of the size that was asked for, in evaluation mode, made on its device."""
    require_transformers()
    from transformers import AutoModelForCausalLM, OPTConfig

    width_of_head = 64 if arguments.width < 4096 else 128
    config = OPTConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.width,
        word_embed_proj_dim=arguments.width,
        ffn_dim=4 * arguments.width,
        num_attention_heads=max(1, arguments.width // width_of_head),
        vocab_size=arguments.vocabulary,
    )
    with arguments.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def closure_of(
    model: nn.Module, arguments: argparse.Namespace, *, batch: int = BATCH, tokens: int = TOKENS
) -> Callable[[], Tensor]:
    """The loss on a random batch of ``batch`` x ``tokens`` tokens, the next token to be told."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(arguments.vocabulary, (batch, tokens), generator=generator).to(arguments.device)
    return lambda: model(input_ids=ids, labels=ids, use_cache=False).loss
