"""What each instruction of sm_90 computes. Uniform instructions (UIADD3, ...) compute what those of the same name
without U do; control flow, barriers and memory are the interpreter's."""

from .doubles import DOUBLES
from .integers import INTEGERS
from .reals import REALS
from .step import Step

SEMANTICS = INTEGERS | REALS | DOUBLES


def execute(step: Step) -> None:
    """Computes the instruction, or raises UnknownInstruction."""
    opcode = step.instruction.opcode
    meaning = SEMANTICS.get(opcode) or SEMANTICS.get(opcode.removeprefix("U"))
    if meaning is None or not meaning.modifiers.issuperset(step.instruction.modifiers):
        raise step.unknown()
    meaning.run(step)
