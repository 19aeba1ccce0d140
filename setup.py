"""Builds zoext._C (the CPU operators and the Python bindings of the core) and, where possible, zoext._cuda.

Environment variables:
    ZOEXT_CUDA=auto|0|1   auto: build the CUDA operators when torch is a CUDA build and nvcc is found
    ZOEXT_DEBUG=1         debug information and no optimisation
    TORCH_CUDA_ARCH_LIST  GPU architectures; default: "8.0;9.0+PTX", and 10.0 where nvcc knows it
    MAX_JOBS              parallel compilations
"""

import os
import subprocess
from pathlib import Path

import torch
from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent
DEBUG = os.environ.get("ZOEXT_DEBUG", "0") == "1"
# 2.11, the oldest torch that the shared objects load under: they use its stable ABI and nothing newer.
TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"
OPTIMISATION = ["-O0", "-g"] if DEBUG else ["-O3", "-g0", "-DNDEBUG"]
# Contraction would fuse a product and a sum into one operation, on some processors only.
HOST = ["-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", *OPTIMISATION]
# torch's headers trigger the first of these, GCC's AVX-512 headers the others.
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-psabi"]
WARNINGS += ["-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-unknown-pragmas"]
# Error messages name source files, but without the path on the machine that built them.
SHORT_PATHS = f"-fmacro-prefix-map={ROOT.resolve()}/="


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def headers() -> list[str]:
    kinds = {".h", ".cuh", ".inl"}
    return sorted(str(path.resolve()) for path in ROOT.glob("csrc/**/*") if path.suffix in kinds)


def wants_cuda() -> bool:
    choice = os.environ.get("ZOEXT_CUDA", "auto").lower()
    if choice not in {"auto", "0", "1"}:
        raise SystemExit(f"ZOEXT_CUDA must be auto, 0 or 1, not {choice!r}")
    missing = []
    if torch.version.cuda is None:
        missing.append(f"torch {torch.__version__} is a CPU build: install a CUDA build (it needs no GPU)")
    if cpp_extension.CUDA_HOME is None or not Path(cpp_extension.CUDA_HOME, "bin", "nvcc").exists():
        missing.append(f"no nvcc under CUDA_HOME ({cpp_extension.CUDA_HOME}): set CUDA_HOME to the toolkit")
    if choice == "1" and missing:
        raise SystemExit("ZOEXT_CUDA=1, but " + "; ".join(missing))
    return choice != "0" and not missing


def find_cuda_home() -> None:
    """Prefers the default folder: nvcc on the PATH may be a wrapper script somewhere else."""
    default = Path("/usr/local/cuda")
    if "CUDA_HOME" not in os.environ and torch.version.cuda and (default / "bin" / "nvcc").exists():
        os.environ["CUDA_HOME"] = cpp_extension.CUDA_HOME = str(default)


def cuda_include_dirs() -> list[str]:
    """The headers of toolkit libraries that are installed as Python packages, among them cuRAND."""
    packages = Path(torch.__file__).parents[1]
    folders = sorted(packages.glob("nvidia/*/include"))
    return [str(folder) for folder in folders if list(folder.glob("curand*.h"))]


def default_architectures() -> str:
    nvcc = Path(cpp_extension.CUDA_HOME, "bin", "nvcc")
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
    return "8.0;9.0+PTX;10.0" if "sm_100" in known.split() else "8.0;9.0+PTX"


def extensions() -> list:
    cpu = cpp_extension.CppExtension(
        "zoext._C",
        sources("csrc/*.cpp") + sources("csrc/ops/*.cpp") + sources("csrc/cpu/*/*.cpp"),
        extra_compile_args={"cxx": [*HOST, *WARNINGS, SHORT_PATHS, TARGET]},
        depends=headers(),
    )
    if not wants_cuda():
        return [cpu]
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", default_architectures())
    nvcc = ["-std=c++17", "-fmad=false", "-lineinfo", *(["-O0", "-g", "-G"] if DEBUG else ["-O3"]), TARGET]
    # After the toolkit's own folders: the packages have other versions of the remaining headers.
    nvcc += [f"-Xcompiler=-idirafter{folder}" for folder in cuda_include_dirs()]
    cuda = cpp_extension.CUDAExtension(
        "zoext._cuda",
        sources("csrc/cuda/kernels/*.cu"),
        extra_compile_args={
            "cxx": [*HOST, *WARNINGS, SHORT_PATHS, TARGET, "-DUSE_CUDA"],
            "nvcc": [*nvcc, f"-Xcompiler={SHORT_PATHS}", "-DUSE_CUDA"],
        },
        depends=headers(),
    )
    return [cpu, cuda]


find_cuda_home()
setup(ext_modules=extensions(), cmdclass={"build_ext": cpp_extension.BuildExtension})
