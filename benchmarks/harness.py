"""Measurement: clocks, interleaved providers, a correctness check first, one record per result.

CPU: wall time of enough calls for 2 ms. CUDA: a CUDA graph of many calls ("graph", the primary clock) and the wall time
of eager calls ("wall"). Calls rotate through sets of random buffers, together three times the last-level cache where
the cap on sets allows it (a record's `sets` and `bytes_rotated` say).
"""

import gc
import itertools
import math
import os
import pathlib
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from . import machine
from .layers import Shape
from .providers import DIRECTIONS, Direction, Inputs, Provider, Setting, make_inputs
from .stats import Ratio, median_ratio, quantiles, spread

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else each start and stop of the profiler prints a line to stderr
MIN_ROUNDS = 10
Call = Callable[[], Any]
Timer = Callable[[], float]
Key = TypeVar("Key")
# Largest error / largest value against float64. Gradients sum up to 4608 float32 products and, like the result, are
# rounded to their dtype once; rivals also round in between.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


class WrongResultError(AssertionError):
    """A provider disagrees with float64."""


@dataclass(frozen=True)
class Case:
    """Weights that are aligned together: one layer, or a network."""

    name: str
    shapes: tuple[Shape, ...]

    def bytes_min(self, direction: Direction, setting: Setting) -> int:
        """What any implementation must move. forward: weights, results, gains, statistics; backward: weights, gradients
        in and out, gains and their gradients, statistics."""
        weights, filters = sum(math.prod(s) for s in self.shapes), sum(s[0] for s in self.shapes)
        own, out = setting.dtype.itemsize, setting.out_dtype.itemsize
        forward = weights * (own + out) + filters * (4 + 8)
        backward = weights * (2 * own + out) + filters * (4 + 4 + 8)
        return {"forward": forward, "backward": backward, "both": forward + backward}[direction]


@dataclass(frozen=True)
class Limits:
    """When to stop sampling: after `rounds`, or after `seconds` but at least MIN_ROUNDS."""

    rounds: int = 30
    seconds: float = 2.0


@dataclass(frozen=True)
class Repeats:
    """How much more than one call it takes to time a kind of device."""

    sets: int  # of random buffers, at most
    copied: int  # bytes: more than any cache holds
    graph_calls: int = 200  # in a CUDA graph, at most
    graph_bytes: int = 1 << 30  # of those calls, whose results are all kept


# The times of a simulated device mean nothing, but each call on one takes seconds.
REPEATS = {"cpu": Repeats(8, 1 << 27), "cuda": Repeats(200, 1 << 29), "simulated": Repeats(1, 1 << 20, graph_calls=1)}


def repeats(device: str) -> Repeats:
    return REPEATS[machine.kind(device)]


def limits(device: str, rounds: int, seconds: float) -> Limits:
    return Limits(1, 0) if machine.kind(device) == "simulated" else Limits(rounds, seconds)


def sets(device: str, footprint: int) -> int:
    """How many sets of buffers of that many bytes to rotate through."""
    return max(1, min(repeats(device).sets, math.ceil(3 * cache_bytes(device) / footprint)))


def interleave(timers: dict[Key, Timer], limits: Limits) -> dict[Key, list[float]]:
    """One sample of each timer per round, in an order of chance: each finds heap and caches as now this one, now that
    one has left them, which decides over thousands of page faults."""
    samples: dict[Key, list[float]] = {name: [] for name in timers}
    order, chance = list(timers), random.Random(0)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(1, limits.rounds + 1):
            chance.shuffle(order)
            for name in order:
                samples[name].append(timers[name]())
            if done >= MIN_ROUNDS and time.perf_counter() - start > limits.seconds:
                break
    finally:
        if collecting:
            gc.enable()
    return samples


def wall_timer(calls: Sequence[Call], cuda: bool) -> tuple[Timer, int]:
    """Wall seconds per call, over calls that take 2 ms together; on CUDA including their kernels."""
    turn = itertools.cycle(calls)
    finish = torch.cuda.synchronize if cuda else lambda: None
    target = 2e-3

    def total(count: int) -> float:
        finish()
        start = time.perf_counter()
        for call in itertools.islice(turn, count):
            call()
        finish()
        return time.perf_counter() - start

    total(len(calls))
    count = 1
    while (took := min(total(count), total(count))) < target:
        count = max(count + 1, math.ceil(count * min(1.2 * target / took, 10)))
    return lambda: total(count) / count, count


