"""Summaries of samples: quantiles, and the ratio of two medians with its bootstrap interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

try:
    from scipy.stats import bootstrap
except ImportError:  # then ratios have no interval
    bootstrap = None

RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its bootstrap interval: None without scipy, or of a single sample."""

    ratio: float
    low: float | None = None
    high: float | None = None

    def to_json(self) -> dict[str, float | None]:
        return asdict(self)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantile."""
    p20, p50, p80 = np.quantile(np.asarray(samples), (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """The samples as fields of a record; each round, for benchmarks.compare."""
    p20, p50, p80 = quantiles(samples)
    return {"p20": p20, "p50": p50, "p80": p80, "samples": len(samples), "rounds": [float(f"{s:.5g}") for s in samples]}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], resamples: int = RESAMPLES) -> Ratio:
    """median(numerator) / median(denominator), with a 95 % interval. Samples were taken in turn, so rounds are
    resampled as pairs."""
    above, below = paired(numerator, denominator)
    ratio = float(np.median(above) / np.median(below))
    if bootstrap is None or above.size == 1:
        return Ratio(ratio)
    statistic = lambda a, b, axis: np.median(a, axis=axis) / np.median(b, axis=axis)  # noqa: E731
    options = {"n_resamples": resamples, "method": "percentile", "rng": np.random.default_rng(0)}
    interval = bootstrap((above, below), statistic, paired=True, vectorized=True, **options).confidence_interval
    return Ratio(ratio, float(interval.low), float(interval.high))


Paired = tuple[Sequence[float], Sequence[float]]  # samples of two things that took turns


def ratio_of_ratios(over: Paired, under: Paired, confidence: float) -> Ratio:
    """The ratio of medians in one run over that in another: rounds are resampled as pairs, runs apart."""
    runs = [paired(*over), paired(*under)]

    def of(run: list[Any], rounds: Any, axis: int) -> Any:
        chosen = [samples[rounds.astype(int)] for samples in run]
        return np.median(chosen[0], axis=axis) / np.median(chosen[1], axis=axis)

    def statistic(first: Any, second: Any, axis: int = -1) -> Any:
        return of(runs[0], first, axis) / of(runs[1], second, axis)

    rounds = [np.arange(run[0].size) for run in runs]
    ratio = float(statistic(*rounds))
    if bootstrap is None or min(map(len, rounds)) == 1:
        return Ratio(ratio)
    options = {"method": "percentile", "confidence_level": confidence, "rng": np.random.default_rng(0)}
    interval = bootstrap(rounds, statistic, vectorized=True, **options).confidence_interval
    return Ratio(ratio, float(interval.low), float(interval.high))


def paired(*samples: Sequence[float]) -> list[Any]:
    """As arrays of one value for each round."""
    arrays = [np.asarray(each) for each in samples]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or arrays[0].size == 0:
        raise ValueError(f"expected equally long lists of samples, got {[array.shape for array in arrays]}")
    return arrays
