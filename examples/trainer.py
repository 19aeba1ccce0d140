"""Fine-tunes with transformers' Trainer, without a backward pass: a tiny model learns to repeat a token.

python examples/trainer.py --output_dir out --max_steps 300 --learning_rate 3e-3
"""

import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, set_seed

from zoext.integrations.transformers import TrajectoryCallback, ZOTrainer, ZOTrainingArguments


def main() -> None:
    (args,) = HfArgumentParser(ZOTrainingArguments).parse_args_into_dataclasses()
    set_seed(args.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=8,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            use_cache=False,
        )
    )
    tokens = torch.arange(3, 8).repeat(20)[:, None].expand(-1, 6)
    examples = [{"input_ids": row, "labels": row} for row in tokens]
    trainer = ZOTrainer(
        model,
        args,
        train_dataset=examples,
        eval_dataset=examples[:10],
        callbacks=[TrajectoryCallback(f"{args.output_dir}/run.jsonl")],
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"loss {before:.3f} -> {trainer.evaluate()['eval_loss']:.3f}")


if __name__ == "__main__":
    main()
