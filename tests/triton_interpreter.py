"""Two patches of Triton's interpreter for the tests: results equal those of compiled kernels, in a third of the
time."""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def mend():
    _round_to_nearest()
    _patch_once()


def _round_to_nearest():
    """float32 to bfloat16, which the interpreter truncates."""
    cast = interpreter.InterpreterBuilder.cast_impl

    def cast_impl(self, source, dtype):
        if (source.dtype.scalar, dtype.scalar) == (tl.float32, tl.bfloat16):
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(values.view(torch.uint16).numpy(), tl.bfloat16)
        return cast(self, source, dtype)

    interpreter.InterpreterBuilder.cast_impl = cast_impl


def _patch_once():
    """A launch patches triton.language while it runs, but each call of a device function does so again, permanently:
    once per module that has device functions is enough."""
    patched = set()

    def call(self, *args, **kwargs):
        if self.fn.__module__ not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(self.fn.__module__)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
