"""The records of finished runs: a file for each experiment, a line for each run."""

import json
import pathlib
from collections.abc import Sequence

from .. import report
from ..report import Record
from .config import Run

LOGS = pathlib.Path(__file__).parent / "logs"


def read(folder: pathlib.Path, experiment: str) -> list[Record]:
    path = folder / f"{experiment}.jsonl"
    return report.read(path) if path.exists() else []


def add(folder: pathlib.Path, record: Record) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{record['run']['experiment']}.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def pending(folder: pathlib.Path, runs: Sequence[Run]) -> list[Run]:
    """Those without a record."""
    done = {Run.from_json(record["run"]) for name in {run.experiment for run in runs} for record in read(folder, name)}
    return [run for run in runs if run not in done]
