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

SM_THREADS, SM_BLOCKS, SM_REGISTERS, SM_SHARED = 2048, 32, 65536, 227 << 10  # of sm_90
RESERVED_SHARED = 1 << 10  # bytes a block, which cuobjdump counts with the kernel's


@dataclass(frozen=True)
class Chip:
    name: str
    ghz: float
    copy_rate: float  # of memory, GB/s: what a copy reaches, reads and writes together


CHIPS = (Chip("H200", 1.755, 4300), Chip("H100", 1.755, 3000))


@dataclass(frozen=True)
class Run:
    """A launch on a chip, with what starts and ends it."""

    microseconds: float
    bytes: int  # to and from DRAM
    instructions: int  # of warps
    issue_slots_used: float


def blocks_per_sm(resources: Resources, threads: int, dynamic_shared: int) -> int:
    """How many blocks of a kernel an SM of sm_90 holds."""
    registers = -(-resources.registers // 8) * 8 * threads
    shared = max(resources.shared + dynamic_shared, RESERVED_SHARED)
    return min(SM_THREADS // threads, SM_BLOCKS, SM_REGISTERS // registers, SM_SHARED // shared)


def run(chip: Chip, kinds: Sequence[Trace], launch: Sequence[int], blocks: int) -> Run:
    """Runs a launch whose block i has the trace `kinds[launch[i]]`, `blocks` of them on an SM at a time."""
    source = HERE / "chip_model.cpp"
    program = compiled("", ["g++", "-std=c++17", "-O2", source], [source, *HERE.glob("chip_*.h")])
    with tempfile.NamedTemporaryFile() as file:
        for array in _flattened(kinds, launch):
            file.write(np.uint64(len(array)).tobytes() + array.tobytes())
        file.flush()
        command = [program, file.name, str(chip.ghz), str(chip.copy_rate), str(blocks)]
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
