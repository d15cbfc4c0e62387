"""What the report consists of: commands, each with its own limit, in the order in which they matter."""

import importlib.util
import os
import sys
from dataclasses import dataclass, field

PYTHON = sys.executable
# Tests that are worth a tool which runs them tens of times slower: all kernels, paths for short and long filters.
SANITIZED = (
    "tests/test_align.py",
    "tests/test_prepare.py",
    "-k",
    "cuda and (gain_of_any_dtype or same_bits or borders)",
)


@dataclass(frozen=True)
class Step:
    """A command, in which {out} is the step's folder."""

    name: str
    about: str
    limit: float  # seconds
    command: tuple[str, ...]
    programs: tuple[str, ...] = ()  # without which it is left out
    modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def pytest(*options: str) -> tuple[str, ...]:
    return (PYTHON, "-m", "pytest", "-rf", *options)


def benchmark(name: str, about: str, limit: float, *command: str) -> Step:
    return Step(name, about, limit, (PYTHON, "-m", "benchmarks", *command, "--device", "cuda", "--out", "{out}"))


def sanitizer(tool: str) -> Step:
    """Without torch's cache of memory, in which an access out of bounds is within bounds of something."""
    command = ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *pytest("-x", *SANITIZED))
    about, uncached = f"compute-sanitizer's {tool} on some tests", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, about, 45, command, programs=(command[0],), modules=("pytest",), environment=uncached)


def tests() -> Step:
    some = ("-n", str(min(8, os.cpu_count() or 1))) if importlib.util.find_spec("xdist") else ()
    command = pytest(*some, "-m", "device and not slow")
    passive = {"OMP_WAIT_POLICY": "passive"}
    return Step("tests", "all tests that run on a device", 120, command, modules=("pytest",), environment=passive)


def steps() -> list[Step]:
    """Together longer than the report may take: those at the end get what time is left."""
    own = (PYTHON, "-m", "benchmarks.gpu_report.build"), (PYTHON, "-m", "benchmarks.gpu_report.profile", "{out}")
    code = (PYTHON, "-m", "benchmarks.machine_code", "--out", "{out}/machine-code.json")
    network, layer, host = (("align", "--out-dtype", "bfloat16", "--suites", s) for s in ("network", "layer", "host"))
    resnet = ("step", "--only", "resnet50", "--no-compile", "--seconds", "3")
    return [
        Step("build", "the native library, for this GPU only", 180, own[0]),
        Step("static", "what the machine code predicts", 75, code),
        benchmark("model", "all weights of ResNet-50 in one launch", 60, *network, "--no-compile", "--seconds", "0.5"),
        tests(),
        sanitizer("memcheck"),
        sanitizer("racecheck"),
        benchmark("step", "training steps of ResNet-50, time and memory", 100, *resnet),
        benchmark("host", "the host's part", 30, *host),
        Step("profile", "the kernels in ncu", 45, own[1], programs=("ncu",)),
        benchmark("layers", "whole convolution layers", 60, "layers", "--seconds", "0.15"),
        benchmark("kernels", "each shape of ResNet-50", 200, *layer, "--seconds", "0.2"),
        benchmark("compile", "all weights, torch.compile among the rivals", 120, *network, "--seconds", "0.3"),
    ]
