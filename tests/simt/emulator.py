"""Builds the CPU emulation of the CUDA kernels and runs them on torch CPU tensors.

A fault of a kernel raises the loaded module's exception Fault; simt.h and simt_check.cpp say what is detected.
"""

import dataclasses
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import torch
from torch import Tensor

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BUILD_DIR = REPOSITORY / "build" / "simt"


def build(build_dir: Path = BUILD_DIR) -> Path:
    """Builds what is out of date and returns the modules' folder."""
    path = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    cmake = shutil.which("cmake", path=path)
    assert cmake, "the emulator of the CUDA kernels needs cmake: pip install cmake ninja"
    definitions = {
        "WA_EMULATOR": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    folders = ["-S", str(REPOSITORY), "-B", str(build_dir)]
    configure = [*folders, "-G", "Ninja", *(f"-D{name}={value}" for name, value in definitions.items())]
    environment = {**os.environ, "PATH": path}
    build_dir.mkdir(parents=True, exist_ok=True)
    with (build_dir / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # one process at a time
        for arguments in (configure, ["--build", str(build_dir)]):
            done = subprocess.run([cmake, *arguments], env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return build_dir / "tests" / "simt"


def load(folder: Path, name: str) -> ModuleType:
    (file,) = folder.glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_with_sanitizers(folder: Path, code: str) -> subprocess.CompletedProcess[str]:
    """Runs Python code that can import simt_asan, with the sanitizers' libraries preloaded."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONMALLOC": "malloc",  # Python's own allocator would hide overruns of small buffers
        "PYTHONPATH": os.pathsep.join([str(folder), str(HERE)]),
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def poisoned(size: Sequence[int], dtype: torch.dtype) -> Tensor:
    """An output buffer: NaN in every element until a kernel writes it."""
    t = torch.empty(tuple(size), dtype=dtype)
    t.view(torch.uint8).fill_(0xFF)
    return t


Counts = dict[str, Any]  # reads, writes: by width in bytes; reads_of_one, writes_of_one: (least, most) of one element


@dataclasses.dataclass
class Forward:
    outs: list[Tensor]
    statistics: Tensor
    counts: dict[str, Counts]


@dataclasses.dataclass
class Backward:
    grad_weights: list[Tensor]
    grad_gain: Tensor
    counts: dict[str, Counts]


@dataclasses.dataclass(frozen=True)
class Block:
    """Number of threads, and bytes read, written and of dynamic shared memory (see simt::Traffic)."""

    threads: int
    read: int
    written: int
    shared: int


@dataclasses.dataclass
class Image:
    """One pass over a convolution's input (batch, channels, one to three spatial dimensions): see PrepareTask."""

    source: Tensor
    to: Tensor
    padding: Sequence[int]  # before, after of each spatial dimension
    mode: int
    activation: int
    saved: Tensor | None = None  # backward, with an activation
    is_backward: bool = False


class _Buffers:
    """The tensors of one run, by name, as the module takes them."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.described: list[tuple[str, int, int, int, bool]] = []

    def add(self, name: str, t: Tensor, is_input: bool) -> int:
        assert t.device.type == "cpu"
        span = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        assert span >= t.numel(), "expected a tensor without overlap"
        self.names.append(name)
        self.described.append((name, t.data_ptr(), span * t.element_size(), t.element_size(), is_input))
        return t.data_ptr()


class Emulator:
    """One build of the emulator. `options` of its methods: seed, preempt_every, blocks (see simt_control.h)."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module
        self.Fault: type[Exception] = module.Fault

    def _call(
        self, function: Callable[..., list[Counts]], *arguments: Any, buffers: _Buffers, **options: Any
    ) -> dict[str, Counts]:
        counts = function(*arguments, self.module.Run(buffers.described, **options))
        return dict(zip(buffers.names, counts, strict=False))  # there may be no counts

    def blocks(self) -> list[Block]:
        """The blocks of the last run, in the order of the launch."""
        return [Block(*each) for each in self.module.traffic()]

    def selftest(self, name: str, x: Tensor, y: Tensor, **options: Any) -> dict[str, Counts]:
        buffers = _Buffers()
        addresses = buffers.add("x", x, True), buffers.add("y", y, False)
        return self._call(self.module.selftest, name, *addresses, buffers=buffers, **options)

    def transpose(self, x: Tensor, y: Tensor, **options: Any) -> dict[str, Counts]:
        buffers = _Buffers()
        addresses = buffers.add("x", x, True), buffers.add("y", y, False)
        return self._call(self.module.transpose, *addresses, *x.shape, buffers=buffers, **options)

    def forward(
        self,
        weights: Sequence[Tensor],
        dtype: torch.dtype,
        gains: Sequence[Tensor | None],
        eps: Sequence[float],
        scales: Sequence[float],
        columns: Sequence[int] | None = None,
        outs: Sequence[Tensor] | None = None,
        input: "Image | None" = None,
        **options: Any,
    ) -> Forward:
        """weights of shape (filters, n), none for an input alone; outs: where to write (default: new tensors)."""
        buffers = _Buffers()
        made = [poisoned(w.shape, dtype) for w in weights] if outs is None else list(outs)
        tasks = self._tasks(buffers, weights, gains, columns)
        for i, task in enumerate(tasks):
            task.update(eps=eps[i], scale=scales[i], aligned_dtype=_name(dtype))
            task["out"] = buffers.add(f"out {i}", made[i], False)
        is_double = dtype == torch.float64
        statistics = poisoned((sum(len(w) for w in weights), 2), dtype if is_double else torch.float32)
        address = buffers.add("statistics", statistics, False)
        arguments = ("forward", tasks, self._input(buffers, input), address, 0, is_double)
        counts = self._call(self.module.align, *arguments, buffers=buffers, **options)
        return Forward(made, statistics, counts)

    def backward(
        self,
        grads: Sequence[Tensor],
        weights: Sequence[Tensor],
        gains: Sequence[Tensor | None],
        statistics: Tensor,
        scales: Sequence[float],
        columns: Sequence[int] | None = None,
        grad_weights: Sequence[Tensor] | None = None,
        input: "Image | None" = None,
        **options: Any,
    ) -> Backward:
        """grads and weights of shape (filters, n); grad_weights: where to write (default: new tensors)."""
        buffers = _Buffers()
        made = [poisoned(w.shape, w.dtype) for w in weights] if grad_weights is None else list(grad_weights)
        tasks = self._tasks(buffers, weights, gains, columns)
        for i, task in enumerate(tasks):
            task.update(scale=scales[i], aligned_dtype=_name(grads[i].dtype))
            task["grad"] = buffers.add(f"grad {i}", grads[i], True)
            task["out"] = buffers.add(f"grad_weight {i}", made[i], False)
        grad_gain = poisoned((len(statistics),), statistics.dtype)
        addresses = buffers.add("statistics", statistics, True), buffers.add("grad_gain", grad_gain, False)
        is_double = statistics.dtype == torch.float64
        arguments = ("backward", tasks, self._input(buffers, input), *addresses, is_double)
        counts = self._call(self.module.align, *arguments, buffers=buffers, **options)
        return Backward(made, grad_gain, counts)

    @staticmethod
    def _input(buffers: _Buffers, image: Image | None) -> dict[str, Any] | None:
        if image is None:
            return None
        absent = 5 - image.to.dim()
        unpadded = image.to if image.is_backward else image.source
        saved = image.saved

        def spatial(numbers: Sequence[int], fill: int) -> list[int]:
            return [fill] * absent + list(numbers)

        def side(t: Tensor) -> dict[str, Any]:
            strides = t.stride()
            return {"strides": [*strides[:2], *spatial(strides[2:], 0)], "dtype": _name(t.dtype)}

        return {
            "from": buffers.add("source", image.source, True),
            "to": buffers.add("to", image.to, False),
            "saved": 0 if saved is None else buffers.add("saved", saved, True),
            "from_side": side(image.source),
            "to_side": side(image.to),
            "batch": image.to.shape[0],
            "channels": image.to.shape[1],
            "size": spatial(unpadded.shape[2:], 1),
            "before": spatial(image.padding[::2], 0),
            "after": spatial(image.padding[1::2], 0),
            "to_size": spatial(image.to.shape[2:], 1),
            "mode": image.mode,
            "activation": image.activation,
        }

    def _tasks(
        self,
        buffers: _Buffers,
        weights: Sequence[Tensor],
        gains: Sequence[Tensor | None],
        columns: Sequence[int] | None,
    ) -> list[dict[str, Any]]:
        tasks = []
        first_filter = 0
        for i, (weight, gain) in enumerate(zip(weights, gains, strict=True)):
            filters, n = weight.shape
            tasks.append(
                {
                    "weight": buffers.add(f"weight {i}", weight, True),
                    "grad": 0,
                    "gain": 0 if gain is None else buffers.add(f"gain {i}", gain, True),
                    "eps": 0.0,
                    "n": n,
                    "filters": filters,
                    "first_filter": first_filter,
                    "columns": columns[i] if columns else 0,
                    "weight_dtype": _name(weight.dtype),
                    "gain_dtype": _name(weight.dtype if gain is None else gain.dtype),
                }
            )
            first_filter += filters
        return tasks


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
