# mypy: ignore-errors
"""Preparation of a convolution's input in Triton, tile by tile: activation, cast, layout, padding, and its gradient.

A program takes one tile, CHANNELS x POSITIONS of one image, from the layout of `from` to that of `to`: each value is
read from memory once and written once; in the backward, the gradients of a value and of its copies in the padding are
gathered (no atomics). If channels are adjacent in one and positions in the other, the compiler transposes the tile
through shared memory between load and store, so that both are coalesced. Why this shape: 2048 values are 8 for each of
256 threads; 32 channels fill a 128-byte line in float32, images of up to 4 channels take longer tiles instead.
"""

import itertools

import triton
import triton.language as tl

ZEROS, REFLECT, REPLICATE, CIRCULAR = (tl.constexpr(i) for i in range(4))  # the op's numbers
TILE = 2048

# The input's fields in the table, and how many values each has. There are 3 spatial dimensions, missing ones first,
# with size 1; strides are those of batch, channel and these three, in values.
FIELDS = {
    "align_programs": 1,  # number of programs before those of the input
    "from": 1,  # addresses; forward: the input; backward: the gradient of the prepared input
    "to": 1,  # forward: the prepared input; backward: the input's gradient
    "saved": 1,  # backward: source of the activation's derivative, the prepared input or the input
    "channels": 1,
    "channel_tiles": 1,
    "position_tiles": 1,
    "size": 3,  # of the input
    "before": 3,  # its padding
    "after": 3,
    "to_size": 3,  # of `to`: padded in the forward, not in the backward
    "from_strides": 5,
    "to_strides": 5,
    "saved_strides": 5,
}
NUMBERS = tl.constexpr(sum(FIELDS.values()))
PLACES = dict(zip(FIELDS, itertools.accumulate(FIELDS.values(), initial=0), strict=False))


@triton.constexpr_function
def place(name, i):
    return PLACES[name] + i


@triton.jit
def number(row, NAME: tl.constexpr, I: tl.constexpr = 0):  # noqa: E741
    return tl.load(row + place(NAME, I))


@triton.jit
def size(row, NAME: tl.constexpr, D: tl.constexpr):
    return number(row, NAME, D).to(tl.int32)


