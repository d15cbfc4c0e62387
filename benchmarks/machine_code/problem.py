"""Random weights and gradients at the addresses of a launch, and what a block must have made of them, in float64."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .launches import Direction, Placed
from .memory import GlobalMemory
from .reals import bfloat16_bits

EPS, SCALE = 1e-6, 1.3
POISON = 0xFF  # each byte of a result, which is then NaN, until a kernel writes it
FLOAT_ROUNDING, BFLOAT16_ROUNDING = 2.0**-24, 2.0**-8


@dataclass(frozen=True)
class Layer:
    filters: int
    n: int
    columns: int = 0


@dataclass(frozen=True)
class Image:
    """A convolution's input. One without padding has a height of 1 and all positions as its width: so does the host."""

    batch: int
    channels: int
    height: int
    width: int
    padding: int = 0
    from_channels_last: bool = False
    to_channels_last: bool = True

    @property
    def values(self) -> int:
        return self.batch * self.channels * self.height * self.width

    @property
    def padded_values(self) -> int:
        return self.batch * self.channels * (self.height + 2 * self.padding) * (self.width + 2 * self.padding)

    @property
    def turned(self) -> "Image":
        """With the layouts of its backward."""
        return replace(self, from_channels_last=self.to_channels_last, to_channels_last=self.from_channels_last)

    @property
    def bytes_min(self) -> int:
        """What a pass from float32 to bfloat16, or back, must move."""
        return 4 * self.values + 2 * self.padded_values

    def ordered(self, values: NDArray[np.generic], channels_last: bool, padding: int = 0) -> NDArray[np.generic]:
        """(batch, channels, height, width), however the values lie."""
        height, width = self.height + 2 * padding, self.width + 2 * padding
        if channels_last:
            return values.reshape(self.batch, height, width, self.channels).transpose(0, 3, 1, 2)
        return values.reshape(self.batch, self.channels, height, width)


def from_bfloat16(bits: NDArray[np.uint16]) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


