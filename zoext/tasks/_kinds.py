"""Kinds of models by what they predict."""

from __future__ import annotations

import importlib
from typing import Any

CAUSAL = "causal"  # the next token
MASKED = "masked"  # masked tokens
SEQ2SEQ = "seq2seq"  # the tokens of a decoder
CLASSIFIER = "classifier"  # a class, by a head that was trained for it
ENCODER = "encoder"  # nothing: hidden states only

_MASKED_HEADS = ("ForMaskedLM", "ForPreTraining", "WithLMHeadModel", "LMHeadModel")


def kind_of(config: Any) -> str:
    """The kind of the model with this configuration of transformers, by the architecture of its files.

    Returns:
        "causal", "masked", "seq2seq", "classifier" for a model that was saved with a classification head, or
        "encoder" for one whose files have no head that predicts tokens.
    """
    if any("ForSequenceClassification" in name for name in config.architectures or ()):
        return CLASSIFIER
    return language_kind_of(config)


def language_kind_of(config: Any) -> str:
    """As ``kind_of``, but for a model that is used without its classification head, if it has one."""
    names = tuple(name for name in config.architectures or () if "ForSequenceClassification" not in name)
    if getattr(config, "is_encoder_decoder", False):
        return SEQ2SEQ
    if _sees_the_future(config):
        return MASKED if not names or any(name.endswith(_MASKED_HEADS) for name in names) else ENCODER
    return CAUSAL


def _sees_the_future(config: Any) -> bool:
    """Whether tokens attend to those after them: the model is an encoder that is not used as a decoder."""
    if getattr(config, "is_decoder", False):
        return False
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    masked = config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if masked and causal:  # as BERT, which has a causal head only for decoders
        return not any(name.endswith("ForCausalLM") for name in config.architectures or ())
    return masked or not causal
