"""The compiled CUDA kernels: checks of the machine code in the library, for every architecture in it."""

import functools
import pathlib
import re
import shutil
import subprocess

import pytest

from weightalign_cuda.ops import library, native_library

KERNELS = 8  # forward and backward, float and double, small and large table
MAX_REGISTERS = 64


@functools.cache
def cuobjdump(*options: str) -> str:
    program = shutil.which("cuobjdump")
    if program is None:  # Triton brings its own
        import triton

        program = str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    command = [program, *options, str(native_library.PATH)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@functools.cache
def machine_code(architecture: int) -> dict[str, str]:
    """Name of each kernel -> its SASS."""
    parts = re.split(r"\tFunction : (\S+)", cuobjdump("-sass", "-arch", f"sm_{architecture}"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))


# Results differ little between architectures.
ARCHITECTURES = [pytest.param(a, marks=pytest.mark.slow if a != 90 else ()) for a in library.architectures]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_registers_and_spills(architecture):
    usage = re.findall(
        r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)",
        cuobjdump("--dump-resource-usage", "-arch", f"sm_{architecture}"),
    )
    assert len(usage) == KERNELS
    for name, registers, stack, shared, local in usage:
        assert int(registers) <= MAX_REGISTERS, name
        assert int(stack) == int(local) == 0, f"{name} spills"
        assert int(shared) <= 48 * 1024, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_accesses(architecture):
    code = machine_code(architecture)
    assert len(code) == KERNELS
    for name, sass in code.items():
        assert re.search(r"LDG\.E\.128", sass), f"{name} has no 16-byte load"
        assert re.search(r"STG\.E\.128", sass), f"{name} has no 16-byte store"
        assert not re.search(r"\b(LDL|STL|ATOM|ATOMG|RED)\b", sass), f"{name} uses local memory or atomics"


def test_one_portable_copy():
    """PTX for the last architecture, which all later ones can compile."""
    ptx = re.findall(r"sm_(\d+)\.ptx", cuobjdump("--list-ptx")) if library.architectures else []
    assert ptx == [str(a) for a in library.architectures[-1:]]
