"""What each instruction of sm_90 computes. A table: opcode, the modifiers that are known, and a function of a Step.

Uniform instructions (UIADD3, ...) compute what those of the same name without U do. Control flow, barriers and memory
are the interpreter's. The letters of a modifier that only chooses a pipe or a cache policy are accepted and ignored.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .memory import Words
from .sass import Address, Name, Number, Predicate
from .step import Reals, Step, low_word

COMPARISONS = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip
WIDTHS = {"U8": 1, "U16": 2, "64": 8, "128": 16}
PREDICATES = 7  # that can be written


@dataclass(frozen=True)
class Meaning:
    run: Callable[[Step], None]
    modifiers: frozenset[str]


SEMANTICS: dict[str, Meaning] = {}


def instruction(opcodes: str, modifiers: str = "") -> Callable[[Callable[[Step], None]], Callable[[Step], None]]:
    def register(run: Callable[[Step], None]) -> Callable[[Step], None]:
        for opcode in opcodes.split():
            SEMANTICS[opcode] = Meaning(run, frozenset(modifiers.split()))
        return run

    return register


def execute(step: Step) -> None:
    """Computes the instruction, or raises UnknownInstruction."""
    opcode = step.instruction.opcode
    meaning = SEMANTICS.get(opcode) or SEMANTICS.get(opcode.removeprefix("U"))
    if meaning is None or not meaning.modifiers.issuperset(step.instruction.modifiers):
        raise step.unknown()
    meaning.run(step)


# Moves


@instruction("MOV")
def _move(s: Step) -> None:
    s.write(0, s.bits(1))


@instruction("R2UR")
def _to_uniform(s: Step) -> None:
    s.write(0, s.bits(1))


@instruction("CS2R", "32")
def _clear(s: Step) -> None:
    if s.operand(1, Name) != Name("SRZ"):
        raise s.unknown()
    s.write_all(0, [np.zeros((1, 1), np.uint32)] * (1 if s.has("32") else 2))


@instruction("LDC ULDC", "U8 U16 64")
def _load_constant(s: Step) -> None:
    width = next((WIDTHS[m] for m in s.instruction.modifiers), 4)
    s.write_all(0, s.constant_words(s.operand(1, Address), width))  # type: ignore[arg-type]


@instruction("SEL")
def _select(s: Step) -> None:
    s.write(0, np.where(s.truth(3), s.bits(1), s.bits(2)))


@instruction("PRMT")
def _permute(s: Step) -> None:
    """Each byte of the result: one of the eight of two registers, or its sign."""
    a, selector, b = np.broadcast_arrays(s.bits(1), s.bits(2), s.bits(3))
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    result = np.zeros(a.shape, np.uint64)
    for i in range(4):
        choice = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = both >> (choice & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        byte = np.where(choice & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        result |= byte << np.uint64(8 * i)
    s.write(0, low_word(result))


@instruction("SHFL", "IDX BFLY UP DOWN")
def _shuffle(s: Step) -> None:
    """Operands: whether the source is in range; result, value, lane, and limits of the segment."""
    value = np.broadcast_to(s.bits(2), s.active.shape)
    b, limits = s.bits(3).astype(np.int64) & 31, s.bits(4).astype(np.int64)
    lane, clamp, segment = np.arange(32)[None], limits & 31, limits >> 8 & 31
    last = lane & segment | clamp & ~segment
    if s.has("IDX"):
        source = lane & segment | b & ~segment
    elif s.has("BFLY"):
        source = lane ^ b
    else:
        source = lane - b if s.has("UP") else lane + b
    within = source >= last if s.has("UP") else source <= last
    source = np.broadcast_to(np.where(within, source, lane), s.active.shape)
    if (s.active & ~np.take_along_axis(s.active, source, 1)).any():
        raise ValueError(f"a lane reads one that does not take part: {s.instruction}")
    s.write(1, np.take_along_axis(value, source, 1))
    s.write_truth(0, within)


# Integers


@instruction("IADD3", "X")
def _add_three(s: Step) -> None:
    """Operands: result, up to two carries out, three terms, and with X two carries in. With X, a minus is a ~."""
    out = s.predicates(1)
    total = np.zeros((1, 1), np.uint64)
    for i in range(1 + out, 4 + out):
        term = s.instruction.operands[i]
        if getattr(term, "negated", False):
            total = total + (~(np.uint32(0) - s.bits(i))).astype(np.uint64) + np.uint64(not s.has("X"))
        else:
            total = total + s.bits(i)
    if s.has("X"):
        for i in range(4 + out, len(s.instruction.operands)):
            total = total + s.truth(i)
    s.write(0, low_word(total))
    for i in range(out):
        s.write_truth(1 + i, total >> np.uint64(32) > i)


@instruction("IMAD", "MOV IADD SHL U32 X WIDE HI")
def _multiply_add(s: Step) -> None:
    if s.has("WIDE") or s.has("HI"):
        if s.has("U32"):
            product = s.bits(1).astype(np.uint64) * s.bits(2)
        else:
            product = (s.signed(1).astype(np.int64) * s.signed(2)).view(np.uint64)
        total = product + s.pair(3)
        if s.has("HI"):
            s.write(0, low_word(total >> np.uint64(32)))
        else:
            s.write_pair(0, total)
        return
    total32 = s.bits(1) * s.bits(2) + s.bits(3)
    s.write(0, total32 + s.truth(4) if s.has("X") else total32)


@instruction("VIADD")
def _add(s: Step) -> None:
    s.write(0, s.bits(1) + s.bits(2))


def _least_or_greatest(s: Step, a: Words, b: Words, which: int) -> None:
    if not s.has("U32"):
        a, b = a.view(np.int32), b.view(np.int32)
    s.write(0, np.where(s.truth(which), np.minimum(a, b), np.maximum(a, b)))


@instruction("VIMNMX", "U32")
def _minimum(s: Step) -> None:
    _least_or_greatest(s, s.bits(1), s.bits(2), 3)


@instruction("VIADDMNMX", "U32")
def _minimum_of_sum(s: Step) -> None:
    _least_or_greatest(s, s.bits(1) + s.bits(2), s.bits(3), 4)


@instruction("LEA", "HI X SX32")
def _shifted_add(s: Step) -> None:
    """Operands: result, a carry out, a, b, with HI the upper half of a, the shift, a carry in. SX32 extends a's sign."""
    out = s.predicates(1)
    a, b = 1 + out, 2 + out
    if not s.has("HI"):
        shifted = low_word(s.bits(a).astype(np.uint64) << np.uint64(s.operand(3 + out, Number).value))  # type: ignore[union-attr]
        carry_in = 4 + out
    elif s.has("SX32"):
        shifted = low_word(
            (s.signed(a).astype(np.int64) << s.operand(3 + out, Number).value >> 32).view(np.uint64)  # type: ignore[union-attr]
        )
        carry_in = 4 + out
    else:
        both = s.bits(a).astype(np.uint64) | s.bits(3 + out).astype(np.uint64) << np.uint64(32)
        shifted = low_word(both << np.uint64(s.operand(4 + out, Number).value) >> np.uint64(32))  # type: ignore[union-attr]
        carry_in = 5 + out
    total = shifted.astype(np.uint64) + s.bits(b)
    if s.has("X"):
        total = total + s.truth(carry_in)
    s.write(0, low_word(total))
    if out:
        s.write_truth(1, total >> np.uint64(32) > 0)


