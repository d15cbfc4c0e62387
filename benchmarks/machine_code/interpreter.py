"""Executes one block of a kernel, all its warps together, and records what each warp has executed.

Lanes that have come to the lowest address run first. A lane waits at a convergence barrier (BSYNC) for those that set
out with it, and at the block's barrier (BAR) for all; waiting lanes go on when no other lane can.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .integers import WIDTHS
from .memory import Addresses, BadAccess, GlobalMemory, units
from .sass import BYTES, Address, Instruction, Name, Register
from .semantics import execute
from .step import Lanes, Registers, Step

NOT_WAITING, BLOCK_BARRIER = -1, 16  # convergence barriers are 0 to 15
LANE_BITS = (np.uint32(1) << np.arange(32, dtype=np.uint32))[None]
MAX_STEPS = 1_000_000
# What has no effect here: hints, and synchronisation of a warp, whose lanes run together wherever they can.
NO_EFFECT = {"NOP", "YIELD"}


@dataclass(frozen=True)
class Executed:
    """An instruction executed by all warps that were at it."""

    instruction: Instruction
    present: Lanes  # the lanes that were at it; `active`: those whose guard held
    active: Lanes
    addresses: NDArray[np.integer[Any]] | None = None  # of lanes that access memory, else of no meaning
    width: int = 0  # of that access, in bytes
    jumps: Lanes | None = None  # where it is a jump: the lanes that took it


@dataclass(frozen=True)
class Kernel:
    """A kernel's code and one launch of it."""

    code: Sequence[Instruction]
    constants: bytes  # constant bank 0
    threads: int
    shared_bytes: int


@dataclass
class Block:
    kernel: Kernel
    index: int
    memory: GlobalMemory
    trace: list[Executed] = field(default_factory=list)

    def __post_init__(self) -> None:
        warps = self.kernel.threads // 32
        self.registers = Registers.of(warps)
        self.shared = np.zeros(self.kernel.shared_bytes, np.uint8)
        self.live = np.ones((warps, 32), bool)
        self.next = np.zeros((warps, 32), np.int64)  # the index of each lane's next instruction
        self.waits_at = np.full((warps, 32), NOT_WAITING)

    def run(self) -> list[Executed]:
        """Executes the block to its end; returns what was executed, in order."""
        with np.errstate(all="ignore"):
            while self.live.any():
                ready = self.live & (self.waits_at == NOT_WAITING)
                if not ready.any():
                    self._release()
                    continue
                at = int(self.next[ready].min())
                self.trace.append(self._execute(self.kernel.code[at], ready & (self.next == at)))
                if len(self.trace) > MAX_STEPS:
                    raise RuntimeError(f"no end after {MAX_STEPS} instructions, at {self.kernel.code[at]}")
        return self.trace

    def _execute(self, instruction: Instruction, present: Lanes) -> Executed:
        active = present & self.registers.truth(instruction.guard)
        self.next[present] += 1
        step = Step(instruction, active, self.registers, self.kernel.constants)
        if instruction.opcode in JUMPS:
            JUMPS[instruction.opcode](self, step)
            follows = instruction.address // BYTES + 1
            return Executed(instruction, present, active, jumps=present & (self.next != follows))
        if not active.any() or instruction.opcode in NO_EFFECT:
            return Executed(instruction, present, active)
        if instruction.opcode in ACCESSES:
            addresses, width = ACCESSES[instruction.opcode](self, step)
            return Executed(instruction, present, active, addresses, width)
        if instruction.opcode in ("LDC", "ULDC"):
            at = step.constant_at(step.operand(1, Address))
            execute(step)
            return Executed(instruction, present, active, np.broadcast_to(at, active.shape))
        if instruction.opcode in ("S2R", "S2UR"):
            self._special_register(step)
        else:
            execute(step)
        return Executed(instruction, present, active)

    def _release(self) -> None:
        """Lets lanes go on whose barrier is complete."""
        released = np.zeros_like(self.live)
        for barrier in np.unique(self.waits_at[self.live]):
            waiting = self.live & (self.waits_at == barrier)
            if barrier == BLOCK_BARRIER:
                released |= waiting if (waiting == self.live).all() else False
                continue
            arrived = np.where(waiting | ~self.live, LANE_BITS, 0).sum(1, keepdims=True).astype(np.uint32)
            released |= waiting & (self.registers.barriers[barrier] & ~arrived == 0)
        if not released.any():
            raise RuntimeError("deadlock: lanes of the block wait for each other at different barriers")
        self.waits_at[released] = NOT_WAITING

    def _special_register(self, step: Step) -> None:
        warps = len(self.live)
        values = {
            "SR_TID.X": np.arange(32 * warps).reshape(warps, 32),
            "SR_LANEID": np.arange(32)[None],
            "SR_CTAID.X": np.full((1, 1), self.index),
            "SR_CgaCtaId": np.zeros((1, 1), np.int64),  # no clusters
        }
        name = step.operand(1, Name)
        if name.text not in values:
            raise step.unknown()
        step.write(0, values[name.text])


