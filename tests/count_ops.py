"""Counts calls of the registered ops."""

import collections

from torch.utils._python_dispatch import TorchDispatchMode


class CountOps(TorchDispatchMode):
    """Counts the calls of registered ops, native or Triton's, that reach a kernel, under the native ops' names."""

    def __init__(self):
        super().__init__()
        self.calls = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "weightalign_cuda":
            self.calls[func._opname.removeprefix("triton_")] += 1
        return func(*args, **(kwargs or {}))
