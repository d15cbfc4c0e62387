"""python -m benchmarks.compare A B: whether the runs whose records are in file B are slower than those in file A.

Each record of ours is paired with that of the same suite, case, provider, direction, clock, dtypes, layouts and batch.
A busy machine slows down all that it runs, so times are not compared with times. In each run ours is divided by its
yardstick, round by round: the geometric mean of the rivals that took turns with it in both runs. The ratio is

    median(ours / yardstick in B) / median(ours / yardstick in A);  above 1, B is slower.

Its interval (99 %) is a bootstrap's, which resamples the rounds of each run.

A loss is significant if the whole interval lies above 1 + MARGIN. The interval knows how rounds of one run differ; the
margin is for what differs between two runs of the same program, such as where its memory happens to lie. A gain is
the same on the other side. Memory is a single sample, repeats itself, and is a loss beyond the margin. Records without
a rival in common are named and not judged, as are those that only one of the files has.

Exits with 1 on a significant loss, with 2 on files that cannot be compared: of different machines, or of a simulated
device. Versions that differ are named, because the rivals differ with them.
"""

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import machine, stats
from .console import Console
from .report import UNITS, Record, read

MARGIN = 0.05
CONFIDENCE = 0.99
SAME = ("device", "gpu", "cpu", "cpu_kernels", "threads")
NAMED = ("driver", "cuda", "torch", "triton")
KEY = (
    "suite",
    "group",
    "case",
    "provider",
    "direction",
    "clock",
    "dtype",
    "out_dtype",
    "layout",
    "out_layout",
    "batch",
)
Key = tuple[Any, ...]


@dataclass(frozen=True)
class Change:
    """Of one record, from A to B."""

    key: Key
    ratio: stats.Ratio
    before: float  # ours, in A
    after: float

    @property
    def verdict(self) -> str:
        """loss, gain, or nothing."""
        low, high = (self.ratio.ratio if end is None else end for end in (self.ratio.low, self.ratio.high))
        if low > 1 + MARGIN:
            return "loss"
        return "gain" if high < 1 / (1 + MARGIN) else ""


def is_ours(provider: str) -> bool:
    return "ours" in provider.split()


def key_of(record: Record, **other: Any) -> Key:
    return tuple(other.get(field, record.get(field)) for field in KEY)


def by_key(records: Sequence[Record]) -> dict[Key, Record]:
    found = {key_of(record): record for record in records}
    if len(found) != len(records):
        raise ValueError("records of more than one run: two have the same case, provider and setting")
    return found


def check_same_machine(a: Sequence[Record], b: Sequence[Record]) -> list[str]:
    """The versions that differ; ValueError if the machines do, or if no hardware took the times."""
    machine.refuse_simulated((*a, *b))
    for name in SAME:
        values = [sorted({str(record[name]) for record in records}) for records in (a, b)]
        if values[0] != values[1] or len(values[0]) != 1:
            raise ValueError(f"different machines: {name} is {', '.join(values[0])} in A, {', '.join(values[1])} in B")
    return [f"{n}: {a[0].get(n)} in A, {b[0].get(n)} in B" for n in NAMED if a[0].get(n) != b[0].get(n)]


def relative(records: dict[Key, Record], key: Key, rivals: Sequence[str]) -> list[float]:
    """Ours / the geometric mean of the rivals, in each round."""
    ours = records[key]
    theirs = (records[key_of(ours, provider=rival)]["rounds"] for rival in rivals)
    own, *others = (np.log(each) for each in stats.in_rounds(ours["rounds"], *theirs))
    return [float(ratio) for ratio in np.exp(own - np.mean(others, axis=0))]


def changes(a: Sequence[Record], b: Sequence[Record]) -> tuple[list[Change], list[str]]:
    """Of all pairs of records of ours, and what was left out and why."""
    before, after, found, left_out = by_key(a), by_key(b), [], []
    for key in dict.fromkeys((*before, *after)):
        if not is_ours(key[KEY.index("provider")]):
            continue
        name = text_of(key)
        if key not in before or key not in after:
            left_out.append(f"{name}: only in {'A' if key in before else 'B'}")
            continue
        rivals = [r for r in before[key]["speedups"] if r in after[key]["speedups"] and not is_ours(r)]
        if not rivals:
            left_out.append(f"{name}: no rival in common")
        elif any("rounds" not in record for record in (before[key], after[key])):
            left_out.append(f"{name}: its samples were not recorded")
        else:
            b_to_a = stats.median_ratio_of_runs(*(relative(run, key, rivals) for run in (after, before)), CONFIDENCE)
            found.append(Change(key, b_to_a, before[key]["p50"], after[key]["p50"]))
    return found, left_out


def text_of(key: Key) -> str:
    usual = (None, "contiguous_format", "preserve_format")
    return ", ".join(str(part) for part in key if part not in usual)


def line(change: Change) -> str:
    low, ratio, high = change.ratio.low, change.ratio.ratio, change.ratio.high
    ends = "" if low is None else f"({low:.3f} to {high:.3f})"
    unit = "MB" if "memory" in change.key else "us"
    times = " to ".join(f"{value * UNITS[unit]:.1f}" for value in (change.before, change.after))
    text = f"{ratio:.3f} {ends:18} {change.verdict:4}  {text_of(change.key)}: {times} {unit}"
    return f"[red]{text}[/red]" if change.verdict == "loss" else text


def show(screen: Console, found: Sequence[Change], left_out: Sequence[str]) -> None:
    screen.print("B / A, each relative to its rivals (99 % interval)")
    for change in sorted(found, key=lambda each: -each.ratio.ratio):
        screen.print(line(change), highlight=False, soft_wrap=True)
    for each in left_out:
        screen.print(f"left out: {each}", highlight=False, soft_wrap=True)
    slower, faster = (sum(change.verdict == verdict for change in found) for verdict in ("loss", "gain"))
    screen.print(f"{len(found)} compared: {slower} slower, {faster} faster, certainly by more than {MARGIN:.0%}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=pathlib.Path, metavar="A", help="records of the run before, JSON lines")
    parser.add_argument("b", type=pathlib.Path, metavar="B", help="records of the run after")
    arguments = parser.parse_args()
    screen, a, b = Console(), read(arguments.a), read(arguments.b)
    try:
        differing = check_same_machine(a, b)
        found, left_out = changes(a, b)
    except ValueError as reason:
        print(f"cannot be compared: {reason}", file=sys.stderr)
        raise SystemExit(2) from None
    for line in differing:
        screen.print(f"[yellow]the rivals may differ, {line}[/yellow]", highlight=False)
    show(screen, found, left_out)
    raise SystemExit(any(change.verdict == "loss" for change in found))


if __name__ == "__main__":
    main()
