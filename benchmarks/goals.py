"""python -m benchmarks.goals FILE...: how far the records of these files come: must, target and stretch of each goal.

The only place that says what is wanted. Exits with 1 if a must is missed; what was not measured is not missed.
"""

import argparse
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import geometric_mean
from typing import Any

from . import machine
from .report import Record, read

LEVELS = ("must", "target", "stretch")


@dataclass(frozen=True)
class Kind:
    """A way to sum up records, of a rival's part in them where there is one."""

    more_is_better: bool
    text: Callable[[float], str]
    of: Callable[[Sequence[Record], str], float]


def _ratios(records: Sequence[Record], rival: str) -> list[float]:
    return [r["speedups"][rival]["ratio"] for r in records]


SPEEDUP = Kind(True, "{:.2f}x".format, lambda records, rival: geometric_mean(_ratios(records, rival)))
COST = Kind(False, "{:.3f}".format, lambda records, rival: 1 / min(_ratios(records, rival)))
SLOWER = Kind(False, "{:.0f}".format, lambda records, rival: sum(ratio < 1 for ratio in _ratios(records, rival)))
SHARE = Kind(True, "{:.1%}".format, lambda records, _: min(r["fraction_of_copy"] for r in records))
TIME = Kind(False, lambda seconds: f"{1e6 * seconds:.0f} us", lambda records, _: max(r["p50"] for r in records))


@dataclass(frozen=True)
class Goal:
    """What is wanted of the records that have these fields."""

    name: str
    kind: Kind
    rival: str
    fields: Mapping[str, Any]
    levels: tuple[float | None, ...]  # as in LEVELS

    def among(self, records: Sequence[Record]) -> list[Record]:
        found = [r for r in records if all(r.get(key) == value for key, value in self.fields.items())]
        return [r for r in found if not self.rival or self.rival in r["speedups"]]


@dataclass(frozen=True)
class Verdict:
    goal: Goal
    value: float | None  # None: not measured
    records: Sequence[Record]

    def is_met(self, level: float | None) -> bool | None:
        """None if there is nothing to meet, or nothing was measured."""
        if self.value is None or level is None:
            return None
        return self.value >= level if self.goal.kind.more_is_better else self.value <= level

    @property
    def misses_must(self) -> bool:
        return self.is_met(self.goal.levels[0]) is False

    @property
    def measured(self) -> str:
        """With its interval, if it is a single ratio that has one; else with the number of records."""
        if self.value is None:
            return "not measured"
        text = self.goal.kind.text
        if len(self.records) > 1:
            return f"{text(self.value)} of {len(self.records)}"
        ratio = self.records[0]["speedups"].get(self.goal.rival)
        if ratio is None or ratio["low"] is None or self.goal.kind not in (SPEEDUP, COST):
            return text(self.value)
        ends = (ratio["low"], ratio["high"]) if self.goal.kind is SPEEDUP else (1 / ratio["high"], 1 / ratio["low"])
        return f"{text(self.value)} ({text(ends[0])} to {text(ends[1])})"

    def of_level(self, level: float | None) -> str:
        """A tick, or how much is missing."""
        met, text = self.is_met(level), self.goal.kind.text
        if level is None:
            return ""
        if met is None:
            return text(level)
        return f"✓ {text(level)}" if met else f"{text(level)}: {text(abs(level - (self.value or 0)))} missing"

    @property
    def cells(self) -> list[str]:
        return [self.goal.name, self.measured, *map(self.of_level, self.goal.levels)]

    def to_json(self) -> dict[str, Any]:
        levels = dict(zip(LEVELS, self.goal.levels, strict=True))
        return {"goal": self.goal.name, "value": self.value, "measured": self.measured, **levels}


def judge(records: Sequence[Record]) -> list[Verdict]:
    """All goals of the device that the records come from; ValueError for those of a simulated one."""
    machine.refuse_simulated(records)
    device = records[0]["device"] if records else "cuda"
    verdicts = []
    for goal in GOALS[device]:
        found = goal.among(records)
        verdicts.append(Verdict(goal, goal.kind.of(found, goal.rival) if found else None, found))
    return verdicts


def lines(records: Sequence[Record]) -> list[str]:
    """For the console: the goals that these records speak of."""
    if any(map(machine.is_simulated, records)):
        return []
    return [
        f"{v.goal.name}: {v.measured}; " + ", ".join(f"{n} {c}" for n, c in zip(LEVELS, v.cells[2:], strict=True) if c)
        for v in judge(records)
        if v.value is not None
    ]


def _networks_of_timm() -> list[Goal]:
    """Their layers standardise weights themselves."""
    fields = {"suite": "step", "provider": "ours foreach"}
    return [
        Goal(f"training step of {name} / timm's", COST, "timm", fields | {"case": name}, (1.0, None, None))
        for name in ("eca_nfnet_l0", "resnetv2_50x1_bit")
    ]


