"""Raises a reward of generated text, which has no gradient: python reward.py MODEL [STEPS [SEED]]

The reward is the number of sentences per word. MODEL is a causal language model of transformers, such as
TinyStories-260K. Only the scales of its last norm move: few weights learn from coarse rewards in few steps.
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import zoext

NAMES = [f"{kind} {animal}" for kind in ("little", "big", "red", "sad") for animal in ("dog", "cat", "bird")]
PROMPTS = [f"Once upon a time there was a {name}" for name in NAMES] * 2


def train(folder: str, steps: int = 40, seed: int = 0) -> tuple[float, float]:
    """The reward on fresh samples, before and after."""
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    model.model.norm.requires_grad_(True)

    def reward(prompts: list[str]) -> float:
        batch = tokenizer(prompts, return_tensors="pt", padding=True)
        tokens = model.generate(**batch, max_new_tokens=10, do_sample=True, min_new_tokens=10)
        texts = tokenizer.batch_decode(tokens[:, batch.input_ids.shape[1] :])
        return sum(text.count(".") for text in texts) / sum(len(text.split()) for text in texts)

    torch.manual_seed(seed)
    before = reward(PROMPTS * 10)
    optimizer = zoext.MeZO(model, lr=10.0, mu=2.0, seed=seed)
    for _ in range(steps):
        optimizer.step(lambda: -reward(PROMPTS))  # both probes sample with the same random numbers
    return before, reward(PROMPTS * 10)


if __name__ == "__main__":
    print("reward {:.3f} -> {:.3f}".format(*train(sys.argv[1], *map(int, sys.argv[2:]))))
