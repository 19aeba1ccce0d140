"""A tiny transformers model in a folder, and data that it can learn."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from zoext.cli._problem.models import quiet_transformers

GOOD, BAD = ("bright", "kind", "sweet"), ("grim", "cruel", "sour")
OTHER = ("the", "day", "was", "so", "very", "cat")
FIXTURES = Path(__file__).absolute().parents[2].parent / "shared" / "fixtures"


def tiny_bert(folder: Path, hidden: int = 16, seed: int = 3) -> Path:
    """A random BERT of two layers whose vocabulary is the words above."""
    words = ["[PAD]", "[UNK]", *GOOD, *BAD, *OTHER]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", model_max_length=16
    ).save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        initializer_range=0.2,
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def tiny_language_model(folder: Path, kind: str = "causal", seed: int = 3, words: Sequence[str] = ()) -> Path:
    """A random language model of that vocabulary, of more ``words`` and the special tokens of its kind."""
    specials = ["[PAD]", "[UNK]", "[MASK]", "[EOS]"]
    vocabulary = dict.fromkeys([*specials, *GOOD, *BAD, *OTHER, *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[EOS]"}
    if kind == "masked":
        names["mask_token"] = "[MASK]"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **names).save_pretrained(folder)
    size = {
        "vocab_size": len(vocabulary),
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    ids = {"pad_token_id": 0, "eos_token_id": 3, "bos_token_id": None}
    wide = {"intermediate_size": 24, "initializer_range": 0.2, "max_position_embeddings": 48}
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if kind == "causal":
            model: Any = LlamaForCausalLM(LlamaConfig(**size, **wide, **ids))
        elif kind == "masked":
            model = BertForMaskedLM(BertConfig(**size, **wide, **ids))
        else:
            config = T5Config(
                vocab_size=len(vocabulary),
                d_model=16,
                d_kv=8,
                d_ff=24,
                num_layers=2,
                num_heads=2,
                decoder_start_token_id=0,
                **ids,
            )
            model = T5ForConditionalGeneration(config)
        model.save_pretrained(folder)
    return folder


def tiny_deberta(folder: Path) -> Path:
    """A random DeBERTa with that vocabulary: it reads the weight of an embedding that it never calls."""
    tiny_bert(folder)
    config = DebertaV2Config(
        vocab_size=2 + len(GOOD + BAD + OTHER),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
        relative_attention=True,
        pos_att_type=["c2p", "p2c"],
    )
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        DebertaV2ForSequenceClassification(config).save_pretrained(folder)
    return folder


def labelled(path: Path, examples: int = 40) -> Path:
    """A .jsonl file: the label says whether the one word that matters is a good one."""
    rows = []
    for i in range(examples):
        word = (GOOD if i % 2 else BAD)[i % 3]
        rows.append({"text": f"{OTHER[i % 6]} {word} {OTHER[i % 5]}" + " so" * (i % 4), "label": i % 2})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
