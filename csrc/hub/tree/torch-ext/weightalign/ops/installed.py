"""Where kernel-builder has put the native library, and what it has called it: each build has a namespace of its own."""

import ctypes
import json
import pathlib

from .. import _ops

NAMESPACE = _ops.add_op_namespace_prefix("").removesuffix("::")
PATH = pathlib.Path(getattr(_ops, NAMESPACE).__file__)


def architectures_of(library: ctypes.CDLL) -> list[str]:
    """Those of its CUDA kernels, from "9.0+PTX" to "90+PTX"."""
    backend = json.loads(PATH.with_name("metadata.json").read_text())["backend"]
    return [each.replace(".", "") for each in backend.get("archs", [])]
