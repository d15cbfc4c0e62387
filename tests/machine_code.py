"""Loops in x86-64 machine code, as objdump prints it."""

import collections
import pathlib
import re
import subprocess
from collections.abc import Iterator

Function = list[tuple[int, str]]  # address and instruction
# Between a jump and the loop behind it, these would look like a second way into the loop.
PADDING = r"(data16 |cs )*nop|xchg +%ax,%ax"


def functions(path: pathlib.Path) -> Iterator[tuple[str, Function]]:
    command = ["objdump", "-d", "--no-show-raw-insn", "--demangle", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    parts = re.split(r"^[0-9a-f]+ <(.*)>:\n", listing, flags=re.MULTILINE)[1:]
    for name, body in zip(parts[::2], parts[1::2], strict=True):
        found = re.findall(r"^\s+([0-9a-f]+):\s+(.*)$", body, re.MULTILINE)
        yield name, [(int(address, 16), each) for address, each in found if not re.match(PADDING, each)]


def innermost_loops(code: Function) -> list[list[str]]:
    """The instructions of each innermost natural loop: the blocks that reach a back edge, a jump to a block that
    dominates the jump."""
    places, follows = _blocks(code)
    before: dict[int, list[int]] = collections.defaultdict(list)
    for block, nexts in follows.items():
        for other in nexts:
            before[other].append(block)
    dominators = _dominators(list(places), before)
    loops: dict[int, set[int]] = collections.defaultdict(set)
    for block, nexts in follows.items():
        for head in nexts:
            if head in dominators[block]:
                body, todo = {head}, [block]
                while todo:
                    if (member := todo.pop()) not in body:
                        body.add(member)
                        todo += before[member]
                loops[head] |= body
    inner = [body for body in loops.values() if not any(other < body for other in loops.values())]
    return [[code[i][1] for block in sorted(body) for i in places[block]] for body in inner]


def _blocks(code: Function) -> tuple[dict[int, range], dict[int, list[int]]]:
    """The basic blocks, by their first instruction, and the successors of each."""
    index = {address: i for i, (address, _) in enumerate(code)}
    targets = {}
    for i, (_, instruction) in enumerate(code):
        jump = re.match(r"j\w+\s+([0-9a-f]+) <", instruction)
        if jump and int(jump[1], 16) in index:
            targets[i] = index[int(jump[1], 16)]
    ends = [i + 1 for i, (_, instruction) in enumerate(code) if re.match(r"j|ret|notrack jmp", instruction)]
    starts = sorted({0, *targets.values(), *ends} - {len(code)})
    places = {a: range(a, b) for a, b in zip(starts, [*starts[1:], len(code)], strict=True)}
    follows = {}
    for start, place in places.items():
        last = place[-1]
        nexts = [targets[last]] if last in targets else []
        if not re.match(r"(notrack )?jmp|ret|ud2", code[last][1]) and last + 1 < len(code):
            nexts.append(last + 1)
        follows[start] = nexts
    return places, follows


def _dominators(blocks: list[int], before: dict[int, list[int]]) -> dict[int, set[int]]:
    """The dominators of each block. Entries are the function's first instruction, and blocks without a known
    predecessor (targets of jump tables)."""
    found = {block: set(blocks) if before[block] and block else {block} for block in blocks}
    changed = True
    while changed:
        changed = False
        for block in blocks:
            if before[block] and block:
                new = set.intersection(*(found[b] for b in before[block])) | {block}
                changed |= new != found[block]
                found[block] = new
    return found
