"""The native align ops called without torch's dispatcher, which takes twice as long as the op itself on a small weight.
`backward` is that of the autograd.Function, with what it has to ask first.

The library's functions decline, by returning None, tensors that the dispatcher would not hand to the op's kernel as
they are, and arguments that are wrong. `is_open` says what no argument shows: at once, where they decline everything.

`fingerprint`, of a layer, and who holds a tensor are beside them as they take the same access to tensors: see
model/fingerprint.py and spent.py.
"""

from ..torch_private import are_calls_unobserved
from .native_library import Library
from .schemas import library

__all__ = ["backward", "fingerprint", "forward", "holders", "is_open", "storage_state"]
forward, backward, fingerprint, holders, storage_state = library.python_calls
is_open = are_calls_unobserved if library.python_calls is not Library.python_calls else lambda: False
