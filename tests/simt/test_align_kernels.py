"""The CUDA kernels, run by the emulator, against the formulas of csrc/common/align_task.h in float64.

Every run also asserts how memory was accessed: each value read and written as often, and as wide, as the kernels claim.
"""

import dataclasses
import itertools
import mmap
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from emulator import Backward, Counts, Emulator, Forward, poisoned, run_with_sanitizers
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GAIN_DTYPES = (None, F32, BF16, F16, F64)

# Half a unit in the last place, relative.
HALF_ULP = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, F64: 2.0**-53}
TINY = {F16: 2.0**-25, BF16: 0.0, F32: 0.0, F64: 0.0}  # half of the least subnormal; the others stay far from theirs

# What a sum may err by, in half units of the sum of magnitudes. A value passes up to 16 additions in its thread, 5 in
# its warp and 16 over the warps; the rest is for what is done with the sum. Longer filters are summed up in double.
ROUNDINGS = 64


@dataclasses.dataclass
class Problem:
    weights: list[Tensor]
    grads: list[Tensor]
    gains: list[Tensor | None]
    eps: list[float]
    scales: list[float]
    columns: list[int]
    outs: list[Tensor]
    grad_weights: list[Tensor]
    aligned_dtype: torch.dtype

    @property
    def unit(self) -> float:
        """Half a unit of the accumulation type; twice that for float64, in which the reference errs as well."""
        return 2 * HALF_ULP[F64] if self.weights[0].dtype == F64 else HALF_ULP[F32]


