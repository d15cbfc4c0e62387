"""The CPU kernels of each instruction set that this machine supports, each in its own process: WEIGHTALIGN_CPU is read
at the first call."""

import hashlib
import itertools
import math
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest
import torch
from test_prepare import ACTIVATIONS, check_prepare
from test_prepare import PAIRS as PREPARED
from truth import BF16, F16, F32, PAIRS, check_align, dense, normal

import weightalign_cuda as wa
from weightalign_cuda.ops import library

TESTS = pathlib.Path(__file__).parent
VARIABLE = "WEIGHTALIGN_CPU"
NAMES = ("baseline", "avx2", "avx512", "avx512+avx2")
HERE = NAMES[: {"AVX2": 2, "AVX512": 4}.get(torch.backends.cpu.get_cpu_capability(), 1)]


def run_apart(check, instruction_set):
    """Runs this file's function `check` in another process."""
    path = os.pathsep.join([str(pathlib.Path(wa.__file__).parents[1]), str(TESTS)])
    env = {**os.environ, "PYTHONPATH": path, "WEIGHTALIGN_BACKEND": "cpu", VARIABLE: instruction_set}
    code = f"import test_cpu_instruction_sets as t; t.{check}()"
    # An emulated machine takes minutes to import torch.
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", HERE)
def test_values_gradients_and_conversions(name):
    run_apart("check_all", name)


def test_best_instruction_set_is_the_default():
    with wa.use_backend("cpu"):
        assert keeps_payload() == has_conversions(os.environ.get(VARIABLE) or HERE[-1])


def print_bits():
    """Of a list's results and gradients, which differ between instruction sets: weights of 65,536 values and more."""
    weights = [normal(16, 4096, seed=1), normal(16, 4100, seed=2), normal(1, 65536, seed=3), normal(1, 65537, seed=4)]
    gains = [normal(len(w), seed=5) for w in weights]
    grads = [normal(*w.shape, seed=6) for w in weights]
    leaves = [t.requires_grad_() for t in (*weights, *gains)]
    together = wa.align_foreach(weights, gains)
    found = [*together, *torch.autograd.grad(together, leaves, grads)]
    print(*(hashlib.sha256(t.detach().numpy()).hexdigest() for t in found))


@pytest.mark.skipif(len(HERE) < len(NAMES), reason="needs AVX-512")
def test_small_weights_are_aligned_by_avx2():
    """By the size of each weight: what else is in its list does not matter."""
    avx2, avx512, default = (run_apart("print_bits", name).split() for name in NAMES[1:])
    assert not set(avx2) & set(avx512)
    for i, bits in enumerate(default):
        assert bits == (avx512 if i % 2 else avx2)[i]


def check_errors():
    """A failed choice is repeated at the next call."""
    asked = os.environ[VARIABLE]
    for name in ("sse9", "AVX2", *NAMES[len(HERE) :]):
        os.environ[VARIABLE] = name
        wanted = f"{VARIABLE}: expected one of {', '.join(HERE)} (what this machine has), got '{name}'"
        with pytest.raises(RuntimeError, match=re.escape(wanted)):
            wa.align(torch.ones(2, 2))
        assert wanted in library.cpu_kernels()
    os.environ[VARIABLE] = asked


def check_all():
    check_errors()
    assert library.cpu_kernels() == os.environ[VARIABLE]
    assert keeps_payload() == has_conversions(os.environ[VARIABLE])
    check_values()
    check_streams()
    check_conversions()


def cast(x, dtype):
    return wa.prepare(x, torch.ones(1, 1, 1, dtype=x.dtype), dtype=dtype)[0]


def has_conversions(instruction_set):
    """Whether float32 to float16 is an instruction: from AVX2 on, and on every aarch64."""
    return instruction_set != "baseline" or platform.machine() != "x86_64"


def keeps_payload():
    """Whether float32 to float16 keeps the payload of a NaN: only the hardware conversion does."""
    nan = torch.tensor([[[0x7FC02000]]], dtype=torch.int32).view(F32)
    return cast(nan, F16).view(torch.int16).item() == 0x7E01


