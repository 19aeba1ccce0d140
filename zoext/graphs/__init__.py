"""A whole step in a CUDA graph."""

from zoext.graphs.graphed_step import CaptureError, CudaGraph, GraphedStep

__all__ = ["CaptureError", "CudaGraph", "GraphedStep"]
