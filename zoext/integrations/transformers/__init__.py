"""Fine-tunes with transformers' ``Trainer``, by forward passes only.

    from zoext.integrations.transformers import ZOTrainer, ZOTrainingArguments

    args = ZOTrainingArguments("out", zo_optimizer="MeZO", learning_rate=1e-6)
    ZOTrainer(model, args, train_dataset=dataset).train()

``ZOTrainerMixin`` and ``ZOArgumentsMixin`` do the same for subclasses of ``Trainer`` and of
``TrainingArguments``, such as ``Seq2SeqTrainer`` and those of TRL.
"""

from zoext.integrations.transformers._arguments import ZOArgumentsMixin, ZOTrainingArguments
from zoext.integrations.transformers._callbacks import TrajectoryCallback
from zoext.integrations.transformers._trainer import ZOTrainer, ZOTrainerMixin

__all__ = [
    "TrajectoryCallback",
    "ZOArgumentsMixin",
    "ZOTrainer",
    "ZOTrainerMixin",
    "ZOTrainingArguments",
]
