"""What a step of ZOTrainer takes beyond the same step in a plain loop.

python benchmarks/trainer_overhead.py --threads 2 --json trainer_overhead.json

Both train models of their own in turn, step by step, so that disturbances of the machine meet both.
"""

from __future__ import annotations

import argparse
import copy
import time
from itertools import cycle
from tempfile import TemporaryDirectory
from typing import Any

import torch
from mezo_step import MOST_REPEATS, WATCHED_STEPS, too_many
from opt_model import BATCH, TOKENS, random_opt, require_transformers
from torch.utils.data import DataLoader

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.report import Report, at_most
from zoext._benchmarking.timing import Measurement, threads

SETTINGS = {"lr": 1e-6, "mu": 1e-3, "seed": 0}


def measure(arguments: argparse.Namespace) -> dict[str, Measurement]:
    """The seconds of each step, with its batch and scheduler, of both."""
    require_transformers()
    from transformers import TrainerCallback, default_data_collator

    from zoext.integrations.transformers import ZOTrainer, ZOTrainingArguments

    model = random_opt(arguments, torch.float32)
    plain = copy.deepcopy(model).train()
    steps = WATCHED_STEPS + 1 + arguments.repeats
    ids = torch.randint(
        arguments.vocabulary, (BATCH * steps, TOKENS), generator=torch.Generator().manual_seed(0)
    )
    examples = [{"input_ids": row, "labels": row} for row in ids]
    optimizer = zoext.MeZO(plain, **SETTINGS)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    loader = cycle(DataLoader(examples, BATCH, collate_fn=default_data_collator))  # type: ignore[arg-type]

    def plain_step() -> None:
        batch = {name: tensor.to(arguments.device) for name, tensor in next(loader).items()}
        # Trainer counts the labels of a batch, so that the model divides by them.
        count = batch["labels"][:, 1:].ne(-100).sum()
        optimizer.step(lambda: plain(**batch, num_items_in_batch=count).loss)
        schedule.step()

    times: dict[str, list[float]] = {"plain loop": [], "ZOTrainer": []}

    class Alternating(TrainerCallback):
        """Takes a step of the plain loop after each step of the trainer."""

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            _wait(arguments.device)
            now = time.perf_counter()
            if state.global_step > 1:
                times["ZOTrainer"].append(now - self.began)
            now = time.perf_counter()
            plain_step()
            _wait(arguments.device)
            self.began = time.perf_counter()
            if state.global_step > 1:
                times["plain loop"].append(self.began - now)

    with TemporaryDirectory() as folder:
        args = ZOTrainingArguments(
            folder,
            learning_rate=SETTINGS["lr"],
            seed=0,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=5,
            use_cpu=arguments.device.type == "cpu",
            dataloader_pin_memory=False,
        )
        ZOTrainer(model, args, train_dataset=examples, callbacks=[Alternating()]).train()
    return {name: Measurement(tuple(taken[WATCHED_STEPS:])) for name, taken in times.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=MOST_REPEATS)
    options.add_model_arguments(parser)
    parser.set_defaults(layers=6, width=256, vocabulary=8000)  # a forward takes about 50 ms on two cores
    arguments = parser.parse_args()
    if arguments.repeats > MOST_REPEATS:
        parser.error(f"argument --repeats: {too_many(arguments.repeats)}")
    size = options.describe(options.shapes_of(arguments))
    report = Report(f"ZOTrainer on {size}, batch {BATCH} x {TOKENS}", options.settings_of(arguments))
    with threads(arguments.threads):
        times = measure(arguments)
    report.add_times("step", times)
    ratio = times["ZOTrainer"] / times["plain loop"]
    report.add(
        "ZOTrainer beyond the plain loop",
        Measurement(tuple(100 * (each - 1) for each in ratio.rounds)),
        "%",
        at_most(3),
    )
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
