# mypy: ignore-errors
"""WeightAlign in Triton: the forward and backward programs.

A launch reads a table in device memory, one row of int64 values (`Task`) for each tensor. A program takes FILTERS[i]
filters of one tensor as a tile of FILTERS[i] x WIDTHS[i] values, the narrowest that holds a filter. A filter is read
once, kept in registers for its sums, and written once, in 16-byte accesses if its length and all addresses allow.
Filters longer than the last width are read in parts for the sums, and again for the output. No sum spans programs:
fixed order, no atomics.

Why these shapes: 4096 values are 16 for each of a program's 256 threads and, at two or more programs per
multiprocessor, 32 KB in flight, enough to hide an H100's latency; narrow tiles are smaller, as each filter needs
registers of its own. Lanes beyond the end of a filter access no memory, but execute what the others do: widths in steps
of two leave at most half of them idle. 8192 values are the most that 128 registers a thread hold.
"""

from typing import NamedTuple

import triton
import triton.language as tl

WARPS = 8
WIDTHS = tl.constexpr((64, 256, 512, 1024, 2048, 4096, 8192))
FILTERS = tl.constexpr((16, 8, 8, 4, 2, 1, 1, 1))
LONG = tl.constexpr(7)  # the `shape` of filters longer than the last width
PART = tl.constexpr(4096)  # values of theirs at a time
WIDE = tl.constexpr(8)  # filters of a multiple of this many values use 16-byte accesses if addresses allow
GAIN_TYPES = tl.constexpr((tl.float32, tl.float16, tl.bfloat16, tl.float64))


class Task(NamedTuple):
    """One weight of `filters` rows of n values; a row is one filter, contiguous in memory."""

    weight: int  # addresses; grad: backward only; gain: 0 for none
    grad: int
    out: int  # forward: the aligned weight; backward: the weight's gradient
    gain: int
    gain_type: int  # index into GAIN_TYPES
    gain_stride: int
    eps: int  # bits of a float64
    scale: int
    n: int
    filters: int
    first_filter: int  # this weight's first row in the list's statistics and gain gradients
    first_program: int
    transposed_columns: int  # if not 0, the aligned side is the transpose of the weight, whose filter is the matrix
    #               (n / columns, columns), as between contiguous and channels_last
    shape: int  # index into WIDTHS, or LONG
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
def multiple(n, IS_WIDE: tl.constexpr):
    """n itself, in a form that tells the compiler that it is a multiple of WIDE, if it is."""
    return n // WIDE * WIDE if IS_WIDE else n


@triton.jit
def rows_of(row, NAME: tl.constexpr, k, n, TYPE: tl.constexpr, IS_WIDE: tl.constexpr):
    """Pointers to the first values of filters k, (ROWS, 1)."""
    first = number(row, NAME).to(tl.pointer_type(TYPE))
    if IS_WIDE:
        first = tl.multiple_of(first, 16)
    return (first + k * n)[:, None]


@triton.jit
def inverse(x):
    """1 / x, correctly rounded; for float32 `/` would be approximate."""
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
def part_of(begin, n, WIDTH: tl.constexpr, IS_WIDE: tl.constexpr):
    """The part of a filter from `begin` on: positions (1, WIDTH), which of them exist, and how many. (int32: positions
    in int64 would take half of all registers.)"""
    position = tl.arange(0, WIDTH)[None, :]
    count = multiple(tl.minimum(n - begin, WIDTH).to(tl.int32), IS_WIDE)
    return position, position < count, count


@triton.jit
def load(pointers, exists, ACC: tl.constexpr):
    return tl.load(pointers, mask=exists, other=0.0).to(ACC)


