"""The CUDA kernels that prepare a convolution's input, run by the emulator beside one weight, against PyTorch's own
padding and activations in float64. Each value is read as often, and each access as wide, as the kernels claim."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from emulator import Counts, Emulator, Image, poisoned
from problem import BF16, F16, F32, F64, HALF_ULP, Layer, check_backward, check_forward, problem
from torch import Tensor

MODES = ("zeros", "reflect", "replicate", "circular")
ACTIVATIONS = (None, F.relu, F.silu, F.gelu)
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# exp and erf are right to 2 units in the last place, and what is made of them rounds 6 times.
ACTIVATION_ULPS = 16

both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=CHANNELS_LAST.get(t.dim() if channels_last else 0, torch.contiguous_format))


def empty_like(t: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """Of t's shape, poisoned."""
    memory_order = layout(torch.empty(t.shape), channels_last)
    result = torch.empty_like(memory_order, dtype=dtype, memory_format=torch.preserve_format)
    result.untyped_storage().copy_(poisoned((result.untyped_storage().nbytes(),), torch.uint8).untyped_storage())
    return result


def prepared(x: Tensor, padding: list[int], mode: int, activation: int) -> Tensor:
    """By PyTorch, differentiable."""
    act = ACTIVATIONS[activation]
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    flat = [n for pair in reversed(pairs) for n in pair]
    y = x if act is None else act(x)
    return F.pad(y, flat, mode="constant" if mode == 0 else MODES[mode]) if any(flat) else y


def check_counts(counts: dict[str, Counts], image: Image, is_wide: tuple[bool, bool] | None) -> None:
    """Written once; read once, or backward once for each place that shows the value."""
    if not counts:
        return
    assert counts["to"]["writes_of_one"] == (1, 1)
    assert not counts["to"]["reads"]
    if image.is_backward and image.mode != 0 and any(image.padding):
        assert counts["source"]["reads_of_one"][0] >= 1
        assert counts["source"]["reads_of_one"][1] <= 2  # a value shown twice reads its own place again
    elif image.mode == 0 and not any(image.padding):
        assert counts["source"]["reads_of_one"] == (1, 1)
    if image.saved is not None and not any(image.padding):
        assert counts["saved"]["reads_of_one"] == (1, 1)
    if is_wide is not None:
        for name, kind, wide in zip(("source", "to"), ("reads", "writes"), is_wide, strict=True):
            t = image.source if name == "source" else image.to
            assert set(counts[name][kind]) == {16 if wide else t.element_size()}, name


