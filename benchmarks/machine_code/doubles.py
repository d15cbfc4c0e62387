"""Instructions on doubles, which merge the parts of long filters, and conversions from and to them."""

import numpy as np

from .meanings import Meanings
from .reals import compare
from .step import Step

DOUBLES = Meanings()


@DOUBLES.instruction("DADD")
def _add(s: Step) -> None:
    s.write_doubles(0, s.doubles(1) + s.doubles(2))


@DOUBLES.instruction("DMUL")
def _multiply(s: Step) -> None:
    s.write_doubles(0, s.doubles(1) * s.doubles(2))


@DOUBLES.instruction("DFMA")
def _fused_multiply_add(s: Step) -> None:
    """In extended precision: of the product's 106 bits, 64 are kept."""
    s.write_doubles(0, s.doubles(1).astype(np.longdouble) * s.doubles(2) + s.doubles(3))


@DOUBLES.instruction("DSETP", "EQ NE LT LE GT GE EQU NEU LTU LEU GTU GEU NAN AND OR")
def _compare(s: Step) -> None:
    compare(s, s.doubles(2), s.doubles(3))


@DOUBLES.instruction("F2F", "F32 F64")
def _convert(s: Step) -> None:
    if s.instruction.modifiers == ("F64", "F32"):
        s.write_doubles(0, s.reals(1))
    elif s.instruction.modifiers == ("F32", "F64"):
        s.write_reals(0, s.doubles(1))
    else:
        raise s.unknown()


@DOUBLES.instruction("I2F", "F32 F64 U32 S32 RP")
def _from_integer(s: Step) -> None:
    value = s.bits(1) if s.has("U32") else s.signed(1)
    if s.has("F64"):
        s.write_doubles(0, value)
        return
    real = value.astype(np.float32)
    if s.has("RP"):  # rounded up
        real = np.where(real < value.astype(np.float64), np.nextafter(real, np.float32(np.inf)), real)
    s.write_reals(0, real)
