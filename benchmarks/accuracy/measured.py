"""Quantities from records, with 95 % intervals over seeds (Student's t; differences are paired by seed)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from .config import Run
from .logs import Record

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float | None  # None: from a single seed
    high: float | None
    seeds: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:.1f}"
        return f"{self.mean:.1f} ± {(self.high - self.low) / 2:.1f}"

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies on that side of 0; 0 if that is open."""
        if self.low is None or self.high is None:
            return 0
        return int(self.low > 0) - int(self.high < 0)


def estimate(values: Sequence[float]) -> Estimate:
    mean, count = float(np.mean(values)), len(values)
    if count < 2:
        return Estimate(mean, None, None, count)
    half = float(stats.sem(values) * stats.t.ppf((1 + CONFIDENCE) / 2, count - 1))
    return Estimate(mean, mean - half, mean + half, count)


def run_of(record: Record) -> Run:
    return Run.from_json(record["run"])


def error(record: Record) -> float:
    """In percent, after the last epoch."""
    return 100 * record["epochs"][-1]["error"]


def error_shifted(record: Record) -> float:
    """In percent, the mean over the other domains."""
    return 100 * float(np.mean(list(record["shifts"].values())))


class Table:
    """The values of some records by seed, for each choice of the runs' fields."""

    def __init__(self, records: Sequence[Record], value: Callable[[Record], float] = error) -> None:
        self.pairs = [(run_of(record), value(record)) for record in records]

    def by_seed(self, **fields: object) -> dict[int, float]:
        return {run.seed: v for run, v in self.pairs if all(getattr(run, k) == wanted for k, wanted in fields.items())}

    def mean(self, **fields: object) -> Estimate | None:
        found = self.by_seed(**fields)
        return estimate(list(found.values())) if found else None

    def difference(self, a: dict[str, object], b: dict[str, object]) -> Estimate | None:
        """a - b."""
        return paired(self.by_seed(**a), self.by_seed(**b))


def paired(a: dict[int, float], b: dict[int, float]) -> Estimate | None:
    """a - b, over the seeds that both have; None if there is none."""
    differences = less(a, b)
    return estimate(list(differences.values())) if differences else None


def less(a: dict[int, float], b: dict[int, float]) -> dict[int, float]:
    """a - b for each seed that both have."""
    return {seed: value - b[seed] for seed, value in a.items() if seed in b}
