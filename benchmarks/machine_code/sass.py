"""The instructions of sm_90 machine code, from cuobjdump's listing.

An instruction has 16 bytes, of which bits 105 to 121 are for the scheduler: how many cycles to stall after it, which
scoreboards it sets (one when its result is there, one when its operands have been read), and which it waits for.
"""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass

ZERO = {"R": 255, "UR": 63}  # the registers that read as 0
TRUE = 7  # the predicate that is always true
BYTES = 16  # of an instruction
NO_SCOREBOARD = 7

INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/\s+/\* 0x([0-9a-f]{16}) \*/")
REGISTER = re.compile(r"(-?)(~?)(\|?)(U?R)(\d+|Z)\|?(?:\.reuse)?(?:\.(H0_H0|H1_H1))?")
PREDICATE = re.compile(r"(!?)(U?P)(\d|T)")
ADDRESS = re.compile(r"(c\[0x0\]|desc\[UR\d+\])?\[([^\]]+)\]")
TERM = re.compile(r"(U?R)(\d+|Z)(?:\.(64|X(?:\d+)))?")
SPELLED = {"INF": float("inf"), "QNAN": float("nan")}


@dataclass(frozen=True)
class Register:
    """A general register, or a uniform one (`UR`), which a warp shares; read with modifiers."""

    file: str
    index: int
    negated: bool = False
    inverted: bool = False
    absolute: bool = False
    half: int | None = None  # which 16 bits are read


@dataclass(frozen=True)
class Predicate:
    file: str
    index: int
    inverted: bool = False


@dataclass(frozen=True)
class Number:
    """An immediate operand: bits if it was written in hexadecimal, else the value."""

    value: int | float


@dataclass(frozen=True)
class Term:
    """A register in an address: itself, a multiple of it, or a 64-bit pair."""

    register: Register
    scale: int = 1
    is_pair: bool = False


@dataclass(frozen=True)
class Address:
    is_constant: bool  # in constant bank 0
    terms: tuple[Term, ...]
    offset: int


@dataclass(frozen=True)
class Name:
    """What is referred to by name: a special register, a convergence barrier, all predicates."""

    text: str


Operand = Register | Predicate | Number | Address | Name


@dataclass(frozen=True)
class Instruction:
    address: int
    text: str
    guard: Predicate
    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    stall: int
    sets_when_written: int
    sets_when_read: int
    waits_for: int  # a bit for each scoreboard

    def __str__(self) -> str:
        return f"{self.text} at {self.address:#x}"


def _index(file: str, text: str) -> int:
    return ZERO[file] if text == "Z" else int(text)


def _address(inside: str, is_constant: bool) -> Address:
    terms, offset = [], 0
    for part in inside.split("+"):
        if found := TERM.fullmatch(part):
            file, number, suffix = found.groups()
            scale = int(suffix[1:]) if suffix and suffix != "64" else 1
            terms.append(Term(Register(file, _index(file, number)), scale, suffix == "64"))
        else:
            offset += int(part, 16)
    return Address(is_constant, tuple(terms), offset)


def operand(text: str) -> Operand:
    """The operand that is written as `text`."""
    if found := REGISTER.fullmatch(text):
        minus, tilde, bar, file, number, half = found.groups()
        which = None if half is None else int(half[1])
        return Register(file, _index(file, number), bool(minus), bool(tilde), bool(bar), which)
    if found := PREDICATE.fullmatch(text):
        inverted, file, number = found.groups()
        return Predicate(file, TRUE if number == "T" else int(number), bool(inverted))
    if found := ADDRESS.fullmatch(text):
        return _address(found[2], (found[1] or "").startswith("c"))
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return Number(int(text, 16))
    if found := re.fullmatch(r"[+-]?(INF|QNAN)", text):
        return Number(SPELLED[found[1]] * (-1 if text[0] == "-" else 1))
    if re.fullmatch(r"-?\d[\d.]*(e[+-]\d+)?", text):
        return Number(float(text))
    return Name(text)


def _operands(text: str) -> Iterator[Operand]:
    for part in re.split(r",\s*|\s+", text):
        if part:
            yield operand(part)


@functools.cache
def instructions(listing: str) -> list[Instruction]:
    """The instructions of one kernel, in order."""
    found = []
    for address, text, high in INSTRUCTION.findall(listing):
        guard, body = re.fullmatch(r"(?:@(\S+)\s+)?(.*)", text).groups()  # type: ignore[union-attr]
        full_opcode, _, rest = body.partition(" ")
        opcode, *modifiers = full_opcode.split(".")
        control = int(high, 16) >> 41
        found.append(
            Instruction(
                int(address, 16),
                text,
                operand(guard or "PT"),  # type: ignore[arg-type]
                opcode,
                tuple(modifiers),
                tuple(_operands(rest)),
                stall=control & 15,
                sets_when_written=control >> 5 & 7,
                sets_when_read=control >> 8 & 7,
                waits_for=control >> 11 & 63,
            )
        )
    assert [i.address for i in found] == list(range(0, BYTES * len(found), BYTES)), "a part of the listing is not read"
    return found
