"""The mixin makes other trainers forward-only: that of sequences to sequences, and TRL's for SFT."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
)

from support.trainers import Ragged, logs, optimizer_of, tiny_llama, weights
from zoext.integrations.transformers import ZOArgumentsMixin, ZOTrainerMixin


@dataclass
class Seq2SeqArguments(ZOArgumentsMixin, Seq2SeqTrainingArguments):
    pass


class ZOSeq2SeqTrainer(ZOTrainerMixin, Seq2SeqTrainer):
    pass


def common(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
    }


def test_seq2seq(tmp_path: Path) -> None:
    config = T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(config)
    begin = weights(model).clone()
    args = Seq2SeqArguments(**common(tmp_path), predict_with_generate=True, generation_max_length=4)
    trainer = ZOSeq2SeqTrainer(model, args, train_dataset=Ragged(8), eval_dataset=Ragged(4))
    trainer.train()
    assert "eval_loss" in trainer.evaluate()
    assert not torch.equal(weights(model), begin)
    assert len(logs(trainer, "projected_gradient")) == 2


def test_sft(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl", reason="needs TRL")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{letter: 3 + i for i, letter in enumerate("abcdefgh")}}
    vocabulary = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=vocabulary, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    texts = [" ".join("abcdefgh"[: 2 + i % 6]) for i in range(8)]

    @dataclass
    class Arguments(ZOArgumentsMixin, trl.SFTConfig):  # type: ignore[misc, name-defined]
        pass

    class ZOSFTTrainer(ZOTrainerMixin, trl.SFTTrainer):  # type: ignore[misc, name-defined]
        pass

    ends = []
    for size, count in [(4, 1), (2, 2)]:
        options: dict[str, Any] = {
            "per_device_train_batch_size": size,
            "gradient_accumulation_steps": count,
            "bf16": False,
            "gradient_checkpointing": None,  # its deprecated name is a default of TRL
        }
        args = Arguments(**{**common(tmp_path), **options})
        data = datasets.Dataset.from_dict({"text": texts})
        trainer = ZOSFTTrainer(tiny_llama(), args, train_dataset=data, processing_class=tokenizer)
        trainer.train()
        assert optimizer_of(trainer).param_groups[0]["step"] == 2
        assert all(parameter.grad is None for parameter in trainer.model.parameters())
        ends.append((weights(trainer), logs(trainer, "loss")))
    moved = (ends[0][0] - weights(tiny_llama())).norm()
    assert (ends[0][0] - ends[1][0]).norm() < 1e-2 * moved
    assert ends[0][1] == pytest.approx(ends[1][1], rel=1e-5)
