"""python -m benchmarks.tables: regenerates the documents' tables from benchmarks/results and benchmarks/scaling.py.

Each is between two comments, the first of which names it. A test checks that they are up to date.
"""

import json
import re
from collections.abc import Callable, Sequence
from statistics import geometric_mean
from typing import Any

from . import machine, report, scaling
from .report import Record, pick

DOCUMENTS = tuple(machine.ROOT / name for name in ("README.md", "docs/pages/performance.md", "docs/pages/scaling.md"))
RESULTS = machine.ROOT / "benchmarks/results"
DIRECTIONS = ("forward", "backward")
END = "<!-- end of table -->"
PLACE = re.compile(rf"<!-- table of benchmarks/tables.py: (\w+) -->\n.*?{END}", re.DOTALL)
# The machines: suffixes of their record files, and what to add to the facts in the records of benchmarks.align; which
# has measured those of FORCED as well, with WEIGHTALIGN_CPU.
NEWEST = "xeon-avx512-2-cores.jsonl"
MACHINES = {
    NEWEST: "AVX-512 and AMX",
    "epyc-avx2-2-cores.jsonl": "AVX2 without AVX-512",
}
FORCED = {"xeon-avx2-2-cores.jsonl": "AVX2, forced on a machine that has AVX-512"}
RIVALS = {
    "eager": "the formula in eager PyTorch",
    "timm": "timm's `F.batch_norm` trick",
    "compile": "torch.compile of the formula",
    "multiply": "gain * weight in PyTorch",
    "cast": "cast of a plain convolution (here a clone)",
}


def times(value: float) -> str:
    """1.83x; 12.8x."""
    return f"{value:.1f}x" if value >= 10 else f"{value:.2f}x"


def row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def head(*cells: str) -> list[str]:
    return [row(*cells), "|---" * len(cells) + "|"]


def read(benchmark: str, file: str) -> list[Record]:
    records = report.read(RESULTS / f"{benchmark}-{file}")
    machine.refuse_simulated(records)
    return records


def ratio(record: Record, rival: str) -> str:
    """Empty if the rival did not run."""
    return times(record["speedups"][rival]["ratio"]) if rival in record["speedups"] else ""


def shapes_table(single: Sequence[Record]) -> list[str]:
    lines = head("against", "mean", "minimum", "shapes not slower", "mean, forward; backward")
    for rival, name in RIVALS.items():
        ratios = {
            direction: [r["speedups"][rival]["ratio"] for r in pick(single, direction=direction)]
            for direction in ("forward", "backward", "both")
        }
        both, (forward, backward) = ratios["both"], (geometric_mean(ratios[d]) for d in ("forward", "backward"))
        not_slower = f"{sum(ratio >= 1 for ratio in both)} of {len(both)}"
        directions = f"{times(forward)}; {times(backward)}"
        lines.append(row(name, times(geometric_mean(both)), times(min(both)), not_slower, directions))
    return lines


def network_table(whole: Sequence[Record]) -> list[str]:
    lines = head("the whole model, `wa.align_foreach`", "ours", *RIVALS)
    for r in whole:
        lines.append(row(r["direction"], f"{r['p50'] * 1e3:.1f} ms", *(ratio(r, rival) for rival in RIVALS)))
    return lines


def ratios_table(title: str, records: Sequence[Record]) -> list[str]:
    """Ratios of ours to the others."""
    lines = head(title, "us", "times as long as")
    for r in records:
        case = r["case"] if r["suite"] == "host" else f"{r['case']}, {r['direction']}"
        by = {"ours": "", "ours per layer": ", layer by layer", "ours frozen": ", frozen", "ours folded": ", folded"}
        others = ", ".join(f"{1 / each['ratio']:.2f} {rival}" for rival, each in r["speedups"].items())
        lines.append(row(case + by[r["provider"]], f"{r['p50'] * 1e6:.0f}", others))
    return lines


def of_align(file: str, about: str) -> list[str]:
    records = read("align", file)
    ours = [r for r in records if r["provider"].startswith("ours")]
    facts: dict[str, Any] = records[-1]  # which knows how busy the machine was during all of the run
    busy = facts.get("others_busy")
    noise = "" if busy is None else f"; other programs kept {busy} processors busy"
    title = f"{facts['cpu']}, {facts['threads']} cores, torch {facts['torch']}: {about}{noise}."
    lines = [f"**{title}**", "", *shapes_table(pick(ours, suite="layer")), ""]
    lines += [*network_table(pick(ours, suite="network", provider="ours")), ""]
    if op := pick(ours, suite="op"):
        lines += [*ratios_table("the op alone, float32", op), ""]
    if host := [r for r in pick(ours, suite="host") if r["speedups"]]:
        lines += [*ratios_table("the host's part; empty: an autograd.Function that computes nothing", host), ""]
    return lines


def align() -> list[str]:
    """One block for each machine and set of instructions."""
    return [line for file, about in (MACHINES | FORCED).items() for line in of_align(file, about)][:-1]


def short_name(about: str) -> str:
    """AVX2."""
    return about.split(" ")[0].rstrip(",")


