"""The CUDA kernels on weights that are hard to align: rounding, overflow and NaN."""

import sys

import pytest
import torch
from emulator import REPOSITORY, Emulator
from problem import Layer, backward, check_backward, check_forward, forward, problem
from truth import BF16, F32, F64

sys.path.insert(0, str(REPOSITORY))

from benchmarks import numerics


@pytest.mark.parametrize("case", numerics.CASES, ids=lambda case: case.name)
def test_rounding_explains_every_error(check: Emulator, case: numerics.Case) -> None:
    case.check(numerics.emulated(check)(case))


@pytest.mark.parametrize("n", [1, 9, 147, 1024, 8192, 11000])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)])
def test_constant_filters_become_zero(check: Emulator, n: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    p = problem([Layer(4, n)], *dtypes)
    p.weights[0].copy_(torch.tensor([[0.0], [0.1], [-1e30], [1e-30]]))
    result = forward(check, p)
    assert (result.outs[0] == 0).all()
    assert torch.equal(result.statistics[:, 0], p.weights[0][:, 0])
    check_forward(p, result)


@pytest.mark.parametrize("n", [27, 147, 1000, 4608, 20000])
def test_small_deviations_from_a_large_mean(check: Emulator, n: int) -> None:
    p = problem([Layer(4, n)], mean=1e4, deviation=1e-3)
    result = forward(check, p)
    check_forward(p, result)
    check_backward(p, backward(check, p, result.statistics))


@pytest.mark.parametrize("n", [9, 147, 1152, 11000])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_filter(check: Emulator, n: int, bad: float) -> None:
    """64 filters of 9 values, or 32 of 147, share a block: their lanes, warps and shared memory are adjacent."""
    p = problem([Layer(67 if n < 512 else 3, n)], F32, F32)

    def run() -> tuple[torch.Tensor, ...]:
        a = forward(check, p)
        b = backward(check, p, a.statistics)
        return a.outs[0].clone(), a.statistics, b.grad_weights[0].clone(), b.grad_gain

    clean = run()
    p.weights[0][1, n // 2] = bad
    for before, after in zip(clean, run(), strict=True):
        others = torch.arange(len(before)) != 1
        assert torch.equal(before[others], after[others])
        assert after[1].isnan().any()
