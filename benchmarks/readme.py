"""python -m benchmarks.readme: writes README's tables of benchmarks.align anew, from the records in benchmarks/results.

One block for each machine that was measured, between two comments in README.md. A test keeps them the same.
"""

import json
from collections.abc import Sequence
from typing import Any

from . import machine
from .report import Record, pick
from .stats import geometric_mean

README = machine.ROOT / "README.md"
RESULTS = machine.ROOT / "benchmarks/results"
BEGIN, END = "<!-- tables of benchmarks/readme.py -->", "<!-- end of tables -->"
# Each file of records, and what is to be known of its machine beside what they say.
MACHINES = {
    "align-epyc-avx2-2-cores.jsonl": "AVX2 without AVX-512",
    "align-epyc-2-cores.jsonl": "AVX-512, by the kernels and the Python of before those of today",
}
RIVALS = {
    "eager": "the formula in eager PyTorch",
    "timm": "timm's `F.batch_norm` trick",
    "compile": "torch.compile of the formula",
    "multiply": "gain * weight, the least that autograd allows",
    "cast": "cast of a plain convolution (here a clone)",
}


def times(value: float) -> str:
    """1.83x; 12.8x."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def shapes_table(single: Sequence[Record]) -> list[str]:
    lines = ["| against | mean | minimum | shapes not slower | mean, forward; backward |", "|---|---|---|---|---|"]
    for rival, name in RIVALS.items():
        ratios = {
            direction: [r["speedups"][rival]["ratio"] for r in pick(single, direction=direction)]
            for direction in ("forward", "backward", "both")
        }
        both, (forward, backward) = ratios["both"], (geometric_mean(ratios[d]) for d in ("forward", "backward"))
        not_slower = f"{sum(ratio >= 1 for ratio in both)} of {len(both)}"
        cells = name, times(geometric_mean(both)), times(min(both)), not_slower, f"{times(forward)}; {times(backward)}"
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def network_table(whole: Sequence[Record]) -> list[str]:
    lines = ["| the whole model, `wa.align_foreach` | ours | " + " | ".join(RIVALS) + " |", "|---" * 7 + "|"]
    for r in whole:
        ratios = [times(r["speedups"][rival]["ratio"]) for rival in RIVALS]
        lines.append(f"| {r['direction']} | {r['p50'] * 1e3:.1f} ms | " + " | ".join(ratios) + " |")
    return lines


def ratios_table(title: str, records: Sequence[Record]) -> list[str]:
    """How many times what something else takes."""
    lines = [f"| {title} | us | times as long as |", "|---|---|---|"]
    for r in records:
        case = r["case"] if r["suite"] == "host" else f"{r['case']}, {r['direction']}"
        by = {"ours": "", "ours per layer": ", layer by layer", "ours frozen": ", frozen", "ours folded": ", folded"}
        others = ", ".join(f"{1 / each['ratio']:.2f} {rival}" for rival, each in r["speedups"].items())
        lines.append(f"| {case}{by[r['provider']]} | {r['p50'] * 1e6:.0f} | {others} |")
    return lines


def block(file: str, about: str) -> list[str]:
    records = [json.loads(line) for line in (RESULTS / file).read_text().splitlines()]
    ours = [r for r in records if r["provider"].startswith("ours")]
    facts: dict[str, Any] = records[0]
    busy = facts.get("others_busy")
    noise = "" if busy is None else f"; other programs kept {busy} processors busy"
    title = f"{facts['cpu']}, {facts['threads']} cores, torch {facts['torch']}: {about}{noise}."
    lines = [f"**{title}**", "", *shapes_table(pick(ours, suite="layer")), ""]
    lines += [*network_table(pick(ours, suite="network", provider="ours")), ""]
    if op := pick(ours, suite="op"):
        lines += [*ratios_table("the op alone, float32", op), ""]
    if host := [r for r in pick(ours, suite="host") if r["speedups"]]:
        lines += [*ratios_table("the host's part", host), ""]
    return lines


def tables() -> str:
    return "\n".join(line for file, about in MACHINES.items() for line in block(file, about))


def with_tables(text: str) -> str:
    """README's text with the tables of today."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
