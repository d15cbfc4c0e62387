"""Runs one after the other, with a progress bar and a record of each."""

import os
import pathlib
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist
from rich.console import Console

from .. import machine
from ..console import progress
from . import experiments, logs
from .config import Run
from .sources import processes, source
from .training import Place, train


def runs_of(names: Sequence[str], folder: pathlib.Path) -> list[Run]:
    """Of several experiments, seed by seed."""
    tuned = experiments.tuned(logs.read(folder, "tuning"))
    runs = [run for name in names for run in experiments.EXPERIMENTS[name](tuned)]
    return sorted(runs, key=lambda run: run.seed)


def run_all(runs: Sequence[Run], place: Place, folder: pathlib.Path, data: str, keep: bool = False) -> None:
    """Those that have no record yet. `data`: what the images are called in the records. `keep`: the trained networks,
    as checkpoints."""
    screen, todo = Console(quiet=processes()[0] > 0), logs.pending(folder, runs)
    screen.print(f"{len(todo)} of {len(runs)} runs are to be done", highlight=False)
    facts = machine.facts(place.device.type)
    with progress(screen) as bar:
        task = bar.add_task("", total=sum(run.epochs * len(source(run, place.data, place.device)) for run in todo))
        for run in todo:
            bar.update(task, description=run.name)
            begun = time.monotonic()
            result = train(run, place, lambda images: bar.advance(task, images))
            seconds = round(time.monotonic() - begun, 1)
            if processes()[0] == 0:
                logs.add(folder, {"run": run.to_json(), "data": data, **result, "seconds": seconds, "machine": facts})
                if not keep:
                    place.checkpoint(run).unlink()


def place(data: pathlib.Path, work: pathlib.Path, device: str) -> Place:
    """For this process: under torchrun it joins the others, with a GPU of its own."""
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
    index = int(os.environ.get("LOCAL_RANK", 0))
    return Place(data, work, torch.device("cuda", index) if device == "cuda" else torch.device("cpu"))
