"""One instruction, executed by all warps of a block that have come to it: its operands as arrays over warps and lanes.

Arrays have the shape (warps, 32), or (warps, 1) where they come from uniform registers; both take part in the same
arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from .memory import Addresses, Words
from .sass import TRUE, ZERO, Address, Instruction, Number, Operand, Predicate, Register

Lanes = NDArray[np.bool_]
Reals = NDArray[np.floating[Any]]
Kind = TypeVar("Kind", bound=Operand)


class UnknownInstruction(Exception):  # noqa: N818
    """The interpreter has no meaning for it; add one to semantics.py."""


@dataclass(frozen=True)
class Registers:
    """A block's registers. The last of each kind is constant: 0, or true."""

    words: dict[str, Words]  # R: (256, warps, 32), UR: (64, warps, 1)
    truths: dict[str, NDArray[np.bool_]]  # P: (8, warps, 32), UP: (8, warps, 1)
    barriers: Words  # (16, warps, 32): for each lane, which lanes of its warp a convergence barrier waits for

    @staticmethod
    def of(warps: int) -> "Registers":
        words = {"R": np.zeros((256, warps, 32), np.uint32), "UR": np.zeros((64, warps, 1), np.uint32)}
        truths = {"P": np.zeros((8, warps, 32), bool), "UP": np.zeros((8, warps, 1), bool)}
        for each in truths.values():
            each[TRUE] = True
        return Registers(words, truths, np.zeros((16, warps, 32), np.uint32))

    def truth(self, predicate: Predicate) -> NDArray[np.bool_]:
        value = self.truths[predicate.file][predicate.index]
        return ~value if predicate.inverted else value


