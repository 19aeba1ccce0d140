"""A CUDA graph, and what becomes of a capture that fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, TypeVar

import torch

T = TypeVar("T")


class CaptureError(RuntimeError):
    """The driver refused to begin or to end a capture, and torch may not have left it."""


class CudaGraph:
    """Launches with their addresses, numbers and memory, captured once and replayed."""

    failure: ClassVar[str | None] = None  # of the process: what the driver once refused

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"GraphedStep needs parameters on a CUDA device, not on {device}; move the model there, or "
                "step with optimizer.step(closure)"
            )
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, work: Callable[[], T]) -> T:
        """Captures what ``work`` launches, and launches none of it.

        Raises:
            CaptureError: where the driver refused, now or earlier in this process. Where ending a capture
                fails, torch's allocator and generator stay in it.
            Exception: what ``work`` raises, if the capture could be ended.
        """
        if CudaGraph.failure is not None:
            raise CaptureError(_refused(CudaGraph.failure))
        raised: Exception | None = None
        self._graph = torch.cuda.CUDAGraph()
        # The outer context brings the stream back where ending a failed capture raises.
        outer = torch.cuda.stream(torch.cuda.current_stream(self._device))
        try:
            with outer, self._capturing(self._graph):
                try:
                    return work()
                except Exception as error:
                    raised = error
                    raise
        except Exception as error:
            if error is raised:
                raise
            first = raised or error  # the failure of the end does not say what went wrong
            CudaGraph.failure = str(first)
            raise CaptureError(_refused(CudaGraph.failure)) from first

    def _capturing(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        return torch.cuda.graph(
            graph,
            stream=torch.cuda.Stream(self._device),
            capture_error_mode="thread_local",  # other threads may go on loading batches
        )

    def replay(self) -> None:
        assert self._graph is not None
        with torch.cuda.device(self._device):
            self._graph.replay()


def _refused(failure: str) -> str:
    return (
        f"the driver refused to capture the step in a CUDA graph: {failure}. Theta was not moved, but "
        "torch's allocator and generator may be left as they are within a capture, so nothing is captured "
        "again: save optimizer and model, restart the process, and step with optimizer.step(closure)"
    )