class Problem:
    """The tensors of a list of layers in one direction. Only the layers in `real` have values; the others have
    addresses that no block may touch."""

    def __init__(self, layers: Sequence[Layer], direction: Direction, real: Iterable[int], seed: int = 0) -> None:
        self.layers, self.direction = layers, direction
        self.memory = GlobalMemory()
        self._random = np.random.default_rng(seed)
        self.first = np.cumsum([0, *(layer.filters for layer in layers)])
        filters = int(self.first[-1])
        self.statistics = np.full((filters, 2), np.nan, np.float32)
        self.grad_gain = np.full(filters, np.nan, np.float32)
        self.statistics_at = self.memory.add("statistics", self.statistics, is_streamed=False).address
        self.grad_gain_at = self.memory.add("grad_gain", self.grad_gain, is_streamed=False).address
        self.arrays: dict[int, dict[str, NDArray[np.generic]]] = {}
        chosen = set(real)
        self.placed = [self._place(i, i in chosen) for i in range(len(layers))]

    def _place(self, i: int, is_real: bool) -> Placed:
        layer, backward = self.layers[i], self.direction == "backward"
        shape, random = (layer.filters, layer.n), self._random
        itemsizes = {"weight": 4, "grad": 2, "out": 4 if backward else 2}
        addresses = {"grad": 0}
        if is_real:
            arrays = {
                "weight": random.standard_normal(shape, np.float32) * np.float32(0.05) + np.float32(0.01),
                "out": np.full(shape, POISON * 0x01010101 if backward else POISON * 0x0101, f"u{itemsizes['out']}"),
            }
            if backward:
                arrays["grad"] = bfloat16_bits(random.standard_normal(shape, np.float32)).astype(np.uint16)
                self._set_statistics(i, arrays["weight"])
            self.arrays[i] = arrays
            addresses |= {name: self.memory.add(f"{name} {i}", array).address for name, array in arrays.items()}
        else:
            names = ("weight", "grad", "out") if backward else ("weight", "out")
            size = layer.filters * layer.n
            addresses |= {n: self.memory.reserve(f"{n} {i}", size * itemsizes[n]).address for n in names}
        gain = random.uniform(0.5, 1.5, layer.filters).astype(np.float32)
        self.arrays.setdefault(i, {})["gain"] = gain
        addresses["gain"] = self.memory.add(f"gain {i}", gain, is_streamed=False).address
        return Placed(**addresses, filters=layer.filters, n=layer.n, columns=layer.columns, eps=EPS, scale=SCALE)

    def _set_statistics(self, i: int, weight: NDArray[np.float32]) -> None:
        mean, rstd = moments(weight.astype(np.float64))
        self.statistics[self.first[i] : self.first[i + 1]] = np.stack([mean, rstd], 1)

    def written(self, i: int) -> NDArray[np.intp]:
        """The filters of layer i whose results have been written in full; none may have been in part."""
        unwritten = (self.arrays[i]["out"] == np.iinfo(self.arrays[i]["out"].dtype).max).sum(1)
        assert set(np.unique(unwritten)) <= {0, self.layers[i].n}, "a filter is written in part"
        return np.flatnonzero(unwritten == 0)

    def error(self, i: int) -> float:
        """The largest error of what has been written of layer i, in units of what rounding explains."""
        filters = self.written(i)
        return self._forward_error(i, filters) if self.direction == "forward" else self._backward_error(i, filters)

    def _forward_error(self, i: int, filters: NDArray[np.intp]) -> float:
        layer, arrays = self.layers[i], self.arrays[i]
        weight = arrays["weight"][filters].astype(np.float64)
        mean, rstd = moments(weight)
        expected = (SCALE * arrays["gain"][filters] * rstd)[:, None] * (weight - mean[:, None])
        if layer.columns:
            expected = expected.reshape(len(filters), -1, layer.columns).swapaxes(1, 2).reshape(expected.shape)
        errors = np.abs(from_bfloat16(arrays["out"][filters]) - expected)
        of_float = rounding(layer.n)
        bound = BFLOAT16_ROUNDING * np.abs(expected) + of_float * np.abs(expected).max(1, keepdims=True)
        got_mean, got_rstd = self.statistics[self.first[i] + filters].T.astype(np.float64)
        of_statistics = np.maximum(np.abs(got_mean - mean) * rstd, np.abs(got_rstd / rstd - 1)) / of_float
        return float(max((errors / bound).max(), of_statistics.max()))

    def _backward_error(self, i: int, filters: NDArray[np.intp]) -> float:
        layer, arrays = self.layers[i], self.arrays[i]
        weight, grad = arrays["weight"][filters].astype(np.float64), from_bfloat16(arrays["grad"][filters])
        if layer.columns:
            grad = grad.reshape(len(filters), layer.columns, -1).swapaxes(1, 2).reshape(grad.shape)
        mean, rstd = moments(weight)
        x = (weight - mean[:, None]) * rstd[:, None]
        dot = (grad * x).sum(1)
        factor = (SCALE * arrays["gain"][filters] * rstd)[:, None]
        expected = factor * (grad - grad.mean(1, keepdims=True) - x * dot[:, None] / 2)
        of_float = rounding(layer.n)
        errors = np.abs(arrays["out"][filters].view(np.float32) - expected)
        bound = (
            of_float
            * np.abs(factor)
            * (np.abs(grad).max(1, keepdims=True) + np.abs(x) * (np.abs(grad * x).sum(1))[:, None])
        )
        of_gain = np.abs(self.grad_gain[self.first[i] + filters] - SCALE * dot)
        gain_bound = of_float * SCALE * np.abs(grad * x).sum(1)
        return float(max((errors / bound).max(), (of_gain / gain_bound).max()))


def moments(weight: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean and 1 / sqrt(n/2 * var + eps) of each filter."""
    return weight.mean(1), 1 / np.sqrt(weight.shape[1] / 2 * weight.var(1) + EPS)


def rounding(n: int) -> float:
    """The relative error of a sum of n floats as the kernels form it: a thread adds up to 32 values in order, then the
    lanes of a warp in 5 steps, then up to 16 warps in order; and some 10 operations before and after."""
    return (min(n, 32) + min(5, math.log2(n)) + math.ceil(n / 1024) + 10) * FLOAT_ROUNDING
