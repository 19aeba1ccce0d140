"""The operators on dense directions, drawn from the noise field."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from zoext._reference import checks, steps, windows
from zoext._reference.field import NoiseTerm, round_keys
from zoext._reference.places import chunks
from zoext._reference.steps import Target, own_residuals
from zoext._reference.windows import Window
from zoext.ops import Distribution, Span


def normal_(
    out: Sequence[Tensor],
    seed: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    stream: int,
    distribution: int,
) -> None:
    checks.tensors("out", out)
    places_of = checks.places(out, keys, spans)
    kind = checks.distribution(distribution)
    checks.in_words("stream", stream)
    if not out:
        return
    checks.number("seed", seed, torch.int64, out[0])
    with torch.inference_mode():
        own_keys = round_keys(seed.reshape(1))[0]
        for tensor, key, span in zip(out, keys, places_of, strict=True):
            term = NoiseTerm(own_keys, key, kind, stream)
            flat = tensor.detach().view(-1)
            for places in chunks(tensor.numel(), span, tensor.device):
                flat.narrow(0, places.start, places.count).copy_(term.at(places, torch.float32))


def noise_axpy_(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    distribution: int,
    rounding: int,
) -> None:
    checks.tensors("theta", theta)
    places_of = checks.places(theta, keys, spans)
    kind, how = checks.distribution(distribution), checks.rounding(rounding, theta, residuals)
    if not theta:
        return
    checks.steps(seeds, coefficients, decay, theta[0])
    with torch.inference_mode():
        targets = _targets(theta, residuals, seeds, keys, places_of, kind)
        steps.axpy_(targets, seeds, coefficients, decay, how)


def noise_copy_(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    distribution: int,
    rounding: int,
) -> None:
    checks.tensors("out", out)
    checks.tensors("theta", theta)
    checks.copies(out, theta)
    places_of = checks.places(theta, keys, spans)
    kind, how = checks.distribution(distribution), checks.rounding_of_copy(rounding)
    if not theta:
        return
    checks.terms(seeds, coefficients, theta[0], dimensions=1)
    with torch.inference_mode():
        targets = _targets(theta, (), seeds, keys, places_of, kind)
        steps.copy_(out, targets, seeds, coefficients, how)


def noise_copies_(
    out: Sequence[Tensor],
    theta: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    distribution: int,
    rounding: int,
) -> None:
    if theta:
        checks.terms_of_copies(seeds, coefficients, theta[0])
    checks.tensors("out", out)
    checks.tensors("theta", theta)
    checks.stacks(out, theta, len(coefficients) if theta else 0)
    places_of = checks.places(theta, keys, spans)
    kind, how = checks.distribution(distribution), checks.rounding_of_copy(rounding)
    if not theta:
        return
    with torch.inference_mode():
        targets = _targets(theta, (), seeds, keys, places_of, kind)
        steps.copies_([to.detach() for to in out], targets, seeds, coefficients, how)


def noise_window_(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
    seeds: Tensor,
    coefficients: Tensor,
    first_weights: Tensor,
    second_weights: Tensor,
    lr: Tensor,
    eps: Tensor,
    decay: Tensor,
    keys: Sequence[int],
    spans: Sequence[int],
    distribution: int,
    rounding: int,
    rule: int,
) -> None:
    checks.tensors("theta", theta)
    places_of = checks.places(theta, keys, spans)
    kind, how = checks.distribution(distribution), checks.rounding(rounding, theta, residuals)
    known = checks.rule(rule)
    if not theta:
        return
    arguments = seeds, coefficients, first_weights, second_weights, lr, eps, decay
    checks.windows(*arguments, theta[0])
    with torch.inference_mode():
        targets = _targets(theta, residuals, seeds, keys, places_of, kind)
        windows.window_(targets, Window.of(*arguments), how, known)


def _targets(
    theta: Sequence[Tensor],
    residuals: Sequence[Tensor],
    seeds: Tensor,
    keys: Sequence[int],
    spans: Sequence[Span],
    distribution: Distribution,
) -> list[Target]:
    of_terms = round_keys(seeds.flatten()).unbind()
    return [
        Target(tensor.detach(), residual, key, span, [NoiseTerm(own, key, distribution) for own in of_terms])
        for tensor, residual, key, span in zip(
            theta, own_residuals(residuals, theta), keys, spans, strict=True
        )
    ]
