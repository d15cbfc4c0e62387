"""benchmarks/launch_plan.py where its results are known; its figures for ResNet-50 are in NOTES.md."""

import sys

import pytest
from emulator import REPOSITORY, Emulator

sys.path.insert(0, str(REPOSITORY))

from benchmarks import launch_plan
from benchmarks.harness import Case
from benchmarks.launch_plan import makespan, plan

both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])
LAYERS = ((64, 3, 7, 7), (67, 64, 1, 1), (70, 64, 3, 3), (5, 256, 1, 1), (3, 512, 3, 3), (9, 2048, 1, 1))


@both_directions
def test_blocks_move_no_more_than_any_implementation_must(check: Emulator, direction: launch_plan.Direction) -> None:
    found = plan(check, Case("some of ResNet-50", LAYERS), direction)
    assert found.over_floor == 1
    assert sum(found.values) == sum(k * c * h * w for k, c, h, w in LAYERS)
    assert {block.threads for block in found.blocks} == {256}


@both_directions
def test_second_read_is_counted(check: Emulator, direction: launch_plan.Direction) -> None:
    """A filter too long for a block is read twice: 10 instead of 6 bytes per value, 16 instead of 10."""
    (block,) = plan(check, Case("long", ((1, 11000),)), direction).blocks
    assert block.threads == 512
    read, written = launch_plan.PER_VALUE[direction]
    read_once, written_once = launch_plan.PER_FILTER[direction]
    assert (block.read, block.written) == (2 * 11000 * read + read_once, 11000 * written + written_once)


@both_directions
def test_largest_filters_first_leave_no_tail(check: Emulator, direction: launch_plan.Direction) -> None:
    """4 + 2 and 3 + 3. Smallest first, or in the list's order, one slot would get 3 + 4 and the other 2 + 3."""
    found = plan(check, Case("a block each", tuple((1, n) for n in (3000, 4000, 2000, 3000))), direction)
    assert found.values == [4000, 3000, 3000, 2000]
    assert found.tail(slots=2) == 1


@pytest.mark.parametrize(
    ("costs", "slots", "end"),
    [([4, 3, 3, 2], 2, 6), ([1, 1, 4], 2, 5), ([4, 1, 1], 2, 4), ([5], 3, 5), ([2] * 7, 3, 6)],
)
def test_makespan(costs: list[float], slots: int, end: float) -> None:
    assert makespan(costs, slots) == end


def test_in_flight_is_averaged_over_bytes() -> None:
    blocks = [launch_plan.simt.Block(512, read, 0, 0) for read in (100, 300)]
    assert launch_plan.Plan(Case("", ()), "forward", blocks).in_flight == 2 * (100 * 100 + 300 * 300) / 400
