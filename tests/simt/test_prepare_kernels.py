"""The CUDA kernels that prepare a convolution's input, run by the emulator with weights or alone, against PyTorch's own
padding and activations in float64. Each value is read as often, and each access as wide, as the kernels claim."""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F
from emulator import Counts, Emulator, Image, poisoned
from problem import BF16, F16, F32, F64, HALF_ULP, Layer, backward, check_backward, check_forward, forward, problem
from torch import Tensor
from truth import ACTIVATIONS

MODES = ("zeros", "reflect", "replicate", "circular")
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
# exp and erf are accurate to 2 units in the last place, and what is computed from them rounds 6 times.
ACTIVATION_ULPS = 16

both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def layout(t: Tensor, channels_last: bool) -> Tensor:
    return t.contiguous(memory_format=CHANNELS_LAST.get(t.dim() if channels_last else 0, torch.contiguous_format))


def empty_like(t: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """A poisoned tensor of t's shape."""
    memory_order = layout(torch.empty(t.shape), channels_last)
    result = torch.empty_like(memory_order, dtype=dtype, memory_format=torch.preserve_format)
    result.untyped_storage().copy_(poisoned((result.untyped_storage().nbytes(),), torch.uint8).untyped_storage())
    return result


def strided(t: Tensor, strides: Sequence[int], offset: int = 0) -> Tensor:
    """A copy with these strides, `offset` values past an aligned address."""
    span = 1 + sum((n - 1) * stride for n, stride in zip(t.shape, strides, strict=True))
    return poisoned((offset + span,), t.dtype).as_strided(t.shape, strides, offset).copy_(t)


def spaced(t: Tensor, dim: int) -> Tensor:
    """With a gap of one value between the steps of this dimension alone: strides of the dimensions outside it
    double."""
    step = t.stride(dim)
    return strided(t, [s + 1 if d == dim else s * (1 + (s > step)) for d, s in enumerate(t.stride())])


def roomy(t: Tensor) -> Tensor:
    """With a gap of two values after each row of adjacent values."""
    n = t.shape[t.stride().index(1)]
    return strided(t, [s if s == 1 else s // n * (n + 2) for s in t.stride()])


def late(t: Tensor) -> Tensor:
    """One value past an aligned address."""
    return strided(t, t.stride(), 1)


def move(image: Image, moved: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    for name, to in moved.items():
        setattr(image, name, to(getattr(image, name)))


def prepared(x: Tensor, padding: list[int], mode: int, activation: int) -> Tensor:
    """PyTorch's result, differentiable."""
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    flat = [n for pair in reversed(pairs) for n in pair]
    y = list(ACTIVATIONS.values())[activation](x)
    return F.pad(y, flat, mode="constant" if mode == 0 else MODES[mode]) if any(flat) else y


def once(t: Tensor) -> tuple[int, int]:
    """Least and most accesses of one element of its memory: each value 1, gaps none."""
    return int(torch.ops.aten.is_non_overlapping_and_dense(t)), 1


def check_counts(counts: dict[str, Counts], image: Image, is_wide: tuple[bool, bool] | None) -> None:
    """Each value is written once, and read once or, in the backward, once for each position that shows it."""
    if not counts:
        return
    assert counts["to"]["writes_of_one"] == once(image.to)
    assert not counts["to"]["reads"]
    if image.is_backward and image.mode != 0 and any(image.padding):
        assert counts["source"]["reads_of_one"][0] >= 1
        assert counts["source"]["reads_of_one"][1] <= 2  # a value shown twice reads its own position again
    elif image.mode == 0 and not any(image.padding):
        assert counts["source"]["reads_of_one"] == once(image.source)
    if image.saved is not None and not any(image.padding):
        assert counts["saved"]["reads_of_one"] == (1, 1)
    if is_wide is not None:
        saved_is_wide = is_wide[0 if image.activation == 1 else 1]  # it has the layout of one or the other
        for name, wide in zip(("source", "to", "saved"), (*is_wide, saved_is_wide), strict=True):
            if (t := getattr(image, name)) is not None:
                kind = "writes" if name == "to" else "reads"
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
    layers: Sequence[Layer] = (Layer(3, 147),),
    moved: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({}),
    **options: int,
) -> Tensor:
    """Runs weights and one input together and returns the input's result. dtypes: of the input and the prepared one.
    moved: which of the image's tensors have another layout or address, and how."""
    generator = torch.Generator().manual_seed(math.prod(shape))
    dtype, out_dtype = dtypes
    x = layout(torch.randn(shape, generator=generator, dtype=F64).to(dtype), channels_last[0])
    leaf = x.double().requires_grad_()
    truth = prepared(leaf, padding, mode, activation)
    p = problem(layers, F64 if dtype == F64 else F32, out_dtype)
    u = HALF_ULP[F64 if dtype == F64 else F32] * (2 if dtype == F64 else 1)
    if direction == "forward":
        image = Image(x, empty_like(truth, out_dtype, channels_last[1]), padding, mode, activation)
        move(image, moved)
        result = forward(emulator, p, input=image, **options)
        check_forward(p, result)
        expected, largest = truth.detach(), prepared(leaf.abs(), padding, mode, 0).detach()
    else:
        grad = layout(torch.randn(truth.shape, generator=generator, dtype=F64).to(out_dtype), channels_last[1])
        kept = layout(truth.detach().to(out_dtype), channels_last[1]) if activation == 1 else x
        out = empty_like(x, dtype, channels_last[0])
        image = Image(grad, out, padding, mode, activation, kept if activation else None, is_backward=True)
        move(image, moved)
        result = backward(emulator, p, forward(emulator, p).statistics, input=image, **options)
        check_backward(p, result)
        (expected,) = torch.autograd.grad(truth, leaf, grad.double())
        sums = prepared(unit := leaf.detach().clone().requires_grad_(), padding, mode, 0)
        (largest,) = torch.autograd.grad(sums, unit, grad.double().abs())
    # At most 27 positions are summed.
    terms = 27 * u if direction == "backward" else 0.0
    bound = (ACTIVATION_ULPS * u * (activation > 1) + terms) * 2 * largest
    bound = bound + HALF_ULP[image.to.dtype] * (expected.abs() + bound) + torch.finfo(image.to.dtype).tiny
    error = (image.to.double() - expected).abs()
    assert (error <= bound).all(), f"{(error / bound).max():.3g} times the tolerance"
    check_counts(result.counts, image, is_wide)
    return image.to


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
@pytest.mark.parametrize("activation", range(len(ACTIVATIONS)))
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
        ((2, 72, 7, 7), (F32, F32), (True, True)),  # 49 positions are no whole accesses, but all channels' are
        ((1, 40, 14, 14), (F32, BF16), (True, True)),
        ((1, 16, 23, 23), (F32, F32), (False, True)),  # 529 positions: eight channels of them do not fit in a tile
        ((1, 33, 8, 8), (F32, F32), (True, False)),  # odd channels: only the contiguous side
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
@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize(
    ("shape", "padding"),
    [
        ((2, 24, 8, 8), [1, 1, 1, 1]),
        ((1, 64, 9, 20), [3, 3, 3, 3]),
        ((1, 72, 12, 12), [0, 1, 2, 0]),
        ((2, 40, 7, 7), [1, 1, 1, 1]),  # a run of whole channels
        ((1, 16, 1, 32), [0, 0, 5, 90]),
    ],
)
def test_padding_with_zeros_leaves_accesses_wide(
    check: Emulator, direction: str, shape: tuple[int, ...], padding: list[int], activation: int
) -> None:
    """From contiguous to channels_last. Each tile writes the zeros behind its values."""
    dtypes = (F32, BF16) if shape[2] % 8 else (BF16, F16)
    run(check, direction, shape, padding, 0, activation, dtypes, (False, True), is_wide=(True, True))


def test_padding_of_nothing(check: Emulator) -> None:
    result = run(check, "forward", (2, 8, 0, 4), [1, 1, 1, 1], channels_last=(False, True))
    assert not result.any()


@both_directions
def test_values_of_a_padded_row_are_read_one_by_one(check: Emulator, direction: str) -> None:
    """Its 20 positions are contiguous, but 4 of them are padding."""
    run(check, direction, (2, 8, 16), [1, 3], is_wide=(False, True))


@both_directions
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [((2, 8, 2, 4, 4), True), ((2, 8, 2, 4, 4), False), ((2, 8, 4, 8), False), ((2, 8, 32), False)],
)
@pytest.mark.parametrize("side", ["source", "to"])
def test_accesses_are_narrow_where_a_side_is_not_aligned(
    check: Emulator, direction: str, shape: tuple[int, ...], channels_last: bool, side: str
) -> None:
    """One odd stride at a time, as in a sliced image, or an odd address; the other side stays wide."""
    for moved in (late, *(functools.partial(spaced, dim=dim) for dim in range(len(shape)))):
        run(
            check,
            direction,
            shape,
            [0] * 2 * (len(shape) - 2),
            dtypes=(F32, BF16),
            channels_last=(channels_last, channels_last),
            is_wide=(side != "source", side != "to"),
            moved={side: moved},
        )


@both_directions
@pytest.mark.parametrize(("shape", "channels_last"), [((2, 6, 3, 5), True), ((2, 8, 30), False)])
def test_accesses_are_narrow_where_rows_end_in_a_gap(
    check: Emulator, direction: str, shape: tuple[int, ...], channels_last: bool
) -> None:
    """Within 16 bytes, even though all strides are aligned."""
    padding, layouts = [0] * 2 * (len(shape) - 2), (channels_last, channels_last)
    moved = {"source": roomy, "to": roomy}
    run(check, direction, shape, padding, 0, 0, (F32, BF16), layouts, is_wide=(False, False), moved=moved)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("activation", [1, 2, 3])
@pytest.mark.parametrize("is_late", [False, True])
def test_misaligned_saved_makes_the_side_of_its_layout_narrow(
    check: Emulator, channels_last: bool, activation: int, is_late: bool
) -> None:
    is_wide = not is_late or activation != 1, not is_late or activation == 1
    layouts = channels_last, channels_last
    moved = {"saved": late} if is_late else {}
    run(check, "backward", (2, 8, 4, 4), [0] * 4, 0, activation, (F32, BF16), layouts, is_wide, moved=moved)


@both_directions
def test_input_alone(check: Emulator, direction: str) -> None:
    """As in the backward of a frozen weight."""
    run(check, direction, (2, 5, 6, 5), [1, 2, 0, 3], 1, 1, layers=())


@both_directions
def test_first_launch_of_a_long_list_takes_the_input(check: Emulator, direction: str) -> None:
    """A launch takes 16 of these weights, one block each, which need no dynamic shared memory."""
    run(check, direction, (2, 5, 6, 5), [1, 2, 0, 3], 1, 1, layers=[Layer(3, 9 + i) for i in range(40)])
    shared = [block.shared for block in check.blocks()]
    assert all(shared[:-24])
    assert not any(shared[-24:])


@pytest.mark.parametrize("activation", range(1, len(ACTIVATIONS)))
def test_nan_and_infinity_propagate_as_in_float64(check: Emulator, activation: int) -> None:
    """And where the derivative is 0 so is the gradient, even if the incoming one is infinite or NaN."""
    x = torch.tensor([0.5, math.nan, math.inf, -math.inf, 100.0, -100.0]).view(1, 1, 6)
    out = torch.empty_like(x)
    check.forward([], F32, [], [], [], input=Image(x, out, [0, 0], 0, activation))
    truth = prepared(x.double(), [0, 0], 0, activation)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-6, equal_nan=True)
    leaf = x.requires_grad_()
    (slope,) = torch.autograd.grad(prepared(leaf, [0, 0], 0, activation).sum(), leaf)
    assert 0 in slope
    if list(ACTIVATIONS)[activation] == "hardswish":  # at NaN PyTorch's depends on vectorisation: NaN or 1
        slope = slope.masked_fill(leaf.isnan(), math.nan)
    for value in (math.inf, math.nan):
        grad, grad_input = torch.full_like(out, value), torch.empty_like(out)
        image = Image(grad, grad_input, [0, 0], 0, activation, out if activation == 1 else x, is_backward=True)
        check.backward([], [], [], torch.empty(0, 2), [], input=image)
        expected = torch.where(slope == 0, 0, value * slope)
        torch.testing.assert_close(grad_input, expected, rtol=1e-6, atol=1e-6, equal_nan=True)


@both_directions
def test_same_bits_under_every_schedule(check: Emulator, direction: str) -> None:
    orders = [(1, 0), (2, 0), (3, 5), (4, 50)]
    results = [
        run(check, direction, (2, 9, 6, 5), [2, 1, 1, 2], 1, 3, seed=seed, preempt_every=every)
        for seed, every in orders
    ]
    assert all(torch.equal(results[0], other) for other in results[1:])
