"""The bits of every operator, recipe and replay are those of ``pinned_bits.json``.

They must not depend on the processor, so nothing here that a digest sees comes out of a matrix product or a
long sum of torch: weights and activations are exact in every dtype, losses are given and not computed, and
sums of a few of them are float64 before they become float32.

A change that is meant to move bits writes the digests again, and its commit says which ones moved and why:

    python tests/project/test_bits_are_pinned.py --write
"""

from __future__ import annotations

import copy
import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import zoext
from zoext import ops
from zoext.ops import Distribution, Rounding, Span, Stream

PINNED = Path(__file__).with_name("pinned_bits.json")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
WIDE = (torch.float32, torch.float64)

Digests = Iterator[tuple[str, str]]


def window_(kind: str, *tensors: Any, **options: Any) -> None:
    """``noise_window_`` or ``factored_window_`` with the rule of Adam."""
    getattr(ops, f"{kind}_window_")(*tensors, rule=ops.Rule.ADAM, **options)


# Data and digests


def exact(*shape: int, dtype: torch.dtype, salt: int = 0) -> Tensor:
    """Weights of either sign over 13 binades, with zeros of either sign among them."""
    number = torch.arange(torch.Size(shape).numel()) + 7919 * salt
    word = (number * 6364136223846793005 + 1442695040888963407) >> 11  # of 53 bits, with a sign
    value = word.double() * 2.0 ** -(52 + number % 13)
    return torch.where(number % 17 == 3, value * 0.0, value).to(dtype).reshape(shape)


def some_residuals(theta: Tensor) -> Tensor:
    """Of every size; none makes a weight less than zero in magnitude. Empty for wide weights."""
    if theta.dtype in WIDE:
        return torch.empty(0, dtype=torch.int8)
    residual = (torch.arange(theta.numel()).reshape(theta.shape) * 37 + 11) % 256 - 128
    return torch.where(theta == 0, residual.abs().clamp(max=127), residual).to(torch.int8)


def bytes_of(tensor: Tensor) -> bytes:
    if tensor.is_floating_point():  # the sign of a mean that is no number depends on the processor
        tensor = torch.where(tensor.isnan(), torch.nan, tensor)
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(*tensors: Tensor | int | None) -> str:
    sha = hashlib.sha256()
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            sha.update(f"{tensor.dtype}{list(tensor.shape)}".encode() + bytes_of(tensor))
        else:
            sha.update(repr(tensor).encode())
    return sha.hexdigest()[:12]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# Operators

ROWS, COLUMNS = 23, 150
BLOCK = (8 * COLUMNS + 67, 64, COLUMNS)  # rows 8 to 22, columns 67 to 130
SEEDS = (2**62 + 11, -5, 7, 2**40 + 1, -(2**63), 0)
COEFFICIENTS = (0.25, -1.5, 3e-3, 0.0, -0.7, 2.0)
SHAPES: tuple[tuple[tuple[int, ...], Span | None], ...] = (
    ((1,), None),
    ((3,), None),
    ((0,), None),
    ((67,), None),
    ((1030,), None),
    ((15, 64), BLOCK),
    ((131,), (2**34 - 50, 131, 0)),
    ((70,), (2**39 - 33, 70, 0)),
)
MATRICES: tuple[tuple[tuple[int, int], Span | None], ...] = (
    ((1, 1), None),
    ((5, 3), None),
    ((17, 67), None),
    ((1, 131), None),
    ((15, 64), BLOCK),
)
KEYS = (0, 1, 2, 3, 77, 2**31 + 7, 5, 6)


class Weights:
    """The tensors of a call."""

    def __init__(self, shapes: Sequence[tuple[Any, Span | None]], dtype: torch.dtype) -> None:
        self.theta = [exact(*shape, dtype=dtype, salt=i) for i, (shape, _) in enumerate(shapes)]
        self.keys = KEYS[: len(shapes)]
        self.spans = [span or ops.span_of(theta) for theta, (_, span) in zip(self.theta, shapes, strict=True)]
        self.residuals = [some_residuals(theta) for theta in self.theta]

    def options(self, rounding: Rounding) -> dict[str, Any]:
        return {
            "rounding": rounding,
            "residuals": self.residuals if rounding == Rounding.RESIDUAL else (),
        }

    def digest(self) -> str:
        return digest(*self.theta, *self.residuals)


