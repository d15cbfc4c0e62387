"""The emulator itself: each fault planted in a kernel of selftest.cpp is caught, correct kernels pass."""

import re
from pathlib import Path

import pytest
import torch
from emulator import Emulator, poisoned, run_with_sanitizers
from torch import Tensor


def run(check: Emulator, name: str, **options: int) -> tuple[Tensor, Tensor]:
    x, y = torch.arange(64, dtype=torch.float32), poisoned((64,), torch.float32)
    check.selftest(name, x, y, **options)
    return x, y


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("preempt_every", [0, 3])
def test_correct_kernels(check: Emulator, seed: int, preempt_every: int) -> None:
    def result(name: str) -> tuple[Tensor, Tensor]:
        return run(check, name, seed=seed, preempt_every=preempt_every)

    i = torch.arange(64)
    x, y = result("ok")
    assert torch.equal(y, x.flip(0))
    x, y = result("warp_exchange")
    assert torch.equal(y, x[i ^ 31])
    x, y = result("half_mask")
    assert torch.equal(y, torch.where(i % 32 < 16, x[i ^ 1], 0))
    x, y = result("atomics")
    assert torch.equal(y, x.sum().expand(64))
    assert result("votes")[1].all()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_barrier", "uninitialised|race with another thread's"),
        ("warp_no_sync", "race with another thread's write"),
        ("divergent_barrier", "divergent __syncthreads"),
        ("skipped_barrier", "32 threads wait at __syncthreads .*32 have exited"),
        ("exited_lane", "names lane .*, which has exited|at a warp operation .* have exited"),
        ("outside_mask", "which the mask 0xffff leaves out"),
        ("misaligned", "misaligned: read of 16 bytes at byte 4 of x"),
        ("out_of_bounds", r"out of bounds: write of 4 bytes at byte 256 of y \(256 bytes\), at selftest.cpp:"),
        ("far_out", "out of bounds: write of 4 bytes at 0x.*, near no buffer"),
        ("store_to_input", "store to an input"),
        ("read_before_write", "uninitialised: read of 4 bytes"),
        ("blocks_collide", "race with another block's write"),
        ("atomics_unordered", "race with another thread's write|uninitialised"),
        ("overflow", "out of bounds: read"),
    ],
)
def test_planted_faults(check: Emulator, name: str, message: str, seed: int) -> None:
    with pytest.raises(check.Fault, match=message):
        run(check, name, seed=seed)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (33, 95), (64, 64)])
def test_transpose(check: Emulator, rows: int, columns: int) -> None:
    x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).half()
    y = poisoned((columns, rows), torch.float16)
    counts = check.transpose(x, y)
    assert torch.equal(y, x.T)
    assert counts["x"]["reads_of_one"] == counts["y"]["writes_of_one"] == (1, 1)
    assert counts["x"]["reads"] == counts["y"]["writes"] == {2: x.numel()}


# Without torch, which takes seconds to import under the sanitizers.
SANITIZED = """
import ctypes, simt_asan
x, y = (ctypes.c_float * 64)(), (ctypes.c_float * 64)()
simt_asan.selftest({name!r}, ctypes.addressof(x), ctypes.addressof(y), simt_asan.Run([]))
"""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ok", None),
        ("warp_exchange", None),
        ("votes", None),
        ("out_of_bounds", "heap-buffer-overflow"),
        ("shared_out_of_bounds", "global-buffer-overflow"),
        ("shared_index", "runtime error: index 64 out of bounds"),
        ("misaligned", "runtime error: .*misaligned address"),
        ("overflow", "runtime error: signed integer overflow"),
    ],
)
def test_sanitizers(modules: Path, name: str, message: str | None) -> None:
    done = run_with_sanitizers(modules, SANITIZED.format(name=name))
    if message is None:
        assert done.returncode == 0, done.stderr
    else:
        assert done.returncode != 0
        assert re.search(message, done.stderr), done.stderr
