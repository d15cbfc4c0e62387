"""A convolution's input on sm_90: its launch, executed tiles, and what they must hold, in float64."""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from .interpreter import Block
from .launches import Direction, PlacedInput, input_launch
from .memory import GlobalMemory
from .predict import ExecutedLaunch, Kind, Library
from .problem import POISON, Image, from_bfloat16
from .reals import bfloat16_bits
from .trace import Trace

EXECUTED_TILES = 8


class InputProblem:
    """Random values in the source, nothing yet in the result: float32 to bfloat16 with padding or, backward, back."""

    def __init__(self, image: Image, direction: Direction, seed: int = 0) -> None:
        self.image, self.is_forward, self.memory = image, direction == "forward", GlobalMemory()
        sides = (image.values, image.padded_values)
        read, written = sides if self.is_forward else sides[::-1]
        self.source = np.random.default_rng(seed).standard_normal(read, np.float32)
        if self.is_forward:
            self.result = np.full(written, POISON * 0x0101, np.uint16)
        else:
            self.source = bfloat16_bits(self.source).astype(np.uint16)
            self.result = np.full(written, POISON * 0x01010101, np.uint32)
        addresses = (self.memory.add(name, getattr(self, name)).address for name in ("source", "result"))
        self.placed = PlacedInput(*addresses, *dataclasses.astuple(image))

    def error(self) -> tuple[float, int]:
        """The largest error of what has been written, in units of its rounding, and how many values that is."""
        image, padding = self.image, self.image.padding
        inner = (..., slice(padding, padding + image.height), slice(padding, padding + image.width))
        written = self._result(self.result != np.iinfo(self.result.dtype).max)
        if self.is_forward:
            expected = np.zeros(written.shape)
            expected[inner] = image.ordered(self.source, image.from_channels_last)
            got, rounding = self._result(from_bfloat16(self.result)), 2.0**-8
        else:
            source = from_bfloat16(self.source)
            expected = image.ordered(source, image.from_channels_last, padding)[inner]
            got, rounding = self._result(self.result.view(np.float32)), 2.0**-24
        errors = np.abs(got - expected)[written] / np.maximum(rounding * np.abs(expected[written]), 1e-30)
        return float(errors.max()), int(written.sum())

    def _result(self, values: NDArray[np.generic]) -> NDArray[np.generic]:
        return self.image.ordered(values, self.image.to_channels_last, self.image.padding if self.is_forward else 0)


def execute(library: Library, image: Image, direction: Direction) -> ExecutedLaunch:
    """The launch for the image, with some tiles of one of its images executed in the place of all: the first and the
    last, which write more padding, and some between them."""
    problem = InputProblem(image, direction)
    launch = input_launch(library.tree, problem.placed, direction)
    kernel, tiles = library.kernel(launch), len(launch.layers) // image.batch
    stride, first = -(-tiles // EXECUTED_TILES), image.batch // 2 * tiles
    between = range(stride // 2, tiles, stride)
    executed_tiles = sorted({0, *between, tiles - 1})
    kinds, written = [], 0
    for tile in executed_tiles:
        executed = Block(kernel, first + tile, problem.memory).run()
        error, values = problem.error()
        kinds.append(Kind(image, values - written, Trace(executed, problem.memory), error))
        written = values
    stands_in = [between[min(tile // stride, len(between) - 1)] for tile in range(tiles)]
    stands_in[0], stands_in[-1] = 0, tiles - 1
    blocks = [executed_tiles.index(tile) for _ in range(image.batch) for tile in stands_in]
    return ExecutedLaunch(kinds, blocks, launch, library.resources[launch.kernel])
