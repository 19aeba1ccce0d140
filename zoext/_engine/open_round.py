"""Ask and tell: rounds of probes whose losses are computed elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from zoext import noise
from zoext._engine.estimation import Estimation, as_loss
from zoext._parameters import wrappers
from zoext._runtime.profiling import Phase, record
from zoext.distributed import EstimateRestart, Share
from zoext.estimators import Estimate, Round
from zoext.probes import Probe, Session

#: The losses of a round: None for one that did not come back.
Told = Tensor | Sequence[float | Tensor | None]


class LoRAFactors(NamedTuple):
    """The displacement ``B @ A`` of a weight, in the layout of PEFT's LoRA.

    Attributes:
        A: float32 [r, d_in], or [r, d_in, *kernel] of a convolution.
        B: float32 [d_out, r], or [d_out, r, 1, ...] of a convolution; includes mu and the coefficients.
    """

    A: Tensor
    B: Tensor


class OpenRound:
    """A round of probes whose losses the caller computes; see ``ZerothOrderOptimizer.ask``.

    The probes do not depend on each other's losses: evaluate them in any order, on any copy of the model.

    Attributes:
        seeds: int64 [K].
        coefficients: float32 [P, K]; probe p evaluates the loss at
            ``theta + mu * sum_k coefficients[p, k] D(seeds[k])``.
    """

    def __init__(self, asking: Asking, pending: Round) -> None:
        self.seeds = pending.seeds
        self.coefficients = pending.coefficients
        self._asking = asking
        asking.estimation.begin(pending, range(len(pending)))

    def __len__(self) -> int:
        """The number of probes, P."""
        return len(self.coefficients)

    @contextmanager
    def displaced(self, index: int) -> Iterator[None]:
        """Displaces the model to probe ``index`` within the block.

        Theta is restored when the block ends: bit for bit by a streamed probe, up to rounding by an in-place
        one. Gradients are disabled within the block, and all probes start from the same state of the global
        generators.

        Raises:
            IndexError: for an index out of range.
            RuntimeError: if the round is over, if such blocks are nested, or if the block changed the
                parameters.
        """
        self._check_index(index)
        asking = self._asking
        with asking.closures(), record(Phase.ESTIMATE), asking.probe.session() as session:
            with displaced(asking.estimation, session, index):
                yield
            asking.keep_buffers(index, session)

    def adapter(self, index: int) -> dict[str, LoRAFactors]:
        """Probe ``index`` as low-rank factors, keyed by the names of the parameters in the module.

        The displaced weight of a linear layer is ``W + B @ A``: a LoRA adapter with ``lora_alpha = r``, where
        r is the rank of the layer's direction times the number of its terms. For a layer that stores its
        weight transposed (``Conv1D`` of transformers, ``nn.Embedding``) it is ``W + (B @ A).T``. Empty for a
        probe at theta.

        Raises:
            IndexError: for an index out of range.
            ValueError: for dense directions, which no adapter can represent, and without a module.
            RuntimeError: for directions that a forward at theta determines (``ActivationSubspace``), if that
                forward, in ``displaced(0)`` of the first round, has not run yet.
        """
        self._check_index(index)
        estimation = self._asking.estimation
        estimation.check_frame("adapter")
        context = estimation.context
        seeds, coefficients = estimation.probe(index)
        found: dict[str, LoRAFactors] = {}
        if not len(seeds):
            return found
        if context.held:
            raise RuntimeError(
                "adapter: the weights lack steps that defer=True holds back; call merge() before ask()"
            )
        frame = estimation.found.frame
        if context.module is None:
            raise ValueError(
                "adapter: whether a weight is stored transposed depends on its module; build the optimizer "
                "with the module as params, or with probe=zoext.StreamedProbe(module)"
            )
        transposed = _transposed(context.module)
        names = {id(parameter): name for name, parameter in wrappers.named_parameters(context.module)}
        with torch.no_grad():
            for position, group in enumerate(context.groups):
                if not len(group):
                    continue
                terms = context.terms(position, seeds, coefficients, frame)
                left, right = context.axes.direction.factors(group, terms)
                columns = zip(group.names, group.owners, left, right, strict=True)
                for name, owner, rows, across in columns:
                    found[names.get(id(owner), name)] = _adapter(
                        terms.coefficients, rows, across, owner, id(owner) in transposed
                    )
        return found

    def _check_index(self, index: int) -> None:
        if self._asking.round is not self:
            raise RuntimeError(
                "this round is over: use the round that tell() returned, or call ask() for another estimate"
            )
        if isinstance(index, bool) or not hasattr(index, "__index__") or not 0 <= index < len(self):
            raise IndexError(f"index must be in 0 .. {len(self) - 1}, not {index!r}")


class Asking:
    """An estimate whose losses the caller computes.

    Args:
        estimation: evaluates the probes.
        probe: the probe of the optimizer.
        closures: enters the block in which the caller runs the model.
        owner: the optimizer, which an open round keeps alive.

    Attributes:
        round: the round whose losses are missing; None once the estimate is complete or was cancelled.
    """

    def __init__(
        self,
        estimation: Estimation,
        probe: Probe,
        closures: Callable[[], AbstractContextManager[None]],
        owner: object,
    ) -> None:
        self.estimation = estimation
        self.probe = probe
        self.closures = closures
        self._owner = owner
        self._write_buffers: Callable[[Tensor], None] | None = None
        self._rounds = estimation.rounds()
        self.round: OpenRound | None = OpenRound(self, next(self._rounds))

    def tell(self, losses: Told) -> Estimate | None:
        """Accepts the losses of ``round``; returns the estimate, or None if another round follows."""
        share = self._checked(losses)
        self.estimation.check_frame("tell")
        try:
            told = self.estimation.told(share)
        except EstimateRestart:
            self.estimation.restart()
            self._rounds = self.estimation.rounds()
            self.round = OpenRound(self, next(self._rounds))
            return None
        self.round = None
        try:
            self.round = OpenRound(self, self._rounds.send(told))
        except StopIteration as done:
            estimate = self.estimation.complete(done.value)
            if self._write_buffers is not None:
                self._write_buffers(estimate.finite)
            return estimate
        return None

    def keep_buffers(self, index: int, session: Session) -> None:
        """Keeps what the probe that moves running statistics left, until the estimate is complete."""
        if self.estimation.moves_buffers(index):
            self._write_buffers = session.take_buffers()

    def cancel(self) -> None:
        self.round = None

    def _checked(self, losses: Told) -> Share:
        assert self.round is not None
        count = len(self.round)
        is_array = isinstance(losses, Tensor) or hasattr(losses, "__array__")
        if isinstance(losses, str) or not (is_array or isinstance(losses, Sequence)):
            raise TypeError(f"losses must be a tensor [{count}] or a list of numbers, not {losses!r}")
        given = losses.unbind() if isinstance(losses, Tensor) and losses.dim() == 1 else losses
        if isinstance(given, Tensor) or not getattr(given, "shape", (1,)) or len(given) != count:
            kind = f"a tensor of shape {tuple(given.shape)}" if isinstance(given, Tensor) else f"{len(given)}"
            raise ValueError(f"losses must be one for each of the {count} probes of the round, not {kind}")
        device = self.estimation.context.device
        found = {
            index: as_loss(loss, device, "losses: each")
            for index, loss in enumerate(given)
            if loss is not None
        }
        if not found:
            raise ValueError("losses: all are None; tell those that came back, or call cancel()")
        return Share(found, count, is_whole=True)


@contextmanager
def displaced(estimation: Estimation, session: Session, index: int) -> Iterator[None]:
    """Displaces the model to probe ``index`` of the round of ``estimation`` within the block.

    Raises:
        RuntimeError: if the block must be evaluated again, or changed the parameters.
    """
    with estimation.displaced(session, index), session.interruptible():
        yield
    if estimation.is_to_repeat(session):
        raise RuntimeError(
            f"displaced({index}): weights were read outside their modules in a way that is not seen "
            "at every probe, and may have been read as they were, or compiled code ran as it is "
            "written so that activations could be seen; evaluate this probe again"
        )


def checked_pairs(
    seeds: Tensor | Sequence[int], coefficients: Tensor | Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Checks seeds and coefficients; returns int64 [K] and float32 [K]."""
    if not isinstance(seeds, Tensor):
        seeds = torch.tensor([noise.signed(seed) for seed in seeds], dtype=torch.int64)
    if seeds.dtype != torch.int64 or seeds.dim() != 1:
        raise ValueError(f"seeds must be int64 [K], not {seeds.dtype} {list(seeds.shape)}")
    coefficients = torch.as_tensor(coefficients, dtype=torch.float32)
    if coefficients.shape != seeds.shape:
        raise ValueError(
            f"coefficients must be [{len(seeds)}], one for each seed, not {list(coefficients.shape)}"
        )
    if not bool(torch.isfinite(coefficients).all()):
        raise ValueError(f"coefficients must be finite, not {coefficients.tolist()}")
    return seeds, coefficients


def _transposed(module: nn.Module | None) -> set[int]:
    """The ids of weights that their module stores as [d_in, d_out]."""
    parts = module.modules() if module is not None else ()
    return {
        id(parameter)
        for part in parts
        if isinstance(part, (nn.Embedding, *wrappers.conv1d()))
        for parameter in part.parameters(recurse=False)
    }


def _adapter(
    coefficients: Tensor, left: Tensor, right: Tensor, weight: Tensor, transposed: bool
) -> LoRAFactors:
    """The factors of ``sum_t coefficients[t] left[t]^T right[t]``: [T or 1, r, m] and [T or 1, r, n]."""
    count = len(coefficients)
    scaled = (coefficients.to(left.device).view(-1, 1, 1) * left).expand(count, -1, -1).flatten(0, 1)
    other = right.expand(count, -1, -1).flatten(0, 1)
    if transposed:
        return LoRAFactors(A=scaled, B=other.T.contiguous())
    rank, kernel = len(other), weight.shape[2:]
    down = other.unflatten(1, weight.shape[1:])
    return LoRAFactors(A=down, B=scaled.T.reshape(-1, rank, *(1 for _ in kernel)))
