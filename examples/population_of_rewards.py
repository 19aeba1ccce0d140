"""Evolution strategies on a reward of generated tokens: python population_of_rewards.py

A tiny causal model learns not to repeat itself: the reward is the share of distinct tokens among those that
it generates greedily, which has no gradient. Each step compares 8 candidates, for which it generates at once.
"""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import zoext

TOKENS, NEW = 24, 6
PROMPTS = torch.arange(TOKENS).unsqueeze(1)


def tiny_model(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=TOKENS, eos_token_id=None, initializer_range=0.2, **sizes))


def train(steps: int = 15, seed: int = 0) -> tuple[float, float]:
    """The reward before and after."""
    model = tiny_model(seed).eval()

    def closure(copies: int = 1) -> torch.Tensor:
        tokens = model.generate(zoext.repeat(PROMPTS, copies), max_new_tokens=NEW, do_sample=False)
        distinct = 1 + (tokens[:, 1:].sort().values.diff() != 0).sum(1)
        return -zoext.mean_per_copy(distinct / NEW, copies)  # the lower the better, as for any loss

    options = {"estimator": zoext.Population(8, shaping="rank"), "probe": "batched", "seed": seed}
    optimizer = zoext.ZerothOrderOptimizer(model, lr=0.2, mu=0.05, **options)
    before = -float(closure())
    for _ in range(steps):
        optimizer.step(closure)
    return before, -float(closure())


if __name__ == "__main__":
    print("reward {:.2f} -> {:.2f}".format(*train()))
