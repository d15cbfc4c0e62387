# mypy: ignore-errors
"""WeightAlign in Triton: the programs that align filters, and those of the backward.

A launch works through a table of tensors in device memory, one row of int64 numbers (`Task`) each; a program takes as
many filters of one tensor as make a tile (FILTERS[i], WIDTHS[i]), the smallest that is as wide as a filter. Why those
shapes: 2048 values are 16 for each of a program's 128 threads, which keeps enough bytes in flight with registers to
spare; four widths waste at most three lanes in four, and a lane that has no value loads nothing. A filter that is on
chip is read once, kept in registers through its sums, and written once. Longer ones are read in parts of the last
width for the sums and a second time to be written. No sum crosses programs: a fixed order, and no atomics.
"""

from typing import NamedTuple

import triton
import triton.language as tl

WARPS = 8
WIDTHS = tl.constexpr((64, 256, 1024, 4096))
FILTERS = tl.constexpr((16, 8, 4, 1, 1))
LONG = tl.constexpr(4)  # the `shape` of filters longer than the last width
WIDE = tl.constexpr(8)  # filters of so many values, or a multiple, are read 16 bytes at a time where addresses allow
GAIN_TYPES = tl.constexpr((tl.float32, tl.float16, tl.bfloat16, tl.float64))


class Task(NamedTuple):
    """One weight of `filters` rows of n values, a row being one filter, contiguous in memory."""

    weight: int  # addresses; grad only backward, gain 0: none
    grad: int
    out: int  # forward the aligned weight, backward the weight's gradient
    gain: int
    gain_type: int  # place in GAIN_TYPES
    gain_stride: int
    eps: int  # bits of a float64
    scale: int
    n: int
    filters: int
    first_filter: int  # this weight's first row in the list's statistics and gain gradients
    first_program: int
    columns: int  # not 0: the aligned side is transposed against the weight, whose filter is the matrix (n/columns,
    #               columns), as between contiguous and channels_last
    shape: int  # place in WIDTHS, or LONG
    is_wide: int


PLACES = {name: i for i, name in enumerate(Task._fields)}


@triton.constexpr_function
def place(name):
    return PLACES[name]


@triton.jit
def number(row, NAME: tl.constexpr):
    return tl.load(row + place(NAME))


@triton.jit
def real(row, NAME: tl.constexpr, ACC: tl.constexpr):
    return number(row, NAME).to(tl.float64, bitcast=True).to(ACC)


@triton.jit
def memory(row, NAME: tl.constexpr, TYPE: tl.constexpr, IS_WIDE: tl.constexpr):
    """An address of the table as a pointer."""
    pointer = number(row, NAME).to(tl.pointer_type(TYPE))
    if IS_WIDE:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def length(row, IS_WIDE: tl.constexpr):
    n = number(row, "n")
    return n // WIDE * WIDE if IS_WIDE else n  # the same number, of which the compiler now knows the factor


@triton.jit
def inverse(x):
    """1 / x to the nearest; of float32 `/` would be an approximation."""
    if x.dtype == tl.float64:
        y = 1.0 / x
    else:
        y = tl.div_rn(1.0, x)
    return y


@triton.jit
def root(x):
    if x.dtype == tl.float64:
        y = tl.sqrt(x)
    else:
        y = tl.sqrt_rn(x)
    return y


@triton.jit
def filters_of(row, ROWS: tl.constexpr):
    """This program's filters, (ROWS,), and which of them exist."""
    k = (tl.program_id(0) - number(row, "first_program")) * ROWS + tl.arange(0, ROWS)
    return k, k < number(row, "filters")


@triton.jit
def part_of(begin, n, WIDTH: tl.constexpr):
    """Positions in a filter from `begin` on, (1, WIDTH), and which of them exist."""
    position = begin + tl.arange(0, WIDTH)[None, :]
    return position, position < n


