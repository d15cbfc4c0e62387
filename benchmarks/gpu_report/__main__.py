"""Runs the steps and writes the report after each."""

import argparse
import pathlib
import re
import time
from dataclasses import replace

import torch

from .. import machine
from ..console import Console
from . import __doc__ as about
from . import page
from .running import run
from .steps import steps

DEFAULT_MINUTES = 9.5


def main() -> None:
    every = {step.name: step for step in steps()}
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=machine.ROOT / "benchmarks/results", help="parent folder")
    parser.add_argument(
        "--minutes", type=float, default=DEFAULT_MINUTES, help="for all; more lengthens each step (default: 9.5)"
    )
    parser.add_argument("--steps", nargs="+", choices=every, default=every, help="only these; others stay as they were")
    arguments = parser.parse_args()
    end, patience = time.monotonic() + 60 * arguments.minutes, max(1.0, arguments.minutes / DEFAULT_MINUTES)
    if not torch.cuda.is_available():
        raise SystemExit(f"the report is about a GPU, and torch {torch.__version__} sees no CUDA device")
    facts, console = machine.facts("cuda"), Console()
    folder = arguments.out.absolute() / re.sub(r"[^a-z0-9]+", "-", facts["gpu"].lower()).strip("-")
    report = page.Report.of(folder, facts, is_new=len(arguments.steps) == len(every))
    for name in (each for each in every if each in arguments.steps):
        step = replace(every[name], limit=patience * every[name].limit)
        console.print(f"{name}: {step.about}, within {step.limit:.0f} s", highlight=False)
        report.outcomes[name] = outcome = run(step, folder / name, end - time.monotonic())
        console.print(f"  {outcome.state}, {outcome.seconds:.0f} s: {outcome.note}", highlight=False, soft_wrap=True)
        report.write()
    console.print(f"wrote {folder / 'report.md'}: {report.summary}", highlight=False, soft_wrap=True)
    raise SystemExit(report.is_bad)


if __name__ == "__main__":
    main()
