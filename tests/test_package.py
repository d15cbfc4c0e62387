"""The package in separate processes: its command, with no library that loads, and under WEIGHTALIGN_BACKEND."""

import importlib.util
import os
import pathlib
import platform
import shutil
import signal
import subprocess
import sys

import pytest
import torch

import weightalign_cuda as wa
from weightalign_cuda.ops import elf, library, native_library

PACKAGE = pathlib.Path(wa.__file__).parent
HAS_TRITON = importlib.util.find_spec("triton") is not None


def python(*args, root=PACKAGE.parent, **environment):
    """Runs a Python that imports the package from `root`, whichever is installed."""
    env = {k: v for k, v in os.environ.items() if k != "WEIGHTALIGN_BACKEND"} | {"PYTHONPATH": str(root)} | environment
    return subprocess.run([sys.executable, *args], cwd=root, env=env, capture_output=True, text=True, timeout=120)


def test_command():
    done = python("-m", "weightalign_cuda", WEIGHTALIGN_BACKEND="")  # empty is the same as unset
    assert done.returncode == 0, done.stderr
    for expected in (f"weightalign_cuda {wa.__version__}", f"torch {torch.__version__}", "compiled architectures"):
        assert expected in " ".join(done.stdout.split())
    assert f"CPU kernels {library.cpu_kernels()} " in " ".join(done.stdout.split())
    for name, state in wa.backends().items():
        assert f"backend {name} {state}" in " ".join(done.stdout.split())
    runtime = library.cuda_runtime
    version = f"{runtime // 1000}.{runtime % 1000 // 10}" if runtime else "none"
    assert f"CUDA of the library {version} CUDA of the driver" in " ".join(done.stdout.split())