@triton.jit
def transposed(row, position, n):
    """Where a position of the weight's filter lies on the aligned side."""
    columns = number(row, "columns").to(tl.int32)
    return (position % columns) * (n.to(tl.int32) // columns) + position // columns


@triton.jit
def load_gain(row, k, is_filter, ACC: tl.constexpr):
    gain = tl.full(k.shape, 1, ACC)
    for i in tl.static_range(4):
        if (number(row, "gain") != 0) & (number(row, "gain_type") == i):
            at = memory(row, "gain", GAIN_TYPES[i], False) + k * number(row, "gain_stride")
            gain = tl.load(at, mask=is_filter, other=1.0).to(ACC)
    return gain


@triton.jit
def mean_above(x, level, is_value, count):
    return tl.sum(tl.where(is_value, x - level[:, None], 0.0), 1) * inverse(count.to(x.dtype))


@triton.jit
def moments(x, reference, is_value, count):
    """Of x - reference: the mean, and the sum of squares about it."""
    rest = mean_above(x, reference, is_value, count)
    deviations = tl.where(is_value, x - reference[:, None] - rest[:, None], 0.0)
    return rest, tl.sum(deviations * deviations, 1)


@triton.jit
def finish_forward(row, statistics, k, is_filter, mean, squares, ACC: tl.constexpr):
    """Stores the statistics and returns the factor of the deviations."""
    rstd = inverse(root(squares * 0.5 + real(row, "eps", ACC)))  # n/2 * var = squares / 2
    at = statistics + 2 * (number(row, "first_filter") + k)
    tl.store(at, mean, mask=is_filter)
    tl.store(at + 1, rstd, mask=is_filter)
    return real(row, "scale", ACC) * load_gain(row, k, is_filter, ACC) * rstd


@triton.jit
def forward_on_chip(
    row, statistics, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of whole filters: read once, written once, scattered within each filter where the aligned side is
    transposed.

    The mean is that of the differences to the filter's first value, so that it is exact for a constant filter, whose
    deviations are then exactly 0; and what rounding left of it in the deviations is subtracted as well (mean 1e4,
    deviation 1e-3).
    """
    n = length(row, IS_WIDE)
    k, is_filter = filters_of(row, ROWS)
    position, is_inside = part_of(0, n, WIDTH)
    is_value = is_filter[:, None] & is_inside
    weight = memory(row, "weight", WEIGHT, IS_WIDE) + k * n
    x = tl.load(weight[:, None] + position, mask=is_value, other=0.0).to(ACC)
    pivot = tl.load(weight, mask=is_filter, other=0.0).to(ACC)
    mean = pivot + mean_above(x, pivot, is_value, n)
    rest, squares = moments(x, mean, is_value, n)
    slope = finish_forward(row, statistics, k, is_filter, mean + rest, squares, ACC)
    y = ((x - mean[:, None] - rest[:, None]) * slope[:, None]).to(ALIGNED)
    out = memory(row, "out", ALIGNED, IS_WIDE) + k * n
    if number(row, "columns") == 0:
        tl.store(out[:, None] + position, y, mask=is_value)
    else:
        tl.store(out[:, None] + transposed(row, position, n), y, mask=is_value)


@triton.jit
def forward_in_parts(
    row, statistics, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One long filter: moments of each part about the first part's mean, merged in order (Chan et al.) in float64, a
    few operations a part; then each part again, to be written."""
    n = length(row, IS_WIDE)
    k, is_filter = filters_of(row, 1)
    weight = memory(row, "weight", WEIGHT, IS_WIDE) + k * n
    mean = tl.load(weight).to(ACC)
    rest, squares = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for begin in range(0, n, WIDTH):
        position, is_value = part_of(begin, n, WIDTH)
        count = tl.minimum(n - begin, WIDTH)
        x = tl.load(weight[:, None] + position, mask=is_value, other=0.0).to(ACC)
        if begin == 0:
            mean += mean_above(x, mean, is_value, count)
        part_rest, part_squares = moments(x, mean, is_value, count)
        delta = part_rest.to(tl.float64) - rest
        share = count.to(ACC) * inverse((begin + count).to(ACC))
        rest += delta * share
        squares += part_squares + delta * delta * share * begin
    rest = rest.to(ACC)
    slope = finish_forward(row, statistics, k, is_filter, mean + rest, squares.to(ACC), ACC)
    out = memory(row, "out", ALIGNED, IS_WIDE) + k * n
    for begin in range(0, n, WIDTH):
        position, is_value = part_of(begin, n, WIDTH)
        x = tl.load(weight[:, None] + position, mask=is_value, other=0.0).to(ACC)
        y = (x - mean[:, None] - rest[:, None]) * slope[:, None]
        tl.store(out[:, None] + position, y.to(ALIGNED), mask=is_value)


@triton.jit
def align_forward(row, statistics, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """scale * gain * (w - mean) / sqrt(n/2 * var + eps) of this program's filters, and their statistics."""
    shape, is_wide = number(row, "shape"), number(row, "is_wide")
    for w in tl.static_range(2):
        for i in tl.static_range(4):
            if (shape == i) & (is_wide == w):
                forward_on_chip(row, statistics, WEIGHT, ALIGNED, ACC, FILTERS[i], WIDTHS[i], w == 1)
        if (shape == LONG) & (is_wide == w):
            forward_in_parts(row, statistics, WEIGHT, ALIGNED, ACC, WIDTHS[3], w == 1)


@triton.jit
def load_statistics(row, statistics, k, is_filter):
    """Mean and rstd of filters k."""
    at = statistics + 2 * (number(row, "first_filter") + k)
    return tl.load(at, mask=is_filter, other=0.0), tl.load(at + 1, mask=is_filter, other=0.0)


@triton.jit
def sums_of(d, g):
    """Over each filter: of w - mean, of G and of their product."""
    return tl.sum(d, 1), tl.sum(g, 1), tl.sum(d * g, 1)


@triton.jit
def finish_backward(row, grad_gain, k, is_filter, sums, n, rstd, ACC: tl.constexpr):
    """Stores the gain's gradient; returns what `gradient` takes, the first being what rounding left in the mean."""
    sum_d, sum_g, sum_dg = sums
    per_value = inverse(n.to(sum_d.dtype))
    rest, g_mean = sum_d * per_value, sum_g * per_value
    g_dot_x = (sum_dg - sum_d * g_mean).to(ACC) * rstd
    scale = real(row, "scale", ACC)
    tl.store(grad_gain + number(row, "first_filter") + k, scale * g_dot_x, mask=is_filter)
    return rest.to(ACC), g_mean.to(ACC), g_dot_x * rstd * 0.5, scale * load_gain(row, k, is_filter, ACC) * rstd


@triton.jit
def gradient(d, g, slopes):
    rest, g_mean, along, factor = slopes
    return ((g - g_mean[:, None]) - (d - rest[:, None]) * along[:, None]) * factor[:, None]


@triton.jit
def backward_on_chip(
    row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of whole filters: weight and gradient read once, the weight's gradient written once."""
    n = length(row, IS_WIDE)
    k, is_filter = filters_of(row, ROWS)
    position, is_inside = part_of(0, n, WIDTH)
    is_value = is_filter[:, None] & is_inside
    mean, rstd = load_statistics(row, statistics, k, is_filter)
    at = (k * n)[:, None] + position
    grad = memory(row, "grad", ALIGNED, IS_WIDE)
    if number(row, "columns") == 0:
        g = tl.load(grad + at, mask=is_value, other=0.0).to(ACC)
    else:
        there = (k * n)[:, None] + transposed(row, position, n)
        g = tl.load(grad + there, mask=is_value, other=0.0).to(ACC)
    w = tl.load(memory(row, "weight", WEIGHT, IS_WIDE) + at, mask=is_value, other=0.0).to(ACC)
    d = tl.where(is_value, w - mean[:, None], 0.0)
    slopes = finish_backward(row, grad_gain, k, is_filter, sums_of(d, g), n, rstd, ACC)
    tl.store(memory(row, "out", WEIGHT, IS_WIDE) + at, gradient(d, g, slopes).to(WEIGHT), mask=is_value)


@triton.jit
def load_part(row, k, begin, n, mean, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
              WIDTH: tl.constexpr, IS_WIDE: tl.constexpr):  # fmt: skip
    """Of a long filter, from `begin` on: where it lies, which values exist, w - mean and G."""
    position, is_value = part_of(begin, n, WIDTH)
    at = (k * n)[:, None] + position
    w = tl.load(memory(row, "weight", WEIGHT, IS_WIDE) + at, mask=is_value, other=0.0).to(ACC)
    g = tl.load(memory(row, "grad", ALIGNED, IS_WIDE) + at, mask=is_value, other=0.0).to(ACC)
    return at, is_value, tl.where(is_value, w - mean[:, None], 0.0), g


@triton.jit
def backward_in_parts(
    row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One long filter: the sums of its parts added in order in float64, then each part again, to be written."""
    n = length(row, IS_WIDE)
    k, is_filter = filters_of(row, 1)
    mean, rstd = load_statistics(row, statistics, k, is_filter)
    sum_d, sum_g, sum_dg = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for begin in range(0, n, WIDTH):
        _, _, d, g = load_part(row, k, begin, n, mean, WEIGHT, ALIGNED, ACC, WIDTH, IS_WIDE)
        part_d, part_g, part_dg = sums_of(d, g)
        sum_d, sum_g, sum_dg = sum_d + part_d, sum_g + part_g, sum_dg + part_dg
    slopes = finish_backward(row, grad_gain, k, is_filter, (sum_d, sum_g, sum_dg), n, rstd, ACC)
    for begin in range(0, n, WIDTH):
        at, is_value, d, g = load_part(row, k, begin, n, mean, WEIGHT, ALIGNED, ACC, WIDTH, IS_WIDE)
        tl.store(memory(row, "out", WEIGHT, IS_WIDE) + at, gradient(d, g, slopes).to(WEIGHT), mask=is_value)


@triton.jit
def align_backward(row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """With x = (w - mean) * rstd and G the gradient of the aligned weight, of this program's filters

    d gain = scale * sum(G x),  d w = scale * gain * rstd * (G - mean(G) - x * sum(G x) / 2).
    """
    shape, is_wide = number(row, "shape"), number(row, "is_wide")
    for w in tl.static_range(2):
        for i in tl.static_range(4):
            if (shape == i) & (is_wide == w):
                backward_on_chip(row, statistics, grad_gain, WEIGHT, ALIGNED, ACC, FILTERS[i], WIDTHS[i], w == 1)
        if (shape == LONG) & (is_wide == w):
            backward_in_parts(row, statistics, grad_gain, WEIGHT, ALIGNED, ACC, WIDTHS[3], w == 1)
