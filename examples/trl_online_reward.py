"""Raises a reward function of TRL on completions that the model samples: no gradient, no reference model.

python examples/trl_online_reward.py --model MODEL --output_dir out --max_steps 200 --learning_rate 1e-3
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer

from zoext.integrations.transformers import ZOTrainerMixin, ZOTrainingArguments


@dataclass
class Arguments(ZOTrainingArguments):
    model: str = field(default="", metadata={"help": "A causal language model of transformers."})


def reward(prompts: list[str], completions: list[str], **kwargs: Any) -> list[float]:  # TRL's signature
    return [-abs(len(completion) - 20.0) for completion in completions]


class ZORewardTrainer(ZOTrainerMixin, Trainer):
    def compute_loss(self, model: Any, inputs: list[dict[str, str]], **kwargs: Any) -> torch.Tensor:
        prompts = [each["prompt"] for each in inputs]
        batch = self.processing_class(prompts, return_tensors="pt", padding=True).to(model.device)
        tokens = model.generate(**batch, max_new_tokens=12, do_sample=True)  # with a KV cache
        completions = self.processing_class.batch_decode(tokens[:, batch.input_ids.shape[1] :], True)
        return -torch.tensor(reward(prompts, completions), device=model.device).mean()


if __name__ == "__main__":
    (args,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    args.remove_unused_columns = False
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    data = [{"prompt": f"Once upon a time, a {name}"} for name in ("dog", "cat", "bird", "girl") * 8]
    model = AutoModelForCausalLM.from_pretrained(args.model)
    trainer = ZORewardTrainer(model, args, list, data, processing_class=tokenizer)
    trainer.train()