def graph_timer(calls: Sequence[Call], count: int, stream: "torch.cuda.Stream") -> tuple[Timer, int]:
    """GPU seconds per call, from replays of a CUDA graph of `count` calls captured on `stream`, the current one."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    kept = []  # so that no result reuses the memory, still cached, of another
    with torch.cuda.graph(graph, stream=stream):
        for call in itertools.islice(itertools.cycle(calls), count):
            kept.append(call())
    kept.clear()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def sample() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e-3 / count

    sample()
    return sample, count


def largest_error(provider: Provider, direction: Direction, inputs: Inputs) -> float:
    """Largest error / largest value over the results, with poisoned memory; WrongResultError beyond the tolerance."""
    expected = provider.expected(direction, inputs)
    call = provider.call(direction, inputs)
    poison = [torch.full_like(t, math.nan, dtype=t.dtype) for t in (*inputs.weights, *inputs.grads)]
    del poison
    results = call()
    if len(results) != len(expected):
        raise WrongResultError(f"{provider.name}: {len(results)} results instead of {len(expected)}")
    worst = 0.0
    for result, reference in zip(results, expected, strict=True):
        result, reference = result.detach(), reference.detach()
        error = float((result.double() - reference).abs().max() / reference.abs().max())
        tolerance = max(TOLERANCES[result.dtype], TOLERANCES[inputs.setting.dtype])
        if not error <= tolerance:  # NaN is wrong too
            which = f"{provider.name}, {direction}, {tuple(reference.shape)}"
            raise WrongResultError(f"{which}: error {error:.1e} > {tolerance:.0e}")
        worst = max(worst, error)
    return worst


def count_launches(call: Call) -> int | None:
    """Kernels, copies and fills that one call launches; None if the profiler sees none, as each call launches some."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events()) or None


def peak_bytes(call: Call, cuda: bool) -> int:
    """The peak of PyTorch's allocator during the call, minus what it held before.

    On the CPU, frees of earlier allocations are not counted: leave the call none to free.
    """
    from torch.profiler import ProfilerActivity, profile

    if cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate((event.nbytes() for event in events), initial=0))


def cache_bytes(device: str) -> int:
    """The size of the last-level cache: the GPU's L2, or the CPU's largest (32 MiB if unknown)."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = [p.read_text().strip() for p in pathlib.Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) << 10 for s in sizes if s.endswith("K")), default=32 << 20)


def copy_rate(device: str) -> float:
    """Bytes per second, read and written, of copying a large buffer."""
    cuda = device == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    with torch.cuda.stream(stream):
        source = torch.rand(repeats(device).copied // 4, device=device)
        target = torch.zeros_like(source)
        calls = [lambda: target.copy_(source)]
        timer, _ = wall_timer(calls, False) if stream is None else graph_timer(calls, 10, stream)
        return 2 * source.nbytes / quantiles([timer() for _ in range(MIN_ROUNDS)])[1]


def measure(
    suite: str,
    case: Case,
    setting: Setting,
    entrants: Sequence[Provider],
    limits: Limits,
    copy: float | None = None,
    directions: Sequence[Direction] = DIRECTIONS,
    advance: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Records of all `entrants` on `case`, for each direction and clock. `copy`: bytes/s of a large copy."""
    cuda = setting.device == "cuda"
    stream = torch.cuda.Stream() if cuda else None
    records = []
    with torch.cuda.stream(stream):
        footprint = case.bytes_min("both", setting)
        inputs = [make_inputs(case.shapes, setting) for _ in range(sets(setting.device, footprint))]
        for direction in directions:
            errors = {p.name: largest_error(p, direction, inputs[0]) for p in entrants}
            calls = {p.name: [p.call(direction, each) for each in inputs] for p in entrants}
            launches = {name: count_launches(each[0]) if cuda else None for name, each in calls.items()}
            timings = {"wall": {name: wall_timer(each, cuda) for name, each in calls.items()}}
            if stream is not None:
                most = repeats(setting.device)
                count = max(1, most.graph_calls // len(case.shapes), len(inputs) if len(case.shapes) > 1 else 1)
                count = max(min(count, most.graph_bytes // footprint), 2)
                timings["graph"] = {name: graph_timer(each, count, stream) for name, each in calls.items()}
            bytes_min = case.bytes_min(direction, setting)
            for clock, pairs in timings.items():
                samples = interleave({name: timer for name, (timer, _) in pairs.items()}, limits)
                common = {
                    "suite": suite, "case": case.name, "direction": direction, "clock": clock,
                    **setting.fields,
                    "shape": list(case.shapes[0]) if len(case.shapes) == 1 else None, "n_layers": len(case.shapes),
                    "batch": None, "bytes_min": bytes_min, "sets": len(inputs),
                    "bytes_rotated": len(inputs) * footprint,
                }  # fmt: skip
                for p in entrants:
                    extra = {"calls": pairs[p.name][1], "launches": launches[p.name], "max_error": errors[p.name]}
                    numbers = summary(p.name, samples, bytes_min, copy)
                    records.append({**common, "provider": p.name, **extra, **numbers})
            advance()
    return records


def summary(name: str, samples: dict[str, list[float]], bytes_min: int, copy: float | None) -> dict[str, Any]:
    """Quantiles and rates of one provider and, for ours, speedups."""
    times = spread(samples[name])
    rate = bytes_min / times["p50"]
    speedups: dict[str, Ratio] = {}
    if name.startswith("ours"):
        speedups = {rival: median_ratio(each, samples[name]) for rival, each in samples.items() if rival != name}
    return {
        **times, "GB/s": rate / 1e9,
        "fraction_of_flat": quantiles(samples["flat"])[1] / times["p50"] if "flat" in samples else None,
        "fraction_of_copy": rate / copy if copy else None,
        "speedups": {rival: ratio.to_json() for rival, ratio in speedups.items()},
    }  # fmt: skip
