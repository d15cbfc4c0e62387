"""The installed library: one small file that any torch >= 2.11 loads, with or without CUDA."""

import importlib.metadata
import pathlib
import re
import subprocess

import pytest

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


def undefined():
    """Its undefined symbols, as (name, version), where a library is named by version."""
    listed = subprocess.run(["nm", "-D", "-u", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    return [tuple(name.split("@")) for name in re.findall(r" [Uwv] (\S+)$", listed, re.M)]


def test_only_c_is_asked_of_torch():
    """And nothing that it happens to export of libstdc++, which has versions where it comes from there."""
    assert not [name for name, *version in undefined() if name.startswith("_Z") and not version]


NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}


def test_versions_are_those_of_the_wheel_s_tag():
    if "manylinux_2_28" not in (importlib.metadata.distribution("weightalign_cuda").read_text("WHEEL") or ""):
        pytest.skip("the library was built for this machine")
    versions = {version[0].rpartition("_")[::2] for _, *version in undefined() if version}
    assert {"GLIBC", "GLIBCXX"} <= {family for family, _ in versions}
    assert not {(f, number) for f, number in versions if tuple(map(int, number.split("."))) > NEWEST[f]}


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
