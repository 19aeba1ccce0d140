"""A model of the shape of OPT with random weights, and a batch for it. Downloads nothing."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

BATCH, TOKENS = 4, 64


def random_opt(arguments: argparse.Namespace, dtype: torch.dtype) -> nn.Module:
    """An OPT decoder of the size that was asked for, in evaluation mode."""
    try:
        from transformers import OPTConfig, OPTForCausalLM
    except ImportError:
        sys.exit("this benchmark needs transformers: pip install 'zoext[finetune]'")
    config = OPTConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.width,
        word_embed_proj_dim=arguments.width,
        ffn_dim=4 * arguments.width,
        num_attention_heads=max(1, arguments.width // 64),
        vocab_size=arguments.vocabulary,
    )
    return OPTForCausalLM(config).to(arguments.device, dtype).eval()


def closure_of(model: nn.Module, arguments: argparse.Namespace) -> Callable[[], Tensor]:
    """The loss on a random batch of 4 x 64 tokens, the next token to be told."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(arguments.vocabulary, (BATCH, TOKENS), generator=generator).to(arguments.device)
    return lambda: model(input_ids=tokens, labels=tokens, use_cache=False).loss
