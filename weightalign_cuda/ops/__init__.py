"""The ops and what serves them: schemas, autograd, choice of a backend, the native library. The backends in Python are
`reference` and `triton`, the others are in csrc/."""

from .schemas import in_triton, library, native

__all__ = ["in_triton", "library", "native"]