@dataclass(frozen=True)
class Step:
    instruction: Instruction
    active: Lanes  # (warps, 32): the lanes that execute it
    registers: Registers
    constants: bytes  # constant bank 0

    def unknown(self) -> UnknownInstruction:
        return UnknownInstruction(f"unknown instruction: {self.instruction}")

    def has(self, modifier: str) -> bool:
        return modifier in self.instruction.modifiers

    def operand(self, i: int, kind: type[Kind]) -> Kind:
        """Operand i, which must be of this kind."""
        operands = self.instruction.operands
        operand = operands[i] if i < len(operands) else None
        if not isinstance(operand, kind):
            raise self.unknown()
        return operand

    def number(self, i: int) -> int:
        """Operand i, an immediate integer."""
        return int(self.operand(i, Number).value)

    # Reading

    def _raw(self, i: int) -> Words:
        """Operand i as bits, before negation and the like."""
        operand = self.instruction.operands[i]
        if isinstance(operand, Register):
            bits = self.registers.words[operand.file][operand.index]
            if operand.half is not None:
                bits = bits >> np.uint32(16 * operand.half) & np.uint32(0xFFFF)
            return bits
        if isinstance(operand, Number):
            is_bits = isinstance(operand.value, int)
            bits = np.uint32(operand.value & 0xFFFFFFFF) if is_bits else np.float32(operand.value).view(np.uint32)
            return np.full((1, 1), bits)
        if isinstance(operand, Address) and operand.is_constant:
            return self.constant_words(operand, 4)[0]
        raise self.unknown()

    def bits(self, i: int) -> Words:
        """Operand i as a 32-bit integer."""
        bits, operand = self._raw(i), self.instruction.operands[i]
        if isinstance(operand, Register):
            if operand.absolute:
                raise self.unknown()
            bits = ~bits if operand.inverted else bits
            bits = np.uint32(0) - bits if operand.negated else bits
        return bits

    def signed(self, i: int) -> NDArray[np.int32]:
        return self.bits(i).view(np.int32)

    def reals(self, i: int) -> Reals:
        """Operand i as a float."""
        bits, operand = self._raw(i), self.instruction.operands[i]
        if isinstance(operand, Register):
            bits = bits & np.uint32(0x7FFFFFFF) if operand.absolute else bits
            bits = bits ^ np.uint32(0x80000000) if operand.negated else bits
        return bits.view(np.float32)

    def pair(self, i: int) -> NDArray[np.uint64]:
        """Operand i as 64 bits in two registers."""
        return pair_of(self.registers, self.operand(i, Register))

    def doubles(self, i: int) -> NDArray[np.float64]:
        """Operand i as a double."""
        operand = self.instruction.operands[i]
        if isinstance(operand, Number) and isinstance(operand.value, float):
            return np.full((1, 1), operand.value)
        register = self.operand(i, Register)
        value = pair_of(self.registers, Register(register.file, register.index)).view(np.float64)
        value = np.abs(value) if register.absolute else value
        return -value if register.negated else value

    def truth(self, i: int) -> NDArray[np.bool_]:
        return self.registers.truth(self.operand(i, Predicate))

    def predicates(self, first: int) -> int:
        """How many operands from `first` on are predicates."""
        count = 0
        for operand in self.instruction.operands[first:]:
            if not isinstance(operand, Predicate):
                break
            count += 1
        return count

    def constant_at(self, address: Address) -> NDArray[np.int64]:
        at = np.full((1, 1), address.offset, np.int64)
        for term in address.terms:
            at = at + self.registers.words[term.register.file][term.register.index].astype(np.int64) * term.scale
        return at

    def constant_words(self, address: Address, width: int) -> list[Words]:
        """The 32-bit words there; one word, filled with zeros, for less than 4 bytes."""
        at = np.broadcast_to(self.constant_at(address), self.active.shape)
        at = np.where(self.active, at, 0)
        unit = np.dtype(f"u{min(width, 4)}")
        if (at % min(width, 8)).any() or (at + width > len(self.constants)).any():
            raise IndexError(f"outside of the constant bank's {len(self.constants)} bytes: {self.instruction}")
        view = np.frombuffer(self.constants, unit, len(self.constants) // unit.itemsize)
        return [view[at // unit.itemsize + k].astype(np.uint32) for k in range(max(1, width // 4))]

    def memory_at(self, i: int) -> Addresses:
        """The addresses in operand i, of global or of shared memory."""
        address = self.operand(i, Address)
        at = np.full(self.active.shape, address.offset % 2**64, np.uint64)
        for term in address.terms:
            words = self.registers.words[term.register.file][term.register.index].astype(np.uint64)
            at += pair_of(self.registers, term.register) if term.is_pair else words * np.uint64(term.scale)
        return at

    # Writing

    def write(self, i: int, bits: Words | NDArray[np.integer], part: int = 0) -> None:
        """Writes operand i, or the register that is `part` after it, in the lanes that are active."""
        register = self.operand(i, Register)
        if register.index != ZERO[register.file]:
            target = self.registers.words[register.file][register.index + part]
            self._put(target, np.asarray(bits).astype(np.uint32, copy=False))

    def write_reals(self, i: int, value: NDArray[Any]) -> None:
        self.write(i, value.astype(np.float32, copy=False).view(np.uint32))

    def write_pair(self, i: int, value: NDArray[np.uint64]) -> None:
        self.write(i, low_word(value))
        self.write(i, low_word(value >> np.uint64(32)), part=1)

    def write_doubles(self, i: int, value: NDArray[Any]) -> None:
        self.write_pair(i, value.astype(np.float64, copy=False).view(np.uint64))

    def write_all(self, i: int, words: Sequence[Words]) -> None:
        for part, word in enumerate(words):
            self.write(i, word, part)

    def write_truth(self, i: int, value: NDArray[np.bool_]) -> None:
        predicate = self.operand(i, Predicate)
        if predicate.index != TRUE:
            self._put(self.registers.truths[predicate.file][predicate.index], value)

    def _put(self, target: NDArray[np.generic], value: NDArray[np.generic]) -> None:
        """A uniform register gets the value of its warp's first active lane."""
        where = self.active
        if target.shape[1] == 1:
            if value.shape[1] != 1:
                value = np.take_along_axis(value, where.argmax(1)[:, None], 1)
            where = where.any(1, keepdims=True)
        np.copyto(target, value, where=where)


def low_word(value: NDArray[np.uint64]) -> Words:
    return (value & np.uint64(0xFFFFFFFF)).astype(np.uint32)


def pair_of(registers: Registers, register: Register) -> NDArray[np.uint64]:
    """The 64 bits in a register and the one after it."""
    words = registers.words[register.file]
    if register.negated or register.inverted:
        raise NotImplementedError(f"a pair of registers with a sign: {register}")
    if register.index == ZERO[register.file]:
        return np.zeros((1, 1), np.uint64)
    return words[register.index].astype(np.uint64) | words[register.index + 1].astype(np.uint64) << np.uint64(32)
