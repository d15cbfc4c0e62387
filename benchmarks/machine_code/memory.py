"""The GPU's global memory: named tensors at addresses."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FIRST_ADDRESS = 0x7F00_0000_0000 - 0x4800  # the first weight lies across a multiple of 2^32: a lost carry shows
ALIGNMENT = 256  # of each tensor, as allocated by CUDA
GAP = 4096  # between tensors, so that an access beyond one is found

Words = NDArray[np.uint32]
Addresses = NDArray[np.uint64]


@dataclass(frozen=True)
class Tensor:
    """An array in memory; without one, addresses that nothing may access."""

    name: str
    address: int
    size: int
    array: NDArray[np.generic] | None
    is_streamed: bool  # each value is read or written once; not so gains and statistics, whose sectors blocks share

    @property
    def end(self) -> int:
        return self.address + self.size


class BadAccess(Exception):  # noqa: N818
    """An access that the GPU would not make, or that would fault."""


class GlobalMemory:
    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self._next = FIRST_ADDRESS

    def add(self, name: str, array: NDArray[np.generic], is_streamed: bool = True) -> Tensor:
        """Puts a contiguous array into memory; kernels read and write the array itself."""
        return self._place(name, array.nbytes, array.reshape(-1).view(), is_streamed)

    def reserve(self, name: str, size: int) -> Tensor:
        """Addresses as if a tensor were there."""
        return self._place(name, size, None, True)

    def _place(self, name: str, size: int, array: NDArray[np.generic] | None, is_streamed: bool) -> Tensor:
        tensor = Tensor(name, self._next, size, array, is_streamed)
        self.tensors.append(tensor)
        self._next += -(-(size + GAP) // ALIGNMENT) * ALIGNMENT
        return tensor

    def tensor_at(self, address: int) -> Tensor:
        """The tensor that contains the address."""
        for tensor in self.tensors:
            if tensor.address <= address < tensor.end:
                return tensor
        raise BadAccess(f"near no tensor: {address:#x}")

    def parts(self, addresses: Addresses, width: int) -> list[tuple[Tensor, NDArray[np.bool_], NDArray[np.int64]]]:
        """The tensors in which these accesses of `width` bytes lie, for each which accesses, and their offsets."""
        if (addresses % np.uint64(width)).any():
            raise BadAccess(f"misaligned: {width} bytes")
        found, left = [], np.ones(addresses.shape, bool)
        while left.any():
            tensor = self.tensor_at(int(addresses[left][0]))
            within = left & (addresses >= tensor.address) & (addresses < tensor.end)
            offsets = (addresses[within] - np.uint64(tensor.address)).astype(np.int64)
            if tensor.array is None or int(offsets.max()) + width > tensor.size:
                raise BadAccess(f"outside of {tensor.name}: {width} bytes at {int(offsets.max())} of {tensor.size}")
            found.append((tensor, within, offsets))
            left &= ~within
        return found

    def load(self, addresses: Addresses, width: int) -> list[Words]:
        """The 32-bit words at each address; one word, filled with zeros, for less than 4 bytes."""
        words = [np.zeros(addresses.shape, np.uint32) for _ in range(max(1, width // 4))]
        for tensor, within, offsets in self.parts(addresses, width):
            view = units(tensor.array, width)
            for k, word in enumerate(words):
                word[within] = view[offsets // view.itemsize + k]
        return words

    def store(self, addresses: Addresses, width: int, words: list[Words]) -> None:
        for tensor, within, offsets in self.parts(addresses, width):
            view = units(tensor.array, width)
            for k, word in enumerate(words):
                view[offsets // view.itemsize + k] = word[within].astype(view.dtype)


def units(array: NDArray[np.generic], width: int) -> NDArray[np.unsignedinteger]:
    """The array's bytes as the units that accesses of `width` bytes consist of."""
    return array.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
