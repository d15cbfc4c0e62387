"""python -m benchmarks.gpu_report.profile FOLDER: what ncu sees of the kernels, as FOLDER/kernels.json."""

import csv
import json
import pathlib
import re
import subprocess
import sys
from typing import Any

SECTIONS = ("SpeedOfLight", "Occupancy", "WarpStateStats", "LaunchStats")
# By name in the report: ncu's metric.
METRICS = {
    "time": "gpu__time_duration.sum",
    "DRAM %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    "occupancy %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "registers": "launch__registers_per_thread",
}
STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+)_per_issue_active\.ratio")


def command(log: pathlib.Path) -> list[str]:
    """The second forward and backward; clocks as they are."""
    sections = [part for name in SECTIONS for part in ("--section", name)]
    chosen = ["--kernel-name", "regex:align_.*_kernel", "--launch-skip", "2", "--launch-count", "2"]
    output = ["--csv", "--page", "raw", "--log-file", str(log), "--clock-control", "none"]
    asked = ["--metrics", ",".join(METRICS.values())]
    return ["ncu", *output, *sections, *asked, *chosen, sys.executable, "-m", "benchmarks.gpu_report.one_launch"]


def kernels(text: str) -> list[dict[str, Any]]:
    """From ncu's raw CSV: names, units, then a row for each launch. Stalls: warps that wait, for each that issues."""
    rows = list(csv.DictReader(line for line in text.splitlines() if line.startswith('"')))
    if len(rows) < 2:
        return []
    units, *launches = rows
    found = []
    for row in launches:
        values = {name: f"{row[m]} {units[m]}".removesuffix(" %").strip() for name, m in METRICS.items() if row.get(m)}
        stalls = {
            match[1]: float(row[m].replace(",", "")) for m in row if m and (match := STALL.fullmatch(m)) and row[m]
        }
        largest = dict(sorted(stalls.items(), key=lambda item: -item[1])[:5])
        found.append({"kernel": re.sub(r"[<(].*", "", row["Kernel Name"]), **values, "stalls": largest})
    return found


def main() -> None:
    folder = pathlib.Path(sys.argv[1])
    log = folder / "ncu.csv"
    done = subprocess.run(command(log))
    text = log.read_text(errors="replace") if log.exists() else ""
    if not (found := kernels(text)):
        said = [line for line in text.splitlines() if line.startswith("==ERROR==")]
        raise SystemExit(f"ncu gave no metrics: {said[-1] if said else f'exit code {done.returncode}'}")
    (folder / "kernels.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(found)} launches")


if __name__ == "__main__":
    main()
