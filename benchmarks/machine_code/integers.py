"""Instructions on integers, bits and predicates, and moves."""

import numpy as np
from numpy.typing import NDArray

from .meanings import COMPARISONS, Meanings
from .memory import Words
from .sass import Address, Name, Predicate
from .step import Step, low_word

WIDTHS = {"U8": 1, "U16": 2, "64": 8, "128": 16}
PREDICATES = 7  # that can be written
INTEGERS = Meanings()

# Moves


@INTEGERS.instruction("MOV")
def _move(s: Step) -> None:
    s.write(0, s.bits(1))


@INTEGERS.instruction("R2UR")
def _to_uniform(s: Step) -> None:
    s.write(0, s.bits(1))


@INTEGERS.instruction("CS2R", "32")
def _clear(s: Step) -> None:
    if s.operand(1, Name) != Name("SRZ"):
        raise s.unknown()
    s.write_all(0, [np.zeros((1, 1), np.uint32)] * (1 if s.has("32") else 2))


@INTEGERS.instruction("LDC ULDC", "U8 U16 64")
def _load_constant(s: Step) -> None:
    width = next((WIDTHS[m] for m in s.instruction.modifiers), 4)
    s.write_all(0, s.constant_words(s.operand(1, Address), width))


@INTEGERS.instruction("SEL")
def _select(s: Step) -> None:
    s.write(0, np.where(s.truth(3), s.bits(1), s.bits(2)))


@INTEGERS.instruction("PRMT")
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


@INTEGERS.instruction("SHFL", "IDX BFLY UP DOWN")
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


@INTEGERS.instruction("IADD3", "X")
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


@INTEGERS.instruction("IMAD", "MOV IADD SHL U32 X WIDE HI")
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


@INTEGERS.instruction("VIADD")
def _add(s: Step) -> None:
    s.write(0, s.bits(1) + s.bits(2))


def _least_or_greatest(s: Step, a: Words, b: Words, which: int) -> None:
    if not s.has("U32"):
        a, b = a.view(np.int32), b.view(np.int32)
    s.write(0, np.where(s.truth(which), np.minimum(a, b), np.maximum(a, b)))


@INTEGERS.instruction("VIMNMX", "U32")
def _minimum(s: Step) -> None:
    _least_or_greatest(s, s.bits(1), s.bits(2), 3)


@INTEGERS.instruction("VIADDMNMX", "U32")
def _minimum_of_sum(s: Step) -> None:
    _least_or_greatest(s, s.bits(1) + s.bits(2), s.bits(3), 4)


@INTEGERS.instruction("LEA", "HI X SX32")
def _shifted_add(s: Step) -> None:
    """Operands: result, a carry out, a, b, with HI the upper half of a (SX32: of its sign), the shift, a carry in."""
    out = s.predicates(1)
    a, b = 1 + out, 2 + out
    if not s.has("HI"):
        shifted = low_word(s.bits(a).astype(np.uint64) << np.uint64(s.number(3 + out)))
        carry_in = 4 + out
    elif s.has("SX32"):
        shifted = low_word((s.signed(a).astype(np.int64) << s.number(3 + out) >> 32).view(np.uint64))
        carry_in = 4 + out
    else:
        both = s.bits(a).astype(np.uint64) | s.bits(3 + out).astype(np.uint64) << np.uint64(32)
        shifted = low_word(both << np.uint64(s.number(4 + out)) >> np.uint64(32))
        carry_in = 5 + out
    total = shifted.astype(np.uint64) + s.bits(b)
    if s.has("X"):
        total = total + s.truth(carry_in)
    s.write(0, low_word(total))
    if out:
        s.write_truth(1, total >> np.uint64(32) > 0)


@INTEGERS.instruction("SHF", "L R U32 S32 U64 S64 HI W")
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


@INTEGERS.instruction("LOP3", "LUT")
def _logic(s: Step) -> None:
    """Any function of three bits: bit 4 a + 2 b + c of the table."""
    out = s.predicates(0)  # whether any bit is set
    a, b, c = (s.bits(out + i) for i in (1, 2, 3))
    table = s.number(out + 4)
    result = np.zeros((1, 1), np.uint32)
    for i in range(8):
        if table >> i & 1:
            result = result | (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
    s.write(out, result)
    if out:
        s.write_truth(0, result != 0)


# Predicates


@INTEGERS.instruction("PLOP3", "LUT")
def _logic_of_predicates(s: Step) -> None:
    index = sum(s.truth(i).astype(np.int64) << shift for i, shift in ((2, 2), (3, 1), (4, 0)))
    for i in (0, 1):
        s.write_truth(i, s.number(5 + i) >> index & 1 == 1)


def write_comparison(s: Step, result: NDArray[np.bool_]) -> None:
    """To operand 0, and its negation to operand 1, each combined with operand 4."""
    combine = np.logical_or if s.has("OR") else np.logical_and
    other = s.truth(4)
    s.write_truth(0, combine(result, other))
    s.write_truth(1, combine(~result, other))


@INTEGERS.instruction("ISETP", "EQ NE LT LE GT GE U32 AND OR EX")
def _compare(s: Step) -> None:
    """With EX, of the upper halves; operand 5 is the result for the lower ones."""
    a, b = (s.bits(2), s.bits(3)) if s.has("U32") else (s.signed(2), s.signed(3))
    comparison = s.instruction.modifiers[0]
    result = COMPARISONS[comparison](a, b)
    if s.has("EX"):
        result = np.where(a == b, s.truth(5), result)
    write_comparison(s, result)


@INTEGERS.instruction("P2R")
def _predicates_to_register(s: Step) -> None:
    """The predicates whose bits the mask has; the other bits are operand 2's."""
    mask = np.uint32(s.number(3))
    packed = np.zeros(s.active.shape, np.uint32)
    for i in range(PREDICATES):
        packed |= s.registers.truths["P"][i].astype(np.uint32) << np.uint32(i)
    s.write(0, s.bits(2) & ~mask | packed & mask)


@INTEGERS.instruction("R2P")
def _register_to_predicates(s: Step) -> None:
    bits, mask = s.bits(1), s.number(2)
    for i in range(PREDICATES):
        if mask >> i & 1:
            np.copyto(s.registers.truths["P"][i], bits >> np.uint32(i) & np.uint32(1) == 1, where=s.active)


@INTEGERS.instruction("VOTE VOTEU", "ANY ALL")
def _vote(s: Step) -> None:
    """Operands: a mask of the lanes whose predicate holds, or none; the vote; the predicate."""
    last = len(s.instruction.operands) - 1
    holds = s.truth(last) & s.active
    vote = (holds | ~s.active).all(1, keepdims=True) if s.has("ALL") else holds.any(1, keepdims=True)
    if not isinstance(s.instruction.operands[0], Predicate):
        s.write(0, (holds << np.arange(32)).sum(1, keepdims=True).astype(np.uint32))
    s.write_truth(last - 1, vote)
