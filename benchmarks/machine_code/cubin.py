"""What a library of CUDA kernels contains, by cuobjdump: architectures, resources and machine code of each kernel."""

import functools
import pathlib
import re
import shutil
import subprocess
from dataclasses import dataclass


@dataclass(frozen=True)
class Resources:
    """What a kernel occupies: registers a thread, the rest in bytes."""

    registers: int
    stack: int
    shared: int
    local: int
    constant: int  # of bank 0, which ends with the parameters


def _program() -> str:
    program = shutil.which("cuobjdump")
    if program is None:  # Triton brings its own
        import triton

        program = str(pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump")
    return program


@functools.cache
def cuobjdump(path: pathlib.Path, *options: str) -> str:
    """The output of cuobjdump on a library or a cubin, with names as in the source."""
    listing = subprocess.run([_program(), *options, str(path)], check=True, capture_output=True, text=True).stdout
    return subprocess.run(["c++filt"], input=listing, check=True, capture_output=True, text=True).stdout


def architectures(path: pathlib.Path) -> list[int]:
    """The compute capabilities that the library has machine code for."""
    return sorted({int(found) for found in re.findall(r"\.sm_(\d+)\w*\.cubin", cuobjdump(path, "--list-elf"))})


def resources(path: pathlib.Path, architecture: int) -> dict[str, Resources]:
    """By kernel."""
    found = re.findall(
        r"Function (.+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+).*CONSTANT\[0\]:(\d+)",
        cuobjdump(path, "--dump-resource-usage", "-arch", f"sm_{architecture}"),
    )
    return {name: Resources(*map(int, numbers)) for name, *numbers in found}


def machine_code(path: pathlib.Path, architecture: int) -> dict[str, str]:
    """By kernel, as cuobjdump lists it."""
    parts = re.split(r"\tFunction : (.+)\n", cuobjdump(path, "-sass", "-arch", f"sm_{architecture}"))
    return dict(zip(parts[1::2], parts[2::2], strict=True))
