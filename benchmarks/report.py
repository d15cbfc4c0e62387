"""Tables from records, and the plot of benchmarks.align."""

import importlib.util
import json
import pathlib
from collections.abc import Sequence
from statistics import geometric_mean
from typing import Any

from . import console, machine
from .console import Console

RIVALS = ("eager", "timm", "compile", "multiply", "cast", "flat")
PLOTTED = ("eager", "timm", "compile")
UNITS = {"us": 1e6, "ms": 1e3, "MB": 1e-6}
Record = dict[str, Any]


def read(path: pathlib.Path) -> list[Record]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def pick(records: Sequence[Record], **fields: Any) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in fields.items())]


def present(records: Sequence[Record], among: Sequence[str] = RIVALS) -> list[str]:
    """The rivals that ran."""
    return [rival for rival in among if any(rival in r["speedups"] for r in records)]


def ratio_text(speedup: dict[str, Any]) -> str:
    """4.31x; red if ours is certainly slower, yellow if the interval contains 1."""
    text = f"{speedup['ratio']:.2f}x"
    if speedup["low"] is None or speedup["low"] > 1:
        return text
    return f"[red]{text}[/red]" if speedup["high"] < 1 else f"[yellow]{text}[/yellow]"


def table(
    title: str, first: str, rows: Sequence[tuple[str, Record]], among: Sequence[str] = RIVALS, unit: str = "us"
) -> Any:
    """One line per record of ours: what it takes, and how many times that each rival takes."""
    rivals = present([record for _, record in rows], among)
    lines = []
    for name, record in rows:
        value, speedups = record["p50"] * UNITS[unit], record["speedups"]
        others = (ratio_text(speedups[rival]) if rival in speedups else "" for rival in rivals)
        lines.append([name, f"{value:.1f}" if value < 1000 else f"{value:.0f}", *others])
    return console.table(title, [first, f"ours {unit}", *rivals], lines)


def summary_lines(records: Sequence[Record]) -> list[str]:
    """For single layers: geometric mean, minimum, and share of shapes not slower, for each rival and direction."""
    lines = []
    for rival in present(records):
        for direction in ("forward", "backward", "both"):
            ratios = [r["speedups"][rival]["ratio"] for r in pick(records, direction=direction)]
            if ratios:
                share = sum(ratio >= 1 for ratio in ratios)
                lines.append(
                    f"vs {rival:8}{direction:9} geomean {geometric_mean(ratios):6.2f}x  minimum {min(ratios):6.2f}x  "
                    f">= 1x: {share} of {len(ratios)}"
                )
    return lines


def print_report(screen: Console, records: Sequence[Record], left_out: Sequence[str]) -> None:
    """Everything, losses included, for each setting and clock."""
    kinds = dict.fromkeys((r["dtype"], r["out_dtype"], r["out_layout"], r["clock"]) for r in records)
    for dtype, out_dtype, layout, clock in kinds:
        some = pick(records, dtype=dtype, out_dtype=out_dtype, out_layout=layout, clock=clock)
        title = f"{dtype} -> {out_dtype}, {layout}, {clock} time"
        single = pick(some, suite="layer", provider="ours")
        if both := pick(single, direction="both"):
            rows = [(f"{'x'.join(map(str, r['shape']))}", r) for r in both]
            screen.print(table(f"One layer, forward + backward, {title}", "shape", rows))
            screen.print("\n".join(summary_lines(single)), highlight=False)
        if whole := [r for r in pick(some, suite="network") if r["provider"].startswith("ours")]:
            name = {"ours": "", "ours per layer": ", per layer"}
            rows = [(f"{r['direction']}{name[r['provider']]}", r) for r in whole]
            screen.print(table(f"align_foreach, {whole[0]['case']}, {title}", "direction", rows))
    for suite, title in (("op", "The op alone"), ("host", "The host's part")):
        for r in [r for r in pick(records, suite=suite) if r["provider"].startswith("ours")]:
            times = ", ".join(f"{1 / ratio['ratio']:.2f} x {rival}" for rival, ratio in r["speedups"].items())
            what = f"{r['case']}, {r['direction']}" if suite == "op" else r["case"]
            screen.print(f"{title}: {what:56}{r['provider']:15}{r['p50'] * 1e6:9.1f} us  {times}", highlight=False)
    for line in left_out:
        screen.print(f"[yellow]left out: {line}[/yellow]", highlight=False)
    screen.print("Ratios: median time of the rival / of ours; yellow: the 95 % interval holds 1; red: ours is slower.")


def plots(records: Sequence[Record], folder: pathlib.Path) -> list[pathlib.Path]:
    """A plot for each pair of dtypes, of CUDA by its primary clock; none of a simulated device."""
    clock = "graph" if any(r["clock"] == "graph" for r in records) else "wall"
    single = pick(records, suite="layer", provider="ours", direction="both", clock=clock)
    if not single or machine.is_simulated(single[0]) or importlib.util.find_spec("matplotlib") is None:
        return []
    written = []
    for dtype, out_dtype in dict.fromkeys((r["dtype"], r["out_dtype"]) for r in single):
        written.append(folder / f"align-{single[0]['device']}-{dtype}-{out_dtype}.png")
        plot(pick(single, dtype=dtype, out_dtype=out_dtype), written[-1])
    return written


def plot(records: Sequence[Record], path: pathlib.Path) -> None:
    """Horizontal bars: speedup of forward + backward for each shape against each rival."""
    machine.refuse_simulated(records)
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rivals = present(records, PLOTTED)
    height = 0.8 / len(rivals)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(records) + 1.8), layout="constrained")
    for i, rival in enumerate(rivals):
        ratios = {row: r["speedups"][rival] for row, r in enumerate(records) if rival in r["speedups"]}
        places = [row + (i - (len(rivals) - 1) / 2) * height for row in ratios]
        values = [r["ratio"] for r in ratios.values()]
        bounds = [(r["low"] or r["ratio"], r["ratio"], r["high"] or r["ratio"]) for r in ratios.values()]
        spread = [[max(mid - low, 0) for low, mid, _ in bounds], [max(high - mid, 0) for _, mid, high in bounds]]
        label = f"{rival} (geometric mean {geometric_mean(values):.1f}x)"
        axes.barh(
            places,
            [v - 1 for v in values],
            height,
            left=1,
            xerr=spread,
            label=label,
            error_kw={"elinewidth": 0.7, "ecolor": "0.3"},
        )
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}x" if f"{x:e}"[0] in "25" else "")
    axes.tick_params(axis="x", which="minor", labelsize=8)
    axes.set_yticks(range(len(records)), ["x".join(map(str, r["shape"])) for r in records])
    axes.set_ylim(len(records) - 0.4, -0.6)
    axes.grid(axis="x", which="both", linewidth=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("speedup of wa.align, forward + backward (right of 1x: faster)")
    first = records[0]
    what = f"{first['dtype']} to {first['out_dtype']}, {first['clock']} time"
    axes.set_title(f"Aligning one weight of ResNet-50, {what}\n{machine.label(first)}", fontsize=10)
    axes.legend(fontsize=8, loc="upper right")
    figure.savefig(path, dpi=130)
    plt.close(figure)
