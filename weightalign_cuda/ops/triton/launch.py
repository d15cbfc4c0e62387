"""Launches Triton's kernels for a list of weights and, optionally, a convolution's input; builds the table they read.

Host cost: a row and a lookup, some 10 microseconds of Python per tensor. If an address, shape or constant differs from
all previous calls, the table is built and copied to the device, from pinned memory and in stream order, so that nothing
waits. Training repeats its addresses in each step: the copies cease after a few. During CUDA graph capture each call's
copy becomes part of the graph, whose replays read the host's table again: that one is kept forever, and no cached table
is used, since it may be dropped before the graph is.
"""

import contextlib
import functools
import struct
import threading
from array import array
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import statistics_dtype
from . import kernels
from .align_kernels import FILTERS, GAIN_TYPES, WARPS, WIDE, WIDTHS, Task

TYPES = {
    torch.float32: tl.float32,
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float64: tl.float64,
}
# For each accumulation type. Two programs of 256 threads and 128 registers fit on a multiprocessor; by default ptxas
# may choose fewer, and spill (sm_100). Triton for AMD's GPUs refuses the option.
OPTIONS = {
    sums: {"num_warps": WARPS} | ({"maxnreg": registers} if torch.version.hip is None else {})
    for sums, registers in ((torch.float32, 128), (torch.float64, 255))
}
IS_INTERPRETED = not isinstance(kernels.forward, triton.JITFunction)
TABLES_KEPT = 4096  # several for each layer of a large model, 512 bytes or more each
MOST_PROGRAMS = 2**31 - 1

_recorded: list[Tensor] = []  # the host tables that CUDA graphs read
_interpreter = threading.Lock()  # Triton's runs one launch at a time


class InputWork(NamedTuple):
    """A convolution's input: its table fields after the first one, its programs, the kernel's constants."""

    tensor: Tensor | None = None  # must be compatible with the weights in device and dtype
    numbers: tuple[int, ...] = ()
    programs: int = 0
    constants: tuple[tuple[str, Any], ...] = ()


def check(condition: bool, message: str) -> None:
    """For direct calls of the ops; arguments of the public functions have been checked before."""
    if not condition:
        raise RuntimeError(message)


def check_dtypes(*dtypes: torch.dtype) -> None:
    check(all(dtype in TYPES for dtype in dtypes), "dtypes: want float32, float16, bfloat16 or float64")
    doubles = dtypes.count(torch.float64)
    check(doubles in (0, len(dtypes)), "dtypes: float64 goes to float64 only, and nothing else does")


