"""The ops: schemas, autograd, backend selection, native library. The backends `reference` and `triton` are in Python,
the others in csrc/."""

from .schemas import in_triton, library, native

__all__ = ["in_triton", "library", "native"]
