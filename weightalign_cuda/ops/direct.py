"""The align ops without torch's dispatcher, which takes twice as long as the native op itself on a small weight."""

from typing import Any

from ..torch_private import below_autograd, dispatch_modes, is_function_mode_enabled, is_profiler_enabled
from .schemas import OpSet, library, native

_forward, _backward = library.python_calls


def align_forward(served: OpSet, *arguments: Any) -> Any:
    """The op, below autograd; dtype and memory format are c10's numbers of them."""
    if served is native and not is_watched() and (results := _forward(*arguments)) is not None:
        return results
    with below_autograd():
        return served.align_forward._op(*arguments)


def align_backward(served: OpSet, *arguments: Any) -> Any:
    """The op, below autograd."""
    if served is native and not is_watched() and (results := _backward(*arguments)) is not None:
        return results
    with below_autograd():
        return served.align_backward._op(*arguments)


def is_watched() -> bool:
    """Whether the dispatcher would show the call to somebody: a mode or a profiler."""
    return is_function_mode_enabled() or dispatch_modes() > 0 or is_profiler_enabled()
