"""Trains LoRA adapters on a packed base: python lora_on_a_packed_base.py MODEL TEXTS nf4|int8 STEPS

NF4 and int8 are those of bitsandbytes, which run on CPUs as well. Bases packed by torchao or quanto, or read
from a GGUF file, are trained alike: pass their quantization_config, or gguf_file, to from_pretrained.
"""

import sys
from itertools import cycle, islice
from pathlib import Path

import peft
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

import zoext

PACKINGS = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def train(folder: str, texts: list[str], packing: str, steps: int) -> tuple[peft.PeftModel, list[float]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=PACKINGS[packing])
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    optimizer = zoext.MeZO(model, lr=1e-4, mu=1e-2)
    losses = []
    for text in islice(cycle(texts), steps):
        batch = tokenizer(text, return_tensors="pt", truncation=True, max_length=128)
        loss = optimizer.step(lambda batch=batch: model(**batch, labels=batch.input_ids).loss)
        losses.append(float(loss))
    return model, losses


if __name__ == "__main__":
    texts = Path(sys.argv[2]).read_text(encoding="utf-8").splitlines()
    model, losses = train(sys.argv[1], texts, sys.argv[3], int(sys.argv[4]))
    model.save_pretrained("adapter")