@instruction("SHF", "L R U32 S32 U64 S64 HI W")
def _funnel_shift(s: Step) -> None:
    """Shifts the pair (operand 3, operand 1) by operand 2 and takes a half of it."""
    is_wide = s.has("U64") or s.has("S64")
    low, high, by = s.bits(1).astype(np.uint64), s.bits(3).astype(np.uint64), s.bits(2)
    limit = np.uint32(63 if is_wide else 32)
    by = (by & np.uint32(63 if is_wide else 31) if s.has("W") else np.minimum(by, limit)).astype(np.uint64)
    both = low | high << np.uint64(32)
    if s.has("L"):
        result = both << by >> np.uint64(32) if s.has("HI") else low << by
    elif not s.has("HI"):
        result = both >> by
    elif s.has("S32") or s.has("S64"):
        result = (high.astype(np.uint32).view(np.int32).astype(np.int64) >> by.astype(np.int64)).view(np.uint64)
    else:
        result = high >> by
    s.write(0, low_word(result))


@instruction("LOP3", "LUT")
def _logic(s: Step) -> None:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    out = s.predicates(0)  # whether any bit is set
    a, b, c = (s.bits(out + i) for i in (1, 2, 3))
    table = s.operand(out + 4, Number).value  # type: ignore[union-attr]
    result = np.zeros((1, 1), np.uint32)
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    s.write(out, result)
    if out:
        s.write_truth(0, result != 0)


