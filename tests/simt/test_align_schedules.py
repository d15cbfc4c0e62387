"""The CUDA kernels under different thread schedules, and under the sanitizers."""

from pathlib import Path

import pytest
import torch
from emulator import Emulator, run_with_sanitizers
from problem import BF16, F16, F32, F64, Layer, backward, check_all, forward, problem

MIXED = [Layer(67, 9), Layer(3, 147, columns=49), Layer(2, 1152, misaligned=("weight",)), Layer(1, 8200), Layer(5, 2)]
SCHEDULED = {
    "n=9": ([Layer(3, 9)], F32, BF16),
    "n=147": ([Layer(3, 147)], F32, BF16),
    "n=1152 transposed": ([Layer(3, 1152, columns=9)], F32, BF16),
    "n=4608": ([Layer(3, 4608)], F32, BF16),
    "n=11000": ([Layer(3, 11000)], F32, BF16),
    "n=11000 misaligned": ([Layer(2, 11000, misaligned=("weight", "out", "grad"))], F16, F32),
    "doubles": ([Layer(2, 2048, columns=8), Layer(1, 5000)], F64, F64),
    "mixed": (MIXED, BF16, F16),
}


@pytest.mark.parametrize("case", SCHEDULED.values(), ids=SCHEDULED)
def test_same_bits_under_every_schedule(check: Emulator, case: tuple[list[Layer], torch.dtype, torch.dtype]) -> None:
    results = []
    for seed, preempt_every in [(1, 0), (2, 0), (3, 5), (4, 50)]:
        p = problem(*case)
        order = {"seed": seed, "preempt_every": preempt_every}
        a = forward(check, p, **order)
        b = backward(check, p, a.statistics, **order)
        results.append((*a.outs, a.statistics, *b.grad_weights, b.grad_gain))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


def run_sanitized(emulator: Emulator) -> None:
    """All of them in one process, because torch is slow to import under the sanitizers."""
    problems = [
        problem([Layer(67, 9)]),
        problem([Layer(3, 1152)], F32, BF16),
        problem([Layer(3, 1152, columns=9)], F32, BF16),
        problem([Layer(2, 11000, misaligned=("weight",))]),
        problem([Layer(2, 4608)], F64, F64),
        problem([Layer(35, 72, columns=9)], F16, F32),
        problem([Layer(2, 2048, columns=8)], F64, F64),
        problem([Layer(67, n) for n in range(1, 9)], BF16, F16),
        problem(MIXED, F16, BF16),
        problem([Layer(3 + i % 5, (9, 64, 147)[i % 3]) for i in range(53)], BF16, BF16),
    ]
    for p in problems:
        for direction in ("forward", "backward"):
            check_all(emulator, p, direction)


def test_sanitizers(modules: Path) -> None:
    code = "import emulator as e, simt_asan, test_align_schedules as t; t.run_sanitized(e.Emulator(simt_asan))"
    done = run_with_sanitizers(modules, code)
    assert done.returncode == 0, done.stderr
