"""The CUDA kernels, run by the emulator, on one weight: every dtype, length, alignment and transposition."""

import dataclasses
import itertools
import mmap

import pytest
import torch
from emulator import Backward, Emulator, Forward
from problem import Layer, backward, check_all, check_backward, check_forward, forward, problem
from torch import Tensor
from truth import BF16, F16, F32, F64, PAIRS, name

Dtypes = tuple[torch.dtype, torch.dtype]  # of the weight and the aligned weight
both_directions = pytest.mark.parametrize("direction", ["forward", "backward"])


def some_filters(n: int) -> int:
    """Where a block takes several: more than one block of them, and the last one partly filled."""
    return 3 if n > 512 else 19 if n > 128 else 35 if n > 64 else 67


def ids(value: object) -> str | None:
    return "-".join(map(str, map(name, value))) if isinstance(value, tuple) else None


SIZES = (1, 2, 9, 27, 64, 147, 576, 1000, 1024, 1152, 4608, 8192, 11000, 20000)
# The shortest filters of each access width, and lengths around those where more lanes or warps take a filter, or it is
# read in parts.
BOUNDARIES = (
    3,
    4,
    5,
    6,
    7,
    8,
    16,
    65,
    128,
    129,
    160,
    164,
    256,
    512,
    513,
    1025,
    2048,
    2056,
    4097,
    6143,
    6145,
    8184,
    8196,
)
BOUNDARIES += (8200, 10240, 10244)
SINGLE = [pair for pair in PAIRS if F64 not in pair]
CASES = [
    *itertools.product(SIZES, [(F32, F32), (F32, BF16)]),
    *itertools.product((9, 72, 147, 1152, 11000), [pair for pair in SINGLE if pair not in [(F32, F32), (F32, BF16)]]),
    *itertools.product(BOUNDARIES, [(F32, BF16), (F16, F16)]),
    *itertools.product((1, 2, 3, 9, 64, 147, 1000, 4096, 4608, 9001), [(F64, F64)]),
]


@both_directions
@pytest.mark.parametrize(("n", "dtypes"), CASES, ids=ids)
def test_dtypes_and_sizes(check: Emulator, direction: str, n: int, dtypes: Dtypes) -> None:
    check_all(check, problem([Layer(some_filters(n), n)], *dtypes), direction)


EVERYTHING = ("weight", "out", "grad", "grad_weight")


@both_directions
@pytest.mark.parametrize("misaligned", [("weight",), ("out", "grad"), ("grad_weight",), EVERYTHING], ids=" ".join)
@pytest.mark.parametrize("n", [64, 1152, 11000])
def test_misaligned_tensors(check: Emulator, direction: str, misaligned: tuple[str, ...], n: int) -> None:
    check_all(check, problem([Layer(some_filters(n), n, misaligned=misaligned)], F32, BF16), direction)


@both_directions
@pytest.mark.parametrize("dtypes", PAIRS, ids=ids)
def test_misaligned_tensors_of_any_dtype(check: Emulator, direction: str, dtypes: Dtypes) -> None:
    """16-bit tensors are misaligned by 2 bytes."""
    for n in (8, 576):
        check_all(check, problem([Layer(some_filters(n), n, misaligned=EVERYTHING)], *dtypes), direction)


@both_directions
@pytest.mark.parametrize(
    ("n", "columns"),
    [(9, 9), (27, 9), (45, 9), (36, 9), (108, 9), (40, 4), (147, 49), (147, 3), (576, 9), (576, 64), (1152, 9),
     (4608, 9), (6144, 2), (10240, 5)],
)  # fmt: skip
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)], ids=ids)
def test_transposed_filters(check: Emulator, direction: str, n: int, columns: int, dtypes: Dtypes) -> None:
    check_all(check, problem([Layer(some_filters(n), n, columns)], *dtypes), direction)


@both_directions
@pytest.mark.parametrize("dtypes", [pair for pair in SINGLE if pair[0] != F32] + [(F32, F16)], ids=ids)
def test_transposed_filters_of_any_dtype(check: Emulator, direction: str, dtypes: Dtypes) -> None:
    for n, columns in [(27, 9), (72, 9), (147, 49), (2304, 9)]:
        check_all(check, problem([Layer(some_filters(n), n, columns)], *dtypes), direction)


@both_directions
@pytest.mark.parametrize("n", [27, 2048, 4096])
def test_transposed_filters_of_doubles(check: Emulator, direction: str, n: int) -> None:
    check_all(check, problem([Layer(some_filters(n), n, n // (3 if n == 27 else 256))], F64, F64), direction)


@pytest.mark.parametrize("columns", [0, 9])
def test_indices_beyond_32_bits(check: Emulator, columns: int) -> None:
    filters, n, last = 1_000_000, 4608, 2  # one per block, and only the last blocks run: memory stays sparse

    def sparse() -> Tensor:
        no_reserve = 0x4000  # MAP_NORESERVE, which not every Python defines
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | no_reserve
        return torch.frombuffer(mmap.mmap(-1, filters * n * 4, flags=flags), dtype=F32).view(filters, n)

    p = problem([Layer(last, n, columns)])
    p.gains = [None]
    whole = dataclasses.replace(p, weights=[sparse()], grads=[sparse()], outs=[sparse()], grad_weights=[sparse()])
    whole.weights[0][-last:] = p.weights[0]
    whole.grads[0][-last:] = p.grads[0]
    blocks = (filters - last, filters)
    a = forward(check, whole, blocks=blocks)
    check_forward(p, Forward([a.outs[0][-last:]], a.statistics[-last:], {}))
    b = backward(check, whole, a.statistics, blocks=blocks)
    check_backward(p, Backward([b.grad_weights[0][-last:]], b.grad_gain[-last:], {}))
    assert not a.outs[0][-last - 1].any()
    assert not b.grad_weights[0][-last - 1].any()
