"""Checks, without a GPU, that every operator with a CPU kernel also has a CUDA kernel."""

import sys

import torch

from zoext import ops


def kernels(backend: str) -> set[str]:
    registered = torch._C._dispatch_get_registrations_for_dispatch_key(backend)
    return {name for name in registered if name.startswith("zoext::")}


def main() -> int:
    if ops.cuda_missing is not None:
        print(f"the CUDA kernels are missing: {ops.cuda_missing}", file=sys.stderr)
        return 1
    cpu, cuda = kernels("CPU"), kernels("CUDA")
    if not cpu or cpu != cuda:
        print(f"on one backend only: {sorted(cpu ^ cuda) or 'no operator at all'}", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__}: {len(cuda)} operators have CUDA kernels: {', '.join(sorted(cuda))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
