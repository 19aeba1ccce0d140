"""A tiny model whose linear layers are packed, by every library that packs on a CPU."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
import transformers
from torch import Tensor, nn

import zoext
from support.packings import PACKINGS
from support.peft_methods import SMALL, TOKENS, llama

SIZES = {"hidden_size": 64, "intermediate_size": 128}


def packed(packing: str, folder: Path) -> Any:
    """The model, packed as one of ``PACKINGS``, by HQQ, or read from a GGUF file."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if packing == "HQQ":
            return _with_hqq(llama(**SIZES).to(torch.bfloat16))
        if packing == "GGUF":
            return _from_gguf(llama(**SIZES), folder)
        config = PACKINGS[packing]()
        llama(**SIZES).to(torch.bfloat16).save_pretrained(folder)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )


def losses(model: nn.Module, copies: int) -> Tensor:
    """The losses [copies] of the tokens; logits are wide, so that less is rounded."""
    tokens = zoext.repeat(TOKENS, copies)
    logits = model(input_ids=tokens).logits[:, :-1].mT.float()
    each = nn.functional.cross_entropy(logits, tokens[:, 1:], reduction="none")
    return zoext.mean_per_copy(each, copies)


def _with_hqq(model: Any) -> Any:
    hqq = pytest.importorskip("hqq.core.quantize", reason="needs hqq")
    for layer in model.model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, nn.Linear):
                    config = hqq.BaseQuantizeConfig(nbits=4, group_size=32)
                    settings = {"compute_dtype": torch.bfloat16, "device": "cpu"}
                    setattr(block, name, hqq.HQQLinear(linear, config, **settings))
    return model


def _from_gguf(model: Any, folder: Path) -> Any:
    """The weights in blocks of 32 with 8 bits each, which transformers unpacks as it loads them."""
    gguf = pytest.importorskip("gguf", reason="needs gguf")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_block_count(SMALL["num_hidden_layers"])
    writer.add_context_length(SMALL["max_position_embeddings"])
    writer.add_embedding_length(SIZES["hidden_size"])
    writer.add_feed_forward_length(SIZES["intermediate_size"])
    writer.add_head_count(SMALL["num_attention_heads"])
    writer.add_head_count_kv(SMALL["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(SMALL["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, SMALL["num_hidden_layers"])
    for name, each in model.state_dict().items():
        kind = gguf.GGMLQuantizationType.Q8_0 if each.dim() > 1 else gguf.GGMLQuantizationType.F32
        own = names.get_name(name.removesuffix(".weight")) + ".weight"
        writer.add_tensor(own, gguf.quantize(each.numpy(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.bfloat16
    )
