"""Every operator on a GPU against the same on the CPU, bit for bit."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from zoext import noise, ops
from zoext.ops import Distribution, Rounding, Span

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")
PATTERNS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

SEEDS = torch.tensor([[3, -(2**63) + 9], [2**62 + 5, -1], [12345, 2**33 + 1]])
COEFFICIENTS = torch.tensor([[1.5e-3, -2.25], [0.0, 0.75], [-1.25, 5e-4]])
FIRST_WEIGHTS, SECOND_WEIGHTS = torch.tensor([[0.1, 0.15, 0.2], [0.07, 0.08, 0.3]])
LR, EPS, DECAY = torch.tensor([0.03, 1e-4, 0.01])
#: Of several steps: a learning rate and a decay for each, and the weights of a window of two rows each.
LRS, DECAYS = torch.tensor([[0.03, -0.02], [0.01, 0.0]])
FIRST_WEIGHTS_OF_STEPS, SECOND_WEIGHTS_OF_STEPS = torch.tensor(
    [[[0.1, 0.2], [0.15, 0.3]], [[0.07, 0.3], [0.1, 0.2]]]
)
#: Of copies: a row for each.
COPIES = torch.stack([COEFFICIENTS.flatten() * scale for scale in (1.0, -1.0, 0.0, 3.0, 0.5)])
COPIES[3, 1:] = 0.0
RANK = 3

#: Columns of which rows begin at addresses for wide accesses, as all rows of a real layer do, and others.
WIDE_COLUMNS, ODD_COLUMNS = 1024, 1001
#: An index of more than 32 bits where a wide access can begin, and no whole block of 128 signs.
HIGH = 2**34 + 56
#: Enough for a chunk that is all there, wherever its tensor begins: thread blocks take 8,192 elements each.
WHOLE_CHUNKS = 2 * 8192


@dataclass(frozen=True)
class Check:
    """``results(device)`` is what an operator makes there, of the same arguments each time."""

    name: str
    results: Callable[[torch.device], list[Tensor]]

    def difference(self, device: torch.device) -> str | None:
        """Where the device and the CPU differ first, and by what; None where they do not."""
        pairs = zip(self.results(device), self.results(CPU), strict=True)
        found = (first_difference(actual.cpu(), expected) for actual, expected in pairs)
        return next((f"tensor {t}, {text}" for t, text in enumerate(found) if text), None)


def first_difference(actual: Tensor, expected: Tensor) -> str | None:
    """A NaN equals any NaN: which of its patterns it has, IEEE 754 leaves to the processor."""
    pattern = PATTERNS[expected.element_size()]
    actual, expected = actual.flatten(), expected.flatten()
    differ = (actual.view(pattern) != expected.view(pattern)) & ~(actual.isnan() & expected.isnan())
    if not differ.any():
        return None
    first = int(differ.nonzero()[0])
    values = f"{actual[first].item()!r}, not {expected[first].item()!r} as on the CPU"
    return f"element {first}: {values} ({int(differ.sum())} of {differ.numel()} differ)"


def checks(elements: int) -> Iterator[Check]:
    """Of every operator, in every dtype, distribution and rounding.

    Each is on lists of a few tensors, of which the largest have about ``elements``. Chunks that are all there
    take another loop than the edges of tensors: whatever ``elements`` is, there are both, also beyond 2^32.
    """
    for dtype in DTYPES:
        label = str(dtype).removeprefix("torch.")
        for distribution, rounding in itertools.product(Distribution, Rounding):
            dense = Dense(elements, dtype, distribution, rounding)
            options = f"{label}, {distribution.name.lower()}, {rounding.name.lower()}"
            if rounding == Rounding.NEAREST:  # it has no other
                yield Check(f"normal_, {label}, {distribution.name.lower()}", dense.normal)
            if rounding != Rounding.RESIDUAL:
                yield Check(f"noise_copy_, {options}", dense.copy)
                yield Check(f"noise_copies_, {options}", dense.copies)
            for steps in ("", ", several steps"):
                yield Check(f"noise_axpy_, {options}{steps}", partial(dense.axpy, several=bool(steps)))
                yield Check(f"noise_window_, {options}{steps}", partial(dense.adam, several=bool(steps)))
        for rounding in Rounding:
            factored = Factored(elements, dtype, rounding)
            options = f"{label}, {rounding.name.lower()}"
            if rounding != Rounding.RESIDUAL:
                yield Check(f"factored_copy_, {options}", factored.copy)
            for steps in ("", ", several steps"):
                yield Check(f"factored_axpy_, {options}{steps}", partial(factored.axpy, several=bool(steps)))
                yield Check(
                    f"factored_window_, {options}{steps}", partial(factored.adam, several=bool(steps))
                )
        activations = Activations(elements, dtype)
        yield Check(f"power_iteration, {label}", activations.bases)
        yield Check(f"power_iteration, {label}, masked", activations.masked_bases)
        for shared in (True, False):
            how = "shared input basis" if shared else "own factors"
            yield Check(f"factored_linear_, {label}, {how}", partial(activations.displaced, shared=shared))


class Dense:
    """A list of parameters: a large one, an empty one, a single element, and parts of larger ones.

    ``moved`` aligns those at even places.
    """

    def __init__(
        self, elements: int, dtype: torch.dtype, distribution: Distribution, rounding: Rounding
    ) -> None:
        self._spans: list[Span] = [
            (0, elements, 0),
            (0, 1, 0),
            (5, 1, 0),
            (2**34 + 3, 8193, 0),
            (HIGH, 40000, 0),
            (2**35 + 7, 100, 333),
        ]
        self._weights = [weights(count, dtype) for count in (elements, 0, 1, 8193, 40000, 3000)]
        self._keys = range(len(self._weights))
        self._how = {"distribution": distribution, "rounding": rounding}

    def normal(self, device: torch.device) -> list[Tensor]:
        out = moved(self._weights, device)
        seed, distribution = SEEDS[0, :1].to(device), self._how["distribution"]
        ops.normal_(out, seed, self._keys, self._spans, distribution=Distribution(distribution))
        return out

    def axpy(self, device: torch.device, *, several: bool) -> list[Tensor]:
        theta, residuals = moved(self._weights, device), self._residuals(device)
        change = steps(device) if several else [*combination(device), DECAY.to(device)]
        ops.noise_axpy_(theta, *change, self._keys, self._spans, residuals=residuals, **self._how)
        return [*theta, *residuals]

    def copy(self, device: torch.device) -> list[Tensor]:
        theta, out = moved(self._weights, device), moved(self._weights, device)
        ops.noise_copy_(out, theta, *combination(device), self._keys, self._spans, **self._how)
        return [*out, *theta]

    def copies(self, device: torch.device) -> list[Tensor]:
        """More than a kernel makes at once, with terms that none, one or all of them have."""
        theta = moved(self._weights, device)
        out = moved([weight.repeat(len(COPIES)) for weight in self._weights], device)
        stacks = [to.view(len(COPIES), len(weight)) for to, weight in zip(out, self._weights, strict=True)]
        terms = SEEDS.flatten().to(device), COPIES.to(device)
        ops.noise_copies_(stacks, theta, *terms, self._keys, self._spans, **self._how)
        return [*stacks, *theta]

    def adam(self, device: torch.device, *, several: bool) -> list[Tensor]:
        theta, residuals = moved(self._weights, device), self._residuals(device)
        change = windows(device) if several else window(device)
        ops.noise_window_(theta, *change, self._keys, self._spans, residuals=residuals, **self._how)
        return [*theta, *residuals]

    def _residuals(self, device: torch.device) -> list[Tensor]:
        return moved(residuals(self._weights, self._how["rounding"]), device)


class Factored:
    """A list of matrices and factors of each term: large, empty and small ones, and a part of a larger one.

    ``moved`` aligns those at even places.
    """

    def __init__(self, elements: int, dtype: torch.dtype, rounding: Rounding) -> None:
        wide = max(WHOLE_CHUNKS, elements) // WIDE_COLUMNS, WIDE_COLUMNS
        odd = max(1, elements // ODD_COLUMNS), ODD_COLUMNS
        shapes = [wide, (0, 4), wide, (37, 443), odd, (1, 1)]
        self._weights = [weights(rows * columns, dtype) for rows, columns in shapes]
        self._left, self._right = (
            [
                noise.normal((SEEDS.numel(), RANK, shape[side]), seed=7 + side, key=t)
                for t, shape in enumerate(shapes)
            ]
            for side in (0, 1)
        )
        bases = [0, 0, HIGH, 0, 0, 0]
        spans = [(base, max(1, len(matrix)), 0) for base, matrix in zip(bases, self._weights, strict=True)]
        self._places = range(len(shapes)), spans
        self._rounding = rounding

    def axpy(self, device: torch.device, *, several: bool) -> list[Tensor]:
        change = steps(device) if several else [*combination(device), DECAY.to(device)]
        return self._moved_by(ops.factored_axpy_, change, device)

    def copy(self, device: torch.device) -> list[Tensor]:
        theta, out = moved(self._weights, device), moved(self._weights, device)
        factors = self._factors(device)
        ops.factored_copy_(out, theta, *factors, *combination(device), *self._places, rounding=self._rounding)
        return [*out, *theta]

    def adam(self, device: torch.device, *, several: bool) -> list[Tensor]:
        change = windows(device) if several else window(device)
        return self._moved_by(ops.factored_window_, change, device)

    def _moved_by(
        self, operator: Callable[..., None], change: Sequence[Tensor], device: torch.device
    ) -> list[Tensor]:
        theta, lower = moved(self._weights, device), moved(residuals(self._weights, self._rounding), device)
        given = *self._factors(device), *change, *self._places
        operator(theta, *given, rounding=self._rounding, residuals=lower)
        return [*theta, *lower]

    def _factors(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        return [left.to(device) for left in self._left], [right.to(device) for right in self._right]


class Activations:
    """What a layer is fed, with three directions that stand out, and a mask of the tokens that count."""

    def __init__(self, elements: int, dtype: torch.dtype) -> None:
        tokens, features = max(RANK, min(4099, elements // 301)), 301
        self._rows = noise.normal((tokens, features), seed=11)
        self._rows[:, 5:8] *= torch.tensor([30.0, 20.0, 10.0])
        self._rows = self._rows.to(dtype)
        self._mask = torch.arange(tokens) % 5 != 3
        terms, outputs = COPIES.shape[1], 277
        self._outputs = noise.normal((len(COPIES), tokens, outputs), seed=13, dtype=dtype)
        self._left = noise.normal((terms, RANK, outputs), seed=17)
        self._right = noise.normal((terms, RANK, features), seed=19)

    def bases(self, device: torch.device) -> list[Tensor]:
        return self._bases(device, None)

    def masked_bases(self, device: torch.device) -> list[Tensor]:
        return self._bases(device, self._mask.to(device))

    def displaced(self, device: torch.device, *, shared: bool) -> list[Tensor]:
        """Outputs of copies of the rows, of which one is left as it is."""
        out = self._outputs.clone().to(device)
        input = self._rows.repeat(len(COPIES), 1, 1).to(device)
        right = self._right[:1] if shared else self._right
        ops.factored_linear_(out, input, self._left.to(device), right.to(device), COPIES.to(device))
        return [out]

    def _bases(self, device: torch.device, mask: Tensor | None) -> list[Tensor]:
        seed = SEEDS[0, :1].to(device)
        return list(ops.power_iteration(self._rows.to(device), mask, seed, rank=RANK, iterations=3))


def weights(count: int, dtype: torch.dtype) -> Tensor:
    """Of every magnitude that weights have, and zeros, subnormals, infinities and a NaN."""
    theta = noise.normal(count, seed=5, dtype=dtype)
    theta *= torch.tensor([1.0, 1e-2, 1e-4]).to(dtype)[torch.arange(count) % 3]
    limits = torch.finfo(dtype)
    special = [0.0, -0.0, limits.max, -limits.max, limits.smallest_normal / 2, float("inf"), float("nan")]
    if count >= 100:
        theta[20 : 20 + len(special)] = torch.tensor(special, dtype=dtype)
    return theta


def residuals(weights: Sequence[Tensor], rounding: Rounding) -> list[Tensor]:
    """The lower parts of weights, if they have some; zero beside what is zero or not finite."""
    if rounding != Rounding.RESIDUAL:
        return []
    lower = []
    for weight in weights:
        count = weight.numel() if weight.element_size() == 2 else 0
        upper = weight[:count]
        pattern = (torch.arange(count) * 37 % 256 - 128).to(torch.int8)
        lower.append(torch.where(upper.isfinite() & (upper != 0), pattern, 0))
    return lower


def moved(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """Copies on a device; every other one begins at an address that no wide access can have."""
    copies = []
    for t, tensor in enumerate(tensors):
        buffer = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=device)
        copies.append(buffer[t % 2 : t % 2 + tensor.numel()].copy_(tensor))
    return copies


def combination(device: torch.device) -> tuple[Tensor, Tensor]:
    return SEEDS.flatten().to(device), COEFFICIENTS.flatten().to(device)


def steps(device: torch.device) -> list[Tensor]:
    """Two steps of three terms each."""
    change = SEEDS.view(2, 3), COEFFICIENTS.view(2, 3), DECAYS
    return [argument.to(device) for argument in change]


def windows(device: torch.device) -> list[Tensor]:
    """Two steps, whose windows of two share the middle one of three rows."""
    weights = FIRST_WEIGHTS_OF_STEPS, SECOND_WEIGHTS_OF_STEPS
    return [argument.to(device) for argument in (SEEDS, COEFFICIENTS, *weights, LRS, EPS, DECAYS)]


def window(device: torch.device) -> list[Tensor]:
    """A window of three steps of two terms, and how far it moves theta."""
    arguments = (SEEDS, COEFFICIENTS, FIRST_WEIGHTS, SECOND_WEIGHTS, LR, EPS, DECAY)
    return [argument.to(device) for argument in arguments]
