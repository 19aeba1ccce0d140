"""The checks that operators make before they change anything, with the same messages as the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoext._reference import rounding as storage
from zoext.ops import Distribution, Rounding, Rule, Span

_STORED = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_NAMES = {torch.int64: "int64", torch.float32: "float32"}


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise RuntimeError(message)


def tensors(name: str, given: Sequence[Tensor]) -> None:
    for t, tensor in enumerate(given):
        _check(tensor.is_contiguous(), f"{name}[{t}] is not contiguous; pass tensor.contiguous()")
        _check(tensor.dtype in _STORED, f"{name}[{t}] must be float32, float64, bfloat16 or float16")
        _check(
            tensor.device == given[0].device,
            f"{name}[{t}] is on another device than {name}[0]; call the operator once per device",
        )


def places(given: Sequence[Tensor], keys: Sequence[int], spans: Sequence[int]) -> list[Span]:
    """Checks keys and spans, and returns the span of each tensor."""
    _check(
        len(keys) == len(given) and len(spans) == 3 * len(given),
        "keys must have one and spans three numbers per tensor; there are "
        f"{len(given)} tensors, {len(keys)} keys and {len(spans)} span numbers",
    )
    checked = []
    for t, tensor in enumerate(given):
        _check(0 <= keys[t] < 2**32, f"keys[{t}] must be in 0 .. 2^32 - 1, not {keys[t]}")
        base, run, stride = span = spans[3 * t], spans[3 * t + 1], spans[3 * t + 2]
        _check(
            base >= 0 and run >= 1 and stride >= 0,
            f"spans[{t}] must have base >= 0, run >= 1 and stride >= 0, not {span}",
        )
        count = tensor.numel()
        last = base + (count - 1) // run * stride + min(run, count) - 1
        _check(
            count == 0 or last < 2**63,
            f"spans[{t}] must end below 2^63, but starts at {base} with stride {stride} over {count} "
            "elements",
        )
        checked.append(span)
    return checked


def distribution(number: int) -> Distribution:
    _check(number in (0, 1), f"distribution must be 0 (normal) or 1 (sign), not {number}")
    return Distribution(number)


def rule(number: int) -> Rule:
    known = ", ".join(f"{member.value} ({member.name.lower()})" for member in Rule)
    _check(number in list(Rule), f"rule must be one of {known}, not {number}")
    return Rule(number)


def in_words(name: str, number: int) -> None:
    _check(0 <= number < 2**32, f"{name} must be in 0 .. 2^32 - 1, not {number}")


def rounding_of_copy(number: int) -> Rounding:
    _check(number in (0, 1), f"rounding must be 0 (nearest) or 1 (stochastic), not {number}")
    return Rounding(number)


def rounding(number: int, theta: Sequence[Tensor], residuals: Sequence[Tensor]) -> Rounding:
    _check(
        number in (0, 1, 2),
        f"rounding must be 0 (nearest), 1 (stochastic) or 2 (with residuals), not {number}",
    )
    _check(
        len(residuals) == (len(theta) if number == Rounding.RESIDUAL else 0),
        "residuals must have one tensor per tensor of theta with rounding 2, else none; there are "
        f"{len(residuals)} with rounding {number}",
    )
    for t, residual in enumerate(residuals):
        count = theta[t].numel() if storage.is_rounded(theta[t].dtype) else 0
        _check(
            residual.dtype == torch.int8
            and residual.is_contiguous()
            and residual.numel() == count
            and residual.device == theta[t].device,
            f"residuals[{t}] must be a contiguous int8 tensor on the device of theta[{t}] with {count} "
            "elements",
        )
    return Rounding(number)


def number(name: str, scalar: Tensor, dtype: torch.dtype, like: Tensor) -> None:
    """Checks a tensor of one element."""
    _check(scalar.numel() == 1 and scalar.dtype == dtype, f"{name} must hold one {_NAMES[dtype]} number")
    _on_device(name, scalar, like)


def terms(seeds: Tensor, coefficients: Tensor, like: Tensor, dimensions: int) -> None:
    """Checks the terms of a step, [K], or of several, [S, K]."""
    of = "one dimension" if dimensions == 1 else "two dimensions: steps and terms of a step"
    _check(
        seeds.dim() == dimensions and seeds.dtype == torch.int64 and seeds.is_contiguous(),
        f"seeds must be a contiguous int64 tensor of {of}",
    )
    _check(
        coefficients.dtype == torch.float32
        and coefficients.shape == seeds.shape
        and coefficients.is_contiguous(),
        "coefficients must be a contiguous float32 tensor with one element per seed",
    )
    _on_device("seeds and coefficients", seeds, like)
    _on_device("seeds and coefficients", coefficients, like)


def steps(seeds: Tensor, coefficients: Tensor, decay: Tensor, like: Tensor) -> None:
    is_one = seeds.dim() != 2
    terms(seeds, coefficients, like, 1 if is_one else 2)
    _per_step("decay", decay, 1 if is_one else len(seeds), like)


def windows(
    seeds: Tensor,
    coefficients: Tensor,
    first_weights: Tensor,
    second_weights: Tensor,
    lr: Tensor,
    eps: Tensor,
    decay: Tensor,
    like: Tensor,
) -> None:
    terms(seeds, coefficients, like, dimensions=2)
    is_one = first_weights.dim() != 2
    count = 1 if is_one else len(first_weights)
    horizon = len(seeds) - count + 1
    shape = (horizon,) if is_one else (count, horizon)
    for weights in (first_weights, second_weights):
        _check(
            weights.dtype == torch.float32 and weights.shape == shape and weights.is_contiguous(),
            "first_weights and second_weights must be contiguous float32 tensors with one element per step "
            f"of a window, {'' if is_one else 'a row for each window, '}which has {horizon} of "
            f"{len(seeds)} steps",
        )
        _on_device("seeds, coefficients and weights", weights, like)
    _per_step("lr", lr, count, like)
    _per_step("decay", decay, count, like)
    number("eps", eps, torch.float32, like)


def factors(theta: Sequence[Tensor], left: Sequence[Tensor], right: Sequence[Tensor], count: int) -> None:
    _check(
        len(left) == len(theta) and len(right) == len(theta),
        f"left and right must have one tensor per matrix; there are {len(theta)} matrices, {len(left)} "
        f"left and {len(right)} right factors",
    )
    for t, (matrix, *sides) in enumerate(zip(theta, left, right, strict=True)):
        for name, factor in zip(("left", "right"), sides, strict=True):
            _check(
                factor.dim() == 3 and factor.dtype == torch.float32 and factor.is_contiguous(),
                f"{name}[{t}] must be a contiguous float32 tensor of three dimensions: terms, rank, length",
            )
            _check(
                len(factor) in (count, 1),
                f"{name}[{t}] must have a factor for each of {count} terms, or one for all, not "
                f"{len(factor)}",
            )
            _on_device(f"{name}[{t}]", factor, theta[0])
        (_, rank, rows), (_, other_rank, columns) = (side.shape for side in sides)
        _check(
            rank == other_rank, f"left[{t}] and right[{t}] must have one rank, not {rank} and {other_rank}"
        )
        _check(
            rows * columns == matrix.numel(),
            f"theta[{t}] has {matrix.numel()} elements, but its factors are those of a matrix of "
            f"{rows} x {columns}",
        )


def copies(out: Sequence[Tensor], theta: Sequence[Tensor]) -> None:
    _check(
        len(out) == len(theta),
        f"out and theta must be lists of one length, not {len(out)} and {len(theta)}",
    )
    for t, (to, source) in enumerate(zip(out, theta, strict=True)):
        _check(
            to.numel() == source.numel() and to.dtype == source.dtype and to.device == source.device,
            f"out[{t}] must have the size, the dtype and the device of theta[{t}]",
        )
        apart = abs(to.data_ptr() - source.data_ptr())
        _check(
            apart == 0 or apart >= to.numel() * to.element_size(),
            f"out[{t}] must be theta[{t}] itself or lie apart from it, but they share a part of their memory",
        )


def terms_of_copies(seeds: Tensor, coefficients: Tensor, like: Tensor) -> None:
    """Checks the directions of several copies, [K], and their coefficients, [C, K]."""
    _check(
        seeds.dim() == 1 and seeds.dtype == torch.int64 and seeds.is_contiguous(),
        f"seeds must be a contiguous int64 tensor of one dimension, not of {seeds.dim()}",
    )
    _on_device("seeds", seeds, like)
    coefficients_of_copies(coefficients, len(seeds), like)


def coefficients_of_copies(coefficients: Tensor, count: int, like: Tensor) -> None:
    _check(
        coefficients.dim() == 2 and coefficients.dtype == torch.float32 and coefficients.is_contiguous(),
        "coefficients must be a contiguous float32 tensor of two dimensions: copies and terms of a copy",
    )
    _check(
        coefficients.shape[1] == count,
        f"coefficients must have a column for each of {count} terms, not {coefficients.shape[1]}",
    )
    _check(coefficients.device == like.device, "coefficients must be on the device of the other tensors")


def stacks(out: Sequence[Tensor], theta: Sequence[Tensor], count: int) -> None:
    """Checks that a tensor of ``out`` has ``count`` copies of one of ``theta``."""
    _check(
        len(out) == len(theta),
        f"out and theta must be lists of one length, not {len(out)} and {len(theta)}",
    )
    for t, (to, source) in enumerate(zip(out, theta, strict=True)):
        _check(
            to.shape == (count, *source.shape),
            f"out[{t}] must have a copy of theta[{t}] for each row of coefficients, {count} of shape "
            f"{list(source.shape)}, not the shape {list(to.shape)}",
        )
        _check(
            to.dtype == source.dtype and to.device == source.device,
            f"out[{t}] must have the dtype and the device of theta[{t}]",
        )
        _check(not _overlap(to, source), f"out[{t}] and theta[{t}] share memory; pass tensors that lie apart")


def _overlap(a: Tensor, b: Tensor) -> bool:
    first, second = a.data_ptr(), b.data_ptr()
    return first < second + b.numel() * b.element_size() and second < first + a.numel() * a.element_size()


def _per_step(name: str, numbers: Tensor, steps: int, like: Tensor) -> None:
    _check(
        numbers.numel() == steps and numbers.dtype == torch.float32 and numbers.is_contiguous(),
        f"{name} must be a contiguous float32 tensor of one number for each step, {steps}, not of "
        f"{numbers.numel()}",
    )
    _on_device(name, numbers, like)


def _on_device(name: str, tensor: Tensor, like: Tensor) -> None:
    _check(tensor.device == like.device, f"{name} must be on the device of the parameters")


def power_iteration(input: Tensor, mask: Tensor | None, seed: Tensor, rank: int, iterations: int) -> int:
    """Checks the arguments, and returns the number of features."""
    _check(input.is_contiguous(), "input is not contiguous; pass input.contiguous()")
    _check(input.dtype in _STORED, "input must be float32, float64, bfloat16 or float16")
    _check(
        input.dim() >= 1 and input.shape[-1] >= 1,
        "input must have a last dimension of at least one feature",
    )
    features = input.shape[-1]
    _check(
        1 <= rank <= features,
        f"rank must be in 1 .. {features}, the number of features of input, not {rank}",
    )
    _check(iterations >= 0, f"iterations must be at least 0, not {iterations}")
    number("seed", seed, torch.int64, input)
    if mask is not None:
        _check(
            mask.dtype == torch.bool and mask.is_contiguous(),
            "mask must be a contiguous bool tensor; pass (mask != 0).contiguous()",
        )
        _check(
            mask.shape == input.shape[:-1],
            "mask must have the shape of input without its last dimension: "
            f"{input.numel() // features} elements, not {mask.numel()}",
        )
        _check(mask.device == input.device, "mask must be on the device of input")
    return features


def factored_linear(out: Tensor, input: Tensor, left: Tensor, right: Tensor, coefficients: Tensor) -> None:
    for name, last, tensor in (("out", "outputs", out), ("input", "features", input)):
        _check(
            tensor.dim() == 3,
            f"{name} must have three dimensions: copies, rows and {last}, not the shape "
            f"{list(tensor.shape)}; pass tensor.reshape(copies, -1, tensor.shape[-1])",
        )
        _check(tensor.is_contiguous(), f"{name} is not contiguous; pass tensor.contiguous()")
        _check(tensor.dtype in _STORED, f"{name} must be float32, float64, bfloat16 or float16")
    _check(
        input.dtype == out.dtype and input.device == out.device,
        "input must have the dtype and the device of out",
    )
    _check(
        input.shape[:2] == out.shape[:2],
        f"input and out must have the same copies and rows, not the shapes {list(input.shape)} and "
        f"{list(out.shape)}",
    )
    count = coefficients.shape[1] if coefficients.dim() == 2 else 0
    coefficients_of_copies(coefficients, count, out)
    _check(
        len(coefficients) == len(out),
        f"coefficients must have a row for each of {len(out)} copies of out, not {len(coefficients)}",
    )
    _side("left", left, count, out.shape[2], out)
    _side("right", right, count, input.shape[2], out)
    _check(
        left.shape[1] == right.shape[1],
        f"left and right must have one rank, not {left.shape[1]} and {right.shape[1]}",
    )
    read = {"input": input, "left": left, "right": right, "coefficients": coefficients}
    for name, tensor in read.items():
        _check(not _overlap(out, tensor), f"out and {name} share memory; pass an out that lies apart")


def _side(name: str, factor: Tensor, count: int, length: int, out: Tensor) -> None:
    shape = list(factor.shape)
    _check(
        factor.dim() == 3 and factor.dtype == torch.float32 and factor.is_contiguous(),
        f"{name} must be a contiguous float32 tensor of three dimensions: terms, rank, length; its shape is "
        f"{shape}",
    )
    _check(
        len(factor) in (count, 1),
        f"{name} must have a factor for each of {count} columns of coefficients, or one for all, not "
        f"{len(factor)}",
    )
    _check(factor.shape[1] >= 1, f"{name} must have a rank of at least 1, not the shape {shape}")
    of = "outputs" if name == "left" else "features"
    _check(
        factor.shape[2] == length,
        f"{name} must have as many numbers as the layer has {of}, {length}, not {factor.shape[2]}",
    )
    _check(factor.device == out.device, f"{name} must be on the device of out")
