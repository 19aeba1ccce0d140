"""A CUDA graph, and the handling of failed captures."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, TypeVar

import torch

T = TypeVar("T")


class CaptureError(RuntimeError):
    """The driver refused to begin or end a capture, and torch may still be in capture mode."""


class CudaGraph:
    """Kernel launches with fixed addresses, scalars and memory, captured once and replayed."""

    failure: ClassVar[str | None] = None  # process-wide: the driver's first refusal

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise ValueError(
                f"GraphedStep needs parameters on a CUDA device, not on {device}; move the model there, or "
                "step with optimizer.step(closure)"
            )
        self._device = device
        self._graph: torch.cuda.CUDAGraph | None = None

    def capture(self, work: Callable[[], T]) -> T:
        """Captures the launches of ``work`` without executing them.

        Raises:
            CaptureError: if the driver refuses, or has refused earlier in this process. If ending a capture
                fails, torch's allocator and generator remain in capture mode.
            Exception: the exception of ``work``, if the capture could be ended.
        """
        if CudaGraph.failure is not None:
            raise CaptureError(_refused(CudaGraph.failure))
        raised: Exception | None = None
        self._graph = torch.cuda.CUDAGraph()
        # The outer context restores the current stream if ending a failed capture raises.
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
            first = raised or error  # the error from ending the capture hides the cause
            CudaGraph.failure = str(first)
            raise CaptureError(_refused(CudaGraph.failure)) from first

    def _capturing(self, graph: torch.cuda.CUDAGraph) -> AbstractContextManager[None]:
        return torch.cuda.graph(
            graph,
            stream=torch.cuda.Stream(self._device),
            capture_error_mode="thread_local",  # other threads may keep loading batches
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
