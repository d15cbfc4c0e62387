"""A convolution's input as work for the kernels: checks, and how its tiles lie."""

import math
from collections.abc import Sequence

from torch import Tensor

from ..reference.activations import find
from ..reference.prepare import PADDING_MODES, at_most
from .activations import ACTIVATIONS
from .launch import TYPES, InputWork, check
from .prepare_kernels import FIELDS, TILE


def check_preparation(shape: Sequence[int], padding: Sequence[int], padding_mode: int, activation: int) -> None:
    """shape: of the input."""
    rank = len(shape)
    check(3 <= rank <= 5, f"input: want rank 3 to 5, got rank {rank}")
    check(len(padding) == 2 * (rank - 2), "padding: want two numbers for each spatial dimension")
    check(min(padding) >= 0 and min(shape) >= 0, f"padding: want numbers from 0 to the whole of a gradient: {padding}")
    check(0 <= padding_mode <= 3, f"padding_mode: want 0 to 3, got {padding_mode}")
    check(0 <= activation < len(ACTIVATIONS), f"activation: want 0 to {len(ACTIVATIONS) - 1}, got {activation}")
    for size, *ends in zip(shape[2:], padding[::2], padding[1::2], strict=True):
        most = at_most(PADDING_MODES[padding_mode], size, max(ends))
        check(max(ends) <= most, f"padding: too much for a dimension of {size} in this mode: {ends}")


def input_work(
    source: Tensor,
    to: Tensor,
    saved: Tensor | None,
    shape: Sequence[int],
    padding: Sequence[int],
    padding_mode: int,
    activation: int,
) -> InputWork:
    """source: in the forward the input, in the backward the gradient of the prepared input; shape: of the input."""
    if to.numel() == 0:
        return InputWork(source)
    batch, channels, *spatial = to.shape
    positions = math.prod(spatial)
    tile_channels = 4 if channels <= 4 else 32
    tile_positions = TILE // tile_channels
    check(positions < 2**31 - TILE, f"input: want less than 2^31 positions, got {positions}")
    tiles = -(-channels // tile_channels), -(-positions // tile_positions)
    saved_or_to = to if saved is None else saved
    absent = 3 - len(spatial)
    numbers = {
        "from": [source.data_ptr()],
        "to": [to.data_ptr()],
        "saved": [saved_or_to.data_ptr()],
        "channels": [channels],
        "channel_tiles": [tiles[0]],
        "position_tiles": [tiles[1]],
        "size": [1] * absent + list(shape[2:]),
        "before": [0] * absent + list(padding[::2]),
        "after": [0] * absent + list(padding[1::2]),
        "to_size": [1] * absent + spatial,
    }
    for name, t in (("from_strides", source), ("to_strides", to), ("saved_strides", saved_or_to)):
        numbers[name] = [*t.stride()[:2], *[0] * absent, *t.stride()[2:]]
    constants = {
        "FROM": TYPES[source.dtype],
        "TO": TYPES[to.dtype],
        "MODE": padding_mode,
        "ACTIVATION": ACTIVATIONS[activation],
        "FROM_BY_CHANNELS": _is_by_channels(source),
        "TO_BY_CHANNELS": _is_by_channels(to),
        "CHANNELS": tile_channels,
        "POSITIONS": tile_positions,
    }
    if saved is not None:
        constants |= {
            "SAVED": TYPES[saved.dtype],
            "SAVED_BY_CHANNELS": _is_by_channels(saved),
            "SAVED_IS_RESULT": is_from_result(activation),
        }
    flat = tuple(number for name in list(FIELDS)[1:] for number in numbers[name])
    return InputWork(source, flat, batch * tiles[0] * tiles[1], tuple(constants.items()))


def is_from_result(activation: int) -> bool:
    formula = find(activation)
    return formula is not None and formula.is_from_result


def _is_by_channels(t: Tensor) -> bool:
    """Whether the channels of a position are adjacent in memory."""
    return t.stride(1) == 1 and t.shape[1] > 1
