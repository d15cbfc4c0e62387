"""What the benchmark commands share: options, the choice of cases, the progress bar, the file of records."""

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from . import machine

Case = TypeVar("Case")
QUIET = 0.05  # number of processors that other programs may use


def parser(doc: str | None, seconds: float, cases: str) -> argparse.ArgumentParser:
    """`seconds`: the default of --seconds; `cases`: what --only chooses from."""
    result = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--out", type=pathlib.Path, default=pathlib.Path("out"), help="folder (default: out)")
    result.add_argument("--only", help=f"just the cases whose name contains this: {cases}")
    result.add_argument("--rounds", type=int, default=30, help="samples of each provider (at least 10 if slow)")
    result.add_argument("--seconds", type=float, default=seconds, help="time for the rounds of one case")
    return result


def chosen(cases: Mapping[str, Case], only: str | None) -> list[Case]:
    """The cases whose name contains `only`."""
    kept = [case for name, case in cases.items() if only is None or only in name]
    if not kept:
        raise SystemExit(f"--only {only}: none of {', '.join(cases)}")
    return kept


def progress(console: Console) -> Progress:
    """Drawn once a second, because drawing takes time from the measurements."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    return Progress(*columns, TimeRemainingColumn(), console=console, refresh_per_second=1)


def write(records: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
    """Writes one record per line, and warns if the machine was not quiet."""
    busy = machine.others_busy()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record | {"others_busy": busy}) + "\n" for record in records))
    if busy is None or busy > QUIET:
        seen = "cannot be seen here" if busy is None else f"was {busy} processors"
        Console().print(f"[yellow]What other programs took meanwhile {seen}: repeat on a quiet machine.[/yellow]")
