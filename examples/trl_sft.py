"""Supervised fine-tuning with TRL, without a backward pass: LoRA, or all weights without --lora.

python examples/trl_sft.py --model MODEL --texts LINES.txt --output_dir out --max_steps 1000 --lora
"""

from dataclasses import dataclass, field

import peft
from datasets import Dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from zoext.integrations.transformers import ZOArgumentsMixin, ZOTrainerMixin


@dataclass
class ZOSFTConfig(ZOArgumentsMixin, SFTConfig):
    model: str = field(default="", metadata={"help": "A causal language model of transformers."})
    texts: str = field(default="", metadata={"help": "A file with a text in each line."})
    lora: bool = field(default=False, metadata={"help": "Whether to train adapters only."})


class ZOSFTTrainer(ZOTrainerMixin, SFTTrainer):
    pass


def main() -> None:
    (args,) = HfArgumentParser(ZOSFTConfig).parse_args_into_dataclasses()
    with open(args.texts, encoding="utf-8") as file:
        dataset = Dataset.from_dict({"text": file.read().splitlines()})
    adapter = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear") if args.lora else None
    trainer = ZOSFTTrainer(args.model, args, train_dataset=dataset, peft_config=adapter)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