def test_command_whose_reader_leaves():
    """As in `| head`."""
    command = [sys.executable, "-m", "weightalign_cuda"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read() and process.wait() == -signal.SIGPIPE


USE_ON_CPU = """
import torch, weightalign_cuda as wa
model = wa.convert(torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.Conv2d(4, 4, 3)), foreach=True)
image = torch.ones(1, 3, 8, 8)
with wa.accumulate(model):
    model(image)  # torch's own backward queries it
with torch.no_grad(), wa.frozen(model):
    model(image)
if {interpreted}:
    with wa.use_backend("triton"):
        wa.align(model[0].weight)
print("aligned")
"""


# Every call of the CUDA runtime into the driver starts with one of these.
DRIVER = """
#include <unistd.h>
static int asked(void) { return write(2, "driver asked", 12), 100; }
int cuInit(unsigned flags) { return asked(); }
int cuDriverGetVersion(int* version) { return asked(); }
int cuGetProcAddress(void) { return asked(); }
int cuGetProcAddress_v2(void) { return asked(); }
"""


def test_cpu_tensors_do_not_query_cuda(tmp_path):
    """A query would initialise CUDA, and a process forked afterwards could not use it."""
    compile_driver = ["g++", "-x", "c", "-shared", "-fPIC", "-", "-o", tmp_path / "libcuda.so.1"]
    subprocess.run(compile_driver, input=DRIVER.encode(), check=True)
    script = USE_ON_CPU.format(interpreted=os.environ.get("TRITON_INTERPRET") == "1" and HAS_TRITON)
    done = python("-c", script, LD_LIBRARY_PATH=str(tmp_path))
    assert (done.returncode, done.stdout) == (0, "aligned\n"), done.stderr
    assert "driver asked" not in done.stderr
    if library.cuda_runtime:
        done = python(
            "-c", "import weightalign_cuda as wa; wa.ops.library.cuda_driver()", LD_LIBRARY_PATH=str(tmp_path)
        )
        assert "driver asked" in done.stderr


WITHOUT_LIBRARY = """
import torch, weightalign_cuda as wa
from weightalign_cuda.ops import backend as ops_backend
from weightalign_cuda.ops import native as ops
print(wa.backends()["cpu"]); print(wa.backends()["cuda"]); print(ops_backend.choose("cpu"))

def grads(align):
    w = torch.arange(12, dtype=torch.float64).sin().view(3, 4).requires_grad_()
    g = torch.ones(3, dtype=torch.float64, requires_grad=True)
    y = align(w, g)
    return torch.cat([t.flatten() for t in (y, *torch.autograd.grad(y.cos().sum(), (w, g)))])

def formula(w, g):
    return g[:, None] * (w - w.mean(1, keepdim=True)) / (2 * w.var(1, correction=0, keepdim=True) + 1e-5).sqrt()

def op(w, g):  # where nothing native is registered, the reference is the op's kernel
    return ops.align_forward([w], [g], [1e-5], [1.0], torch.float64, torch.preserve_format)[0][0]

can_interpret = ops_backend._is_interpreted and wa.backends()["triton"] == "available"

def in_triton(w, g):
    with wa.use_backend("triton"):
        return wa.align(w, g)

for align in (wa.align, op, *([in_triton] if can_interpret else [])):
    torch.testing.assert_close(grads(align), grads(formula), rtol=1e-12, atol=1e-12)
try:
    with wa.use_backend("cpu"):
        wa.align(torch.ones(2, 2))
except RuntimeError as refused:
    print(refused)
"""


def test_without_the_native_library(tmp_path):
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = python("-c", WITHOUT_LIBRARY, root=tmp_path)
    assert done.returncode == 0, done.stderr
    cpu, cuda, choice, refused = done.stdout.splitlines()
    assert "RuntimeWarning: weightalign_cuda: the native library is not built" in done.stderr
    assert cpu == cuda and cpu.startswith("the native library is not built: no _weightalign.so beside") and "pip" in cpu
    assert choice == "reference"
    assert refused == f"backend 'cpu' was asked for, but: {cpu}"


def for_another_machine(library):
    return library[:18] + b"\xf7\x00" + library[20:]  # e_machine: BPF


@pytest.mark.parametrize(
    ("break_", "reason"),
    [
        (lambda library: b"not a library", "_weightalign.so is not a 64-bit ELF library"),
        (lambda library: library[: len(library) // 2], "_weightalign.so is truncated: "),  # loaded: a bus error
        (for_another_machine, f"_weightalign.so is not for {platform.machine()}, but for ELF's machine 247"),
        (lambda library: library.replace(b"\0aoti_torch_", b"\0aoti_other_"), "undefined symbol: aoti_other_"),
    ],
    ids=["text", "truncated", "another machine", "another torch"],
)
def test_with_a_library_that_does_not_load(tmp_path, break_, reason):
    """One warning, which gives the reason, and so does backends()."""
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    (tmp_path / PACKAGE.name / "_weightalign.so").write_bytes(break_(native_library.PATH.read_bytes()))
    done = python("-c", "import weightalign_cuda as wa; print(wa.backends()['cpu'])", root=tmp_path)
    assert done.returncode == 0, done.stderr
    state = done.stdout.strip()
    assert state.startswith(f"the native library does not load with torch {torch.__version__}: ") and reason in state
    assert done.stderr.count("RuntimeWarning: weightalign_cuda: ") == 1 and state in done.stderr


@pytest.mark.parametrize("kept", [0, 63, 64, 600, -1])
def test_every_truncated_library_is_recognised(tmp_path, kept):
    (tmp_path / "library.so").write_bytes(native_library.PATH.read_bytes()[:kept])
    with pytest.raises(OSError, match="not a 64-bit ELF library" if 0 <= kept < 64 else "is truncated"):
        elf.check(tmp_path / "library.so")


OLDER_TORCH = """
import torch
torch.__version__ = torch.torch_version.TorchVersion("2.10.1+cu128")
import weightalign_cuda
"""


def test_with_an_older_torch():
    done = python("-c", OLDER_TORCH)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: weightalign_cuda: torch 2.10.1+cu128 is installed, 2.11 or later is needed")


IMPORT_TIMES = """
import time
begin = time.process_time()
import torch
middle = time.process_time()
import weightalign_cuda
print((time.process_time() - middle) / (middle - begin))
"""


def test_import_adds_little_to_that_of_torch():
    shares = [float(python("-c", IMPORT_TIMES).stdout) for _ in range(3)]
    assert min(shares) < 0.1, shares


OF_ENVIRONMENT = """
import os, sys, torch
before = set(sys.modules)
try:
    import weightalign_cuda
except ValueError as refused:
    print(refused)
os.environ["WEIGHTALIGN_BACKEND"] = "reference"
import weightalign_cuda as wa
print([name for name in ("torch._dynamo", "triton") if name in set(sys.modules) - before])
from weightalign_cuda.ops import backend as ops_backend
print(ops_backend.choose("cpu"))
with wa.use_backend("cpu"):
    print(ops_backend.choose("cpu"))
"""


def test_environment_variable():
    done = python("-c", OF_ENVIRONMENT, WEIGHTALIGN_BACKEND="gpu")
    assert done.returncode == 0, done.stderr
    refused, heavy, chosen, used = done.stdout.splitlines()
    assert heavy == "[]"  # they take longer to import than everything else
    assert refused == "WEIGHTALIGN_BACKEND: expected one of cuda, cpu, triton, reference, got 'gpu'"
    assert (chosen, used) == ("reference", "cpu")  # use_backend takes precedence