def run(
    emulator: Emulator,
    direction: str,
    shape: tuple[int, ...],
    padding: list[int],
    mode: int = 0,
    activation: int = 0,
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
    channels_last: tuple[bool, bool] = (False, False),
    is_wide: tuple[bool, bool] | None = None,
    **options: int,
) -> Tensor:
    """One weight of 3 filters and one input (dtypes: its own, the prepared one's) in one launch; the input's result."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    dtype, out_dtype = dtypes
    x = layout(torch.randn(shape, generator=generator, dtype=F64).to(dtype), channels_last[0])
    leaf = x.double().requires_grad_()
    truth = prepared(leaf, padding, mode, activation)
    p = problem([Layer(3, 147)], F64 if dtype == F64 else F32, out_dtype)
    u = HALF_ULP[F64 if dtype == F64 else F32] * (2 if dtype == F64 else 1)
    if direction == "forward":
        out = empty_like(truth, out_dtype, channels_last[1])
        image = Image(x, out, padding, mode, activation)
        result = emulator.forward(p.weights, p.aligned_dtype, p.gains, p.eps, p.scales, input=image, **options)
        check_forward(p, result)
        expected, largest = truth.detach(), prepared(leaf.abs(), padding, mode, 0).detach()
    else:
        grad = layout(torch.randn(truth.shape, generator=generator, dtype=F64).to(out_dtype), channels_last[1])
        kept = layout(truth.detach().to(out_dtype), channels_last[1]) if activation == 1 else x
        out = empty_like(x, dtype, channels_last[0])
        image = Image(grad, out, padding, mode, activation, kept if activation else None, is_backward=True)
        statistics = emulator.forward(p.weights, p.aligned_dtype, p.gains, p.eps, p.scales).statistics
        result = emulator.backward(p.grads, p.weights, p.gains, statistics, p.scales, input=image, **options)
        check_backward(p, result)
        (expected,) = torch.autograd.grad(truth, leaf, grad.double())
        sums = prepared(unit := leaf.detach().clone().requires_grad_(), padding, mode, 0)
        (largest,) = torch.autograd.grad(sums, unit, grad.double().abs())
    # At most 27 places are summed.
    terms = 27 * u if direction == "backward" else 0.0
    bound = (ACTIVATION_ULPS * u * (activation > 1) + terms) * 2 * largest
    bound = bound + HALF_ULP[out.dtype] * (expected.abs() + bound) + torch.finfo(out.dtype).tiny
    error = (out.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the tolerance"
    check_counts(result.counts, image, is_wide)
    return out


SHAPES = [(2, 3, 8, 8), (1, 64, 7, 7), (2, 65, 5, 9), (1, 8, 16, 16), (3, 1, 6, 5)]


@both_directions
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("channels_last", list(itertools.product([False, True], repeat=2)))
def test_layouts(check: Emulator, direction: str, shape: tuple[int, ...], channels_last: tuple[bool, bool]) -> None:
    run(check, direction, shape, [0] * 4, activation=1, dtypes=(F32, BF16), channels_last=channels_last)


@both_directions
@pytest.mark.parametrize("mode", range(4))
@pytest.mark.parametrize("channels_last", [(False, False), (False, True), (True, True)])
@pytest.mark.parametrize("padding", [[1, 2, 0, 3], [2, 2, 2, 2], [0, 0, 4, 0]])
def test_padding(
    check: Emulator, direction: str, mode: int, channels_last: tuple[bool, bool], padding: list[int]
) -> None:
    run(check, direction, (2, 5, 6, 5), padding, mode, channels_last=channels_last)


@both_directions
@pytest.mark.parametrize("mode", [1, 2, 3])
def test_borders_that_overlap(check: Emulator, direction: str, mode: int) -> None:
    most = {1: [2, 2, 1, 1], 2: [7, 1, 0, 3], 3: [3, 3, 2, 2]}[mode]
    run(check, direction, (1, 4, 3, 2), most, mode, channels_last=(True, False))


@both_directions
@pytest.mark.parametrize(("rank", "mode"), list(itertools.product([3, 5], range(4))))
def test_ranks(check: Emulator, direction: str, rank: int, mode: int) -> None:
    shape = (2, 6, 11) if rank == 3 else (1, 9, 3, 4, 5)
    run(check, direction, shape, [1, 2] * (rank - 2), mode, activation=2, channels_last=(rank == 5, False))


@both_directions
@pytest.mark.parametrize("activation", range(4))
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16), (F32, F16), (F16, BF16), (BF16, F32), (F64, F64)])
def test_activations_and_dtypes(
    check: Emulator, direction: str, activation: int, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    run(check, direction, (1, 17, 6, 6), [1, 1, 1, 2], 1, activation, dtypes, channels_last=(False, True))


@both_directions
@pytest.mark.parametrize(
    ("shape", "dtypes", "is_wide"),
    [
        ((2, 64, 8, 8), (F32, F32), (True, True)),
        ((1, 128, 16, 12), (F32, BF16), (True, True)),
        ((1, 8, 32, 32), (BF16, BF16), (True, True)),
        ((1, 64, 7, 7), (F32, F32), (False, True)),  # 49 positions: only the side of the channels is wide
        ((1, 33, 8, 8), (F32, F32), (True, False)),  # odd channels: only the other one
        ((1, 4, 8, 8), (F64, F64), (True, True)),
    ],
)
def test_accesses_are_wide_on_both_sides_of_a_transposition(
    check: Emulator,
    direction: str,
    shape: tuple[int, ...],
    dtypes: tuple[torch.dtype, torch.dtype],
    is_wide: tuple[bool, bool],
) -> None:
    wide = is_wide if direction == "forward" else is_wide[::-1]
    run(check, direction, shape, [0] * 4, 0, 0, dtypes, channels_last=(False, True), is_wide=wide)


@both_directions
def test_same_bits_in_every_order_of_threads(check: Emulator, direction: str) -> None:
    orders = [(1, 0), (2, 0), (3, 5), (4, 50)]
    results = [
        run(check, direction, (2, 9, 6, 5), [2, 1, 1, 2], 1, 3, seed=seed, preempt_every=every)
        for seed, every in orders
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
