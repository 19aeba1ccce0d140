"""A forward with logits for labelled tokens only, against one with all logits: time, and memory of the loss.

    python benchmarks/compact_loss.py --threads 2 --json compact_loss.json

On a random model of the shape of SmolLM2-135M, or a causal model of transformers given by --model, and a
batch in which the last --labelled of --tokens tokens have a label. The memory of a loss is the peak of a
forward with it less that of the base model alone.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from opt_model import require_transformers
from torch import Tensor

import zoext
from zoext._benchmarking import arguments as options
from zoext._benchmarking.memory import MIB, peak
from zoext._benchmarking.report import Report, at_least, at_most
from zoext._benchmarking.timing import Measurement, interleaved, threads

COMPACT, ALL, FULL = "compact loss", "compact loss, all labelled", "full loss"


def model_of(arguments: argparse.Namespace, dtype: torch.dtype) -> Any:
    """The model on its device, in evaluation mode."""
    require_transformers()
    from transformers import AutoModelForCausalLM, LlamaConfig

    if arguments.model:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype)
        return model.to(arguments.device).eval()
    heads = max(1, arguments.width // 64)
    config = LlamaConfig(
        num_hidden_layers=arguments.layers,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_attention_heads=heads,
        num_key_value_heads=heads // 3 if heads % 3 == 0 else heads,
        vocab_size=arguments.vocabulary,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    with arguments.device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def batch_of(model: Any, arguments: argparse.Namespace, labelled: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = arguments.batch, arguments.tokens
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    labels = ids.clone()
    labels[:, : max(arguments.tokens - labelled, 0)] = -100
    return {name: each.to(arguments.device) for name, each in (("input_ids", ids), ("labels", labels))}


def works_of(model: Any, arguments: argparse.Namespace) -> dict[str, Callable[[], object]]:
    """What is compared, and the base model alone."""
    batch = batch_of(model, arguments, arguments.labelled)
    whole = batch_of(model, arguments, arguments.tokens)
    loss = zoext.CompactLoss(model)
    return {
        "base model": lambda: model.base_model(batch["input_ids"], use_cache=False),
        COMPACT: lambda: loss(batch),
        ALL: lambda: loss(whole),
        FULL: lambda: model(**batch, use_cache=False).loss,
    }


@torch.no_grad()
def measure(report: Report, dtype: torch.dtype, arguments: argparse.Namespace) -> None:
    label = str(dtype).removeprefix("torch.")
    works = works_of(model_of(arguments, dtype), arguments)
    times = interleaved(works, repeats=arguments.repeats, device=arguments.device)
    report.add_times(label, times)
    report.add(f"{label}: {FULL} / {COMPACT}, forward", times[FULL] / times[COMPACT], "x", at_least(1))
    peaks = {name: peak(work, arguments.device) / MIB for name, work in works.items()}
    extra = {name: max(peaks[name] - peaks["base model"], 0.0) for name in (COMPACT, ALL, FULL)}
    for name, value in extra.items():
        report.add(f"{label}: memory of the {name}", Measurement((value,)), "MiB")
    share = Measurement((100 * extra[COMPACT] / max(extra[FULL], 1 / MIB),))
    labelled = 100 * arguments.labelled / arguments.tokens
    report.add(f"{label}: memory of the {COMPACT} / {FULL}", share, "%", at_most(max(labelled, 1)))


def main() -> None:
    parser = options.parser_of(__doc__)
    options.add_measuring_arguments(parser, repeats=5)
    options.add_model_arguments(parser)
    parser.set_defaults(layers=30, width=576, vocabulary=49152)
    parser.add_argument("--model", help="a folder or a name of the hub, in place of a random model")
    options.add_count(parser, "--batch", 4)
    options.add_count(parser, "--tokens", 64)
    options.add_count(parser, "--labelled", 4, "tokens of an example")
    arguments = parser.parse_args()
    name = arguments.model or f"{arguments.layers} layers of width {arguments.width}"
    title = (
        f"Losses of {arguments.batch} x {arguments.tokens} tokens, {arguments.labelled} labelled, on {name}"
    )
    report = Report(title, options.settings_of(arguments))
    with threads(arguments.threads):
        for dtype in (torch.float32, torch.bfloat16):
            measure(report, dtype, arguments)
    report.finish(arguments.json)


if __name__ == "__main__":
    main()
