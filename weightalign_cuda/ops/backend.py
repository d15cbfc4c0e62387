"""Backend selection: the one place that decides which implementation serves a tensor, by device and availability."""

import contextlib
import contextvars
import ctypes
import functools
import importlib.util
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.compiler import is_compiling

from ..torch_private import get_object_in_tls, is_key_in_tls, mark_constant, stash_object_in_tls
from . import autograd, reference, schemas
from .exporters import is_onnx_program
from .schemas import library

NAMES = ("cuda", "cpu", "triton", "reference")
NATIVE = ("cuda", "cpu")
OLDEST = 7, 5  # compute capability that the CUDA kernels can be compiled for
ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}  # other devices: reference

_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("weightalign_backend", default=None)


def backends() -> dict[str, str]:
    """Name of each backend -> "available", or why it is not and what to do about it. Queries every device, and so
    initialises CUDA if there is any."""
    return {name: state(name) for name in NAMES}


@functools.cache
def state(name: str) -> str:
    """State of one backend. Choosing one for CPU tensors does not query CUDA: that would initialise it, and forked
    processes could not use it any more."""
    return {"cuda": _cuda, "cpu": _cpu, "triton": _triton, "reference": _reference}[name]()


def _reference() -> str:
    return "available"


def _cpu() -> str:
    return library.error or "available"


def _cuda() -> str:
    if library.error:
        return library.error
    if not library.architectures:
        return "the native library has no CUDA kernels: put nvcc on PATH (or set CUDA_HOME) and install again"
    if not torch.cuda.is_available():
        build = "is a CPU-only build" if torch.version.cuda is None else "sees no CUDA device"
        return f"torch {torch.__version__} {build}"
    driver = library.cuda_driver()
    if driver // 1000 < library.cuda_runtime // 1000:
        return (
            f"the native library was built with CUDA {version(library.cuda_runtime)}, the driver serves up to "
            f"{version(driver)}: update the driver, or install again with an older nvcc"
        )
    for device in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(device)
        if not _runs_on(10 * major + minor):
            compiled = ", ".join(f"sm_{a}" for a in library.architectures)
            return f"cuda:{device} is sm_{major}{minor}, the native library has {compiled}" + (
                f": install again with TORCH_CUDA_ARCH_LIST={major}.{minor}"
                if (major, minor) >= OLDEST
                else "; the kernels need sm_75 or later"
            )
    return "available"


_is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton (CUDA builds of torch bring it)"
    if not (_is_interpreted or torch.cuda.is_available()):
        return "torch sees no CUDA device (with TRITON_INTERPRET=1 it serves CPU tensors, slowly, for tests)"
    return "available"


def _runs_on(capability: int) -> bool:
    """Machine code runs on later devices of the same major version, PTX on all later ones."""
    same_major = [a for a in library.architectures if a // 10 == capability // 10]
    return any(a <= capability for a in (*same_major, *library.ptx))


def version(code: int) -> str:
    """Of CUDA, by its own numbers: 13020 is 13.2, 0 is none."""
    return f"{code // 1000}.{code % 1000 // 10}" if code else "none"


def check_name(name: str, source: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{source}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


_environment = os.environ.get("WEIGHTALIGN_BACKEND") or None
if _environment is not None:
    check_name(_environment, "WEIGHTALIGN_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Context in which backend `name` ("cuda", "cpu", "triton" or "reference") serves all calls of this thread or task.
    A free-threaded Python hands it on to threads that are started inside (sys.flags.thread_inherit_context).

    The choice is made in the forward and kept for its backward. The environment variable WEIGHTALIGN_BACKEND, read at
    import, does the same for the whole process.

    Raises:
        ValueError: if no backend has this name.
        RuntimeError: not here but in the calls inside, if the backend cannot serve them.
    """
    global _was_forced
    token = _forced.set(check_name(name, "name"))
    _was_forced = True
    before = _get_stashed()
    _stash((name, threading.get_ident()))
    try:
        yield
    finally:
        _forced.reset(token)
        _stash(before)


# Autograd runs the backward of CUDA tensors, and the forward that checkpointing repeats in it, on its own threads,
# where context variables are unset. Stashed objects are copied there.
_STASH = "weightalign_backend"


def _get_stashed() -> tuple[str | None, int]:
    """The forced backend, if any, and the thread that forced it."""
    return get_object_in_tls(_STASH) if is_key_in_tls(_STASH) else (None, 0)


def _stash(name_and_thread: tuple[str | None, int]) -> None:
    pair = _kept(*name_and_thread)
    _give_references(pair, 1)
    stash_object_in_tls(_STASH, pair)


@functools.cache
def _kept(name: str | None, thread: int) -> tuple[str | None, int]:
    """The only such pair, immortal, with spare references: torch 2.11 sometimes releases more than one per stash."""
    pair = (name, thread)
    _give_references(pair, 1 << 14)
    return pair


def _give_references(pair: Any, count: int) -> None:
    """For torch 2.11, which stashes an object without taking a reference, but later releases one."""
    if not _torch_counts_references():
        for _ in range(count):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(pair))


@functools.cache
def _torch_counts_references() -> bool:
    """Whether stashing takes a reference; tested once, on an object that no other thread can see."""
    probe = (object(),)
    count = sys.getrefcount(probe)
    stash_object_in_tls(f"{_STASH}_probe", probe)
    if sys.getrefcount(probe) > count:
        return True
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(probe))
    return False


def choose(device_type: str) -> str:
    """The backend for tensors on this device type now. A compiled function keeps the one it was traced with."""
    forced = _forced_here() or _environment if _was_forced else _environment
    key = forced, device_type
    backend = _known.get(key)
    if backend is None:
        backend = _known[key] = _default(device_type) if forced is None else _check_serves(forced, device_type)
    return backend


mark_constant(choose)
_was_forced = False  # by any use of `use_backend`: without one there is nothing to look up


def _forced_here() -> str | None:
    forced = _forced.get()
    if forced is None and is_key_in_tls(_STASH):
        name, thread = _get_stashed()
        forced = name if thread != threading.get_ident() else None  # on its own thread the context variable decides
    return forced


_known: dict[tuple[str | None, str], str] = {}


def _default(device_type: str) -> str:
    return next(name for name in ORDER.get(device_type, ("reference",)) if state(name) == "available")


def _check_serves(name: str, device_type: str) -> str:
    if state(name) != "available":
        raise RuntimeError(f"backend {name!r} was asked for, but: {state(name)}")
    serving = ORDER.get(device_type, ("reference",))
    if name not in serving and not (name == "triton" and _is_interpreted):
        raise RuntimeError(f"backend {name!r} was asked for, but it does not serve tensors on {device_type!r}")
    return name


def serving(device_type: str) -> Any:
    """The ops of the backend for this device type, as attributes."""
    backend = choose(device_type)
    return reference if backend == "reference" else schemas.in_triton if backend == "triton" else schemas.native


def run(op: str, device_type: str, *arguments: Any) -> Any:
    """Calls the forward op of this name on the backend for this device type."""
    if is_compiling():
        return getattr(reference if is_onnx_program() else serving(device_type), op)(*arguments)
    served = serving(device_type)
    if served is reference:
        return getattr(reference, op)(*arguments)
    # Eager code calls the Autograd kernel directly, which skips one dispatcher round trip.
    return getattr(autograd, op)(served, *arguments)
