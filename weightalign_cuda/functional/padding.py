"""Parses a convolution's padding into a (before, after) pair for each spatial dimension."""

from collections.abc import Sequence
from typing import Any

from ..ops.reference.prepare import PADDING_MODES, at_most

Pairs = list[tuple[int, int]]


def parse_padding(padding: Any, count: int) -> Pairs:
    """padding: an int, or for each of `count` spatial dimensions an int or a (before, after) pair."""
    if _is_int(padding):
        entries: Sequence[Any] = [padding] * count
    elif isinstance(padding, (list, tuple)):
        if len(padding) != count:
            raise ValueError(f"padding: expected {count} entries, one for each spatial dimension, got {len(padding)}")
        entries = padding
    else:
        raise TypeError(f"padding: expected an int or a tuple, got {type(padding).__name__}")
    return [_pair(entry) for entry in entries]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _pair(entry: Any) -> tuple[int, int]:
    pair = (entry, entry) if _is_int(entry) else entry
    if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(_is_int, pair))):
        raise TypeError(f"padding: expected ints or (before, after) pairs of ints, got {entry!r}")
    if min(pair) < 0 or max(pair) >= 2**31:
        raise ValueError(f"padding: expected numbers from 0 to 2^31 - 1, got {entry!r}")
    return pair[0], pair[1]


def check_padding_mode(padding_mode: Any) -> int:
    """Returns the mode's number in the ops."""
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode: expected one of {', '.join(PADDING_MODES)}, got {padding_mode!r}")
    return PADDING_MODES.index(padding_mode)


def check_padding_size(pairs: Pairs, padding_mode: str, spatial: Sequence[int]) -> None:
    """torch's limits: reflect pads by less than the size, circular by at most the size, replicate needs a size > 0."""
    for pair, size in zip(pairs, spatial, strict=True):
        most = at_most(padding_mode, size, max(pair))
        if max(pair) > most:
            raise ValueError(f"padding: {padding_mode} pads a dimension of {size} by at most {most}, got {pair}")


def is_left_to_convolution(pairs: Pairs, padding_mode: str) -> bool:
    """Symmetric zero padding, which torch's convolutions do themselves."""
    return padding_mode == "zeros" and all(before == after for before, after in pairs)


def same_padding(kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Pairs:
    """torch's padding="same": output of the input's size; an odd total pads one more after than before."""
    if any(s != 1 for s in stride):
        raise ValueError(f"padding: 'same' is for stride 1, got {tuple(stride)}; 'same_tf' is for any")
    totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return [(total // 2, total - total // 2) for total in totals]


def same_tf_padding(
    spatial: Sequence[int], kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Pairs:
    """TensorFlow's "SAME": output of size ceil(input / stride); an odd total pads one more after than before."""
    pairs = []
    for size, k, s, d in zip(spatial, kernel, stride, dilation, strict=True):
        missing = (k - 1) * d - (size - 1) % s  # for the last window; negative if strides skip the last values
        # max(missing, 0) without a comparison, whose result an exporter would fix for all sizes.
        total = (missing + abs(missing)) // 2
        pairs.append((total // 2, total - total // 2))
    return pairs