def problem(
    sizes: Sequence[tuple[int, int]],
    weight_dtype: torch.dtype = F32,
    aligned_dtype: torch.dtype = F32,
    columns: int = 0,
    misaligned: Sequence[str] = (),
    mean: float = 0.02,
    deviation: float = 0.1,
) -> Problem:
    """sizes: (filters, n) of each weight. misaligned: which begin late, of weight, grad, out and grad_weight."""
    generator = torch.Generator().manual_seed(len(sizes) * 1000 + sizes[0][1])

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=F64)

    def placed(name: str, size: tuple[int, int], dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        late = int(name in misaligned)
        t = poisoned((size[0] * size[1] + late,), dtype)[late:].view(size)
        return t if values is None else t.copy_(values)

    gains: list[Tensor | None] = []
    for i, (filters, n) in enumerate(sizes):
        dtype = GAIN_DTYPES[(i + n) % len(GAIN_DTYPES)]
        gains.append(None if dtype is None else (1 + 0.2 * normal(filters)).to(dtype))
    return Problem(
        weights=[placed("weight", s, weight_dtype, mean + deviation * normal(*s)) for s in sizes],
        grads=[placed("grad", s, aligned_dtype, 0.1 + normal(*s)) for s in sizes],
        gains=gains,
        eps=[1e-5 * (i % 3 + 1) for i in range(len(sizes))],
        scales=[1.0 + i % 4 / 8 for i in range(len(sizes))],
        columns=[columns] * len(sizes),
        outs=[placed("out", s, aligned_dtype) for s in sizes],
        grad_weights=[placed("grad_weight", s, weight_dtype) for s in sizes],
        aligned_dtype=aligned_dtype,
    )


def forward(emulator: Emulator, p: Problem, **options: int) -> Forward:
    return emulator.forward(p.weights, p.aligned_dtype, p.gains, p.eps, p.scales, p.columns, p.outs, **options)


def backward(emulator: Emulator, p: Problem, statistics: Tensor, **options: int) -> Backward:
    return emulator.backward(p.grads, p.weights, p.gains, statistics, p.scales, p.columns, p.grad_weights, **options)


def transposed(x: Tensor, columns: int) -> Tensor:
    """Each filter, a matrix of so many columns, stored by columns instead of rows."""
    return x.unflatten(1, (-1, columns)).transpose(1, 2).flatten(1) if columns else x


def restored(x: Tensor, columns: int) -> Tensor:
    return transposed(x, x.shape[1] // columns) if columns else x


def gain_of(p: Problem, i: int) -> Tensor:
    gain = p.gains[i]
    return torch.ones(len(p.weights[i]), 1, dtype=F64) if gain is None else gain.double()[:, None]


def reference_statistics(p: Problem, i: int) -> tuple[Tensor, Tensor, Tensor]:
    """Centred weights, mean and rstd."""
    w = p.weights[i].double()
    mean = w.mean(1, keepdim=True)
    centred = w - mean
    return centred, mean, (w.shape[1] / 2 * centred.square().mean(1, keepdim=True) + p.eps[i]).rsqrt()


def all_statistics(p: Problem) -> Tensor:
    parts = [torch.cat(reference_statistics(p, i)[1:], 1) for i in range(len(p.weights))]
    return torch.cat(parts).to(F64 if p.weights[0].dtype == F64 else F32)


def assert_within(actual: Tensor, expected: Tensor, tolerance: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= tolerance).all(), f"error of up to {(error / tolerance).max():.3g} times the tolerance"


def check_forward(p: Problem, result: Forward) -> None:
    u = p.unit
    for i, statistics in enumerate(result.statistics.split([len(w) for w in p.weights])):
        centred, mean, rstd = reference_statistics(p, i)
        slope = p.scales[i] * gain_of(p, i) * rstd
        # The mean is rounded, and the deviations from that are what is summed and corrected.
        spread = centred.square().mean(1, keepdim=True).sqrt() + u * mean.abs()
        assert_within(statistics[:, :1], mean, u * mean.abs() + ROUNDINGS * u * spread)
        assert_within(statistics[:, 1:], rstd, ROUNDINGS * u * rstd)
        expected = centred * slope
        computed = ROUNDINGS * u * (expected.abs() + slope.abs() * spread)
        stored = HALF_ULP[p.aligned_dtype] * (expected.abs() + computed) + TINY[p.aligned_dtype]
        actual = restored(result.outs[i], p.columns[i])
        assert_within(actual, expected, computed + stored)


def check_backward(p: Problem, result: Backward) -> None:
    u = p.unit
    for i, grad_gain in enumerate(result.grad_gain.split([len(w) for w in p.weights])):
        centred, mean, rstd = reference_statistics(p, i)
        x = centred * rstd
        g = restored(p.grads[i], p.columns[i]).double()
        g_dot_x = (g * x).sum(1, keepdim=True)
        # Every term as large as it is before it cancels; the kernels centre with the mean that the forward has rounded.
        large_x = x.abs() + u * mean.abs() * rstd
        large_dot = (g.abs() * large_x).sum(1, keepdim=True)
        assert_within(grad_gain[:, None], p.scales[i] * g_dot_x, ROUNDINGS * u * p.scales[i] * large_dot)
        factor = p.scales[i] * gain_of(p, i) * rstd
        expected = factor * (g - g.mean(1, keepdim=True) - x * g_dot_x / 2)
        terms = g.abs() + g.abs().mean(1, keepdim=True) + large_x * large_dot / 2
        dtype = p.weights[i].dtype
        computed = ROUNDINGS * u * factor.abs() * terms
        stored = HALF_ULP[dtype] * (expected.abs() + computed) + TINY[dtype]
        assert_within(result.grad_weights[i], expected, computed + stored)


def check_accesses(
    p: Problem, counts: dict[str, Counts], inputs: dict[str, list[Tensor]], outputs: dict[str, list[Tensor]]
) -> None:
    for i, weight in enumerate(p.weights):
        n, on_chip = weight.shape[1], 4096 if weight.dtype == F64 else 8192
        tensors = [(name, ts[i]) for name, ts in (inputs | outputs).items()]
        packs = any(t.dtype in (F16, BF16) for _, t in tensors)
        vector = 2 if weight.dtype == F64 else 4
        if any(t.data_ptr() % 16 for _, t in tensors):
            values = 1
        elif packs and n <= on_chip and n % 8 == 0:
            values = 8
        else:
            values = 1 if n % vector else vector
        for name, t in tensors:
            kind, times = ("reads", 1 if n <= on_chip else 2) if name in inputs else ("writes", 1)
            width = min(16, values * t.element_size())
            actual = counts[f"{name} {i}"]
            assert actual[kind] == {width: times * t.numel() * t.element_size() // width}, (name, i)
            assert actual[f"{kind}_of_one"] == (times, times), (name, i)
            if kind == "writes":
                assert not actual["reads"], (name, i)
    for name in counts.keys() & {"statistics", "grad_gain"}:
        if counts[name]["writes"]:  # the backward only reads the statistics
            assert counts[name]["writes_of_one"] == (1, 1)
            assert not counts[name]["reads"]


def check_all(emulator: Emulator, p: Problem, direction: str, **options: int) -> None:
    if direction == "forward":
        result = forward(emulator, p, **options)
        check_forward(p, result)
        tensors = {"weight": p.weights}, {"out": p.outs}
    else:
        result = backward(emulator, p, all_statistics(p), **options)
        check_backward(p, result)
        tensors = {"weight": p.weights, "grad": p.grads}, {"grad_weight": p.grad_weights}
    if emulator.module.instrumented():
        check_accesses(p, result.counts, *tensors)


def some_filters(n: int) -> int:
    """More than one block of them, where a block takes several, and the last block not full."""
    return 3 if n > 512 else 19 if n > 128 else 35 if n > 64 else 67


SIZES = (1, 2, 9, 27, 64, 147, 576, 1000, 1024, 1152, 4608, 8192, 9000, 20000)
DTYPES = [
    *itertools.product(SIZES, [(F32, F32), (F32, BF16)]),
    *itertools.product((9, 64, 147, 1000, 4096, 4608), [(F64, F64)]),
    *itertools.product((9, 72, 1152, 9000), [(F16, F16), (BF16, BF16), (BF16, F32), (F32, F16)]),
]
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


@both_directions
@pytest.mark.parametrize(("n", "dtypes"), DTYPES)
def test_dtypes_and_sizes(check: Emulator, direction: str, n: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check_all(check, problem([(some_filters(n), n)], *dtypes), direction)


@both_directions
@pytest.mark.parametrize("count", [53, 600])  # one launch with the large table, and two
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)])
def test_lists(check: Emulator, direction: str, count: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    sizes = (64, 576, 147, 9, 1152, 256, 9000) if count < 100 else (9, 27, 64, 8)
    check_all(check, problem([(3 + i % 5, sizes[i % len(sizes)]) for i in range(count)], *dtypes), direction)


@both_directions
@pytest.mark.parametrize(
    "misaligned", [["weight"], ["out", "grad"], ["grad_weight"], ["weight", "out", "grad", "grad_weight"]]
)
@pytest.mark.parametrize("n", [64, 1152, 9000])
def test_misaligned_tensors(check: Emulator, direction: str, misaligned: list[str], n: int) -> None:
    check_all(check, problem([(some_filters(n), n)], F32, BF16, misaligned=misaligned), direction)


@both_directions
@pytest.mark.parametrize(
    ("n", "columns"), [(9, 9), (27, 9), (45, 9), (147, 49), (147, 3), (576, 9), (1152, 9), (4608, 9), (8192, 2)]
)
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)])
def test_transposed_filters(
    check: Emulator, direction: str, n: int, columns: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    check_all(check, problem([(some_filters(n), n)], *dtypes, columns=columns), direction)


@both_directions
@pytest.mark.parametrize("n", [27, 2048, 4096])
def test_transposed_filters_of_doubles(check: Emulator, direction: str, n: int) -> None:
    check_all(check, problem([(some_filters(n), n)], F64, F64, columns=n // (3 if n == 27 else 256)), direction)


@pytest.mark.parametrize("n", [1, 9, 147, 1024, 8192, 9000])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F64, F64)])
def test_constant_filters_become_zero(check: Emulator, n: int, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    p = problem([(4, n)], *dtypes)
    p.weights[0].copy_(torch.tensor([[0.0], [0.1], [-1e30], [1e-30]]))
    result = forward(check, p)
    assert (result.outs[0] == 0).all()
    assert torch.equal(result.statistics[:, 0], p.weights[0][:, 0])
    check_forward(p, result)


@pytest.mark.parametrize("n", [27, 147, 1000, 4608, 20000])
def test_small_deviations_from_a_large_mean(check: Emulator, n: int) -> None:
    p = problem([(4, n)], mean=1e4, deviation=1e-3)
    result = forward(check, p)
    check_forward(p, result)
    check_backward(p, backward(check, p, result.statistics))


@pytest.mark.parametrize(("n", "columns"), [(9, 0), (147, 0), (1152, 9), (4608, 0), (9000, 0)])
def test_same_bits_in_every_order_of_threads(check: Emulator, n: int, columns: int) -> None:
    results = []
    for seed, preempt_every in [(1, 0), (2, 0), (3, 5), (4, 50)]:
        p = problem([(3, n)], F32, BF16, columns=columns)
        order = {"seed": seed, "preempt_every": preempt_every}
        a = forward(check, p, **order)
        b = backward(check, p, a.statistics, **order)
        results.append((a.outs[0], a.statistics, b.grad_weights[0], b.grad_gain))
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other, strict=True))


