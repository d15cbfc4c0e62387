"""Figures of a library's kernels that need no run: resources, spills and the size of the code, by architecture."""

import dataclasses
import pathlib
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from . import cubin

INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\w+)")
LOCAL_ACCESSES = {"LDL": "spill_loads", "STL": "spill_stores"}
INSTRUCTION_BYTES = 16


@dataclass(frozen=True)
class Figures:
    architecture: int
    kernel: str
    registers: int
    stack: int
    shared: int
    constant: int
    spill_loads: int  # instructions, as are the stores
    spill_stores: int
    code_bytes: int


def short_name(kernel: str) -> str:
    """Without namespaces, result and parameters: `align_forward<float, LargeTable>`."""
    return (
        re.sub(r"\(.*", "", re.sub(r"(\w+|\(anonymous namespace\))::", "", kernel))
        .removeprefix("void ")
        .replace("_kernel<", "<")
    )


def of_architecture(path: pathlib.Path, architecture: int) -> list[Figures]:
    """Of all kernels for one architecture of the library."""
    listings = cubin.machine_code(path, architecture)
    found = []
    for kernel, resources in cubin.resources(path, architecture).items():
        opcodes = INSTRUCTION.findall(listings[kernel])
        spills = {name: opcodes.count(opcode) for opcode, name in LOCAL_ACCESSES.items()}
        sizes = {k: v for k, v in dataclasses.asdict(resources).items() if k != "local"}
        found.append(
            Figures(architecture, short_name(kernel), **sizes, **spills, code_bytes=INSTRUCTION_BYTES * len(opcodes))
        )
    return found


def figures(path: pathlib.Path) -> list[Figures]:
    """Of all kernels for all architectures of the library."""
    with ThreadPoolExecutor(2) as pool:
        return [f for of_one in pool.map(lambda a: of_architecture(path, a), cubin.architectures(path)) for f in of_one]
