"""The time of a launch by chip_model.cpp."""

import json
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .compile import HERE, compiled
from .cubin import Resources
from .trace import Trace

SM_THREADS, SM_BLOCKS, SM_REGISTERS = 2048, 32, 65536
RESERVED_SHARED = 1 << 10  # bytes a block, which cuobjdump counts with the kernel's


@dataclass(frozen=True)
class Chip:
    name: str
    sms: int
    ghz: float
    copy_rate: float  # of memory, GB/s: what a copy reaches, reads and writes together
    l2_rate: float  # GB/s; judged, as is the copy rate: 0.9 of memory's own
    shared: int  # of an SM, bytes
    runs_sm_90: bool  # else it stands in for the chip's own machine code


CHIPS = (
    Chip("H200", 132, 1.755, 4300, 6000, 227 << 10, True),
    Chip("H100", 132, 1.755, 3000, 6000, 227 << 10, True),
    Chip("A100", 108, 1.410, 1800, 4000, 163 << 10, False),
    Chip("B200", 148, 1.850, 7200, 10000, 227 << 10, False),
)


@dataclass(frozen=True)
class Run:
    """A launch on a chip, with what starts and ends it."""

    microseconds: float
    bytes: int  # to and from DRAM
    instructions: int  # of warps
    issue_slots_used: float


def blocks_per_sm(chip: Chip, resources: Resources, threads: int, dynamic_shared: int) -> int:
    """How many blocks of a kernel an SM holds."""
    registers = -(-resources.registers // 8) * 8 * threads
    shared = max(resources.shared + dynamic_shared, RESERVED_SHARED)
    return min(SM_THREADS // threads, SM_BLOCKS, SM_REGISTERS // registers, chip.shared // shared)


def run(chip: Chip, kinds: Sequence[Trace], launch: Sequence[int], blocks: int) -> Run:
    """Runs a launch whose block i has the trace `kinds[launch[i]]`, `blocks` of them on an SM at a time."""
    source = HERE / "chip_model.cpp"
    program = compiled("", ["g++", "-std=c++17", "-O2", source], [source, *HERE.glob("chip_*.h")])
    with tempfile.NamedTemporaryFile() as file:
        for array in _flattened(kinds, launch):
            file.write(np.uint64(len(array)).tobytes() + array.tobytes())
        file.flush()
        rates = (chip.sms, chip.ghz, chip.copy_rate, chip.l2_rate)
        command = [program, file.name, *map(str, rates), str(blocks)]
        return Run(**json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def _flattened(kinds: Sequence[Trace], launch: Sequence[int]) -> list[np.ndarray]:
    """Records, segments, (begin, end) of each warp's records and of each kind's warps, and the launch."""
    records = [warp.copy() for kind in kinds for warp in kind.warps]
    first_segments = np.cumsum([0, *(len(kind.segments) for kind in kinds)], dtype=np.uint32)
    of_warps = np.repeat(first_segments[:-1], [len(kind.warps) for kind in kinds])
    for warp, first in zip(records, of_warps, strict=True):
        warp["first_segment"] += first
    return [
        np.concatenate(records),
        np.concatenate([kind.segments for kind in kinds]),
        _spans([len(warp) for warp in records]),
        _spans([len(kind.warps) for kind in kinds]),
        np.array(launch, np.uint32),
    ]


def _spans(lengths: Sequence[int]) -> np.ndarray:
    ends = np.cumsum([0, *lengths], dtype=np.uint32)
    return np.stack([ends[:-1], ends[1:]], 1)