# Predicates


@instruction("PLOP3", "LUT")
def _logic_of_predicates(s: Step) -> None:
    index = sum(s.truth(i).astype(np.int64) << shift for i, shift in ((2, 2), (3, 1), (4, 0)))
    for i in (0, 1):
        s.write_truth(i, s.operand(5 + i, Number).value >> index & 1 == 1)  # type: ignore[union-attr]


def _write_comparison(s: Step, result: NDArray[np.bool_]) -> None:
    """To operand 0, and its negation to operand 1, each combined with operand 4."""
    combine = np.logical_or if s.has("OR") else np.logical_and
    other = s.truth(4)
    s.write_truth(0, combine(result, other))
    s.write_truth(1, combine(~result, other))


@instruction("ISETP", "EQ NE LT LE GT GE U32 AND OR EX")
def _compare(s: Step) -> None:
    """With EX, of the upper halves; operand 5 is the result for the lower ones."""
    a, b = (s.bits(2), s.bits(3)) if s.has("U32") else (s.signed(2), s.signed(3))
    comparison = s.instruction.modifiers[0]
    result = COMPARISONS[comparison](a, b)
    if s.has("EX"):
        result = np.where(a == b, s.truth(5), result)
    _write_comparison(s, result)


@instruction("FSETP", "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU AND OR FTZ")
def _compare_reals(s: Step) -> None:
    """With U at the end of the comparison, NaN compares as true."""
    a, b = s.reals(2), s.reals(3)
    comparison = s.instruction.modifiers[0]
    unordered = np.isnan(a) | np.isnan(b)
    result = COMPARISONS[comparison[:2]](a, b)
    _write_comparison(s, result | unordered if comparison.endswith("U") else result & ~unordered)


@instruction("P2R")
def _predicates_to_register(s: Step) -> None:
    """The predicates whose bits the mask has; the other bits are operand 2's."""
    mask = np.uint32(s.operand(3, Number).value)  # type: ignore[union-attr]
    packed = np.zeros(s.active.shape, np.uint32)
    for i in range(PREDICATES):
        packed |= s.registers.truths["P"][i].astype(np.uint32) << np.uint32(i)
    s.write(0, s.bits(2) & ~mask | packed & mask)


@instruction("R2P")
def _register_to_predicates(s: Step) -> None:
    bits, mask = s.bits(1), s.operand(2, Number).value  # type: ignore[union-attr]
    for i in range(PREDICATES):
        if mask >> i & 1:
            np.copyto(s.registers.truths["P"][i], bits >> np.uint32(i) & np.uint32(1) == 1, where=s.active)


@instruction("VOTE VOTEU", "ANY ALL")
def _vote(s: Step) -> None:
    """Operands: a mask of the lanes whose predicate holds, or none; the vote; the predicate."""
    last = len(s.instruction.operands) - 1
    holds = s.truth(last) & s.active
    vote = (holds | ~s.active).all(1, keepdims=True) if s.has("ALL") else holds.any(1, keepdims=True)
    if not isinstance(s.instruction.operands[0], Predicate):
        s.write(0, (holds << np.arange(32)).sum(1, keepdims=True).astype(np.uint32))
    s.write_truth(last - 1, vote)


