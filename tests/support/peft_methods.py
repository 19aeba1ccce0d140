"""Every method of PEFT on a tiny model: how to build it, and what a zoext optimizer does with it.

``python -m support.peft_methods``, run in the folder of the tests, writes the table of ``docs/peft.md``.
"""

from __future__ import annotations

import copy
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import peft
import torch
import transformers
from torch import Tensor, nn

import zoext

PAGE = Path(__file__).parents[2] / "docs" / "peft.md"
MARKS = "<!-- table of methods: begin -->\n", "<!-- table of methods: end -->\n"
MU = 1e-2
VOCABULARY = 64
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "use_cache": False,
}
TOKENS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))


def llama(**sizes: int) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL | sizes))


def mixture() -> nn.Module:
    """Its experts are weights of three dimensions, in no linear layer."""
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    config._experts_implementation = "eager"  # the others have no float64
    return transformers.MixtralForCausalLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3
    )
    return transformers.GPT2LMHeadModel(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5ForConditionalGeneration(config)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        initializer_range=0.3,
        num_labels=2,
    )
    return transformers.BertForSequenceClassification(config)


@dataclass(frozen=True)
class Method:
    """A method, its configuration by the name of its class, and what its forward needs."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    base: Callable[[], nn.Module] = llama
    inputs: Callable[[], dict[str, Tensor]] = dict
    dtype: torch.dtype = torch.float64
    task: str = "CAUSAL_LM"

    def build(self) -> Any:
        """The model, with adapters that are not at zero, where most methods begin, so that slopes are not."""
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = self.adapted().to(self.dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.requires_grad:
                        parameter += 0.05 * torch.randn_like(parameter)
        return model.eval()

    def adapted(self) -> Any:
        config = getattr(peft, self.config)(task_type=self.task, **self.options)
        return peft.get_peft_model(self.base(), config)

    def loss(self, model: Any) -> Tensor:
        labels = torch.tensor([0, 1]) if self.task == "SEQ_CLS" else TOKENS
        return model(input_ids=TOKENS, labels=labels, **self.inputs()).loss


def on_queries(name: str, config: str, **options: Any) -> Method:
    return Method(name, config, {"target_modules": ["q_proj"], **options})


def for_prompts(name: str, config: str, **options: Any) -> Method:
    return Method(name, config, {"num_virtual_tokens": 4, **options})


def two_tasks() -> dict[str, Tensor]:
    return {"task_ids": torch.tensor([0, 1])}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns of much that is intended here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Mixed(Method):
    """X-LoRA, which mixes adapters that were saved before; it counts them, whatever their names are."""

    def adapted(self) -> Any:
        with tempfile.TemporaryDirectory() as folder:
            for name in ("0", "1"):
                lora = peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
                peft.get_peft_model(self.base(), lora).save_pretrained(f"{folder}/{name}")
            adapters = {name: f"{folder}/{name}" for name in ("0", "1")}
            config = peft.XLoraConfig(task_type=self.task, adapters=adapters, **self.options)
            return peft.get_peft_model(self.base(), config)


METHODS = [
    Method("LoRA", "LoraConfig", {"r": 4, "target_modules": "all-linear"}),
    on_queries("LoRA with dropout", "LoraConfig", r=4, lora_dropout=0.2),
    on_queries("rsLoRA", "LoraConfig", r=4, use_rslora=True),
    on_queries("DoRA", "LoraConfig", r=4, use_dora=True),
    on_queries("LoRA with its own bias", "LoraConfig", r=4, lora_bias=True),
    Method("LoRA on embeddings", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    on_queries("LoRA and whole modules", "LoraConfig", r=4, modules_to_save=["lm_head"]),
    on_queries("LoRA and rows of tokens", "LoraConfig", r=4, trainable_token_indices=[3, 4, 5]),
    Method(
        "LoRA on expert weights",
        "LoraConfig",
        {"r": 4, "target_modules": [], "target_parameters": ["gate_up_proj", "down_proj"]},
        base=mixture,
    ),
    Method(
        "LoRA on GPT-2's Conv1D",
        "LoraConfig",
        {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True},
        base=gpt2,
    ),
    Method(
        "LoRA on a classifier",
        "LoraConfig",
        {"r": 4, "target_modules": ["query", "value"], "bias": "lora_only"},
        base=bert,
        task="SEQ_CLS",
    ),
    Method(
        "LoRA on an encoder-decoder",
        "LoraConfig",
        {"r": 4, "target_modules": ["q", "v"]},
        base=t5,
        task="SEQ_2_SEQ_LM",
    ),
    on_queries("AdaLoRA", "AdaLoraConfig", init_r=4, target_r=2, total_step=100, tinit=1, tfinal=10),
    replace(on_queries("AdaMSS", "AdamssConfig", r=4, num_subspaces=2), dtype=torch.float32),
    Method("Adaption prompt", "AdaptionPromptConfig", {"adapter_len": 4, "adapter_layers": 2}),
    on_queries("BEFT", "BeftConfig"),
    on_queries("BOFT", "BOFTConfig", boft_block_size=4),
    on_queries("C3A", "C3AConfig", block_size=4),
    for_prompts("Cartridge", "CartridgeConfig"),
    Method(
        "CPT",
        "CPTConfig",
        {"cpt_token_ids": [3, 4, 5], "cpt_tokens_type_mask": [1, 2, 4]},
        inputs=lambda: {"input_type_mask": torch.full_like(TOKENS, 4)},
    ),
    on_queries("DEFT", "DeftConfig", r=4),
    on_queries("DeLoRA", "DeloraConfig", r=4),
    on_queries("FourierFT", "FourierFTConfig", n_frequency=10),
    on_queries("FRoD", "FrodConfig"),
    on_queries("GLoRA", "GloraConfig", r=4),
    on_queries("GraLoRA", "GraloraConfig", r=4, alpha=8),
    on_queries("HiRA", "HiraConfig", r=4),
    on_queries("HRA", "HRAConfig", r=4),
    Method(
        "IA3",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    on_queries("Lily", "LilyConfig", r=4),
    Method("LN tuning", "LNTuningConfig"),
    on_queries("LoHa", "LoHaConfig", r=4),
    on_queries("LoKr", "LoKrConfig", r=4),
    on_queries("MiSS", "MissConfig", r=4),
    Method(
        "Multitask prompt tuning",
        "MultitaskPromptTuningConfig",
        {"num_virtual_tokens": 4, "num_tasks": 2},
        inputs=two_tasks,
    ),
    on_queries("OFT", "OFTConfig", oft_block_size=4),
    on_queries("OSF", "OSFConfig", effective_rank=4),
    for_prompts("P-tuning (MLP)", "PromptEncoderConfig", encoder_hidden_size=8),
    for_prompts(
        "P-tuning (LSTM)",
        "PromptEncoderConfig",
        encoder_hidden_size=8,
        encoder_reparameterization_type="LSTM",
    ),
    on_queries("PEANuT", "PeanutConfig", r=4),
    Method(
        "Poly",
        "PolyConfig",
        {"r": 4, "n_tasks": 2, "n_skills": 2, "n_splits": 2, "target_modules": ["q_proj"]},
        inputs=two_tasks,
    ),
    for_prompts("Prefix tuning", "PrefixTuningConfig"),
    for_prompts("Prefix tuning (MLP)", "PrefixTuningConfig", prefix_projection=True, encoder_hidden_size=8),
    for_prompts("Prompt tuning", "PromptTuningConfig"),
    on_queries("PSOFT", "PsoftConfig", r=4),
    on_queries("PVeRA", "PveraConfig", r=4),
    on_queries("RandLoRA", "RandLoraConfig", r=4),
    on_queries("RoAd", "RoadConfig", group_size=4),
    Method("Shadow", "ShadowConfig", {"r": 4}),
    on_queries("SHiRA", "ShiraConfig", r=4),
    on_queries("Supertuning", "SupertuningConfig"),
    on_queries("TinyLoRA", "TinyLoraConfig", u=8),
    Method("Trainable tokens", "TrainableTokensConfig", {"token_indices": [3, 4, 5]}),
    on_queries("UniLoRA", "UniLoraConfig", theta_d_length=16),
    on_queries("VB-LoRA", "VBLoRAConfig", r=4, num_vectors=8, vector_length=4),
    on_queries("VeRA", "VeraConfig", r=4, projection_prng_key=1),
    on_queries("WaveFT", "WaveFTConfig", n_frequency=10),
    Mixed("X-LoRA", "XLoraConfig", {"hidden_size": 16}),
]


@dataclass(frozen=True)
class Outcome:
    """What an estimate and a step of an optimizer did: names of weights."""

    slope: float = 0.0
    trainable: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()  # by the probes, which must restore everything
    unmoved: tuple[str, ...] = ()  # by the step
    gradients: tuple[str, ...] = ()  # allocated
    held: tuple[str, ...] = ()  # displaced for the whole closure
    error: str = ""  # why nothing was run


def outcome(
    method: Method,
    built: nn.Module,
    recipe: Callable[..., zoext.ZerothOrderOptimizer],
    estimates: int = 3,  # two that are watched, and one that is not
) -> Outcome:
    """Runs estimates and a step on a copy."""
    model = copy.deepcopy(built)
    before = snapshot(model)
    with quiet():
        try:
            optimizer = recipe(model, lr=1e-2, mu=MU, probe="streamed")
            for _ in range(estimates):
                estimate = optimizer.estimate(lambda: seeded_loss(method, model))
        except ValueError as error:
            return Outcome(error=str(error))
        changed = differences(before, snapshot(model))
        optimizer.step()
    moved = differences(before, snapshot(model))
    trainable = {name: each for name, each in model.named_parameters() if each.requires_grad}
    description = optimizer.probe.describe() + ","
    return Outcome(
        float(estimate.coefficients),
        tuple(trainable),
        changed,
        tuple(name for name in trainable if name not in moved),
        tuple(name for name, each in model.named_parameters() if each.grad is not None),
        tuple(name for name in trainable if f" {name}," in description),
    )


def runs_batched(method: Method, built: nn.Module) -> bool:
    """Whether a batched probe runs it; its slope must then be that of a streamed one."""
    slopes = []
    for probe in ("streamed", "batched"):
        model = copy.deepcopy(built)
        before = snapshot(model)
        with quiet():
            optimizer = zoext.LOZO(model, lr=1e-2, mu=MU, probe=probe)
            try:
                estimate = optimizer.estimate(
                    (lambda copies, model=model: losses(method, model, copies))
                    if probe == "batched"
                    else (lambda model=model: losses(method, model, 1))
                )
            except RuntimeError:
                assert probe == "batched"
                return False
        assert differences(before, snapshot(model)) == ()
        slopes.append(float(estimate.coefficients))
    assert abs(slopes[0] - slopes[1]) <= 1e-5 * abs(slopes[0]) + 1e-6
    return True


def losses(method: Method, model: nn.Module, copies: int) -> Tensor:
    """The loss of each copy of the batch, of the logits alone."""
    torch.manual_seed(1)
    labels = torch.tensor([0, 1]) if method.task == "SEQ_CLS" else TOKENS
    batch = zoext.repeat({"input_ids": TOKENS, "labels": labels, **method.inputs()}, copies)
    labels = batch["labels"] if method.task == "SEQ_2_SEQ_LM" else batch.pop("labels")
    logits = model(**batch).logits
    if method.task == "CAUSAL_LM":  # without virtual tokens
        logits, labels = logits[:, -TOKENS.shape[1] : -1], labels[:, 1:]
    each = nn.functional.cross_entropy(logits.movedim(-1, 1), labels, reduction="none")
    return zoext.mean_per_copy(each, copies)


def plain_slope(method: Method, built: nn.Module) -> float:
    """The central difference along the same direction, by plain PyTorch on copies."""
    losses = []
    for sign in (1, -1):
        model = copy.deepcopy(built)
        with torch.no_grad(), quiet():
            for key, parameter in enumerate(model.parameters()):
                if parameter.requires_grad:
                    seed = zoext.noise.step_seed(0, 0)
                    z = zoext.noise.normal(parameter.shape, seed=seed, key=key, dtype=parameter.dtype)
                    parameter += sign * MU * z
            losses.append(float(seeded_loss(method, model)))
    return (losses[0] - losses[1]) / (2 * MU)


def seeded_loss(method: Method, model: nn.Module) -> Tensor:
    torch.manual_seed(1)
    return method.loss(model)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def differences(before: dict[str, Tensor], after: dict[str, Tensor]) -> tuple[str, ...]:
    return tuple(name for name, value in before.items() if not torch.equal(value, after[name]))


HEAD = "| method | configuration | displaced | AGZO | batched |\n|---|---|---|---|---|\n"


def row(method: Method, mezo: Outcome, agzo: Outcome, is_batched: bool) -> str:
    """The line of the page's table."""
    displaced = "while its module runs"
    if mezo.held:
        displaced = "until the closure ends"
        if mezo.held != mezo.trainable:
            displaced = f"some {displaced}"
    takes = " | ".join("yes" if each else "no" for each in (not agzo.error, is_batched))
    return f"| {method.name} | `{method.config}` | {displaced} | {takes} |\n"


def table_of_the_page() -> str:
    begin, end = MARKS
    return PAGE.read_text(encoding="utf-8").split(begin)[1].split(end)[0]


def write_table() -> None:
    """Replaces the table of the page by one of what happens now."""
    rows = []
    for method in METHODS:
        built = method.build()
        mezo, agzo = outcome(method, built, zoext.MeZO), outcome(method, built, zoext.AGZO, 1)
        rows.append(row(method, mezo, agzo, runs_batched(method, built)))
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(table_of_the_page(), HEAD + "".join(rows)), encoding="utf-8")


if __name__ == "__main__":
    write_table()