def layers() -> list[str]:
    lines = head("", "mean", "minimum", "layers not slower")
    for file, about in MACHINES.items():
        records = read("conv-layers", file)
        for part, name in (("prep", "preparation alone"), ("conv", "preparation and convolution")):
            ratios = [r["speedups"][f"{part} eager"]["ratio"] for r in pick(records, provider=f"{part} ours")]
            not_slower = f"{sum(ratio >= 1 for ratio in ratios)} of {len(ratios)}"
            mean, least = geometric_mean(ratios), min(ratios)
            lines.append(row(f"{name}, {short_name(about)}", times(mean), times(least), not_slower))
    return lines


STEP_RIVALS = ("plain", "eager", "timm", "compile")


def steps() -> list[str]:
    lines = head("", "ours", *STEP_RIVALS, "peak memory of plain, float32; autocast")
    for file, about in MACHINES.items():
        records = read("step", file)
        for together in pick(records, suite="step", provider="ours foreach"):
            same = {key: together[key] for key in ("case", "batch")}
            (alone,) = pick(records, suite="step", provider="ours per layer", **same)
            memory = pick(records, suite="step memory", provider="ours foreach", **same)
            lines.append(
                row(
                    f"{together['case']}, batch {together['batch']}, {short_name(about)}",
                    f"{together['p50'] * 1e3:.0f} ({alone['p50'] * 1e3:.0f}) ms",
                    *(
                        f"{found} ({ratio(alone, rival)})" if (found := ratio(together, rival)) else ""
                        for rival in STEP_RIVALS
                    ),
                    "; ".join(ratio(r, "plain") for r in memory),
                )
            )
    return lines


def machine_code() -> list[str]:
    """Predicted for the weights of networks and for inputs, by the machine code that the model executed."""
    found = json.loads((RESULTS / "machine-code.json").read_text())
    parts = {
        "resnet50": found,
        "resnet50, contiguous to channels_last": found["channels_last"],
        **found["networks"],
    }
    chips, own_chips = found["predicted"], found["channels_last"]["predicted"]
    lines = head("float32 to bfloat16", "instructions a value", *(f"{name}, of the copy rate" for name in chips))

    def add(what: str, instructions: Sequence[float], shares: Sequence[Sequence[float]]) -> None:
        cells = ["; ".join(f"{share:.0%}" for share in both) for both in shares]
        empty = [""] * (len(chips) - len(cells))
        lines.append(row(what, "; ".join(f"{count:.1f}" for count in instructions), *cells, *empty))

    for name, figures in parts.items():
        (whole,) = pick(figures["instructions_per_value"], n=None)
        shares = [[chip[f"{d}_copy_fraction"] for d in DIRECTIONS] for chip in figures["predicted"].values()]
        add(name, [whole[d] for d in DIRECTIONS], shares)
    for r in found["inputs"]:
        instructions = [r[f"{d}_instructions_per_value"] for d in DIRECTIONS]
        add(f"input {r['input']}", instructions, [[r[f"{d}_copy_fraction_{c}"] for d in DIRECTIONS] for c in own_chips])
    return lines


def summary() -> list[str]:
    """For the machine measured last."""
    rivals = ("eager", "timm", "compile", "plain")
    records, step_records = read("align", NEWEST), read("step", NEWEST)
    single = pick(records, suite="layer", provider="ours", direction="both")
    (whole,) = pick(records, suite="network", provider="ours", direction="both")
    means = (geometric_mean([r["speedups"][rival]["ratio"] for r in single]) for rival in rivals[:3])
    facts = records[0]
    where = f"{facts['cpu']}, {facts['threads']} cores, {short_name(MACHINES[NEWEST])}, torch {facts['torch']}"
    lines = [f"Time of each alternative over ours, forward + backward ({where}); above 1x ours is faster:", ""]
    lines += head("ResNet-50, float32", *(RIVALS[rival] for rival in rivals[:3]), "no alignment")
    lines.append(row(f"`wa.align`, mean of {len(single)} weight shapes", *map(times, means), ""))
    one_call = f"`wa.align_foreach`, all {whole['n_layers']} weights"
    lines.append(row(one_call, *(ratio(whole, rival) for rival in rivals)))
    for r in pick(step_records, suite="step", provider="ours foreach", case="resnet50"):
        lines.append(row(f"a training step, batch {r['batch']}", *(ratio(r, rival) for rival in rivals)))
    return lines


def in_markdown(table: Callable[[], scaling.Cells]) -> Callable[[], list[str]]:
    def lines() -> list[str]:
        first, *others = table()
        return head(*first) + [row(*cells) for cells in others]

    return lines


TABLES = {
    "summary": summary,
    "align": align,
    "layers": layers,
    "steps": steps,
    "machine_code": machine_code,
    "models": in_markdown(scaling.models_table),
    "bytes": in_markdown(scaling.bytes_table),
    "communication": in_markdown(scaling.communication_table),
    "alignment": in_markdown(scaling.alignment_table),
}


def with_tables(text: str) -> str:
    """A document's text with current tables."""

    def renewed(place: re.Match[str]) -> str:
        name = place.group(1)
        return "\n".join((f"<!-- table of benchmarks/tables.py: {name} -->", "", *TABLES[name](), "", END))

    return PLACE.sub(renewed, text)


if __name__ == "__main__":
    for document in DOCUMENTS:
        document.write_text(with_tables(document.read_text()))
