"""Tables of what instructions compute: opcode, the modifiers that are known, and a function of a Step.

A modifier that only chooses a pipe or a rounding that makes no difference here is known, and ignored.
"""

import operator
from collections.abc import Callable
from dataclasses import dataclass

from .step import Step

COMPARISONS = {
    "EQ": operator.eq, "NE": operator.ne, "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge,
}  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    run: Callable[[Step], None]
    modifiers: frozenset[str]


class Meanings(dict[str, Meaning]):
    """By opcode."""

    def instruction(
        self, opcodes: str, modifiers: str = ""
    ) -> Callable[[Callable[[Step], None]], Callable[[Step], None]]:
        """Enters the decorated function for these opcodes, which may have these modifiers."""

        def enter(run: Callable[[Step], None]) -> Callable[[Step], None]:
            for opcode in opcodes.split():
                self[opcode] = Meaning(run, frozenset(modifiers.split()))
            return run

        return enter
