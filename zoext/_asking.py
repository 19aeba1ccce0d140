"""The methods of the optimizer for losses that are computed elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from zoext._engine import OpenRound, StepEngine


class LossesFromElsewhere:
    """Ask and tell, and the probes of other processes; a part of ``ZerothOrderOptimizer``."""

    engine: StepEngine

    def ask(self) -> OpenRound:
        """Begins an estimate whose losses are computed elsewhere, and returns its first round of probes.

            round = optimizer.ask()
            while round is not None:
                losses = []
                for i in range(len(round)):
                    with round.displaced(i):
                        losses.append(loss_of(model))
                round = optimizer.tell(losses)
            optimizer.step()

        With streamed probes this gives the same bits as ``optimizer.step(lambda: loss_of(model))``, provided
        the losses passed to ``tell`` have the dtype that the closure returns. Probes may be evaluated
        elsewhere: pass ``round.adapter(i)`` to an inference engine, or run the same optimizer in several
        processes, each of which calls ``ask``, evaluates some of the probes, and passes all losses to
        ``tell``.

        Raises:
            RuntimeError: while a round is open, and in the cases listed for ``estimate``.
        """
        return self.engine.ask()

    def tell(self, losses: Tensor | Sequence[float | Tensor | None]) -> OpenRound | None:
        """Accepts the losses of the open round, and returns the next round.

        Args:
            losses: one loss for each probe, in the order of the probes: a tensor [P], or P numbers. Python
                floats are treated as float64; pass ``torch.tensor(losses)`` to get the bits of float32
                losses. None stands for a loss that did not come back: the estimate is made without it.

        Returns:
            The next round, or None once the estimate is complete. ``step()`` then applies the mean of all
            pending estimates. If too many losses are None, the first round again.

        Raises:
            RuntimeError: if no round is open, or if the list of parameters, their memory, ``requires_grad``
                or a group's ``mu`` has changed since ``ask``, which cancels the round.
            ValueError: for a wrong number of losses. The round stays open.
            FloatingPointError: for losses that are not finite, with ``nonfinite="raise"``.
        """
        return self.engine.tell(losses)

    @contextmanager
    def displaced(
        self, seeds: Tensor | Sequence[int], coefficients: Tensor | Sequence[float]
    ) -> Iterator[None]:
        """A block in which theta is at ``theta + mu * sum_k coefficients[k] D(seeds[k])``.

        With it a process evaluates a probe that another one asked for, as ``OpenRound.displaced`` does there:

            with optimizer.displaced([seed], [-1.0]):
                loss = loss_of(model)

        The result has the bits of the other process if both optimizers have the same direction, weights, mu
        and step, which directions with a lazily drawn factor depend on. Theta is restored when the block
        ends, and buffers that modules write are too. Random numbers are the caller's: seed the global
        generators before each block.

        Args:
            seeds: [K], int64 or Python integers of 64 bits. Without any, theta is not displaced.
            coefficients: [K], finite.

        Raises:
            TypeError, ValueError: for other arguments.
            RuntimeError: for directions that a forward at theta determines (``ActivationSubspace``), while a
                round is open, if such blocks are nested, and in the cases listed for ``OpenRound.displaced``.
        """
        with self.engine.displaced(seeds, coefficients):
            yield

    def cancel(self) -> None:
        """Drops the open round, if there is one; completed estimates stay pending."""
        self.engine.run.cancel_round()