def numbers(table: Sequence[Any], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    count = torch.Size(shape).numel()
    return torch.tensor([table[i % len(table)] for i in range(count)], dtype=dtype).reshape(shape)


def seeds_of(*shape: int) -> Tensor:
    return numbers(SEEDS, *shape, dtype=torch.int64)


def combinations(steps: int, terms: int, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Seeds, coefficients and decays: one step without a dimension of its own, or several."""
    shape = (terms,) if steps == 1 else (steps, terms)
    decays = torch.tensor(decay) if steps == 1 else numbers((decay, 0.0, 0.01), steps)
    return seeds_of(*shape), numbers(COEFFICIENTS, *shape), decays


#: Steps, terms, decay.
COMBINATIONS = ((1, 0, 0.03), (1, 1, 0.0), (1, 3, 0.03), (1, 4, 0.0), (3, 2, 0.03), (2, 1, 0.0))


def pin_normal(dtype: torch.dtype) -> Digests:
    draws = [(stream, Distribution.NORMAL) for stream in Stream] + [(Stream.SIGN, Distribution.SIGN)]
    for stream, distribution in draws:
        for seed in SEEDS[:3]:
            weights = Weights(SHAPES, dtype)
            ops.normal_(
                weights.theta,
                torch.tensor([seed]),
                weights.keys,
                weights.spans,
                stream=stream,
                distribution=distribution,
            )
            yield f"{stream.name} {distribution.name} {seed}", weights.digest()


def pin_noise_axpy(dtype: torch.dtype) -> Digests:
    for distribution, rounding, case in product(Distribution, Rounding, COMBINATIONS):
        weights = Weights(SHAPES, dtype)
        ops.noise_axpy_(
            weights.theta,
            *combinations(*case),
            weights.keys,
            weights.spans,
            distribution=distribution,
            **weights.options(rounding),
        )
        yield f"{distribution.name} {rounding.name} {case}", weights.digest()


def pin_noise_copy(dtype: torch.dtype) -> Digests:
    roundings = (Rounding.NEAREST, Rounding.STOCHASTIC)
    for distribution, rounding, terms, aliased in product(Distribution, roundings, (0, 1, 3), (False, True)):
        weights = Weights(SHAPES, dtype)
        out = weights.theta if aliased else [torch.ones_like(theta) for theta in weights.theta]
        seeds, coefficients, _ = combinations(1, terms, 0.0)
        ops.noise_copy_(
            out,
            weights.theta,
            seeds,
            coefficients,
            weights.keys,
            weights.spans,
            distribution=distribution,
            rounding=rounding,
        )
        yield f"{distribution.name} {rounding.name} {terms} {aliased}", digest(*weights.theta, *out)


def pin_noise_copies(dtype: torch.dtype) -> Digests:
    roundings = (Rounding.NEAREST, Rounding.STOCHASTIC)
    sizes = ((1, 1), (2, 1), (6, 4), (3, 0))
    for distribution, rounding, (copies, terms) in product(Distribution, roundings, sizes):
        weights = Weights(SHAPES, dtype)
        out = [torch.ones(copies, *theta.shape, dtype=dtype) for theta in weights.theta]
        ops.noise_copies_(
            out,
            weights.theta,
            seeds_of(terms),
            numbers(COEFFICIENTS, copies, terms),
            weights.keys,
            weights.spans,
            distribution=distribution,
            rounding=rounding,
        )
        yield f"{distribution.name} {rounding.name} {copies} {terms}", digest(*weights.theta, *out)


#: Steps, length of the window, terms, first and second weights, lr, decay.
WINDOWS = (
    (1, 1, 1, (0.3,), (0.1,), 0.02, 0.0),
    (1, 3, 2, (0.1, 0.2, 0.4), (0.3, 0.1, 0.2), 0.02, 0.03),
    (1, 2, 1, (0.1, 0.9), (0.0, 0.0), 0.01, 0.0),  # momentum only
    (1, 2, 3, (0.1, 0.9), (0.2, 0.1), 0.0, 0.03),
    (3, 2, 2, (0.1, 0.9, 0.4), (0.2, 0.1, 0.3), 0.02, 0.03),
    (2, 4, 1, (0.1, 0.2, 0.3, 0.4), (0.4, 0.3, 0.2, 0.1), 0.02, 0.0),
)


def windows(
    steps: int,
    horizon: int,
    terms: int,
    first: Sequence[float],
    second: Sequence[float],
    lr: float,
    decay: float,
) -> tuple[Tensor, ...]:
    rows, weights = (horizon, (horizon,)) if steps == 1 else (steps + horizon - 1, (steps, horizon))
    each: tuple[int, ...] = () if steps == 1 else (steps,)
    return (
        seeds_of(rows, terms),
        numbers(COEFFICIENTS, rows, terms),
        numbers(first, *weights),
        numbers(second, *weights),
        numbers((lr, lr / 2), *each),
        torch.tensor(1e-3 if any(second) else 1.0),
        numbers((decay, 0.0), *each),
    )


def pin_noise_window(dtype: torch.dtype) -> Digests:
    for distribution, rounding, (number, case) in product(Distribution, Rounding, enumerate(WINDOWS)):
        weights = Weights(SHAPES, dtype)
        window_(
            "noise",
            weights.theta,
            *windows(*case),
            weights.keys,
            weights.spans,
            distribution=distribution,
            **weights.options(rounding),
        )
        yield f"{distribution.name} {rounding.name} {number}", weights.digest()


def factors(terms: int, rank: int, shared: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of the matrices: one of each side for each term, or one for all on the side called ``shared``."""
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for salt, (shape, _) in enumerate(MATRICES):
        for side, length, name in zip(sides, shape, ("left", "right"), strict=True):
            count = 1 if shared == name else terms
            side.append(exact(count, rank, length, dtype=torch.float32, salt=salt + 3 * length))
    return sides


FACTORS = ((1, ""), (3, "left"), (2, "right"))


def pin_factored_axpy(dtype: torch.dtype) -> Digests:
    for rounding, case, (rank, shared) in product(Rounding, COMBINATIONS, FACTORS):
        weights = Weights(MATRICES, dtype)
        given = factors(case[0] * case[1], rank, shared if case[1] else "")
        ops.factored_axpy_(
            weights.theta,
            *given,
            *combinations(*case),
            weights.keys,
            weights.spans,
            **weights.options(rounding),
        )
        yield f"{rounding.name} {case} rank {rank} {shared}", weights.digest()


def pin_factored_copy(dtype: torch.dtype) -> Digests:
    roundings = (Rounding.NEAREST, Rounding.STOCHASTIC)
    for rounding, terms, (rank, shared) in product(roundings, (1, 3), FACTORS):
        weights = Weights(MATRICES, dtype)
        out = [torch.ones_like(theta) for theta in weights.theta]
        seeds, coefficients, _ = combinations(1, terms, 0.0)
        ops.factored_copy_(
            out,
            weights.theta,
            *factors(terms, rank, shared),
            seeds,
            coefficients,
            weights.keys,
            weights.spans,
            rounding=rounding,
        )
        yield f"{rounding.name} {terms} rank {rank} {shared}", digest(*weights.theta, *out)


def pin_factored_window(dtype: torch.dtype) -> Digests:
    for rounding, (number, case), (rank, shared) in product(Rounding, enumerate(WINDOWS), FACTORS):
        weights = Weights(MATRICES, dtype)
        arguments = windows(*case)
        window_(
            "factored",
            weights.theta,
            *factors(arguments[0].numel(), rank, shared),
            *arguments,
            weights.keys,
            weights.spans,
            **weights.options(rounding),
        )
        yield f"{rounding.name} {number} rank {rank} {shared}", weights.digest()


#: Rows, features, rank, iterations.
ACTIVATIONS = ((1, 1, 1, 0), (3, 5, 2, 3), (65, 37, 4, 2), (200, 77, 3, 3), (131, 515, 16, 3))


def pin_power_iteration(dtype: torch.dtype) -> Digests:
    for (rows, features, rank, iterations), masked in product(ACTIVATIONS, (False, True)):
        basis, values = ops.power_iteration(
            exact(rows, features, dtype=dtype, salt=rows),
            torch.arange(rows) % 5 != 3 if masked else None,
            torch.tensor([7]),
            rank=rank,
            iterations=iterations,
        )
        yield f"{rows}x{features} rank {rank} {iterations} {masked}", digest(basis, values)


#: Rows, features, outputs, rank, terms, and the sides that all terms share.
LINEARS = (
    (1, 1, 1, 1, 1, ()),
    (5, 37, 300, 2, 1, ()),
    (31, 16, 33, 3, 2, ("right",)),
    (26, 515, 67, 2, 4, ()),
    (3, 130, 257, 5, 3, ("left",)),
    (3, 130, 257, 5, 3, ("left", "right")),
)


def pin_factored_linear(dtype: torch.dtype) -> Digests:
    for rows, features, outputs, rank, terms, shared in LINEARS:
        sides = [
            exact(1 if name in shared else terms, rank, length, dtype=torch.float32, salt=length)
            for name, length in (("left", outputs), ("right", features))
        ]
        out, input = (exact(3, rows, length, dtype=dtype, salt=rows) for length in (outputs, features))
        ops.factored_linear_(out, input, *sides, numbers(COEFFICIENTS, 3, terms))
        yield f"{rows}x{features}x{outputs} rank {rank} {terms} {shared}", digest(out)


OPERATORS: dict[str, Callable[[torch.dtype], Digests]] = {
    "normal_": pin_normal,
    "noise_axpy_": pin_noise_axpy,
    "noise_copy_": pin_noise_copy,
    "noise_copies_": pin_noise_copies,
    "noise_window_": pin_noise_window,
    "factored_axpy_": pin_factored_axpy,
    "factored_copy_": pin_factored_copy,
    "factored_window_": pin_factored_window,
    "factored_linear_": pin_factored_linear,
    "power_iteration": pin_power_iteration,
}


def pin_operator(name: str, dtype: torch.dtype) -> Digests:
    """A digest for each rounding or kind of draw, of all its cases."""
    kinds: dict[str, list[str]] = {}
    for case, found in OPERATORS[name](dtype):
        kinds.setdefault(" ".join(word for word in case.split() if word.isupper()), []).append(found)
    for kind, all_found in kinds.items():
        yield f"{name}/{name_of(dtype)}/{kind.lower() or 'all'}", digest(*map(_number, all_found))


def _number(short: str) -> int:
    return int(short, 16)


# Recipes

Optimizer = zoext.ZerothOrderOptimizer

RECIPES: dict[str, Callable[..., Optimizer]] = {
    "mezo": zoext.MeZO,
    "mezo of 3": lambda params, **options: zoext.MeZO(params, samples=3, **options),
    "adamezo": lambda params, **options: zoext.AdaMeZO(params, horizon=3, **options),
    "adamezo printed": lambda params, **options: zoext.AdaMeZO(params, bias_correction=False, **options),
    "momentum": lambda params, **options: zoext.AdaMeZO(params, betas=(0.9, 0.0), horizon=2, **options),
    "agzo": lambda params, **options: zoext.AGZO(params, rank=2, **options),
    "agzo matched": lambda params, **options: zoext.AGZO(params, balance="matched", mask=None, **options),
    "agzo frozen": lambda params, **options: Optimizer(
        params,
        direction=zoext.ActivationSubspace(rank=2, balance="freeze"),
        estimator=zoext.ForwardDifference(),
        **options,
    ),
    "adam over agzo": lambda params, **options: Optimizer(
        params,
        direction=zoext.ActivationSubspace(),
        estimator=zoext.CentralDifference(samples=2),
        update=zoext.AdamReplay(horizon=2),
        **options,
    ),
    "gv": lambda params, **options: zoext.MeZOGV(params, pool_size=3, elite_ratio=0.4, **options),
    "gv centered": lambda params, **options: zoext.MeZOGV(params, weighting="centered", **options),
    "greedy": lambda params, **options: zoext.MeZOGreedy(params, pool_size=3, **options),
    "greedy printed": lambda params, **options: zoext.MeZOGreedy(params, reuse=False, **options),
    "lozo": lambda params, **options: zoext.LOZO(params, rank=2, refresh_interval=3, **options),
    "lozo of code": lambda params, **options: zoext.LOZO(params, rank=3, scale="code", **options),
    "adam over lozo": lambda params, **options: Optimizer(
        params,
        direction=zoext.LowRank(rank=2, refresh_interval=2),
        update=zoext.AdamReplay(horizon=3),
        **options,
    ),
    "fzoo": lambda params, **options: Optimizer(
        params,
        direction=zoext.Rademacher(),
        estimator=zoext.ForwardDifference(samples=3),
        update=zoext.SGD(normalized=True),
        **options,
    ),
    "adam of signs": lambda params, **options: Optimizer(
        params, direction=zoext.Rademacher(), update=zoext.AdamReplay(horizon=2), **options
    ),
}
PRECISIONS = ("nearest", "stochastic", "residual")
KINDS = [(dtype, "nearest") for dtype in WIDE]
KINDS += [(dtype, precision) for dtype in DTYPES[2:] for precision in PRECISIONS]
#: Where one of each kind is enough.
SOME_KINDS = [(torch.float32, "nearest"), (torch.bfloat16, "stochastic"), (torch.float16, "residual")]

Losses = Callable[[int, int], float | Tensor]


def losses(step: int, forward: int) -> float:
    return ((step * 37 + forward * 23 + 11) % 61) / 16


class Watched(nn.Linear):
    """Notes the weights that its forward sees and computes nothing with them."""

    seen: Any

    def forward(self, x: Tensor) -> Tensor:
        self.seen.extend(each.detach().clone() for each in (self.weight, self.bias) if each is not None)
        return x.new_zeros(())


class Other(nn.Module):
    """Parameters of one and three dimensions."""

    seen: Any

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.empty(13, dtype=dtype))
        self.kernel = nn.Parameter(torch.empty(3, 5, 2, dtype=dtype))

    def forward(self) -> None:
        self.seen.extend(each.detach().clone() for each in (self.scale, self.kernel))


class Model(nn.Module):
    """Its layers are fed from outside: what a layer returns depends on the processor."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.first = Watched(7, 11, dtype=dtype)
        self.second = Watched(10, 5, bias=False, dtype=dtype)
        self.other = Other(dtype)
        self.seen: list[Tensor] = []
        for module in (self.first, self.second, self.other):
            module.seen = self.seen
        with torch.no_grad():
            for salt, parameter in enumerate(self.parameters()):
                parameter.copy_(exact(*parameter.shape, dtype=dtype, salt=100 + salt))

    def forward(self, first: Tensor, second: Tensor, attention_mask: Tensor) -> None:
        self.first(first)
        self.second(second)
        self.other()


class Run:
    """A model and an optimizer, whose closures return losses that are given."""

    def __init__(
        self,
        recipe: str,
        dtype: torch.dtype,
        precision: str,
        *,
        grouped: bool = False,
        probe: str = "streamed",
        losses: Losses = losses,
        **options: Any,
    ) -> None:
        self.model = Model(dtype)
        self.losses = losses
        self.trail: list[Tensor | int | None] = []
        chosen: Any = zoext.StreamedProbe(self.model) if grouped and probe == "streamed" else probe
        settings = {"lr": 0.03, "mu": 2e-2, "weight_decay": 0.1, "seed": 2**64 - 5, **options}
        params = self.groups() if grouped else self.model
        self.optimizer = RECIPES[recipe](params, precision=precision, probe=chosen, **settings)

    def groups(self) -> list[dict[str, Any]]:
        first, second, other = (dict(part.named_parameters()) for part in self.model.children())
        return [
            {"params": list(first.values()), "lr": torch.tensor(0.05), "mu": 0.01},
            {"params": list(second.values()), "weight_decay": 0.0},
            {"params": list(other.values()), "lr": 0.07, "mu": 0.04, "weight_decay": 0.3},
        ]

    @property
    def number(self) -> int:
        return int(self.optimizer.param_groups[0]["step"])

    def closure(self, part: int = 0) -> Callable[[], float | Tensor]:
        dtype = self.model.first.weight.dtype
        salt = 10 * self.number + part
        first, second = (exact(3, 3, width, dtype=dtype, salt=salt) for width in (7, 10))
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0]])
        forwards = iter(range(100))

        def evaluate() -> float | Tensor:
            self.model(first, second, attention_mask=mask)
            return self.losses(self.number + 7 * part, next(forwards))

        return evaluate

    def step(self) -> Run:
        self.optimizer.step(self.closure())
        return self.note()

    def accumulated_step(self) -> Run:
        for part in range(2):
            self.optimizer.estimate(self.closure(part))
        self.optimizer.step()
        return self.note()

    def steps(self, count: int) -> Run:
        for _ in range(count):
            self.step()
        return self

    def note(self) -> Run:
        """Adds all that a step leaves to what is hashed."""
        estimate = self.optimizer.last_estimate
        assert estimate is not None
        self.trail += self.model.seen
        self.model.seen.clear()
        self.trail += [estimate.seeds, estimate.coefficients, estimate.loss, estimate.loss_std]
        self.trail += [estimate.forwards, estimate.finite, self.optimizer.nonfinite_steps]
        self.trail += self.state()
        return self

    def state(self) -> list[Tensor | None]:
        parameters = list(self.model.parameters())
        return [*parameters, *(self.optimizer.state.get(each, {}).get("residual") for each in parameters)]

    def digest(self) -> str:
        return digest(*self.trail)


def key_of(what: str, recipe: str, dtype: torch.dtype, precision: str) -> str:
    return f"{what}/{recipe}/{name_of(dtype)}/{precision}"


def pin_steps(recipe: str) -> Digests:
    for kind in KINDS:
        yield key_of("steps", recipe, *kind), Run(recipe, *kind).steps(4).digest()


def pin_inplace(recipe: str) -> Digests:
    """``step(closure)`` may become one pass over the weights that restores and updates."""
    for kind in KINDS:
        yield key_of("inplace", recipe, *kind), Run(recipe, *kind, probe="inplace").steps(3).digest()
    if "agzo" not in recipe:  # which needs the module
        for kind in SOME_KINDS:
            run = Run(recipe, *kind, probe="inplace", grouped=True)
            yield key_of("inplace in groups", recipe, *kind), run.steps(3).digest()


def pin_groups(recipe: str) -> Digests:
    """Groups of their own lr, mu and decay, and a tensor as lr that a schedule halves."""
    for kind in SOME_KINDS:
        run = Run(recipe, *kind, grouped=True)
        for _ in range(4):
            run.step().optimizer.param_groups[0]["lr"].mul_(0.5)
            run.optimizer.param_groups[1]["lr"] *= 0.75
        yield key_of("groups", recipe, *kind), run.digest()


def pin_accumulation(recipe: str) -> Digests:
    for kind, probe in product(SOME_KINDS, ("streamed", "inplace")):
        run = Run(recipe, *kind, probe=probe)
        for _ in range(3):
            run.accumulated_step()
        yield key_of(f"accumulated {probe}", recipe, *kind), run.digest()


def pin_restoration(recipe: str) -> Digests:
    """``estimate`` alone: what a probe in place restores to rounding."""
    for kind in SOME_KINDS:
        run = Run(recipe, *kind, probe="inplace")
        estimate = run.optimizer.estimate(run.closure())
        found = digest(*run.model.seen, estimate.coefficients, *run.state())
        yield key_of("restored in place", recipe, *kind), found


def pin_freezing(recipe: str) -> Digests:
    """A layer that is frozen for some steps."""
    for kind in SOME_KINDS:
        run = Run(recipe, *kind)
        for frozen in (False, True, False, False):
            run.model.second.requires_grad_(not frozen)
            run.step()
        yield key_of("frozen and thawed", recipe, *kind), run.digest()


def pin_nonfinite(recipe: str) -> Digests:
    """Losses of which one or all are not finite, skipped."""

    def some_bad(step: int, forward: int) -> float:
        bad = step in (2, 4) or (step == 1 and forward == 1)
        return float("nan" if step != 4 else "inf") if bad else losses(step, forward)

    for kind in SOME_KINDS:
        run = Run(recipe, *kind, losses=some_bad, nonfinite="skip").steps(5)
        yield key_of("nonfinite", recipe, *kind), run.digest()


def pin_float_losses(recipe: str) -> Digests:
    """Losses that are tensors of the dtype of the weights."""
    for dtype, precision in SOME_KINDS:
        run = Run(recipe, dtype, precision)
        run.losses = lambda step, forward, dtype=dtype: torch.tensor([losses(step, forward)], dtype=dtype)
        yield key_of("tensor losses", recipe, dtype, precision), run.steps(2).digest()


def pin_resumption(recipe: str) -> Digests:
    """From the ``state_dict`` of another process; the digest is that of the run that never stopped."""
    for kind in SOME_KINDS:
        run = Run(recipe, *kind).steps(2)
        again = Run(recipe, *kind)
        again.model.load_state_dict(run.model.state_dict())
        again.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
        whole, resumed = digest(*run.steps(2).state()), digest(*again.steps(2).state())
        assert resumed == whole
        yield key_of("resumed", recipe, *kind), resumed


def pin_replay(recipe: str) -> Digests:
    """Of a recorded run: what many steps at once leave, and the steps that follow them."""
    for kind in SOME_KINDS:
        run = Run(recipe, *kind)
        base = copy.deepcopy(run.model)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.jsonl"
            with zoext.Trajectory(path, run.optimizer, frames=True):
                run.steps(5)
            optimizer = zoext.replay(base, path)
        again = Run(recipe, *kind)
        again.model, again.optimizer = base, optimizer
        for module in (base.first, base.second, base.other):
            module.seen = base.seen
        assert digest(*again.state()) == digest(*run.state())
        whole, resumed = digest(*run.steps(2).state()), digest(*again.steps(2).state())
        assert resumed == whole
        yield key_of("replayed", recipe, *kind), resumed


WAYS: dict[str, Callable[[str], Digests]] = {
    "steps": pin_steps,
    "inplace": pin_inplace,
    "groups": pin_groups,
    "accumulated": pin_accumulation,
    "restored": pin_restoration,
    "frozen": pin_freezing,
    "nonfinite": pin_nonfinite,
    "tensor": pin_float_losses,
    "resumed": pin_resumption,
    "replayed": pin_replay,
}


# Tests


def pinned() -> dict[str, str]:
    known: dict[str, str] = json.loads(PINNED.read_text(encoding="utf-8"))
    return known


def assert_pinned(found: Digests) -> None:
    known = pinned()
    moved = [key for key, value in found if known.get(key) != value]
    assert not moved, "these bits moved:\n" + "\n".join(moved)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("operator", OPERATORS)
def test_operators(operator: str, dtype: torch.dtype, instruction_set: str) -> None:
    assert_pinned(pin_operator(operator, dtype))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe: str, way: str) -> None:
    assert_pinned(WAYS[way](recipe))


def everything() -> Digests:
    for operator, dtype in product(OPERATORS, DTYPES):
        yield from pin_operator(operator, dtype)
    for recipe, way in product(RECIPES, WAYS):
        yield from WAYS[way](recipe)


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit(__doc__)
    table = dict(everything())
    PINNED.write_text(json.dumps(table, indent=0) + "\n", encoding="utf-8")
    print(f"{PINNED}: {len(table)} digests")
