"""What an installation differs in from one of Hugging Face's kernels (csrc/hub), which has another such module."""

import ctypes
import os
import pathlib

NAMESPACE = "weightalign_cuda"  # of the ops
# The native library: the one in the package's folder, or that WEIGHTALIGN_LIBRARY names, to compare builds.
PATH = pathlib.Path(os.environ.get("WEIGHTALIGN_LIBRARY") or pathlib.Path(__file__).parents[1] / "_weightalign.so")


def architectures_of(library: ctypes.CDLL) -> list[str]:
    """Those of its CUDA kernels: "80", or "90+PTX"."""
    library.wa_cuda_architectures.restype = ctypes.c_char_p
    return [a for a in library.wa_cuda_architectures().decode().split(",") if a]
