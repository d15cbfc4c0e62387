"""python -m benchmarks.machine_code: the compiled CUDA kernels judged without a GPU.

Registers, spills and sizes of each kernel; instructions a value; and the time of networks' launches and of inputs,
float32 to bfloat16, by a model of four chips. It executes the machine code of sm_90, which on an A100 and a B200 stands
in for that of sm_80 and sm_100. Several libraries are compared side by side. Needs cuobjdump, g++ and CUDA's headers;
with nvcc, the model also runs a flat cast and a flat add, which on a GPU reach the copy rate.
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Sequence

from weightalign_cuda.ops import native_library

from ..console import Console, Printed, table
from . import flat
from .report import DIRECTIONS, OTHER_NETWORKS, OWN_CHIPS, Report, flat_report, full_report, static_report

STATIC = ("registers", "stack", "shared", "constant", "spill_loads", "spill_stores", "code_bytes")


def side_by_side(values: Sequence[str]) -> str:
    """One text if the libraries agree."""
    return values[0] if len(set(values)) == 1 else " | ".join(values)


def static_table(reports: Sequence[Report]) -> Printed:
    found = [{(f["architecture"], f["kernel"]): f for f in report["static"]} for report in reports]
    rows = []
    for key in dict.fromkeys(key for figures in found for key in figures):
        cells = (side_by_side([str(f[key][name]) if key in f else "-" for f in found]) for name in STATIC)
        rows.append([f"sm_{key[0]} {key[1]}", *cells])
    return table("Kernels; sizes in bytes", ["kernel", *(name.replace("_", " ") for name in STATIC)], rows)


def instructions_table(reports: Sequence[Report], what: str) -> Printed:
    found = [{row["n"]: row for row in report["instructions_per_value"]} for report in reports]
    rows = []
    for n in found[0]:
        cells = (side_by_side([f"{rows[n][direction]:.1f}" for rows in found]) for direction in DIRECTIONS)
        rows.append(["all" if n is None else str(n), *cells])
    title = f"Instructions of threads a value, sm_90, float32 to bfloat16, {what}"
    return table(title, ["n", *DIRECTIONS], rows)


def prediction_table(
    reports: Sequence[Report], what: str, flat_fractions: dict[str, dict[str, float]] | None
) -> Printed:
    rows = []
    for name in reports[0]["predicted"]:
        predicted = [report["predicted"][name] for report in reports]
        times = (side_by_side([f"{p[f'{d}_us']:.1f}" for p in predicted]) for d in DIRECTIONS)
        shares = (side_by_side([f"{p[f'{d}_copy_fraction']:.1%}" for p in predicted]) for d in DIRECTIONS)
        rows += [[f"{name}: us", *times], [f"{name}: of the copy rate", *shares]]
        slots = (side_by_side([f"{p[f'{d}_issue_slots_used']:.0%}" for p in predicted]) for d in DIRECTIONS)
        rows.append([f"{name}: issue slots used", *slots])
        if flat_fractions:
            cells = (f"{flat_fractions[name][f'{d}_copy_fraction']:.1%}" for d in DIRECTIONS)
            rows.append([f"{name}: flat cast, flat add", *cells])
    over = (side_by_side([f"{r['bytes_over_floor'][d]:.3f}" for r in reports]) for d in DIRECTIONS)
    launches = (side_by_side([str(r["launches"][d]) for r in reports]) for d in DIRECTIONS)
    rows += [["bytes over the floor", *over], ["launches", *launches]]
    return table(f"{what} in the model of the chip", ["", *DIRECTIONS], rows)


def inputs_table(reports: Sequence[Report]) -> Printed:
    rows = []
    for each in zip(*(report["inputs"] for report in reports), strict=True):
        for figure, form in (
            ("instructions_per_value", "{:.1f} instructions a value"),
            *((f"copy_fraction_{where.name}", f"{where.name}: {{:.1%}} of the copy rate") for where in OWN_CHIPS),
        ):
            cells = (side_by_side([form.format(row[f"{d}_{figure}"]) for row in each]) for d in DIRECTIONS)
            rows.append([each[0]["input"], *cells])
    return table("A convolution's input, float32 to bfloat16 in channels_last", ["input", *DIRECTIONS], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", type=pathlib.Path, help="default: the package's own")
    parser.add_argument("--static", action="store_true", help="only what needs no run")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out/machine-code.json"))
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 132)  # in a file, wide enough for all columns
    libraries = options.libraries or [native_library.PATH]
    reports = [(static_report if options.static else full_report)(path.resolve()) for path in libraries]
    console.print(static_table(reports))
    if not options.static:
        flat_fractions = flat_report() if flat.has_compiler() else None
        reports = [report | {"flat": flat_fractions} for report in reports]
        parts = {
            "ResNet-50, one layout": reports,
            "ResNet-50, contiguous to channels_last": [report["channels_last"] for report in reports],
            **{name: [report["networks"][name] for report in reports] for name in OTHER_NETWORKS},
        }
        for what, found in parts.items():
            console.print(instructions_table(found, what))
            console.print(prediction_table(found, what, flat_fractions))
        console.print(inputs_table(reports))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(reports[0] if len(reports) == 1 else reports, indent=1) + "\n")
    console.print(f"wrote {options.out}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