class Launch:
    """The table rows of one op call. With mixed dtypes, one launch for each pair of weight and aligned dtype."""

    def __init__(self, weights: Sequence[Tensor], gains: Sequence[Tensor | None], input: InputWork) -> None:
        check(len(gains) == len(weights), "gains: want one gain or None for each weight")
        first = weights[0] if weights else input.tensor
        if first is None:
            raise RuntimeError("weights: want one at least")
        self.dtype, self.device, self.input = first.dtype, first.device, input
        serves = "cpu" if IS_INTERPRETED else "cuda"
        check(first.device.type == serves, f"Triton serves {serves} here (see TRITON_INTERPRET), got {first.device}")
        for t in (*weights, *gains, input.tensor):
            check(t is None or t.device == first.device, "weights, gains, input: want one device")
        for weight, gain in zip(weights, gains, strict=True):
            check(weight.dim() >= 2, "weights: want rank 2 or more")
            check_dtypes(self.dtype, weight.dtype)
            if gain is not None:
                is_column = gain.shape[:1] == weight.shape[:1] and gain.numel() == weight.shape[0]
                check(is_column and gain.dtype in TYPES, "gains: want shape (filters,) or (filters, 1, ...)")
        if input.tensor is not None:
            sums = statistics_dtype(input.tensor.dtype)
            check(sums == statistics_dtype(self.dtype), "input: beside weights, want float64 exactly if they are")
        self.filters = sum(w.shape[0] for w in weights)
        self._has_empty = any(w.numel() == 0 for w in weights)
        self._rows: dict[tuple[torch.dtype, torch.dtype], list[Task]] = {}
        self._programs: dict[tuple[torch.dtype, torch.dtype], int] = {}
        self._kept: list[Tensor | None] = []  # copies must live until the launch
        self._first_filter = 0

    def per_filter(self, *width: int) -> Tensor:
        """(filters, *width) of the accumulation type; zeros if filters may have no values."""
        create = torch.zeros if self._has_empty else torch.empty
        return create((self.filters, *width), dtype=statistics_dtype(self.dtype), device=self.device)

    def add(
        self,
        weight: Tensor,
        grad: Tensor | None,
        out: Tensor,
        gain: Tensor | None,
        eps: float,
        scale: float,
        transposed_columns: int,
    ) -> None:
        """Adds a row. weight: with contiguous filters; transposed_columns: as in Task."""
        filters, n = weight.shape[0], weight.shape[1:].numel()
        first_filter, self._first_filter = self._first_filter, self._first_filter + filters
        if filters == 0 or n == 0:
            return
        key = weight.dtype, out.dtype if grad is None else grad.dtype
        first_program, shape = self._programs.get(key, 0), bisect_left(WIDTHS.value, n)
        addresses = weight.data_ptr(), 0 if grad is None else grad.data_ptr(), out.data_ptr()
        task = Task(
            *addresses,
            gain=0 if gain is None else gain.data_ptr(),
            gain_type=0 if gain is None else GAIN_TYPES.value.index(TYPES[gain.dtype]),
            gain_stride=0 if gain is None else gain.stride(0),
            eps=_bits(eps),
            scale=_bits(scale),
            n=n,
            filters=filters,
            first_filter=first_filter,
            first_program=first_program,
            transposed_columns=transposed_columns,
            shape=shape,
            is_wide=n % WIDE.value == 0 and all(address % 16 == 0 for address in addresses),
        )
        self._rows.setdefault(key, []).append(task)
        self._programs[key] = first_program + -(-filters // FILTERS.value[shape])
        self._kept += (weight, grad, out)

    def run(self, kernel: Any, *outputs: Tensor) -> None:
        """Runs all launches; the first one includes the input."""
        input = self.input
        with torch.cuda.device_of(outputs[0]):
            for key in self._rows or ([(self.dtype, self.dtype)] if input.programs else []):
                self._launch(kernel, outputs, key, input)
                input = InputWork()

    def _launch(
        self, kernel: Any, outputs: tuple[Tensor, ...], key: tuple[torch.dtype, torch.dtype], input: InputWork
    ) -> None:
        align_programs = self._programs.get(key, 0)
        programs = align_programs + input.programs
        check(programs <= MOST_PROGRAMS, f"more than {MOST_PROGRAMS} programs in a launch")
        numbers = (align_programs, *input.numbers) if input.programs else ()
        table = _on_device(numbers, tuple(self._rows.get(key, ())), align_programs, self.device)
        sums = statistics_dtype(self.dtype)
        weight, aligned, acc = (TYPES[dtype] for dtype in (*key, sums))
        constants = {"WEIGHT": weight, "ALIGNED": aligned, "ACC": acc, **dict(input.constants)}
        with _interpreter if IS_INTERPRETED else contextlib.nullcontext():
            kernel[(programs,)](table, *outputs, **constants, **OPTIONS[sums])


def _bits(x: float) -> int:
    return int(struct.unpack("q", struct.pack("d", x))[0])


def _on_device(numbers: tuple[int, ...], rows: tuple[Task, ...], programs: int, device: torch.device) -> Tensor:
    """The table in device memory."""
    if device.type == "cpu":
        return _cached(numbers, rows, programs, device, 0)
    if torch.cuda.is_current_stream_capturing():
        _recorded.append(_table(numbers, rows, programs).pin_memory())
        return _recorded[-1].to(device, non_blocking=True)
    return _cached(numbers, rows, programs, device, torch.cuda.current_stream(device).cuda_stream)


@functools.lru_cache(TABLES_KEPT)
def _cached(
    numbers: tuple[int, ...], rows: tuple[Task, ...], programs: int, device: torch.device, stream: int
) -> Tensor:
    """One per stream: on another one the copy might not have arrived."""
    table = _table(numbers, rows, programs)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


def _table(numbers: tuple[int, ...], rows: tuple[Task, ...], programs: int) -> Tensor:
    table = array("q", numbers)
    place, firsts = len(numbers) + programs, [row.first_program for row in rows] + [programs]
    for row, next_first in zip(rows, firsts[1:], strict=True):
        table += array("q", [place]) * (next_first - row.first_program)
        place += len(row)
    for row in rows:
        table.extend(row)
    return torch.frombuffer(table, dtype=torch.int64)
