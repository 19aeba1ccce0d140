"""Checks, before anything is built, that torch sees a GPU that the CUDA operators can run on."""

import sys

import torch

#: The oldest compute capability that is built by default.
LEAST = (8, 0)


def obstacle() -> str | None:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: choose a CUDA build with TORCH="
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no GPU: does nvidia-smi list one, and does its driver suit?"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST:
        return f"{torch.cuda.get_device_name()} has compute capability {capability}, and {LEAST} is needed"
    return None


def main() -> int:
    problem = obstacle()
    if problem is not None:
        print(f"no GPU to run on: {problem}", file=sys.stderr)
        return 1
    print(f"torch {torch.__version__}: {torch.cuda.get_device_name()}, {torch.cuda.get_device_capability()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
