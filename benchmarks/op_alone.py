"""The op without Python and autograd: the CPU kernels on values in L1, L2 and memory, on one thread and on all, against
a copy (forward) and an addition (backward) of as many values."""

import math
from collections.abc import Callable
from typing import Any

import torch

import weightalign_cuda as wa

from . import harness
from .harness import Limits
from .providers import EPS, Direction, Setting, make_inputs
from .stats import median_ratio, spread

SHAPES = {"L1": (16, 16, 3, 3), "L2": (128, 128, 3, 3), "memory": (2048, 1024, 1, 1)}


def records(setting: Setting, limits: Limits) -> list[dict[str, Any]]:
    all_threads = torch.get_num_threads()
    results = []
    try:
        for threads in dict.fromkeys((1, all_threads)):
            torch.set_num_threads(threads)
            for where, shape in SHAPES.items():
                results += _records_of(setting, where, shape, threads, limits)
    finally:
        torch.set_num_threads(all_threads)
    return results


def _records_of(
    setting: Setting, where: str, shape: tuple[int, ...], threads: int, limits: Limits
) -> list[dict[str, Any]]:
    inputs = make_inputs([shape], setting)
    (weight,), (gain,), (grad,) = inputs.weights, inputs.gains, inputs.grads
    options = [EPS], [1.0], setting.out_dtype, torch.preserve_format
    with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
        _, statistics = wa.ops.native.align_forward([weight], [gain], *options)
        calls: dict[tuple[Direction, str], Callable[[], Any]] = {
            ("forward", "ours"): lambda: wa.ops.native.align_forward([weight], [gain], *options),
            ("forward", "clone"): weight.clone,
            ("backward", "ours"): lambda: wa.ops.native.align_backward([grad], [weight], [gain], statistics, [1.0]),
            ("backward", "add"): lambda: torch.add(weight, grad),
        }
        timers = {key: harness.wall_timer([call], False)[0] for key, call in calls.items()}
        samples = harness.interleave(timers, limits)
    results = []
    for direction, rival in (("forward", "clone"), ("backward", "add")):
        ours, theirs = samples[direction, "ours"], samples[direction, rival]
        case = f"{'x'.join(map(str, shape))} ({where}), {threads} thread{'s' * (threads > 1)}"
        speedups = {rival: median_ratio(theirs, ours).to_json()}
        for provider, own in (("ours", ours), (rival, theirs)):
            results.append({
                "suite": "op", "case": case, "provider": provider, "direction": direction, "clock": "wall",
                **setting.fields, "shape": list(shape), "batch": None, "n_layers": 1,
                "bytes_min": math.prod(shape) * setting.dtype.itemsize * (2 if direction == "forward" else 3),
                **spread(own), "speedups": speedups if provider == "ours" else {},
            })  # fmt: skip
    return results
