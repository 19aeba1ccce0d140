"""Configurations of the packings that Transformers loads; the test is skipped where a package is missing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers


def bitsandbytes(**options: Any) -> Any:
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes")
    return transformers.BitsAndBytesConfig(**options)


def torchao(bits: int) -> Any:
    pytest.importorskip("torchao", reason="needs torchao")
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig

    packing = Int8WeightOnlyConfig() if bits == 8 else IntxWeightOnlyConfig(weight_dtype=torch.int4)
    return transformers.TorchAoConfig(packing)


def quanto() -> Any:
    pytest.importorskip("optimum.quanto", reason="needs optimum-quanto")
    return transformers.QuantoConfig(weights="int8")


PACKINGS = {
    "NF4": lambda: bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8 of bitsandbytes": lambda: bitsandbytes(load_in_8bit=True),
    "int8 of torchao": lambda: torchao(8),
    "int4 of torchao": lambda: torchao(4),
    "int8 of quanto": quanto,
}