# Control flow


def _target(step: Step) -> int:
    return step.number(len(step.instruction.operands) - 1) // BYTES


def _check_modifiers(step: Step, known: str) -> None:
    if not set(known.split()).issuperset(step.instruction.modifiers):
        raise step.unknown()


def _branch(block: Block, step: Step) -> None:
    _check_modifiers(step, "U")
    taken = step.active & step.truth(0) if len(step.instruction.operands) > 1 else step.active
    block.next[taken] = _target(step)


def _call(block: Block, step: Step) -> None:
    _check_modifiers(step, "REL NOINC")
    block.next[step.active] = _target(step)


def _return(block: Block, step: Step) -> None:
    _check_modifiers(step, "REL NODEC")
    register = step.operand(0, Register)
    block.next[step.active] = block.registers.words["R"][register.index][step.active] // BYTES


def _exit(block: Block, step: Step) -> None:
    _check_modifiers(step, "")
    block.live &= ~step.active


def _barrier_number(step: Step) -> int:
    name = step.operand(0, Name)
    return int(name.text.removeprefix("B"))


def _set_convergence(block: Block, step: Step) -> None:
    _check_modifiers(step, "")
    together = np.where(step.active, LANE_BITS, 0).sum(1, keepdims=True).astype(np.uint32)
    np.copyto(block.registers.barriers[_barrier_number(step)], together, where=step.active)


def _converge(block: Block, step: Step) -> None:
    _check_modifiers(step, "")
    block.waits_at[step.active] = _barrier_number(step)


def _block_barrier(block: Block, step: Step) -> None:
    _check_modifiers(step, "SYNC DEFER_BLOCKING")
    block.waits_at[step.active] = BLOCK_BARRIER


JUMPS: dict[str, Callable[[Block, Step], None]] = {
    "BRA": _branch,
    "CALL": _call,
    "RET": _return,
    "EXIT": _exit,
    "BSSY": _set_convergence,
    "BSYNC": _converge,
    "BAR": _block_barrier,
}

# Memory accesses: each returns the addresses and the width


def _width(step: Step) -> int:
    _check_modifiers(step, "E U8 U16 64 128 CONSTANT EF EL LU NA")
    return next((WIDTHS[m] for m in step.instruction.modifiers if m in WIDTHS), 4)


def _load_global(block: Block, step: Step) -> tuple[Addresses, int]:
    at, width, active = step.memory_at(1), _width(step), step.active
    loaded = _located(step, lambda: block.memory.load(at[active], width))
    for part, word in enumerate(loaded):
        words = np.zeros(active.shape, np.uint32)
        words[active] = word
        step.write(0, words, part)
    return at, width


def _store_global(block: Block, step: Step) -> tuple[Addresses, int]:
    at, width, active = step.memory_at(0), _width(step), step.active
    words = [word[active] for word in _stored(block, step, width)]
    _located(step, lambda: block.memory.store(at[active], width, words))
    return at, width


def _stored(block: Block, step: Step, width: int) -> list[NDArray[np.uint32]]:
    """The registers of operand 1."""
    register = step.operand(1, Register)
    words = block.registers.words[register.file]
    is_zero = register.index == 255
    return [words[register.index + (0 if is_zero else k)] for k in range(max(1, width // 4))]


def _located(step: Step, access: Callable[[], list[NDArray[np.uint32]] | None]) -> list[NDArray[np.uint32]]:
    try:
        return access() or []
    except BadAccess as error:
        raise BadAccess(f"{error}, by {step.instruction}") from error


def _shared_places(block: Block, step: Step, i: int) -> tuple[NDArray[np.int64], int]:
    at, width = step.memory_at(i).astype(np.int64) & 0xFFFFFFFF, _width(step)
    used = at[step.active]
    if (used % width).any() or (used + width > block.shared.size).any():
        raise BadAccess(f"outside of {block.shared.size} bytes of shared memory, or misaligned: {step.instruction}")
    return at, width


def _load_shared(block: Block, step: Step) -> tuple[NDArray[np.int64], int]:
    at, width = _shared_places(block, step, 1)
    view, active = units(block.shared, width), step.active
    for part in range(max(1, width // 4)):
        words = np.zeros(active.shape, np.uint32)
        words[active] = view[at[active] // view.itemsize + part]
        step.write(0, words, part)
    return at, width


def _store_shared(block: Block, step: Step) -> tuple[NDArray[np.int64], int]:
    at, width = _shared_places(block, step, 0)
    view, active = units(block.shared, width), step.active
    for part, word in enumerate(_stored(block, step, width)):
        view[at[active] // view.itemsize + part] = word[active].astype(view.dtype)
    return at, width


ACCESSES: dict[str, Callable[[Block, Step], tuple[NDArray[np.integer], int]]] = {
    "LDG": _load_global,
    "STG": _store_global,
    "LDS": _load_shared,
    "STS": _store_shared,
}
