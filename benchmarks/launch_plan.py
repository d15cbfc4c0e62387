"""python -m benchmarks.launch_plan: how one launch over ResNet-50's weights loads a GPU.

The CUDA kernels run on the tests' emulator, which counts each block's bytes, so that no launch rule is duplicated here.
Blocks are then scheduled on the SMs of an H200 as in hardware, as if time were proportional to bytes.
"""

import heapq
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from . import layers, machine
from .harness import Case
from .providers import Setting

sys.path.insert(0, str(machine.ROOT / "tests" / "simt"))
import emulator as simt

SMS, THREADS_PER_SM = 132, 1024  # of an H100 or H200; with 64 registers each
SATURATING = 29 << 10  # bytes in flight on an SM that saturate an H200's memory
SETTING = Setting("cpu", torch.float32, torch.bfloat16)
# Bytes read and written per value, and per filter: gain, statistics, the gain's gradient.
PER_VALUE = {"forward": (4, 2), "backward": (6, 4)}
PER_FILTER = {"forward": (4, 8), "backward": (12, 4)}
Direction = Literal["forward", "backward"]


@dataclass(frozen=True)
class Plan:
    case: Case
    direction: Direction
    blocks: list[simt.Block]

    @property
    def values(self) -> list[float]:
        """The values of each block, solved from the bytes that it reads and writes."""
        (read, written), (read_once, written_once) = PER_VALUE[self.direction], PER_FILTER[self.direction]
        divisor = read * written_once - written * read_once
        return [(b.read * written_once - b.written * read_once) / divisor for b in self.blocks]

    @property
    def moved(self) -> list[int]:
        return [block.read + block.written for block in self.blocks]

    @property
    def over_floor(self) -> float:
        """Bytes moved / bytes that any implementation must move."""
        return sum(self.moved) / self.case.bytes_min(self.direction, SETTING)

    @property
    def blocks_per_sm(self) -> int:
        return THREADS_PER_SM // self.blocks[0].threads

    @property
    def in_flight(self) -> float:
        """Bytes that an SM's blocks request before using the first of them, averaged over the bytes read."""
        return self.blocks_per_sm * sum(b.read**2 for b in self.blocks) / sum(b.read for b in self.blocks)

    def tail(self, slots: int | None = None) -> float:
        """Time of the launch / time if all slots were busy until its end."""
        slots = slots or SMS * self.blocks_per_sm
        return makespan(self.moved, slots) / (sum(self.moved) / slots)


def makespan(costs: Sequence[float], slots: int) -> float:
    """When the last block ends if each starts in order as soon as a slot is free."""
    ends = [0.0] * slots
    for cost in costs:
        heapq.heapreplace(ends, ends[0] + cost)
    return max(ends)


def plan(emulator: simt.Emulator, case: Case, direction: Direction) -> Plan:
    """Counts a run on zeros, float32 to bfloat16."""
    shapes = [(shape[0], math.prod(shape[1:])) for shape in case.shapes]
    weights = [torch.zeros(shape, dtype=SETTING.dtype) for shape in shapes]
    gains, ones = [torch.zeros(k) for k, _ in shapes], [1.0] * len(shapes)
    if direction == "forward":
        emulator.forward(weights, SETTING.out_dtype, gains, ones, ones)
    else:
        grads = [torch.zeros(shape, dtype=SETTING.out_dtype) for shape in shapes]
        emulator.backward(grads, weights, gains, torch.zeros(sum(k for k, _ in shapes), 2), ones)
    return Plan(case, direction, emulator.blocks())


def spread(values: Sequence[float], unit: float = 1) -> str:
    return " / ".join(f"{f(values) / unit:.4g}" for f in (min, statistics.median, max))


def launch_table(plans: Sequence[Plan]) -> Table:
    rows = {
        "blocks": lambda p: f"{len(p.blocks)}",
        "blocks an SM": lambda p: f"{len(p.blocks) / SMS:.1f}",
        "waves": lambda p: f"{len(p.blocks) / SMS / p.blocks_per_sm:.1f}",
        "values a block, min / median / max": lambda p: spread(p.values),
        "KB a block, min / median / max": lambda p: spread(p.moved, 1024),
        "bytes over the floor": lambda p: f"{p.over_floor:.3f}",
        f"KB in flight an SM ({SATURATING >> 10} saturate)": lambda p: f"{p.in_flight / 1024:.1f}",
        "time over the ideal, for the tail": lambda p: f"{p.tail():.3f}",
    }
    table = Table("", *(p.direction for p in plans), title=f"One launch for {plans[0].case.name}, {SETTING}")
    for name, text in rows.items():
        table.add_row(name, *map(text, plans))
    return table


def length_table(emulator: simt.Emulator, network: layers.Network) -> Table:
    """A full block for each length of filter."""
    table = Table("n", "share of weights", "values a block", "loads a thread, in 16 bytes", "KB in flight an SM")
    table.title = "forward; backward: by length of filter"
    weights = {}
    for _, shape in network.layers:
        n = math.prod(shape[1:])
        weights[n] = weights.get(n, 0) + shape[0] * n
    for n, total in sorted(weights.items()):
        case = Case(f"n = {n}", ((128, n),))
        plans = [plan(emulator, case, direction) for direction in ("forward", "backward")]
        first = [p.blocks[0] for p in plans]
        loads = "; ".join(f"{b.read / 16 / b.threads:.1f}" for b in first)
        flight = "; ".join(f"{p.blocks_per_sm * p.blocks[0].read / 1024:.1f}" for p in plans)
        table.add_row(str(n), f"{total / network.weights:.1%}", f"{plans[1].values[0]:.0f}", loads, flight)
    return table


def main() -> None:
    emulator = simt.Emulator(simt.load(simt.build(), "simt_check"))
    network = layers.load("resnet50")
    case = Case(network.name, tuple(shape for _, shape in network.layers))
    console = Console()
    console.print(launch_table([plan(emulator, case, direction) for direction in ("forward", "backward")]))
    console.print(length_table(emulator, network))


if __name__ == "__main__":
    main()
