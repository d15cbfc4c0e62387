"""Runs a command in which PyTorch sees simulated CUDA devices:

    python tests/simcuda/simcuda.py [--devices 2] [--seed 1] [--strict] python -m pytest tests/test_cuda.py

It builds what is out of date, in a source tree where the package was built with its CUDA kernels. The command and all
its children get the simulated runtime instead of CUDA's (LD_PRELOAD), PyTorch calls `load` when it is imported (the
entry point torch.backends in the metadata beside this file, found through PYTHONPATH), and the package loads its own
CUDA ops, linked to that runtime (WEIGHTALIGN_LIBRARY).

What is real: the package's host code as nvcc compiled it; PyTorch's dispatcher, autograd with its device threads,
allocator, streams, events, device guards and graphs. What is simulated: device memory, the order of work
(runtime/machine.h), the package's kernels (by the emulator of tests/simt), PyTorch's kernels (by its CPU ones, torch/),
Triton's launches (by its interpreter, simtriton.py).

What it cannot show:
* speed; what nvcc makes of device code; races within a kernel (tests/simt looks for those)
* work of two streams at the same time: it runs one after the other, in any order that is legal
* what cuDNN and cuBLAS choose: bits, layouts, workspaces
* torch.compile's kernels and Triton's compiled ones, which need a driver; NCCL, IPC, peer access, cudaMallocAsync,
  managed memory, the profiler's device events
* some 90 aten ops without a CPU kernel (cuDNN, fused attention): an error names the kernel. The ops of other libraries
* Triton's launches late: they run at once, after all that is in their stream
* random numbers in graphs, and those of a GPU
"""

import argparse
import ctypes
import fcntl
import functools
import importlib.util
import os
import pathlib
import platform
import shutil
import subprocess
import sys
import sysconfig

HERE = pathlib.Path(__file__).resolve().parent
NATIVE = HERE.parents[1] / "build" / f"native-{platform.machine()}"
BUILD = NATIVE / "tests" / "simcuda"


def build() -> None:
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    if not (cmake and ninja and NATIVE.exists()):
        raise SystemExit("the simulated device needs cmake, ninja and the package built in this tree: pip install -e .")
    with (NATIVE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time
        configure = [cmake, f"-DCMAKE_MAKE_PROGRAM={ninja}", "-DWA_SIMULATED_GPU=ON", str(NATIVE)]
        for command in (configure, [cmake, "--build", str(NATIVE), "--target", "simulated_gpu"]):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stdout + done.stderr)


def environment(**settings: object) -> dict[str, str]:
    """Of a process that has simulated devices. Settings: see Settings of runtime/machine.h."""
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    own = {f"SIMCUDA_{name.upper()}": str(int(value)) for name, value in settings.items() if value is not None}
    libraries = {"LD_PRELOAD": str(BUILD / "libcudart.so.13"), "WEIGHTALIGN_LIBRARY": str(BUILD / "_weightalign.so")}
    return {**os.environ, **libraries, "PYTHONPATH": path, **own}


def load() -> None:
    """What `import torch` calls."""
    import torch

    if "libcudart.so.13" not in os.environ.get("LD_PRELOAD", ""):
        return
    for library in ("libsimcuda_project.so", "libsimcuda_torch.so"):
        ctypes.CDLL(str(BUILD / library))
    torch.backends.cudnn.enabled = False  # PyTorch's own kernels have counterparts on the CPU
    for choose in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{choose}_sdp")(False)
    if importlib.util.find_spec("triton"):
        import simtriton

        torch.cuda._lazy_call(simtriton.install)


@functools.cache
def runtime() -> ctypes.CDLL:
    """In a process with simulated devices: the functions of runtime/control.cpp."""
    library = ctypes.CDLL("libcudart.so.13")
    library.simcuda_launches.restype = library.simcuda_waits.restype = ctypes.c_longlong
    library.simcuda_leave_memory.argtypes = [ctypes.c_longlong]
    library.simcuda_fail_launch.argtypes = [ctypes.c_longlong, ctypes.c_int]
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int)
    parser.add_argument("--seed", type=int, help="of a random order of the streams' work; default: as late as it may")
    parser.add_argument("--strict", action="store_true", default=None, help="SIGSEGV if the host reads device memory")
    parser.add_argument("--l2", type=int, help="bytes")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    settings = vars(parser.parse_args())
    command = settings.pop("command")
    build()
    command[0] = sys.executable if command[0] == "python" else command[0]
    os.execvpe(command[0], command, environment(**settings))


if __name__ == "__main__":
    main()
