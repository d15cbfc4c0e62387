"""The report's tables: lines of Markdown, none where there is nothing to show."""

import json
import pathlib
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from ..report import Record, pick, present
from ..tables import head, ratio, row, times

KERNELS = ("forward", "backward")
PREDICTED = "machine-code.json"  # of the step "static"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def predicted(folder: pathlib.Path, gpu: str) -> dict[str, float]:
    """What benchmarks.machine_code predicts for this GPU: forward_us, forward_copy_fraction and those of the backward.
    Empty if it did not run, or has no model of the chip."""
    path = folder / PREDICTED
    chips = json.loads(path.read_text())["predicted"] if path.exists() else {}
    return next((found for chip, found in chips.items() if chip in gpu), {})


def predictions(folder: pathlib.Path, ours: Sequence[Record], gpu: str) -> list[str]:
    """For the whole model."""
    if not (found := predicted(folder, gpu)):
        return []
    lines = head("all weights in one launch", "predicted us", "measured us", "predicted, of copy", "measured, of copy")
    for direction in KERNELS:
        measured = pick(ours, suite="network", provider="ours", direction=direction, clock="graph")
        us, share = (f"{1e6 * measured[0]['p50']:.1f}", measured[0]["fraction_of_copy"]) if measured else ("", None)
        expected = f"{found[f'{direction}_us']:.1f}", percent(found[f"{direction}_copy_fraction"])
        lines.append(row(direction, expected[0], us, expected[1], percent(share)))
    return lines


def network(ours: Sequence[Record]) -> list[str]:
    if not ours:
        return []
    rivals = present(ours)
    lines = head("", "us", "launches", "of copy", "of flat", *rivals)
    for r in ours:
        name = f"{r['direction']}, {r['clock']}{r['provider'].removeprefix('ours')}"
        shares = percent(r["fraction_of_copy"]), percent(r["fraction_of_flat"])
        others = (ratio(r, rival) for rival in rivals)
        lines.append(row(name, f"{1e6 * r['p50']:.1f}", str(r["launches"] or ""), *shares, *others))
    return lines


def shapes(ours: Sequence[Record]) -> list[str]:
    """GPU time of each shape, losses included, and the means."""
    if not (some := pick(ours, suite="layer", clock="graph")):
        return []
    rivals = present(some)
    lines = head("", "us", "of copy", *rivals)
    for r in some:
        others = (ratio(r, rival) for rival in rivals)
        lines.append(
            row(f"{r['case']}, {r['direction']}", f"{1e6 * r['p50']:.2f}", percent(r["fraction_of_copy"]), *others)
        )
    for direction in dict.fromkeys(r["direction"] for r in some):
        each = {
            v: [r["speedups"][v]["ratio"] for r in pick(some, direction=direction) if v in r["speedups"]]
            for v in rivals
        }
        means = (times(geometric_mean(found)) if found else "" for found in each.values())
        lines.append(row(f"**mean, {direction}**", "", "", *means))
    return lines


def layers(ours: Sequence[Record]) -> list[str]:
    lines = head("against eager PyTorch", "mean", "minimum", "layers not slower")
    for part, name in (("prep", "preparation alone"), ("conv", "preparation and convolution")):
        if found := [r["speedups"][f"{part} eager"]["ratio"] for r in pick(ours, provider=f"{part} ours")]:
            not_slower = f"{sum(each >= 1 for each in found)} of {len(found)}"
            lines.append(row(name, times(geometric_mean(found)), times(min(found)), not_slower))
    return lines if ours else []


def training(ours: Sequence[Record], suite: str, unit: float, name: str) -> list[str]:
    if not (some := pick(ours, suite=suite)):
        return []
    rivals = present(some, ("plain", "eager", "timm", "compile"))
    lines = head("", name, *rivals)
    for r in some:
        what = f"{r['case']}, batch {r['batch']}, {r['clock']}, {r['provider'].removeprefix('ours ')}"
        lines.append(row(what, f"{unit * r['p50']:.2f}", *(ratio(r, rival) for rival in rivals)))
    return lines


def host(ours: Sequence[Record]) -> list[str]:
    lines = head("", "us", "times as long as")
    for r in ours:
        others = ", ".join(f"{1 / each['ratio']:.2f} {rival}" for rival, each in r["speedups"].items())
        lines.append(row(f"{r['case']}, {r['provider']}", f"{1e6 * r['p50']:.0f}", others))
    return lines if ours else []


def profile(path: pathlib.Path) -> list[str]:
    """Stalls: how many warps wait for that reason, for each that issues."""
    kernels: list[dict[str, Any]] = json.loads(path.read_text()) if path.exists() else []
    if not kernels:
        return []
    names = [name for name in kernels[0] if name not in ("kernel", "stalls")]
    lines = head("kernel", *names, "stalls")
    for kernel in kernels:
        stalls = ", ".join(f"{name} {value:.1f}" for name, value in kernel["stalls"].items())
        lines.append(row(kernel["kernel"], *(kernel.get(name, "") for name in names), stalls))
    return lines
