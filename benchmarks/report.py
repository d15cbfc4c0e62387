"""Tables from records, and the plot of benchmarks.align."""

import pathlib
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from . import machine
from .stats import geometric_mean

RIVALS = ("eager", "timm", "compile", "multiply", "cast", "flat")
PLOTTED = ("eager", "timm", "compile")
UNITS = {"us": 1e6, "ms": 1e3, "MB": 1e-6}
Record = dict[str, Any]


def pick(records: Sequence[Record], **fields: Any) -> list[Record]:
    return [r for r in records if all(r[key] == value for key, value in fields.items())]


def present(records: Sequence[Record], among: Sequence[str] = RIVALS) -> list[str]:
    """The rivals that ran."""
    return [rival for rival in among if any(rival in r["speedups"] for r in records)]


def ratio_text(speedup: dict[str, float]) -> str:
    """4.31x; red if ours is certainly slower, yellow if the interval contains 1."""
    text = f"{speedup['ratio']:.2f}x"
    if speedup["high"] < 1:
        return f"[red]{text}[/red]"
    return f"[yellow]{text}[/yellow]" if speedup["low"] <= 1 else text


def table(
    title: str, first: str, rows: Sequence[tuple[str, Record]], among: Sequence[str] = RIVALS, unit: str = "us"
) -> Table:
    """One line per record of ours: what it takes, and how many times that each rival takes."""
    rivals = present([record for _, record in rows], among)
    result = Table(first, f"ours {unit}", *rivals, title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    result.columns[0].no_wrap = True
    for column in result.columns[1:]:
        column.justify = "right"
    for name, record in rows:
        value, speedups = record["p50"] * UNITS[unit], record["speedups"]
        result.add_row(
            name,
            f"{value:.1f}" if value < 1000 else f"{value:.0f}",
            *(ratio_text(speedups[rival]) if rival in speedups else "" for rival in rivals),
        )
    return result


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


def print_report(console: Console, records: Sequence[Record], left_out: Sequence[str]) -> None:
    """Everything, losses included, for each setting and clock."""
    kinds = dict.fromkeys((r["dtype"], r["out_dtype"], r["out_layout"], r["clock"]) for r in records)
    for dtype, out_dtype, layout, clock in kinds:
        some = pick(records, dtype=dtype, out_dtype=out_dtype, out_layout=layout, clock=clock)
        title = f"{dtype} -> {out_dtype}, {layout}, {clock} time"
        single = pick(some, suite="layer", provider="ours")
        if both := pick(single, direction="both"):
            rows = [(f"{'x'.join(map(str, r['shape']))}", r) for r in both]
            console.print(table(f"One layer, forward + backward, {title}", "shape", rows))
            console.print("\n".join(summary_lines(single)), highlight=False)
        if whole := [r for r in pick(some, suite="network") if r["provider"].startswith("ours")]:
            name = {"ours": "", "ours per layer": ", per layer"}
            rows = [(f"{r['direction']}{name[r['provider']]}", r) for r in whole]
            console.print(table(f"align_foreach, {whole[0]['case']}, {title}", "direction", rows))
    for suite, title in (("op", "The op alone"), ("host", "The host's part")):
        for r in [r for r in pick(records, suite=suite) if r["provider"].startswith("ours")]:
            times = ", ".join(f"{1 / ratio['ratio']:.2f} x {rival}" for rival, ratio in r["speedups"].items())
            what = f"{r['case']}, {r['direction']}" if suite == "op" else r["case"]
            console.print(f"{title}: {what:56}{r['provider']:15}{r['p50'] * 1e6:9.1f} us  {times}", highlight=False)
    for line in left_out:
        console.print(f"[yellow]left out: {line}[/yellow]", highlight=False)
    console.print("Ratios: median time of the rival / of ours; yellow: the 95 % interval holds 1; red: ours is slower.")


def plot(records: Sequence[Record], path: pathlib.Path) -> None:
    """Horizontal bars: speedup of forward + backward for each shape against each rival."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rivals = present(records, PLOTTED)
    height = 0.8 / len(rivals)
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(records) + 1.8), layout="constrained")
    for i, rival in enumerate(rivals):
        ratios = [r["speedups"][rival] for r in records]
        places = [row + (i - (len(rivals) - 1) / 2) * height for row in range(len(records))]
        values = [r["ratio"] for r in ratios]
        spread = [[max(r["ratio"] - r["low"], 0) for r in ratios], [max(r["high"] - r["ratio"], 0) for r in ratios]]
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
