"""Loads the native library."""

import ctypes
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..torch_private import storage_holders
from . import elf
from .installed import PATH, architectures_of


@dataclass(frozen=True)
class Library:
    """What the loaded library was built with, or why there is none (`error`)."""

    error: str | None = None
    architectures: tuple[int, ...] = ()  # of its CUDA kernels: 90 is sm_90
    ptx: tuple[int, ...] = ()  # those of which it has PTX as well, which later ones can compile
    cuda_runtime: int = 0  # 13000 is CUDA 13.0; 0: built without CUDA
    # The newest runtime that this machine's driver supports; 0: no driver. Calling it initialises CUDA.
    cuda_driver: Callable[[], int] = lambda: 0
    # The instruction set of the CPU kernels in use, such as "avx2"; or what is wrong with WEIGHTALIGN_CPU.
    cpu_kernels: Callable[[], str] = lambda: "none"
    # align_forward and align_backward, called without torch's dispatcher, the fingerprint of a layer, the holders of a
    # gradient, and the state of a storage. They return None for what they do not take: without the library, or with a
    # torch before 2.14, that is everything.
    python_calls: tuple[Callable[..., Any], ...] = (lambda *_: None,) * 5


def load() -> Library:
    """Loads the library, which registers its kernels with torch; warns if there is none. Call once, after the ops are
    defined."""
    if not PATH.exists():
        return _without(
            f"the native library is not built: no {PATH.name} beside {PATH.parent.name}/__init__.py; "
            "install with 'pip install .' (in a source tree, 'pip install -e .')"
        )
    try:
        elf.check(PATH)
        torch.ops.load_library(str(PATH))
    except OSError as failure:  # torch's names the file alone, its cause says why
        reason = failure.__cause__ or failure
        return _without(f"the native library does not load with torch {torch.__version__}: {reason}")
    native = ctypes.CDLL(str(PATH))
    native.wa_cpu_kernels.restype = ctypes.c_char_p
    architectures = architectures_of(native)
    return Library(
        architectures=tuple(int(a.removesuffix("+PTX")) for a in architectures),
        ptx=tuple(int(a.removesuffix("+PTX")) for a in architectures if a.endswith("+PTX")),
        cuda_runtime=native.wa_cuda_runtime_version(),
        cpu_kernels=lambda: native.wa_cpu_kernels().decode(),
        cuda_driver=native.wa_cuda_driver_version,
        python_calls=_python_calls() or Library.python_calls,
    )


def _python_calls() -> Any:
    find = ctypes.PyDLL(str(PATH)).wa_python_calls
    find.restype = ctypes.py_object
    types = torch.Tensor, torch.nn.Parameter  # all in the order of PythonNames in csrc/common/python_tensors.h
    names: tuple[Any, ...] = *types, torch.Tensor.is_neg, sys.getrefcount, storage_holders, None
    return find((ctypes.py_object * len(names))(*names))


def _without(error: str) -> Library:
    warnings.warn(
        f"weightalign_cuda: {error}. Triton serves CUDA tensors if it can; everything else runs as PyTorch's own "
        "operations, some ten times slower.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Library(error=error)
