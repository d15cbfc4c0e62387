"""Problems for the CUDA kernels, and checks of the results.

Results are compared with the formulas of csrc/common/align_task.h in float64, and each value must be read and written
as often, and as wide, as the kernels claim.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from emulator import Backward, Counts, Emulator, Forward, poisoned
from torch import Tensor

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
GAIN_DTYPES = (None, F32, BF16, F16, F64)

# Half a unit in the last place, relative.
HALF_ULP = {F16: 2.0**-11, BF16: 2.0**-8, F32: 2.0**-24, F64: 2.0**-53}
TINY = {F16: 2.0**-25, BF16: 0.0, F32: 0.0, F64: 0.0}  # half the smallest subnormal; the others stay far from theirs

# The error allowed in a sum, in roundoffs of the sum of magnitudes. A value passes through up to 16 additions in its
# thread, 5 in its warp and 16 across warps; the rest covers what is computed from the sum. Longer filters are summed in
# double.
ROUNDINGS = 64


@dataclasses.dataclass(frozen=True)
class Layer:
    """A weight as in AlignTask; misaligned: which of weight, grad, out and grad_weight start one value late."""

    filters: int
    n: int
    columns: int = 0
    misaligned: tuple[str, ...] = ()


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
        """Roundoff of the accumulation type; doubled for float64, where the reference rounds as well."""
        return 2 * HALF_ULP[F64] if self.aligned_dtype == F64 else HALF_ULP[F32]


def problem(
    layers: Sequence[Layer],
    weight_dtype: torch.dtype = F32,
    aligned_dtype: torch.dtype = F32,
    mean: float = 0.02,
    deviation: float = 0.1,
) -> Problem:
    generator = torch.Generator().manual_seed(len(layers) * 1000 + (layers[0].n if layers else 0))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=F64)

    def placed(name: str, layer: Layer, dtype: torch.dtype, values: Tensor | None = None) -> Tensor:
        late = int(name in layer.misaligned)
        t = poisoned((layer.filters * layer.n + late,), dtype)[late:].view(layer.filters, layer.n)
        return t if values is None else t.copy_(values)

    gains: list[Tensor | None] = []
    for i, layer in enumerate(layers):
        dtype = GAIN_DTYPES[(i + layer.n) % len(GAIN_DTYPES)]
        gains.append(None if dtype is None else (1 + 0.2 * normal(layer.filters)).to(dtype))
    return Problem(
        weights=[placed("weight", x, weight_dtype, mean + deviation * normal(x.filters, x.n)) for x in layers],
        grads=[placed("grad", x, aligned_dtype, 0.1 + normal(x.filters, x.n)) for x in layers],
        gains=gains,
        eps=[1e-5 * (i % 3 + 1) for i in range(len(layers))],
        scales=[1.0 + i % 4 / 8 for i in range(len(layers))],
        columns=[layer.columns for layer in layers],
        outs=[placed("out", x, aligned_dtype) for x in layers],
        grad_weights=[placed("grad_weight", x, weight_dtype) for x in layers],
        aligned_dtype=aligned_dtype,
    )


def forward(emulator: Emulator, p: Problem, **options: Any) -> Forward:
    return emulator.forward(p.weights, p.aligned_dtype, p.gains, p.eps, p.scales, p.columns, p.outs, **options)


def backward(emulator: Emulator, p: Problem, statistics: Tensor, **options: Any) -> Backward:
    return emulator.backward(p.grads, p.weights, p.gains, statistics, p.scales, p.columns, p.grad_weights, **options)


def transposed(x: Tensor, columns: int) -> Tensor:
    """Each filter, a matrix with this many columns, stored by columns instead of rows."""
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
        # The mean is rounded; the deviations from the rounded mean are then summed and corrected.
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
        # Magnitudes of the terms before they cancel; the kernels centre with the forward's rounded mean.
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


def values_a_thread(chunk: int) -> int:
    """That a thread holds of a filter of floats, in chunks of so many."""
    return {1: 12, 4: 20, 8: 16}[chunk]


def lanes(n: int, values: int) -> int:
    """That hold a filter of n floats, so many values each."""
    return next(lanes for lanes in (8 << i for i in range(7)) if values * lanes >= n or lanes == 512)


def check_accesses(
    p: Problem, counts: dict[str, Counts], inputs: dict[str, list[Tensor]], outputs: dict[str, list[Tensor]]
) -> None:
    for i, weight in enumerate(p.weights):
        n, is_double = weight.shape[1], weight.dtype == F64
        tensors = [(name, ts[i]) for name, ts in (inputs | outputs).items()]
        vector = 2 if is_double else 4
        run = n // p.columns[i] if p.columns[i] else n  # of values that are adjacent on both sides, or in a column
        if run % vector or any(t.data_ptr() % 16 for _, t in tensors):
            values = 1
        elif (
            all(t.dtype in (F16, BF16) for _, t in tensors)
            and run % 8 == 0
            and n <= 8192
            and lanes(n, 16) == lanes(n, 20)
        ):
            values = 8
        else:
            values = vector
        on_chip = 4096 if is_double else 512 * values_a_thread(values)
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
