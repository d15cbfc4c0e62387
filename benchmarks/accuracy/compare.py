"""Whether repeated runs agree with the committed records.

A repeated run is to lie in the prediction interval of the records of its setting (all that makes a run but the seed):

    mean ± t * s * sqrt(1 + 1/seeds)

with s pooled over the settings of one experiment, network and batch size. All intervals together hold with CONFIDENCE.
"""

import math
import pathlib
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from . import logs
from .config import Run
from .experiments import EXPERIMENTS
from .logs import Record
from .measured import error, run_of

CONFIDENCE = 0.99


@dataclass(frozen=True)
class Comparison:
    run: Run
    value: float
    low: float
    high: float

    @property
    def agrees(self) -> bool:
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        found = "" if self.agrees else ", outside"
        return f"{self.run.name}: {self.value:.3g}, expected {self.low:.3g} to {self.high:.3g}{found}"


def value(record: Record) -> float:
    """The error in percent; where nothing is trained, the decades by which the variance of the activations changes."""
    if record["epochs"]:
        return error(record)
    first, *_, last = record["start_variance"]
    return math.log10(max(last, 1e-300) / first)


def comparisons(repeated: Sequence[Record], committed: Sequence[Record]) -> list[Comparison]:
    """Of the repeated runs whose setting was committed with at least two seeds."""
    settings: dict[Run, list[float]] = defaultdict(list)
    for record in committed:
        settings[run_of(record).but(seed=0)].append(value(record))
    groups: dict[tuple[str, str, int], list[list[float]]] = defaultdict(list)
    for run, values in settings.items():
        groups[run.experiment, run.network, run.batch].append(values)
    known = [(r, run_of(r)) for r in repeated if len(settings.get(run_of(r).but(seed=0), ())) > 1]
    found = []
    for record, run in known:
        values, group = settings[run.but(seed=0)], groups[run.experiment, run.network, run.batch]
        freedom = sum(len(each) - 1 for each in group)
        deviation = math.sqrt(sum(float(np.var(each)) * len(each) for each in group) / freedom)
        t = float(stats.t.ppf(1 - (1 - CONFIDENCE) / 2 / len(known), freedom))
        # One test image more or less may be rounding.
        half = t * deviation * math.sqrt(1 + 1 / len(values)) + 100 / (run.test_images or 100)
        found.append(Comparison(run, value(record), float(np.mean(values)) - half, float(np.mean(values)) + half))
    return found


def of_folders(repeated: pathlib.Path, committed: pathlib.Path) -> list[Comparison]:
    """ValueError if nothing can be compared."""
    records = [[r for name in EXPERIMENTS for r in logs.read(folder, name)] for folder in (repeated, committed)]
    found = comparisons(*records)
    if not found:
        raise ValueError(f"no run in {repeated} has a setting with several seeds in {committed}")
    return found
