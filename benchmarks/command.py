"""What the benchmark commands share: options, the choice of cases, and the run with its file of records."""

import argparse
import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch

import weightalign_cuda as wa

from . import machine
from .console import Console, one_line

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


class Run:
    """A run of a benchmark. Records are written case by case: a run that is cut leaves what it has measured."""

    def __init__(self, device: str, path: pathlib.Path) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise SystemExit("torch sees no CUDA device")
        self.console, self.facts, self.path = Console(), machine.facts(device), path
        self.records: list[dict[str, Any]] = []
        self.left_out: list[str] = []
        self.failed: list[str] = []
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")
        self.console.print(f"{machine.label(self.facts)}; backends: {wa.backends()}", highlight=False)
        if machine.is_simulated(self.facts):
            self.console.print(
                "[yellow]A simulated device: its times mean nothing, and no document takes them.[/yellow]"
            )

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """One record per line."""
        others = {"others_busy": machine.others_busy()}
        new = [{**record, **self.facts, **others} for record in records]
        self.records += new
        with self.path.open("a") as file:
            file.writelines(json.dumps(record) + "\n" for record in new)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """A case that fails is named, and the others still run."""
        try:
            yield
        except Exception as failure:
            self.failed.append(f"{name}: {one_line(failure)}")
            self.console.print(f"[red]failed: {self.failed[-1]}[/red]", highlight=False)

    def end(self, *plots: pathlib.Path) -> None:
        """Says what was written, and what speaks against it; exits with 1 if a case failed."""
        busy = machine.others_busy()
        if busy is None or busy > QUIET:
            seen = "cannot be seen here" if busy is None else f"was {busy} processors"
            warning = f"What other programs took meanwhile {seen}: repeat on a quiet machine."
            self.console.print(f"[yellow]{warning}[/yellow]")
        self.console.print("wrote " + ", ".join(map(str, (self.path, *plots))), highlight=False)
        if self.failed:
            raise SystemExit("\n".join(f"failed: {each}" for each in self.failed))