# Floating point. Subnormals are kept where the machine flushes them (FTZ), too: no value here comes near them.


@instruction("FADD", "FTZ")
def _add_reals(s: Step) -> None:
    s.write_reals(0, s.reals(1) + s.reals(2))


@instruction("FMUL", "FTZ D2")
def _multiply_reals(s: Step) -> None:
    product = s.reals(1) * s.reals(2)
    s.write_reals(0, product / np.float32(2) if s.has("D2") else product)


@instruction("FFMA", "FTZ")
def _fused_multiply_add(s: Step) -> None:
    """In double: the product is exact, and rounding twice differs from once by 2^-29 of half a unit at most."""
    s.write_reals(0, s.reals(1).astype(np.float64) * s.reals(2) + s.reals(3))


@instruction("FSEL")
def _select_reals(s: Step) -> None:
    s.write_reals(0, np.where(s.truth(3), s.reals(1), s.reals(2)))


@instruction("FMNMX")
def _minimum_of_reals(s: Step) -> None:
    a, b = s.reals(1), s.reals(2)
    s.write_reals(0, np.where(s.truth(3), np.fmin(a, b), np.fmax(a, b)))


MUFU: dict[str, Callable[[Reals], Reals]] = {
    "RCP": lambda x: 1 / x,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
}


@instruction("MUFU", " ".join(MUFU))
def _special_function(s: Step) -> None:
    """Correctly rounded; the machine's are within a unit."""
    s.write_reals(0, MUFU[s.instruction.modifiers[0]](s.reals(1).astype(np.float64)))


@instruction("FCHK")
def _needs_slow_division(s: Step) -> None:
    """Whether the short way of operand 1 / operand 2 could over- or underflow on its way."""
    _, a = np.frexp(s.reals(1))
    _, b = np.frexp(s.reals(2))
    finite = np.isfinite(s.reals(1)) & np.isfinite(s.reals(2)) & (s.reals(2) != 0)
    s.write_truth(0, ~(finite & (np.abs(b) < 125) & (np.abs(a) < 125) & (np.abs(a - b) < 125)))


# Conversions


@instruction("I2FP I2F", "F32 U32 S32")
def _to_real(s: Step) -> None:
    s.write_reals(0, s.bits(1) if s.has("U32") else s.signed(1))


@instruction("F2I", "FTZ U32 TRUNC NTZ")
def _to_integer(s: Step) -> None:
    s.write(0, np.trunc(s.reals(1)).astype(np.int64))


@instruction("F2F", "F32 F64")
def _double_to_real(s: Step) -> None:
    if s.instruction.modifiers != ("F32", "F64"):
        raise s.unknown()
    s.write_reals(0, s.pair(1).view(np.float64))


def bfloat16_bits(x: Reals) -> Words:
    """Rounded to nearest, ties to even."""
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)


@instruction("F2FP", "BF16 F16 F32 PACK_AB")
def _pack_halves(s: Step) -> None:
    def half(x: Reals) -> Words:
        return bfloat16_bits(x) if s.has("BF16") else x.astype(np.float16).view(np.uint16).astype(np.uint32)

    s.write(0, half(s.reals(1)) << np.uint32(16) | half(s.reals(2)))


@instruction("HADD2", "F32")
def _half_to_real(s: Step) -> None:
    if s.instruction.modifiers != ("F32",) or s.bits(1).any():
        raise s.unknown()
    s.write_reals(0, s.bits(2).astype(np.uint16).view(np.float16))


@instruction("HFMA2", "MMA")
def _two_constants(s: Step) -> None:
    """The compiler's way to load two halves: 0 * 0 + constants."""
    if s.bits(1).any() or s.bits(2).any():
        raise s.unknown()
    high, low = (np.float16(s.operand(i, Number).value).view(np.uint16) for i in (3, 4))  # type: ignore[union-attr]
    s.write(0, np.full((1, 1), int(high) << 16 | int(low), np.uint32))
