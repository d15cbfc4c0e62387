"""A flat cast and a flat add in the chip's model. On the chip they run at the copy rate, but for the start and end of a
launch: so must they here."""

import shutil
import struct

import numpy as np

from . import chip, cubin, sass
from .compile import HERE, compiled
from .interpreter import Block, Kernel
from .launches import Direction
from .memory import GlobalMemory
from .predict import ARCHITECTURE, PARAMETERS_AT
from .trace import Trace

THREADS, VALUES = 256, 1024  # of a block
KERNELS: dict[Direction, str] = {"forward": "flat_cast", "backward": "flat_add"}
BYTES: dict[Direction, int] = {"forward": 6, "backward": 10}  # moved for each value


def has_compiler() -> bool:
    return shutil.which("nvcc") is not None


class Flat:
    """The kernel that does the least, executed; needs nvcc."""

    def __init__(self, direction: Direction) -> None:
        source = HERE / "flat.cu"
        command = ["nvcc", "-cubin", f"-arch=sm_{ARCHITECTURE}", "-O3", source]
        cubin_file = compiled(".cubin", command, [source])
        name = next(n for n in cubin.resources(cubin_file, ARCHITECTURE) if n.startswith(KERNELS[direction]))
        self.direction, self._resources = direction, cubin.resources(cubin_file, ARCHITECTURE)[name]
        code = sass.instructions(cubin.machine_code(cubin_file, ARCHITECTURE)[name])
        memory = GlobalMemory()
        itemsizes = (4, 2) if direction == "forward" else (4, 2, 4)
        tensors = [memory.add(f"tensor {i}", np.zeros(2 * VALUES, f"u{n}")) for i, n in enumerate(itemsizes)]
        sizes = struct.pack("<6I", THREADS, 1, 1, 2, 1, 1)
        parameters = b"".join(struct.pack("<Q", tensor.address) for tensor in tensors)
        kernel = Kernel(code, sizes.ljust(PARAMETERS_AT, b"\0") + parameters, THREADS, 0)
        self._trace = Trace(Block(kernel, 1, memory).run(), memory)

    def copy_fraction(self, where: chip.Chip, values: int) -> float:
        """Of the copy rate, for as many values."""
        blocks = values // VALUES
        run = chip.run(where, [self._trace], [0] * blocks, chip.blocks_per_sm(where, self._resources, THREADS, 0))
        return BYTES[self.direction] * blocks * VALUES / run.microseconds / 1e3 / where.copy_rate
