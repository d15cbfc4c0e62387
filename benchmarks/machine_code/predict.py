"""A model's launches on sm_90: instructions a value, bytes and time, from one executed block for each kind of layer."""

import pathlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from . import chip, cubin, sass
from .interpreter import Block, Kernel
from .launches import Direction, Launch, launches, source_tree
from .problem import Image, Layer, Problem
from .trace import Trace

ARCHITECTURE = 90
PARAMETERS_AT = 0x210  # in constant bank 0 of sm_90; before them the sizes of blocks and grid


class LayoutError(Exception):
    """The library was not built from these sources."""


@dataclass(frozen=True)
class Kind:
    """Blocks that do the same, and one of them executed."""

    layer: Layer | Image
    values: int  # of the block
    trace: Trace
    error: float  # of its results, in units of what rounding explains: 1 or less is right

    @property
    def instructions_per_value(self) -> float:
        """Of threads: an instruction of a warp counts 32 times, whether or not all its lanes have values."""
        return 32 * self.trace.instructions / self.values


@dataclass(frozen=True)
class ExecutedLaunch:
    """A launch, the kinds of its blocks, and which of them each block is."""

    kinds: list[Kind]
    blocks: list[int]
    launch: Launch
    resources: cubin.Resources

    @property
    def instructions(self) -> int:
        """Of all its warps."""
        return sum(self.kinds[kind].trace.instructions for kind in self.blocks)

    @property
    def bytes_moved(self) -> int:
        """That its blocks read and write."""
        return sum(self.kinds[kind].trace.bytes_moved for kind in self.blocks)

    def on(self, where: chip.Chip) -> chip.Run:
        on_an_sm = chip.blocks_per_sm(where, self.resources, self.launch.threads, self.launch.shared_bytes)
        return chip.run(where, [kind.trace for kind in self.kinds], self.blocks, on_an_sm)


class Library:
    """The sm_90 kernels of a library."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path, self.tree = path, source_tree(path)
        self.resources = cubin.resources(path, ARCHITECTURE)
        self.listings = cubin.machine_code(path, ARCHITECTURE)

    def kernel(self, launch: Launch) -> Kernel:
        if launch.kernel not in self.resources:
            raise LayoutError(f"{self.path} has no kernel {launch.kernel}, which {self.tree} launches")
        resources = self.resources[launch.kernel]
        if resources.constant != PARAMETERS_AT + len(launch.parameters):
            raise LayoutError(
                f"{launch.kernel} of {self.path} takes {resources.constant - PARAMETERS_AT} bytes of parameters, but "
                f"{self.tree} passes {len(launch.parameters)}: build the library again"
            )
        sizes = struct.pack("<6I", launch.threads, 1, 1, len(launch.layers), 1, 1)
        constants = sizes.ljust(PARAMETERS_AT, b"\0") + launch.parameters
        code = sass.instructions(self.listings[launch.kernel])
        return Kernel(code, constants, launch.threads, resources.shared + launch.shared_bytes)

    def execute(self, layers: Sequence[Layer], direction: Direction) -> list[ExecutedLaunch]:
        """The launches for the layers, with one block of each kind of layer executed."""
        alike: dict[tuple[int, int], list[int]] = {}
        for i, layer in enumerate(layers):
            alike.setdefault(_kind(layer), []).append(i)
        representatives = {kind: members[len(members) // 2] for kind, members in alike.items()}
        problem = Problem(layers, direction, representatives.values())
        found = launches(self.tree, problem.placed, direction, problem.statistics_at, problem.grad_gain_at)
        kinds: dict[tuple[int, int], Kind] = {}
        for launch in found:
            kernel = self.kernel(launch)
            here = set(launch.layers)
            kinds |= {k: _execute_block(kernel, launch, problem, i) for k, i in representatives.items() if i in here}
        return [self._executed(launch, layers, kinds) for launch in found]

    def _executed(self, launch: Launch, layers: Sequence[Layer], kinds: dict[tuple[int, int], Kind]) -> ExecutedLaunch:
        blocks = [_kind(layers[i]) for i in launch.layers]
        used = list(dict.fromkeys(blocks))
        numbers = {kind: number for number, kind in enumerate(used)}
        return ExecutedLaunch(
            [kinds[kind] for kind in used], [numbers[kind] for kind in blocks], launch, self.resources[launch.kernel]
        )


def _kind(layer: Layer) -> tuple[int, int]:
    """Layers that agree in this have blocks that do the same, but for those at their ends."""
    return layer.n, layer.columns


def _execute_block(kernel: Kernel, launch: Launch, problem: Problem, i: int) -> Kind:
    """A block of layer i; not its last, which may have fewer filters."""
    blocks = [block for block, layer in enumerate(launch.layers) if layer == i]
    executed = Block(kernel, blocks[(len(blocks) - 1) // 2], problem.memory).run()
    layer = problem.layers[i]
    return Kind(layer, len(problem.written(i)) * layer.n, Trace(executed, problem.memory), problem.error(i))