@pytest.mark.parametrize("columns", [0, 9])
def test_indexes_past_two_to_the_32(check: Emulator, columns: int) -> None:
    filters, n, last = 1_000_000, 4608, 2  # a filter a block, of which only the last ones run: memory stays sparse

    def sparse() -> Tensor:
        no_reserve = 0x4000  # MAP_NORESERVE, which not every Python names
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, filters * n * 4, flags=flags), dtype=F32).view(filters, n)

    p = problem([(last, n)], columns=columns)
    p.gains = [None]
    whole = dataclasses.replace(p, weights=[sparse()], grads=[sparse()], outs=[sparse()], grad_weights=[sparse()])
    whole.weights[0][-last:] = p.weights[0]
    whole.grads[0][-last:] = p.grads[0]
    blocks = (filters - last, filters)
    a = forward(check, whole, blocks=blocks)
    check_forward(p, Forward([a.outs[0][-last:]], a.statistics[-last:], {}))
    b = backward(check, whole, a.statistics, blocks=blocks)
    check_backward(p, Backward([b.grad_weights[0][-last:]], b.grad_gain[-last:], {}))
    assert not a.outs[0][-last - 1].any()
    assert not b.grad_weights[0][-last - 1].any()


def run_sanitized(emulator: Emulator) -> None:
    """In a process of its own, for torch is slow to import under the sanitizers."""
    problems = [
        problem([(67, 9)]),
        problem([(3, 1152)], F32, BF16),
        problem([(3, 1152)], F32, BF16, columns=9),
        problem([(2, 9000)], misaligned=["weight"]),
        problem([(2, 4608)], F64, F64),
        problem([(3 + i % 5, (9, 64, 147)[i % 3]) for i in range(53)], BF16, BF16),
    ]
    for p in problems:
        for direction in ("forward", "backward"):
            check_all(emulator, p, direction)


def test_sanitizers(modules: Path) -> None:
    code = "import emulator as e, simt_asan, test_align_kernels as t; t.run_sanitized(e.Emulator(simt_asan))"
    done = run_with_sanitizers(modules, code)
    assert done.returncode == 0, done.stderr