def _cuda() -> list[Goal]:
    """Weights in float32, filters in bfloat16 and channels_last: what a convolution under autocast takes."""
    half = {"provider": "ours", "out_dtype": "bfloat16"}
    network, layer = {"suite": "network", **half}, {"suite": "layer", **half}
    step = {"suite": "step", "provider": "ours foreach", "case": "resnet50"}
    found = [
        Goal(f"whole model, {direction}, of the copy rate", SHARE, "", network | fields, levels)
        for direction, levels in (("forward", (0.78, 0.88, 0.93)), ("backward", (0.80, 0.90, 0.94)))
        for fields in [{"direction": direction, "clock": "graph"}]
    ]
    for rival, clock, *levels in (
        ("eager", "graph", 20, 35, 45),
        ("eager", "wall", 20, 40, 60),
        ("timm", "graph", 8, 14, 18),
        ("timm", "wall", 6, 10, 15),
        ("compile", "graph", 2.5, 3.5, 4.5),
    ):
        name = f"whole model, forward + backward, {clock}, against {rival}"
        found.append(Goal(name, SPEEDUP, rival, network | {"direction": "both", "clock": clock}, tuple(levels)))
    for rival, forward, backward in (
        ("eager", (5, 7, 9), (8, 12, 16)),
        ("timm", (3, 4, 5), (2, 3, 4)),
        ("compile", (1.0, 1.2, 1.5), (1.0, 1.3, 1.8)),
    ):
        for direction, each in (("forward", forward), ("backward", backward)):
            fields = layer | {"direction": direction, "clock": "graph"}
            found.append(Goal(f"one layer, {direction}, graph, against {rival}", SPEEDUP, rival, fields, each))
    for clock, small in (("wall", (1.02, 1.00, 0.97)), ("graph", (1.02, 0.98, 0.94))):
        for batch in (1, 2, 8, 64):
            levels = small if batch < 64 else (1.01, 1.00, 0.99)
            fields = step | {"clock": clock, "batch": batch}
            found.append(Goal(f"training step of batch {batch}, {clock} / plain", COST, "plain", fields, levels))
    for case, *levels in (("with", 130e-6, 100e-6, None), ("without", 75e-6, 60e-6, None)):
        fields = {"suite": "host", "provider": "ours", "case": f"align_foreach, 53 weights, forward {case} grad"}
        found.append(Goal(f"host's time of 53 weights, {case} grad", TIME, "", fields, tuple(levels)))
    memory = step | {"suite": "step memory", "out_dtype": "bfloat16"}
    found.append(Goal("peak memory of a step / plain", COST, "plain", memory, (1.05, 1.02, 1.00)))
    return [*found, *_networks_of_timm()]


def _cpu() -> list[Goal]:
    """In float32, forward + backward unless it says otherwise."""
    both = {"provider": "ours", "out_dtype": "float32", "direction": "both"}
    layer, network = {"suite": "layer", **both}, {"suite": "network", **both}
    found = []
    for case, direction, rival, *levels in (
        ("2048x1024x1x1 (memory), 1 thread", "forward", "clone", 2.2, 1.8, None),
        ("2048x1024x1x1 (memory), 1 thread", "backward", "add", 1.4, 1.2, None),
        ("128x128x3x3 (L2), 1 thread", "forward", "clone", 4, 3, None),
        ("128x128x3x3 (L2), 1 thread", "backward", "add", 3, 2.2, None),
    ):
        fields = {"suite": "op", "provider": "ours", "case": case, "direction": direction, "out_dtype": "float32"}
        found.append(Goal(f"op alone, {case}, {direction} / {rival}", COST, rival, fields, tuple(levels)))
    for rival, shapes, whole in (
        ("eager", (7, 9, None), (10, 13, None)),
        ("timm", (2, 2.5, None), (2.3, 3, None)),
        ("compile", (1.7, 2, None), (1.6, 2, None)),
    ):
        found.append(Goal(f"one layer, mean of shapes, against {rival}", SPEEDUP, rival, layer, shapes))
        found.append(Goal(f"whole model, against {rival}", SPEEDUP, rival, network, whole))
    for rival in ("timm", "compile"):
        found.append(Goal(f"shapes slower than {rival}", SLOWER, rival, layer, (0, None, None)))
    tiny = {"suite": "host", "case": "53 tiny convolutions, forward + backward"}
    for provider, *levels in (("ours per layer", 2.3, 1.8, None), ("ours", 1.25, 1.1, None)):
        fields = tiny | {"provider": provider}
        found.append(Goal(f"53 tiny convolutions, {provider} / plain", COST, "plain", fields, tuple(levels)))
    step = {"suite": "step", "provider": "ours foreach", "case": "resnet50", "batch": 1}
    memory = {"suite": "step memory", "provider": "ours foreach", "out_dtype": "bfloat16"}
    return [
        *found,
        Goal("training step of batch 1 / plain", COST, "plain", step, (1.08, 1.04, None)),
        Goal("peak memory of a step under autocast / plain", COST, "plain", memory, (1.05, None, None)),
        *_networks_of_timm(),
    ]


GOALS = {"cuda": _cuda(), "cpu": _cpu()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=pathlib.Path, help="of records of one machine")
    files = parser.parse_args().files
    records = [record for file in files for record in read(file)]
    try:
        verdicts = judge(records)
    except ValueError as reason:
        parser.error(str(reason))
    print("\n".join(lines(records)))
    raise SystemExit(any(verdict.misses_must for verdict in verdicts))


if __name__ == "__main__":
    main()
