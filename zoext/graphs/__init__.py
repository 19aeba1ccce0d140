"""Captures a whole step in a CUDA graph."""

from zoext.graphs._cuda_graph import CaptureError, CudaGraph
from zoext.graphs.graphed_step import GraphedStep

__all__ = ["CaptureError", "CudaGraph", "GraphedStep"]
