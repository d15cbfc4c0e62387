"""Triton's launches on simulated devices, by its interpreter: as with TRITON_INTERPRET=1, but of kernels that were
compiled without it, so that the code around them takes the path of a GPU."""

import ctypes
import functools
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

_recorded: list[Any] = []  # what captured graphs call


def install() -> None:
    from triton.runtime import interpreter, jit

    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    import triton_interpreter

    sys.path.pop(0)
    triton_interpreter.mend()
    one_at_a_time = threading.RLock()  # the interpreter has room for one launch
    runtime = ctypes.CDLL("libcudart.so.13")

    @functools.cache
    def interpreted(function: Callable[..., Any]) -> interpreter.InterpretedFunction:
        return interpreter.InterpretedFunction(function)

    def run(self, *arguments, grid, warmup, **options):
        if warmup:
            return
        # Device memory is host memory: no copies.
        values = [torch.ops.simcuda.on_cpu(a) if isinstance(a, torch.Tensor) else a for a in arguments]

        def interpret(_=None) -> None:
            with one_at_a_time:
                torch.ops.simcuda.open_memory()
                try:
                    interpreted(self.fn).run(*values, grid=grid, warmup=False, **options)
                finally:
                    torch.ops.simcuda.close_memory()

        stream = torch.cuda.current_stream().cuda_stream
        if torch.cuda.is_current_stream_capturing():
            _recorded.append(ctypes.CFUNCTYPE(None, ctypes.c_void_p)(interpret))
            runtime.cudaLaunchHostFunc(ctypes.c_void_p(stream), _recorded[-1], None)
        else:
            torch.ops.simcuda.drain(stream)
            interpret()

    jit.JITFunction.run = run
    jit.JITFunction.__call__ = lambda self, *arguments, **options: interpreted(self.fn)(*arguments, **options)