def check_values():
    for (weight_dtype, dtype), shape in itertools.product(PAIRS, [(5, 7, 7, 3), (3, 512, 3, 3)]):
        gain = normal(shape[0], mean=1, std=0.3, seed=1)
        for order in [(0, 1, 2, 3), (0, 2, 3, 1)]:
            weight = dense(normal(*shape, dtype=weight_dtype), order)
            check_align(weight, gain, dtype=dtype, eps=1e-3, scale=1.3, memory_format=torch.channels_last)
    for (dtype, weight_dtype, out), activation in itertools.product(PREPARED, ACTIVATIONS):
        x, weight = normal(2, 5, 7, 21, std=3, dtype=dtype), normal(4, 5, 3, 3, dtype=weight_dtype)
        for padding, order in itertools.product([0, ((1, 0), (2, 3))], [(0, 1, 2, 3), (0, 2, 3, 1)]):
            check_prepare(dense(x, order), weight, padding=padding, activation=activation, dtype=out)


def check_streams():
    """The results of a list so long that they are written past the caches are bitwise those of each weight alone: of
    filters that fill whole lines of the cache, and of others between them."""
    shapes = (24, 64, 3, 1), (5, 7, 7, 3), (3, 512, 3, 3), (7, 1, 3, 3)
    for (weight_dtype, dtype), memory_format in itertools.product(PAIRS, (torch.preserve_format, torch.channels_last)):
        shaped = [normal(*shape, dtype=weight_dtype, seed=i) for i, shape in enumerate(shapes)]
        weights = [*shaped, torch.ones(2048, 4097, dtype=weight_dtype)]
        gains = [normal(len(w), mean=1, std=0.3, seed=i) for i, w in enumerate(weights)]
        grads = [normal(*w.shape, dtype=dtype, seed=i + 9) for i, w in enumerate(shaped)] + [torch.zeros(2048, 4097)]
        leaves = [t.requires_grad_() for t in (*weights, *gains)]
        options = {"dtype": dtype, "memory_format": memory_format, "eps": 1e-3, "scale": 1.3}
        streamed = wa.align_foreach(weights, gains, **options)
        gradients = torch.autograd.grad(streamed, leaves, [g.to(dtype) for g in grads])
        for i, (weight, gain, grad) in enumerate(zip(weights[:-1], gains, grads, strict=False)):
            alone = wa.align(weight, gain, **options)
            assert torch.equal(streamed[i], alone), (weight.shape, weight_dtype, dtype)
            expected = torch.autograd.grad(alone, (weight, gain), grad)
            for found, want in zip((gradients[i], gradients[len(weights) + i]), expected, strict=True):
                assert torch.equal(found, want), (weight.shape, weight_dtype, dtype)


def check_conversions():
    """Bitwise equal to PyTorch's. Rows of 16 values are converted together, of 15 one by one."""
    for dtype in (F16, BF16):
        every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
        for x, to in [(every, F32), (edges(every), dtype)]:
            for row in (15, 16):
                rows = torch.cat([x, x.new_zeros(-len(x) % row)]).view(-1, 1, row)
                found, expected = cast(rows, to), rows.to(to)
                assert torch.equal(found.isnan(), expected.isnan()), (x.dtype, to, row)
                bits = torch.int32 if to == F32 else torch.int16
                wrong = (found.view(bits) != expected.view(bits)) & ~expected.isnan()
                assert not wrong.any(), f"{to} of {rows[wrong][:8].tolist()}: {found[wrong][:8].tolist()}, row of {row}"


def edges(every):
    """All numbers of a 16-bit dtype; the midpoints of neighbours and, beyond the largest, the limit to infinity, with
    the nearest floats on both sides; some far beyond; and NaNs with the smallest and the largest bits."""
    limit = 2.0**16 if every.dtype == F16 else 2.0**128
    numbers = every.double()[every.isfinite()].unique()
    ends = torch.cat([torch.tensor([-limit]), numbers, torch.tensor([limit])])
    midway = ((ends[1:] + ends[:-1]) / 2).float()
    beside = [midway.nextafter(torch.tensor(bound)) for bound in (math.inf, -math.inf)]
    beyond = torch.tensor([2.0**17, -(2.0**17), 3e38, -3e38])
    nan = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7F800001 - 2**31, -1], dtype=torch.int32).view(F32)
    return torch.cat([every.float(), midway, *beside, beyond, nan])
