"""The installed library: one small file that any torch >= 2.11 loads, with or without CUDA."""

import pathlib
import re
import subprocess

import weightalign_cuda as wa
from weightalign_cuda import ops

PACKAGE = pathlib.Path(wa.__file__).parent
LIBRARY = PACKAGE / "_weightalign.so"


def test_library_is_installed_and_loaded():
    assert [p.name for p in PACKAGE.rglob("*.so*")] == [LIBRARY.name]
    assert ops.library.error is None
    assert wa.backends()["cpu"] == "available"


def test_library_is_small():
    assert LIBRARY.stat().st_size < 3_000_000


def test_library_has_no_cuda_dependencies():
    """The CUDA runtime is linked statically; the rest comes from the torch that is loaded."""
    dynamic = subprocess.run(["readelf", "-d", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    assert "libtorch_cpu.so" in needed
    assert not [n for n in needed if re.match(r"lib(torch_cuda|torch_python|c10_cuda|cuda|cudart|nv|python)", n)]


def test_library_works_without_python():
    """Its symbols may be missing."""
    listed = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    symbols = re.findall(r"(\w) (_?Py\w+)$", listed, re.M)
    assert symbols
    assert {kind for kind, _ in symbols} <= set("wv"), symbols


def test_build_information():
    built_with_cuda = bool(ops.library.architectures)
    assert list(ops.library.architectures) == sorted(set(ops.library.architectures))
    assert all(75 <= a < 200 for a in ops.library.architectures)
    assert bool(ops.library.ptx) == built_with_cuda  # for later GPUs
    assert set(ops.library.ptx) <= set(ops.library.architectures)
    assert (ops.library.cuda_runtime >= 12000) == built_with_cuda
