"""Where and when a record was made."""

import datetime
import os
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterable
from typing import Any

import torch

from weightalign_cuda.ops import backend, library

ROOT = pathlib.Path(__file__).parent.parent
SIMULATED = "Simulated device"  # how the name of a device begins that runs CUDA programs on the CPU


def _times() -> tuple[float, float, float] | None:
    """Processor seconds used by all programs, those used by this one, and the clock."""
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, soft_irq, stolen = map(int, stat.read_text().splitlines()[0].split()[1:9])
    ticks = user + nice + system + irq + soft_irq + stolen
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4]), time.monotonic()


_AT_IMPORT = _times()


def others_busy() -> float | None:
    """How many processors other programs kept busy since this file was imported, on average. If one of ours is taken
    away, all others wait for it at OpenMP's next barrier."""
    now = _times()
    if now is None or _AT_IMPORT is None:
        return None
    everyone, own, elapsed = (after - before for before, after in zip(_AT_IMPORT, now, strict=True))
    return round(max(everyone - own, 0) / elapsed, 2)


def output_of(*command: str) -> str | None:
    """The output of a command; None if it is missing or fails."""
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def cpu_name() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def git_revision() -> str | None:
    revision = output_of("git", "rev-parse", "--short=12", "HEAD")
    # The results of this very run are not a change.
    changes = output_of("git", "status", "--porcelain", "--", ".", ":!benchmarks/results")
    return revision and revision + ("-dirty" if changes else "")


def triton_version() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(triton.__version__)


def kind(device: str) -> str:
    """cpu, cuda or simulated."""
    return "simulated" if device == "cuda" and torch.cuda.get_device_name().startswith(SIMULATED) else device


def facts(device: str) -> dict[str, Any]:
    """Fields for every record of a run on `device`."""
    cuda = device == "cuda"
    gpu = torch.cuda.get_device_name() if cuda else None
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None
    return {
        "device": kind(device),
        "gpu": gpu,
        "backend": backend.choose(device),
        "cpu": cpu_name(),
        "cpu_kernels": library.cpu_kernels(),
        "threads": torch.get_num_threads(),
        "driver": driver.splitlines()[0] if driver else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton_version(),
        "git": git_revision(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def is_simulated(facts: dict[str, Any]) -> bool:
    """Of facts, or of a record, which holds them."""
    return bool(facts["device"] == "simulated")


def refuse_simulated(records: Iterable[dict[str, Any]]) -> None:
    """For what shows times: ValueError if they were not taken on hardware."""
    for record in records:
        if is_simulated(record):
            raise ValueError(f"{record['gpu']}: the times of a simulated device mean nothing")


def label(facts: dict[str, Any]) -> str:
    """The machine in one line."""
    name = facts["gpu"] or f"{facts['cpu']} ({facts['cpu_kernels']} kernels), {facts['threads']} threads"
    return f"{name}, torch {facts['torch']}"
