"""What the instructions that a warp has executed ask of the chip: the pipe of each, and the memory it moves.

The records are the input of chip_model.cpp, which reads them by chip_traces.h.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .interpreter import Executed
from .memory import GlobalMemory
from .sass import NO_SCOREBOARD, Instruction
from .step import UnknownInstruction

# In the order of `Pipe` in chip_traces.h.
PIPES = (
    "alu", "fma", "special", "constant", "uniform_constant", "load", "store", "cached_load", "cached_store", "shared",
    "shuffle", "barrier", "jump", "system_register",
)  # fmt: skip
RECORD = np.dtype(
    [
        ("pipe", "u1"),
        ("stall", "u1"),
        ("sets_when_written", "u1"),
        ("sets_when_read", "u1"),
        ("waits_for", "u1"),
        ("passes", "u1"),  # through the pipe; of a memory access, wavefronts
        ("latency", "u2"),  # of the special function unit, in cycles
        ("constant", "u4"),  # the address in the constant bank
        ("first_segment", "u4"),
        ("segments", "u4"),
    ]
)
# A piece of 256 bytes of global memory, which goes to one channel: how many of its sectors of 32 bytes are moved, and
# how many bytes go to or from DRAM. Of what is cached, a piece is one sector.
SEGMENT = np.dtype([("address", "u8"), ("sectors", "u4"), ("bytes", "u4")])
SECTOR, LINE, SEGMENT_BYTES, BANKS = 32, 128, 256, 32

ALU = (
    "IADD3 VIADD VIMNMX VIADDMNMX LEA SHF LOP3 PLOP3 ISETP FSETP SEL FSEL PRMT FMNMX MOV CS2R P2R R2P R2UR I2FP F2FP "
    "VOTE VOTEU NOP YIELD BSSY BSYNC EXIT"
)
PIPE_OF = {
    **dict.fromkeys(ALU.split(), "alu"),
    **dict.fromkeys(("FADD", "FMUL", "FFMA", "HADD2", "HFMA2", "IMAD", "DADD", "DMUL", "DFMA", "DSETP"), "fma"),
    **dict.fromkeys(("MUFU", "F2F", "I2F", "F2I", "FCHK"), "special"),
    **dict.fromkeys(("S2R", "S2UR"), "system_register"),
    **dict.fromkeys(("LDS", "STS"), "shared"),
    **dict.fromkeys(("BRA", "CALL", "RET"), "jump"),
    "LDC": "constant",
    "ULDC": "uniform_constant",
    "LDG": "load",
    "STG": "store",
    "SHFL": "shuffle",
    "BAR": "barrier",
}
SPECIAL_LATENCY = {"F2F": 30}  # cycles; of the others 22
HALF_RATE = {"IMAD", "DADD", "DMUL", "DFMA", "DSETP"}  # a warp takes two passes through its pipe


def pipe_of(instruction: Instruction) -> str:
    opcode = instruction.opcode
    pipe = PIPE_OF.get(opcode) or (PIPE_OF.get(opcode.removeprefix("U")) and "alu")
    if pipe is None:
        raise UnknownInstruction(f"no pipe is known for {instruction}")
    return pipe


class Trace:
    """The records of one block: each warp's, and the segments that they refer to."""

    def __init__(self, executed: Sequence[Executed], memory: GlobalMemory) -> None:
        warps = len(executed[0].present)
        self._memory = memory
        self._segments: list[tuple[int, int, int]] = []
        self._loaded: list[set[int]] = [set() for _ in range(warps)]  # sectors that each warp has on their way
        found = [[self._record(e, w) for e in executed if e.present[w].any()] for w in range(warps)]
        self.warps: list[NDArray[np.void]] = [np.array(records, RECORD) for records in found]
        self.segments = np.array(self._segments, SEGMENT)
        self.bytes_moved = _bytes_moved(executed)

    @property
    def instructions(self) -> int:
        """Executed by all warps."""
        return sum(map(len, self.warps))

    def _record(self, executed: Executed, warp: int) -> tuple[int, ...]:
        instruction, active = executed.instruction, executed.active[warp]
        pipe = pipe_of(instruction)
        control = [instruction.stall, instruction.sets_when_written, instruction.sets_when_read, instruction.waits_for]
        control[0] = max(1, control[0])
        passes, latency, constant, first = 1, 0, 0, len(self._segments)
        if not active.any() and pipe not in ("alu", "fma"):  # it is issued, and nothing more
            return PIPES.index("alu"), control[0], NO_SCOREBOARD, NO_SCOREBOARD, control[3], 1, 0, 0, first, 0
        if pipe == "jump" and executed.jumps is not None and not executed.jumps[warp].any():
            pipe = "alu"
        elif pipe in ("constant", "uniform_constant"):
            constant = int(executed.addresses[warp][active][0])
        elif pipe == "special":
            latency = SPECIAL_LATENCY.get(instruction.opcode, 22)
        elif pipe == "fma" and instruction.opcode in HALF_RATE:
            passes = 2
        elif pipe == "shared":
            passes = _bank_passes(executed.addresses[warp][active], executed.width)
        elif pipe in ("load", "store"):
            addresses = executed.addresses[warp][active].astype(np.int64)
            pipe, passes = self._access(pipe, addresses, executed.width, warp)
        return PIPES.index(pipe), *control, passes, latency, constant, first, len(self._segments) - first

    def _access(self, pipe: str, addresses: NDArray[np.int64], width: int, warp: int) -> tuple[str, int]:
        """Adds the segments that the access moves; returns its pipe and its wavefronts."""
        sectors = np.unique(np.concatenate([addresses // SECTOR, (addresses + width - 1) // SECTOR]))
        lines = len(np.unique(sectors // (LINE // SECTOR)))
        passes = max(lines, len(addresses) * width // LINE, 1)
        wanted = min(SECTOR, len(addresses) * width / len(sectors))  # bytes of each sector
        if not self._memory.tensor_at(int(addresses[0])).is_streamed:
            self._segments += [(sector, 1, SECTOR) for sector in sectors.tolist()]
            return f"cached_{pipe}", passes
        if pipe == "load":
            on_their_way = self._loaded[warp]
            sectors = np.array([s for s in sectors.tolist() if s not in on_their_way], np.int64)
            on_their_way.update(sectors.tolist())
            wanted = SECTOR
        segments, counts = np.unique(sectors // (SEGMENT_BYTES // SECTOR), return_counts=True)
        self._segments += [(s, c, round(c * wanted)) for s, c in zip(segments.tolist(), counts.tolist(), strict=True)]
        return pipe, passes


def _bytes_moved(executed: Sequence[Executed]) -> int:
    """Bytes that the block reads from global memory and writes: once each where lanes access the same."""
    accesses = [e for e in executed if e.addresses is not None and pipe_of(e.instruction) in ("load", "store")]
    return sum(e.width * len(np.unique(e.addresses[e.active])) for e in accesses)


def _bank_passes(addresses: NDArray[np.int64], width: int) -> int:
    """Wavefronts of an access to shared memory: 64- and 128-bit accesses go by halves and quarters of the warp, each as
    often as its busiest bank has words to give."""
    if len(np.unique(addresses)) == 1:
        return 1
    words, parts = max(1, width // 4), max(1, width // 4)
    lanes = 32 // parts
    passes = 0
    for begin in range(0, len(addresses), lanes):
        part = addresses[begin : begin + lanes] // 4
        distinct = np.unique(part[:, None] + np.arange(words))
        passes += int(np.bincount(distinct % BANKS).max())
    return passes
