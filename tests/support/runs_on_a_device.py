"""A program: every recipe on the device of ``aliasing_device`` and on the CPU; prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
import tempfile
import unittest.mock
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import zoext
from support import aliasing_device
from zoext import _reference, ops

RECIPES: dict[str, Callable[..., zoext.ZerothOrderOptimizer]] = {
    "MeZO": lambda model, **options: zoext.MeZO(model, samples=2, **options),
    "AdaMeZO": lambda model, **options: zoext.AdaMeZO(model, horizon=3, **options),
    "AGZO": lambda model, **options: zoext.AGZO(model, rank=2, **options),
    "MeZOGV": lambda model, **options: zoext.MeZOGV(model, **options),
    "MeZOGV, centered": lambda model, **options: zoext.MeZOGV(model, weighting="centered", **options),
    "MeZOGreedy": lambda model, **options: zoext.MeZOGreedy(model, **options),
    "LOZO": lambda model, **options: zoext.LOZO(model, refresh_interval=2, **options),
    "Rademacher": lambda model, **options: zoext.ZerothOrderOptimizer(
        model, direction=zoext.Rademacher(), **options
    ),
}
PRECISIONS = {"nearest": torch.float32, "stochastic": torch.bfloat16, "residual": torch.float16}
PROBES = {"streamed": tuple(RECIPES), "inplace": ("MeZO",)}
SPLITS = (
    ("MeZO", "nearest", "streamed"),
    ("AGZO", "nearest", "streamed"),
    ("LOZO", "stochastic", "streamed"),
    ("AdaMeZO", "residual", "inplace"),
)
STEPS = 2


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(150, 8)
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 5)
        self.dropout, self.norm = nn.Dropout(0.1), nn.LayerNorm(16)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.last(self.norm(self.dropout(torch.tanh(self.first(self.table(tokens))))))


class SplitModel(Model):
    """A model whose parts may be on different devices."""

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.first(self.table(tokens.to(self.table.weight.device)))
        hidden = self.norm(self.dropout(torch.tanh(hidden.to(self.norm.weight.device))))
        return self.last(hidden.to(self.last.weight.device))


def model_of(dtype: torch.dtype, device: torch.device) -> Model:
    torch.manual_seed(0)
    return Model().to(dtype).to(device)


def loss_of(model: nn.Module, device: torch.device) -> Callable[[], Tensor]:
    tokens, labels = torch.arange(12).reshape(4, 3).to(device), torch.arange(4).to(device)
    return lambda: nn.functional.cross_entropy(model(tokens)[:, 0].float(), labels)


def trained(recipe: str, precision: str, probe: str, device: torch.device) -> tuple[list[Tensor], int]:
    """The weights after some steps, and how often the host read something in the last ones."""
    model = model_of(PRECISIONS[precision], device)
    options: dict[str, Any] = {"lr": 1e-3, "mu": 1e-2, "weight_decay": 0.01, "seed": 5, "nonfinite": "skip"}
    optimizer = RECIPES[recipe](model, probe=probe, precision=precision, **options)
    closure = loss_of(model, device)
    for step in range(STEPS):
        optimizer.step(closure)
        if step == 0:
            aliasing_device.begin_counting()
    reads = aliasing_device.reads_by_host()
    return [parameter.detach().cpu().float() for parameter in model.parameters()], reads


def reference_power_iteration(
    input: Tensor, mask: Tensor | None, seed: Tensor, *, rank: int, iterations: int
) -> tuple[Tensor, Tensor]:
    return _reference.power_iteration(input, mask, seed, rank, iterations)


def compared(recipe: str, precision: str, probe: str, device: torch.device) -> dict[str, float]:
    # The basis of the kernels spans the same subspace, but its vectors are free to have the other sign.
    with unittest.mock.patch.object(ops, "power_iteration", reference_power_iteration):
        expected, _ = trained(recipe, precision, probe, torch.device("cpu"))
    weights, reads = trained(recipe, precision, probe, device)
    model = model_of(PRECISIONS[precision], torch.device("cpu"))
    began = [parameter.detach().float() for parameter in model.parameters()]
    pairs = list(zip(weights, expected, began, strict=True))
    return {
        "reads": reads,
        "error": max(float((a - b).abs().max()) for a, b, _ in pairs),
        "moved": max(float((a - c).abs().max()) for a, _, c in pairs),
    }


def split(
    recipe: str, precision: str, probe: str, placement: tuple[torch.device, torch.device]
) -> list[Tensor]:
    """The weights after some steps with losses that do not depend on the model; frozen ones are included."""
    torch.manual_seed(0)
    model = SplitModel().to(PRECISIONS[precision])
    model.first.bias.requires_grad_(False)
    for modules, device in zip(
        ((model.table, model.first), (model.norm, model.last)), placement, strict=True
    ):
        for module in modules:
            module.to(device)
    optimizer = RECIPES[recipe](model, lr=1e-3, mu=1e-2, weight_decay=0.01, probe=probe, precision=precision)
    losses = iter([1.0, 1.25, 0.75, 1.5, 1.0, 2.0] * STEPS * 2)
    tokens = torch.arange(12).reshape(4, 3)
    for _ in range(STEPS):
        optimizer.step(lambda: model(tokens).float().mean() * 0 + next(losses))
    state = tree_map(
        lambda each: each.to("cpu", copy=True) if isinstance(each, Tensor) else each, optimizer.state_dict()
    )
    optimizer.load_state_dict(state)
    optimizer.step(lambda: model(tokens).float().mean() * 0 + next(losses))
    return [parameter.detach().cpu().float() for parameter in model.parameters()]


def error_of_split(recipe: str, precision: str, probe: str, device: torch.device) -> float:
    """The largest difference of the weights of a model on two devices, either first, and on the CPU."""
    cpu = torch.device("cpu")
    with unittest.mock.patch.object(ops, "power_iteration", reference_power_iteration):
        expected = split(recipe, precision, probe, (cpu, cpu))
        found = [split(recipe, precision, probe, placement) for placement in ((cpu, device), (device, cpu))]
    return max(float((a - b).abs().max()) for each in found for a, b in zip(each, expected, strict=True))


def recorded_and_replayed(recipe: str, precision: str, device: torch.device) -> bool:
    """Whether a replay on the device leaves the bits of the run there."""
    model = model_of(PRECISIONS[precision], device)
    optimizer = RECIPES[recipe](model, lr=1e-3, mu=1e-2, precision=precision)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        with zoext.Trajectory(path, optimizer, frames=recipe == "AGZO"):
            for _ in range(STEPS):
                optimizer.step(loss_of(model, device))
        again = model_of(PRECISIONS[precision], device)
        zoext.replay(again, path)
    pairs = zip(model.parameters(), again.parameters(), strict=True)
    return all(torch.equal(a.cpu(), b.cpu()) for a, b in pairs)


def other_closures(device: torch.device) -> dict[str, Any]:
    """Losses on the host, a learning rate on the device, a loss that is not finite."""
    model = model_of(torch.float32, device)
    loss = loss_of(model, device)
    lr = torch.tensor(1e-3, device=device)
    optimizer = zoext.MeZO(model, lr=lr)  # type: ignore[arg-type]
    for closure in (lambda: float(loss()), lambda: loss().cpu().double()):
        optimizer.step(closure)
    raised = False
    optimizer.step(lambda: loss() * float("nan"))
    try:
        optimizer.step(loss)
    except FloatingPointError:
        raised = True
    return {
        "raised a step later": raised,
        "finite": all(bool(p.isfinite().all()) for p in model.parameters()),
    }


def largest_allocation(precision: str, device: torch.device) -> int:
    """Of updates of a parameter of 2**21 elements."""
    theta = torch.zeros(2**10, 2**11, dtype=PRECISIONS[precision]).to(device)
    rounding = ops.Rounding[precision.upper()]
    residuals = [torch.zeros_like(theta, dtype=torch.int8)] if rounding == ops.Rounding.RESIDUAL else []
    options: dict[str, Any] = {"rounding": rounding, "residuals": residuals}
    seeds, coefficients = torch.ones(1, 1, dtype=torch.int64).to(device), torch.ones(1, 1).to(device)
    one, place = torch.ones(1).to(device), ([0], [ops.span_of(theta)])
    left, right = torch.ones(1, 1, 2**10).to(device), torch.ones(1, 1, 2**11).to(device)
    aliasing_device.begin_counting()
    ops.noise_axpy_([theta], seeds, coefficients, one, *place, **options)
    ops.noise_window_([theta], seeds, coefficients, *[one] * 5, *place, **options)
    ops.factored_axpy_([theta], [left], [right], seeds, coefficients, one, *place, **options)
    return aliasing_device.largest_allocation()


def main(library: str) -> None:
    device = aliasing_device.register(Path(library))
    aliasing_device.begin_counting()
    runs = {
        f"{recipe}/{precision}/{probe}": compared(recipe, precision, probe, device)
        for probe, recipes in PROBES.items()
        for recipe in recipes
        for precision in PRECISIONS
    }
    replays = {
        f"{recipe}/{precision}": recorded_and_replayed(recipe, precision, device)
        for recipe in ("MeZO", "AdaMeZO", "LOZO", "AGZO")
        for precision in PRECISIONS
    }
    splits = {"/".join(run): error_of_split(*run, device) for run in SPLITS}
    seen = {
        "runs": runs,
        "splits": splits,
        "replays": replays,
        "closures": other_closures(device),
        "allocations": {precision: largest_allocation(precision, device) for precision in PRECISIONS},
    }
    print(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1])
