"""The launches that the project's own host code makes for a list of layers, with the bytes of the kernels' parameters.

launches.cpp is compiled against the headers of the library's source tree, so that no layout and no rule of the host is
written down twice: a change of either is followed, or does not compile.
"""

import dataclasses
import functools
import pathlib
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .compile import HERE, ROOT, compiled, cuda_headers

Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Placed:
    """A layer: the addresses of its tensors, and its task."""

    weight: int
    grad: int
    out: int
    gain: int
    filters: int
    n: int
    columns: int  # if not 0, the aligned side is transposed: see AlignTask
    eps: float
    scale: float


@dataclass(frozen=True)
class PlacedInput:
    """A convolution's input: the addresses of both sides, and its task."""

    source: int
    result: int
    batch: int
    channels: int
    height: int
    width: int
    padding: int
    from_channels_last: bool
    to_channels_last: bool


INPUT = -1


@dataclass(frozen=True)
class Launch:
    kernel: str  # as cuobjdump names it
    threads: int
    shared_bytes: int
    parameters: bytes
    layers: list[int]  # of each block, its position in the list of layers, or INPUT


def source_tree(library: pathlib.Path) -> pathlib.Path:
    """The source tree in which the library lies (in weightalign_cuda/), else this one."""
    tree = library.resolve().parents[1]
    return tree if (tree / "csrc/cuda/align_launch.cuh").exists() else ROOT


@functools.cache
def _program(tree: pathlib.Path) -> pathlib.Path:
    """Functions of the emulator that kernels call are left undefined: no kernel is run."""
    source, emulation = HERE / "launches.cpp", tree / "tests" / "simt"
    headers = [*(tree / "csrc").glob("*/*.h"), *(tree / "csrc").glob("*/*.cuh"), emulation / "simt.h"]
    flags = ["-std=c++17", "-O0", "-w", "-no-pie", "-Wl,--unresolved-symbols=ignore-all"]
    folders = [f"-I{tree / 'csrc'}", f"-I{emulation}", "-isystem", cuda_headers()]
    return compiled("", ["g++", *flags, *folders, source], [source, *headers])


def launches(
    tree: pathlib.Path, layers: Sequence[Placed], direction: Direction, statistics: int, grad_gain: int
) -> list[Launch]:
    """The launches for these layers, float32 to bfloat16. `statistics`, `grad_gain`: addresses."""
    lines = [f"{direction} {statistics} {grad_gain} 0"]
    for p in layers:
        lines.append(f"{p.weight} {p.grad} {p.out} {p.gain} {p.filters} {p.n} {p.columns} {p.eps!r} {p.scale!r}")
    return _run(_program(tree), lines)


def input_launch(tree: pathlib.Path, image: PlacedInput, direction: Direction) -> Launch:
    """The launch for an input alone, float32 to bfloat16 or, backward, back."""
    fields = " ".join(str(int(value)) for value in dataclasses.astuple(image))
    (launch,) = _run(_program(tree), [f"{direction} 0 0 1 {fields}"])
    return launch


def _run(program: pathlib.Path, lines: Sequence[str]) -> list[Launch]:
    found = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    symbols = subprocess.run(["nm", "-C", program], capture_output=True, text=True, check=True).stdout
    symbols = symbols.replace(" const&", "")  # the emulator's kernels take by reference what nvcc's take by value
    names = {int(address, 16): name for address, name in re.findall(r"^([0-9a-f]+) \w (.+)$", symbols, re.M)}
    result = []
    for line in found.splitlines():
        kernel, _, threads, shared_bytes, parameters, *runs = line.split()
        blocks = [int(layer) for layer, count in (run.split("*") for run in runs) for _ in range(int(count))]
        result.append(Launch(names[int(kernel)], int(threads), int(shared_bytes), bytes.fromhex(parameters), blocks))
    return result
