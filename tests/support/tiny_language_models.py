"""Tiny random language models of transformers, of many architectures, by name."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY = 97
_SIZES = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 2, "hidden_size": 16}
_BERT = {**_SIZES, "intermediate_size": 24, "max_position_embeddings": 64}
_LLAMA = {**_BERT, "num_key_value_heads": 1}
_GEMMA = {**_LLAMA, "head_dim": 8, "query_pre_attn_scalar": 8}
_MODERN = {
    **_BERT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
}
_GPT = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 24,
    "num_layers": 1,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_BART = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 64,
}

#: The class of each, the class of its configuration if its name is another one, and settings.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", "", _LLAMA),
    "Llama, tied": ("LlamaForCausalLM", "", {**_LLAMA, "tie_word_embeddings": True}),
    "GPT-2": ("GPT2LMHeadModel", "GPT2Config", _GPT),
    "GPT-J, a head with bias": ("GPTJForCausalLM", "", {**_GPT, "rotary_dim": 4}),
    "OPT": (
        "OPTForCausalLM",
        "",
        {**_SIZES, "ffn_dim": 24, "word_embed_proj_dim": 8, "max_position_embeddings": 64},
    ),
    "Qwen2": ("Qwen2ForCausalLM", "", _LLAMA),
    "Mistral": ("MistralForCausalLM", "", _LLAMA),
    "Mixtral": ("MixtralForCausalLM", "", {**_LLAMA, "num_local_experts": 3}),
    "Gemma 2, capped": ("Gemma2ForCausalLM", "", {**_GEMMA, "final_logit_softcapping": 0.5}),
    "RecurrentGemma, capped": (
        "RecurrentGemmaForCausalLM",
        "",
        {**_SIZES, "num_hidden_layers": 3, "intermediate_size": 24, "lru_width": 16, "logits_soft_cap": 0.3},
    ),
    "Cohere, scaled": ("CohereForCausalLM", "", {**_LLAMA, "logit_scale": 0.3}),
    "Granite, divided": ("GraniteForCausalLM", "", {**_LLAMA, "logits_scaling": 3.0}),
    "HyperCLOVA X, multiplied": ("HyperCLOVAXForCausalLM", "", {**_LLAMA, "logits_scaling": 3.0}),
    "ModernBERT decoder": ("ModernBertDecoderForCausalLM", "", _MODERN),
    "BERT": ("BertForMaskedLM", "", _BERT),
    "RoBERTa": ("RobertaForMaskedLM", "", _BERT),
    "DistilBERT": (
        "DistilBertForMaskedLM",
        "",
        {"vocab_size": VOCABULARY, "dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 24},
    ),
    "ALBERT": ("AlbertForMaskedLM", "", {**_BERT, "embedding_size": 8}),
    "ELECTRA": ("ElectraForMaskedLM", "", {**_BERT, "embedding_size": 8}),
    "ModernBERT": ("ModernBertForMaskedLM", "", _MODERN),
    "T5": ("T5ForConditionalGeneration", "", _T5),
    "T5, untied": ("T5ForConditionalGeneration", "", {**_T5, "tie_word_embeddings": False}),
    "mT5": ("MT5ForConditionalGeneration", "", _T5),
    "BART": ("BartForConditionalGeneration", "", _BART),
    "M2M-100": ("M2M100ForConditionalGeneration", "", _BART),
}


def tiny(name: str, dtype: torch.dtype = torch.float32, scale: float = 6.0, **settings: Any) -> Any:
    """The model ``name`` in eval mode, with weights large enough that logits differ visibly."""
    model_class, config_class, sizes = MODELS[name]
    config_class = config_class or model_class.partition("For")[0] + "Config"
    config = getattr(transformers, config_class)(**{**sizes, **settings})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = getattr(transformers, model_class)(config)
        for key, buffer in model.named_buffers():
            if key == "final_logits_bias":
                buffer.normal_()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(scale)
    return model.to(dtype).eval()


def ragged(examples: int = 3, length: int = 9, seed: int = 2) -> dict[str, Tensor]:
    """A batch with padding and labels of a part of the tokens, a different number for each example."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(4, VOCABULARY, (examples, length), generator=generator)
    mask, labels = torch.ones_like(tokens), tokens.clone()
    for row in range(examples):
        mask[row, length - row % 4 :] = 0
        labels[row, : 2 + row % 3] = -100
    labels[mask == 0] = -100
    return {"input_ids": tokens, "attention_mask": mask, "labels": labels}