@triton.jit
def tile_of(row, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr):
    """This program's image, channels (CHANNELS, 1), positions (1, POSITIONS) as three coordinates in `to`, and which of
    the tile's values exist."""
    tile = tl.program_id(0) - number(row, "align_programs")
    position_tiles, channel_tiles = number(row, "position_tiles"), number(row, "channel_tiles")
    image = tile // position_tiles // channel_tiles
    c = (tile // position_tiles % channel_tiles) * CHANNELS + tl.arange(0, CHANNELS)[:, None]
    p = (tile % position_tiles).to(tl.int32) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    depth, height, width = size(row, "to_size", 0), size(row, "to_size", 1), size(row, "to_size", 2)
    at = (p // width // height, p // width % height, p % width)
    return image, c, at, (c < number(row, "channels")) & (p < depth * height * width)


@triton.jit
def origin(row, NAME: tl.constexpr, STRIDES: tl.constexpr, TYPE: tl.constexpr, image, c, BY_CHANNELS: tl.constexpr):
    """Pointers to the channels of an image. (If channels are adjacent the stride is a literal 1, for the compiler.)"""
    stride = 1 if BY_CHANNELS else number(row, STRIDES, 1)
    return number(row, NAME).to(tl.pointer_type(TYPE)) + image * number(row, STRIDES, 0) + c * stride


@triton.jit
def shown_value(MODE: tl.constexpr, at, n):
    """Index of the value shown at position `at` of a dimension of n values (padding: < 0 or >= n); -1: zero."""
    value = tl.where((at >= 0) & (at < n), at, -1)
    if MODE == REFLECT:
        value = tl.where(at < 0, -at, tl.where(at < n, at, 2 * (n - 1) - at))
    elif MODE == REPLICATE:
        value = tl.minimum(tl.maximum(at, 0), n - 1)
    elif MODE == CIRCULAR:
        value = tl.where(at < 0, at + n, tl.where(at < n, at, at - n))
    return value


@triton.jit
def nth_place(MODE: tl.constexpr, i, at, n, before, after):
    """Candidate i of the positions that show value `at`, its own first, and whether it does show it."""
    i += tl.zeros_like(at)  # a tensor: Triton 3.9's interpreter makes integer masks of scalar comparisons
    if MODE == REFLECT:
        place = tl.where(i == 1, -at, 2 * (n - 1) - at)
    elif MODE == REPLICATE:
        place = tl.where(i <= before, -i, n - 1 + i - before)
    else:
        place = tl.where(i == 1, at - n, at + n)
    is_padding = ((place < 0) | (place >= n)) & (place >= -before) & (place < n + after)
    is_shown = (i == 0) | (is_padding & (shown_value(MODE, place, n) == at))
    return tl.where(i == 0, at, place), is_shown


@triton.jit
def candidates(MODE: tl.constexpr, at, n, before, after):
    """Number of candidates that a tile has to check: only its own positions if it is far from both ends."""
    most = tl.maximum(before, after)
    is_near = (most > 0) & ((at <= most) | (at >= n - 1 - most))
    return 1 + tl.max(tl.max(is_near.to(tl.int32), 1), 0) * (before + after if MODE == REPLICATE else 2)


@triton.jit
def prepare_forward(
    row, FROM: tl.constexpr, TO: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr, ACTIVATION: tl.constexpr,
    FROM_BY_CHANNELS: tl.constexpr, TO_BY_CHANNELS: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """A tile of the prepared input, pad(cast(activation(input))). Relies on f(0) = 0 for every activation.

    ACTIVATION: a function of `activations`, or None.
    """
    image, c, at, is_value = tile_of(row, CHANNELS, POSITIONS)
    from_, to = tl.zeros_like(at[0]).to(tl.int64), tl.zeros_like(at[0]).to(tl.int64)
    is_shown = is_value
    for d in tl.static_range(3):
        value = shown_value(MODE, at[d] - size(row, "before", d), size(row, "size", d))
        is_shown &= value >= 0
        from_ += value * number(row, "from_strides", 2 + d)
        to += at[d] * number(row, "to_strides", 2 + d)
    source = origin(row, "from", "from_strides", FROM, image, c, FROM_BY_CHANNELS) + from_
    y = tl.load(source, mask=is_shown, other=0.0).to(ACC)
    if ACTIVATION is not None:
        y, _ = ACTIVATION(y)
    tl.store(origin(row, "to", "to_strides", TO, image, c, TO_BY_CHANNELS) + to, y.to(TO), mask=is_value)


@triton.jit
def gathered(row, source, at, is_value, ACC: tl.constexpr, MODE: tl.constexpr):
    """Sum of `source` over the positions that show each value, its own first."""
    n = (size(row, "size", 0), size(row, "size", 1), size(row, "size", 2))
    before = (size(row, "before", 0), size(row, "before", 1), size(row, "before", 2))
    after = (size(row, "after", 0), size(row, "after", 1), size(row, "after", 2))
    stride = (number(row, "from_strides", 2), number(row, "from_strides", 3), number(row, "from_strides", 4))
    if MODE == ZEROS:
        own = (at[0] + before[0]) * stride[0] + (at[1] + before[1]) * stride[1] + (at[2] + before[2]) * stride[2]
        total = tl.load(source + own, mask=is_value, other=0.0).to(ACC)
    else:
        total = tl.zeros(is_value.shape, ACC)
        depths = candidates(MODE, at[0], n[0], before[0], after[0])
        rows = candidates(MODE, at[1], n[1], before[1], after[1])
        columns = candidates(MODE, at[2], n[2], before[2], after[2])
        for i in range(depths * rows * columns):
            depth, is_depth = nth_place(MODE, i // columns // rows, at[0], n[0], before[0], after[0])
            height, is_row = nth_place(MODE, i // columns % rows, at[1], n[1], before[1], after[1])
            width, is_column = nth_place(MODE, i % columns, at[2], n[2], before[2], after[2])
            there = (depth + before[0]) * stride[0] + (height + before[1]) * stride[1] + (width + before[2]) * stride[2]
            total += tl.load(source + there, mask=is_value & is_depth & is_row & is_column, other=0.0).to(ACC)
    return total


@triton.jit
def prepare_backward(
    row, FROM: tl.constexpr, TO: tl.constexpr, SAVED: tl.constexpr, ACC: tl.constexpr, MODE: tl.constexpr,
    ACTIVATION: tl.constexpr, FROM_BY_CHANNELS: tl.constexpr, TO_BY_CHANNELS: tl.constexpr,
    SAVED_BY_CHANNELS: tl.constexpr, SAVED_IS_RESULT: tl.constexpr, CHANNELS: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """A tile of d input = activation'(input) * sum of d prepared over the positions that show the value. Where the
    derivative is 0 the result is 0, even if the gradient is inf or nan."""
    image, c, at, is_value = tile_of(row, CHANNELS, POSITIONS)
    source = origin(row, "from", "from_strides", FROM, image, c, FROM_BY_CHANNELS)
    g = gathered(row, source, at, is_value, ACC, MODE)
    if ACTIVATION is not None:
        saved = origin(row, "saved", "saved_strides", SAVED, image, c, SAVED_BY_CHANNELS)
        for d in tl.static_range(3):
            before = size(row, "before", d) if SAVED_IS_RESULT else 0
            saved += (at[d] + before) * number(row, "saved_strides", 2 + d)
        _, derivative = ACTIVATION(tl.load(saved, mask=is_value, other=0.0).to(ACC))
        g = tl.where(derivative == 0, 0.0, g * derivative)
    to = origin(row, "to", "to_strides", TO, image, c, TO_BY_CHANNELS)
    for d in tl.static_range(3):
        to += at[d] * number(row, "to_strides", 2 + d)
    tl.store(to, g.to(TO), mask=is_value)
