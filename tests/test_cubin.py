"""The compiled CUDA kernels: checks of the machine code in the library, for every architecture in it."""

import pathlib
import re
import sys

import pytest

from weightalign_cuda.ops import library, native_library

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.machine_code import cubin

KERNELS = 8  # forward and backward, float and double, small and large table
MAX_REGISTERS = 64


# Results differ little between architectures.
ARCHITECTURES = [pytest.param(a, marks=pytest.mark.slow if a != 90 else ()) for a in library.architectures]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(architecture):
    usage = cubin.resources(native_library.PATH, architecture)
    assert len(usage) == KERNELS
    for name, used in usage.items():
        assert used.registers <= MAX_REGISTERS, name
        assert used.stack == used.local == 0, f"{name} spills"
        assert used.shared <= 6 * 1024, name  # beside kMostSharedBytes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses(architecture):
    code = cubin.machine_code(native_library.PATH, architecture)
    assert len(code) == KERNELS
    for name, sass in code.items():
        assert re.search(r"LDG\.E\.128", sass), f"{name} has no 16-byte load"
        assert re.search(r"STG\.E\.128", sass), f"{name} has no 16-byte store"
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", sass), f"{name} uses local memory or atomics"


def test_portable_copies():
    """PTX, which later architectures can compile."""
    ptx = (
        re.findall(r"sm_(\d+)\.ptx", cubin.cuobjdump(native_library.PATH, "--list-ptx"))
        if library.architectures
        else []
    )
    assert ptx == [str(a) for a in library.ptx]
