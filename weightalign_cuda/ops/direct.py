"""The native align ops called without torch's dispatcher, which takes twice as long as the op itself on a small weight.

The library's functions decline, by returning None, tensors that the dispatcher would not hand to the op's kernel as
they are, and arguments that are wrong. What no argument shows is asked here.
"""

from ..torch_private import (
    are_functorch_transforms_active,
    dispatch_modes,
    get_tracing_state,
    is_forward_mode_active,
    is_function_mode_enabled,
    is_profiler_enabled,
)
from .schemas import library

forward, backward = library.python_calls


def is_open() -> bool:
    """Whether nobody wants to see or to change the calls of ops now: no mode, transform, tracer or profiler."""
    return not (
        is_function_mode_enabled()
        or dispatch_modes()
        or are_functorch_transforms_active()
        or is_forward_mode_active()
        or get_tracing_state() is not None
        or is_profiler_enabled()
    )