@triton.jit
def transposed(row, position, n):
    """Maps positions in the weight's filter to the aligned side."""
    columns = number(row, "transposed_columns").to(tl.int32)
    return (position % columns) * (n.to(tl.int32) // columns) + position // columns


@triton.jit
def load_gain(row, k, is_filter, ACC: tl.constexpr):
    gain = tl.full(k.shape, 1, ACC)
    for i in tl.static_range(4):
        if (number(row, "gain") != 0) & (number(row, "gain_type") == i):
            gain = load(
                number(row, "gain").to(tl.pointer_type(GAIN_TYPES[i])) + k * number(row, "gain_stride"), is_filter, ACC
            )
    return gain


@triton.jit
def mean_above(x, level, is_value, count):
    return tl.sum(tl.where(is_value, x - level[:, None], 0.0), 1) * inverse(count.to(x.dtype))


@triton.jit
def moments(x, reference, is_value, count):
    """The mean of x - reference, and the sum of squared deviations from it."""
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
    """A tile of whole filters: read once, written once, scattered within each filter if the aligned side is transposed.

    The mean is computed relative to the filter's first value, so that it is exact for a constant filter, whose
    deviations are then exactly 0; its rounding error, the mean of the deviations, is then subtracted, too (e.g. mean
    1e4, deviation 1e-3).
    """
    n = multiple(number(row, "n"), IS_WIDE)
    k, is_filter = filters_of(row, ROWS)
    position, is_inside, count = part_of(0, n, WIDTH, IS_WIDE)
    is_value = is_filter[:, None] & is_inside
    weight = rows_of(row, "weight", k, n, WEIGHT, IS_WIDE)
    x, pivot = load(weight + position, is_value, ACC), load(tl.reshape(weight, [ROWS]), is_filter, ACC)
    mean = pivot + mean_above(x, pivot, is_value, count)
    rest, squares = moments(x, mean, is_value, count)
    factor = finish_forward(row, statistics, k, is_filter, mean + rest, squares, ACC)
    y = ((x - mean[:, None] - rest[:, None]) * factor[:, None]).to(ALIGNED)
    out = rows_of(row, "out", k, n, ALIGNED, IS_WIDE)
    if number(row, "transposed_columns") == 0:
        tl.store(out + position, y, mask=is_value)
    else:
        tl.store(out + transposed(row, position, n), y, mask=is_value)


@triton.jit
def forward_in_parts(
    row, statistics, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One long filter: moments of each part about the first part's mean, merged in order (Chan et al.) in float64, a
    few operations per part; then each part is read again and written."""
    n = multiple(number(row, "n"), IS_WIDE)
    k, is_filter = filters_of(row, 1)
    weight = rows_of(row, "weight", k, n, WEIGHT, IS_WIDE)
    mean = load(tl.reshape(weight, [1]), is_filter, ACC)
    rest, squares = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for begin in range(0, n, WIDTH):
        position, is_value, count = part_of(begin, n, WIDTH, IS_WIDE)
        x = load(weight + begin + position, is_value, ACC)
        if begin == 0:
            mean += mean_above(x, mean, is_value, count)
        part_rest, part_squares = moments(x, mean, is_value, count)
        delta = part_rest.to(tl.float64) - rest
        share = count.to(ACC) * inverse((begin + count).to(ACC))
        rest += delta * share
        squares += part_squares + delta * delta * share * begin
    rest = rest.to(ACC)
    factor = finish_forward(row, statistics, k, is_filter, mean + rest, squares.to(ACC), ACC)
    out = rows_of(row, "out", k, n, ALIGNED, IS_WIDE)
    for begin in range(0, n, WIDTH):
        position, is_value, _ = part_of(begin, n, WIDTH, IS_WIDE)
        y = (load(weight + begin + position, is_value, ACC) - mean[:, None] - rest[:, None]) * factor[:, None]
        tl.store(out + begin + position, y.to(ALIGNED), mask=is_value)


@triton.jit
def align_forward(row, statistics, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """scale * gain * (w - mean) / sqrt(n/2 * var + eps) of this program's filters, and their statistics."""
    shape, is_wide = number(row, "shape"), number(row, "is_wide")
    for w in tl.static_range(2):
        for i in tl.static_range(LONG):
            if (shape == i) & (is_wide == w):
                forward_on_chip(row, statistics, WEIGHT, ALIGNED, ACC, FILTERS[i], WIDTHS[i], w == 1)
        if (shape == LONG) & (is_wide == w):
            forward_in_parts(row, statistics, WEIGHT, ALIGNED, ACC, PART, w == 1)


@triton.jit
def load_statistics(row, statistics, k, is_filter):
    """Mean and rstd of filters k."""
    at = statistics + 2 * (number(row, "first_filter") + k)
    return tl.load(at, mask=is_filter, other=0.0), tl.load(at + 1, mask=is_filter, other=0.0)


@triton.jit
def sums_of(d, g):
    """Sums over each filter: of w - mean, of G and of their product."""
    return tl.sum(d, 1), tl.sum(g, 1), tl.sum(d * g, 1)


@triton.jit
def finish_backward(row, grad_gain, k, is_filter, sums, n, rstd, ACC: tl.constexpr):
    """Stores the gain's gradient; returns the coefficients for `gradient`, first the rounding error of the mean."""
    sum_d, sum_g, sum_dg = sums
    per_value = inverse(n.to(sum_d.dtype))
    rest, g_mean = sum_d * per_value, sum_g * per_value
    g_dot_x = (sum_dg - sum_d * g_mean).to(ACC) * rstd
    scale = real(row, "scale", ACC)
    tl.store(grad_gain + number(row, "first_filter") + k, scale * g_dot_x, mask=is_filter)
    return rest.to(ACC), g_mean.to(ACC), g_dot_x * rstd * 0.5, scale * load_gain(row, k, is_filter, ACC) * rstd


@triton.jit
def gradient(d, g, coefficients):
    rest, g_mean, along, factor = coefficients
    return ((g - g_mean[:, None]) - (d - rest[:, None]) * along[:, None]) * factor[:, None]


@triton.jit
def backward_on_chip(
    row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """A tile of whole filters: weight and gradient read once, the weight's gradient written once."""
    n = multiple(number(row, "n"), IS_WIDE)
    k, is_filter = filters_of(row, ROWS)
    position, is_inside, _ = part_of(0, n, WIDTH, IS_WIDE)
    is_value = is_filter[:, None] & is_inside
    mean, rstd = load_statistics(row, statistics, k, is_filter)
    grad = rows_of(row, "grad", k, n, ALIGNED, IS_WIDE)
    if number(row, "transposed_columns") == 0:
        g = load(grad + position, is_value, ACC)
    else:
        g = load(grad + transposed(row, position, n), is_value, ACC)
    w = load(rows_of(row, "weight", k, n, WEIGHT, IS_WIDE) + position, is_value, ACC)
    d = tl.where(is_value, w - mean[:, None], 0.0)
    coefficients = finish_backward(row, grad_gain, k, is_filter, sums_of(d, g), n, rstd, ACC)
    out = rows_of(row, "out", k, n, WEIGHT, IS_WIDE)
    tl.store(out + position, gradient(d, g, coefficients).to(WEIGHT), mask=is_value)


@triton.jit
def load_part(weight, grad, begin, n, mean, ACC: tl.constexpr, WIDTH: tl.constexpr, IS_WIDE: tl.constexpr):
    """The part of a long filter from `begin` on: positions, which of them exist, w - mean and G."""
    position, is_value, _ = part_of(begin, n, WIDTH, IS_WIDE)
    w, g = load(weight + begin + position, is_value, ACC), load(grad + begin + position, is_value, ACC)
    return position, is_value, tl.where(is_value, w - mean[:, None], 0.0), g


@triton.jit
def backward_in_parts(
    row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, IS_WIDE: tl.constexpr,
):  # fmt: skip
    """One long filter: the sums of its parts, added in order in float64; then each part is read again and written."""
    n = multiple(number(row, "n"), IS_WIDE)
    k, is_filter = filters_of(row, 1)
    mean, rstd = load_statistics(row, statistics, k, is_filter)
    weight, grad = rows_of(row, "weight", k, n, WEIGHT, IS_WIDE), rows_of(row, "grad", k, n, ALIGNED, IS_WIDE)
    sum_d, sum_g, sum_dg = tl.zeros([1], tl.float64), tl.zeros([1], tl.float64), tl.zeros([1], tl.float64)
    for begin in range(0, n, WIDTH):
        _, _, d, g = load_part(weight, grad, begin, n, mean, ACC, WIDTH, IS_WIDE)
        part_d, part_g, part_dg = sums_of(d, g)
        sum_d, sum_g, sum_dg = sum_d + part_d, sum_g + part_g, sum_dg + part_dg
    coefficients = finish_backward(row, grad_gain, k, is_filter, (sum_d, sum_g, sum_dg), n, rstd, ACC)
    out = rows_of(row, "out", k, n, WEIGHT, IS_WIDE)
    for begin in range(0, n, WIDTH):
        position, is_value, d, g = load_part(weight, grad, begin, n, mean, ACC, WIDTH, IS_WIDE)
        tl.store(out + begin + position, gradient(d, g, coefficients).to(WEIGHT), mask=is_value)


@triton.jit
def align_backward(row, statistics, grad_gain, WEIGHT: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr):
    """For this program's filters, with x = (w - mean) * rstd and G the gradient of the aligned weight:

    d gain = scale * sum(G x),  d w = scale * gain * rstd * (G - mean(G) - x * sum(G x) / 2).
    """
    shape, is_wide = number(row, "shape"), number(row, "is_wide")
    for w in tl.static_range(2):
        for i in tl.static_range(LONG):
            if (shape == i) & (is_wide == w):
                backward_on_chip(row, statistics, grad_gain, WEIGHT, ALIGNED, ACC, FILTERS[i], WIDTHS[i], w == 1)
        if (shape == LONG) & (is_wide == w):
            backward_in_parts(row, statistics, grad_gain, WEIGHT, ALIGNED, ACC, PART, w == 1)
