"""Instructions on floating-point numbers, and conversions.

Subnormals are kept where the machine flushes them (FTZ), too: no value here comes near them.
"""

from collections.abc import Callable

import numpy as np

from .integers import write_comparison
from .meanings import COMPARISONS, Meanings
from .memory import Words
from .sass import Number
from .step import Reals, Step

REALS = Meanings()


@REALS.instruction("FSETP", "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU AND OR FTZ")
def _compare_reals(s: Step) -> None:
    compare(s, s.reals(2), s.reals(3))


def compare(s: Step, a: Reals, b: Reals) -> None:
    """With U at the end of the comparison, NaN compares as true; NAN is true of NaN alone."""
    comparison = s.instruction.modifiers[0]
    unordered = np.isnan(a) | np.isnan(b)
    if comparison == "NAN":
        write_comparison(s, unordered)
        return
    result = COMPARISONS[comparison[:2]](a, b)
    write_comparison(s, result | unordered if comparison.endswith("U") else result & ~unordered)


@REALS.instruction("FADD", "FTZ")
def _add_reals(s: Step) -> None:
    s.write_reals(0, s.reals(1) + s.reals(2))


@REALS.instruction("FMUL", "FTZ D2")
def _multiply_reals(s: Step) -> None:
    product = s.reals(1) * s.reals(2)
    s.write_reals(0, product / np.float32(2) if s.has("D2") else product)


@REALS.instruction("FFMA", "FTZ")
def _fused_multiply_add(s: Step) -> None:
    """In double: the product is exact, and rounding twice differs from once by 2^-29 of half a unit at most."""
    s.write_reals(0, s.reals(1).astype(np.float64) * s.reals(2) + s.reals(3))


@REALS.instruction("FSEL")
def _select_reals(s: Step) -> None:
    s.write_reals(0, np.where(s.truth(3), s.reals(1), s.reals(2)))


@REALS.instruction("FMNMX")
def _minimum_of_reals(s: Step) -> None:
    a, b = s.reals(1), s.reals(2)
    s.write_reals(0, np.where(s.truth(3), np.fmin(a, b), np.fmax(a, b)))


MUFU: dict[str, Callable[[Reals], Reals]] = {
    "RCP": lambda x: 1 / x,
    "RSQ": lambda x: 1 / np.sqrt(x),
    "SQRT": np.sqrt,
    "EX2": np.exp2,
}


@REALS.instruction("MUFU", " ".join([*MUFU, "RCP64H"]))
def _special_function(s: Step) -> None:
    """Correctly rounded; the machine's are within a unit. RCP64H is of the upper halves of doubles."""
    if s.has("RCP64H"):
        double = (s.bits(1).astype(np.uint64) << np.uint64(32)).view(np.float64)
        s.write(0, ((1 / double).view(np.uint64) >> np.uint64(32)).astype(np.uint32))
        return
    s.write_reals(0, MUFU[s.instruction.modifiers[0]](s.reals(1).astype(np.float64)))


@REALS.instruction("FCHK")
def _needs_slow_division(s: Step) -> None:
    """Whether the short way of operand 1 / operand 2 could over- or underflow on its way."""
    _, a = np.frexp(s.reals(1))
    _, b = np.frexp(s.reals(2))
    finite = np.isfinite(s.reals(1)) & np.isfinite(s.reals(2)) & (s.reals(2) != 0)
    s.write_truth(0, ~(finite & (np.abs(b) < 125) & (np.abs(a) < 125) & (np.abs(a - b) < 125)))


# Conversions


@REALS.instruction("I2FP", "F32 U32 S32")
def _to_real(s: Step) -> None:
    s.write_reals(0, s.bits(1) if s.has("U32") else s.signed(1))


@REALS.instruction("F2I", "FTZ U32 TRUNC NTZ")
def _to_integer(s: Step) -> None:
    s.write(0, np.trunc(s.reals(1)).astype(np.int64))


def bfloat16_bits(x: Reals) -> Words:
    """Rounded to nearest, ties to even."""
    bits = x.astype(np.float32, copy=False).view(np.uint32)
    return bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)) >> np.uint32(16)


@REALS.instruction("F2FP", "BF16 F16 F32 PACK_AB")
def _pack_halves(s: Step) -> None:
    def half(x: Reals) -> Words:
        return bfloat16_bits(x) if s.has("BF16") else x.astype(np.float16).view(np.uint16).astype(np.uint32)

    s.write(0, half(s.reals(1)) << np.uint32(16) | half(s.reals(2)))


@REALS.instruction("HADD2", "F32")
def _half_to_real(s: Step) -> None:
    if s.instruction.modifiers != ("F32",) or s.bits(1).any():
        raise s.unknown()
    s.write_reals(0, s.bits(2).astype(np.uint16).view(np.float16))


@REALS.instruction("HFMA2", "MMA")
def _two_constants(s: Step) -> None:
    """The compiler's way to load two halves: 0 * 0 + constants."""
    if s.bits(1).any() or s.bits(2).any():
        raise s.unknown()
    high, low = (np.float16(s.operand(i, Number).value).view(np.uint16) for i in (3, 4))
    s.write(0, np.full((1, 1), int(high) << 16 | int(low), np.uint32))
