"""A small Llama as a GGUF file, with a tokenizer of bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import LlamaForCausalLM

#: What GGUF calls the parameters of a layer.
_IN_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_SPECIAL = "<|end|>"
#: The size of the vocabulary: the bytes, the token that ends a text, and one that is merged.
VOCABULARY = 258


def write(path: Path, model: LlamaForCausalLM) -> None:
    """Writes ``model``, whose vocabulary has ``VOCABULARY`` tokens, in float32."""
    config = model.config
    file = gguf.GGUFWriter(path, "llama")
    file.add_block_count(config.num_hidden_layers)
    file.add_context_length(config.max_position_embeddings)
    file.add_embedding_length(config.hidden_size)
    file.add_feed_forward_length(config.intermediate_size)
    file.add_head_count(config.num_attention_heads)
    file.add_head_count_kv(config.num_key_value_heads)
    file.add_layer_norm_rms_eps(config.rms_norm_eps)
    file.add_rope_dimension_count(config.head_dim)
    file.add_vocab_size(config.vocab_size)
    _add_tokenizer(file)
    for name, tensor in model.state_dict().items():
        file.add_tensor(_name_of(name), _as_in_gguf(name, tensor, config).numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


def _add_tokenizer(file: gguf.GGUFWriter) -> None:
    tokens = [_SPECIAL, *sorted(ByteLevel.alphabet()), "ab"]
    file.add_tokenizer_model("gpt2")
    file.add_token_list(tokens)
    file.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    file.add_token_merges(["a b"])
    file.add_eos_token_id(0)
    file.add_pad_token_id(0)


def _name_of(name: str) -> str:
    name = name.removesuffix(".weight")
    if name in _OUTSIDE:
        return f"{_OUTSIDE[name]}.weight"
    _, _, layer, inner = name.split(".", 3)
    return f"blk.{layer}.{_IN_A_LAYER[inner]}.weight"


def _as_in_gguf(name: str, tensor: Tensor, config: Any) -> Tensor:
    """GGUF has the rows of queries and keys in the order of the rotary embedding of the original Llama."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = next((number for part, number in heads.items() if part in name), None)
    if count is None:
        return tensor
    rows, width = tensor.shape
    return tensor.view(count, 2, rows // count // 2, width).transpose(1, 2).reshape(rows, width).contiguous()
