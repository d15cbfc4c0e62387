"""Summaries of samples: quantiles, and the ratio of two medians with its bootstrap interval."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

try:
    from scipy.stats import bootstrap
except ImportError:  # then ratios have no interval
    bootstrap = None


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


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], resamples: int = 2000) -> Ratio:
    """median(numerator) / median(denominator), with a 95 % interval. Samples were taken in turn, so rounds are
    resampled as pairs."""
    above, below = in_rounds(numerator, denominator)
    return _ratio(above, below, paired=True, n_resamples=resamples)


def median_ratio_of_runs(numerator: Sequence[float], denominator: Sequence[float], confidence: float) -> Ratio:
    """The same of samples from two runs, of which each is resampled by itself."""
    return _ratio(np.asarray(numerator), np.asarray(denominator), n_resamples=10_000, confidence_level=confidence)


def _ratio(above: Any, below: Any, **options: Any) -> Ratio:
    ratio = float(np.median(above) / np.median(below))
    if bootstrap is None or min(above.size, below.size) == 1:
        return Ratio(ratio)

    def statistic(above: Any, below: Any, axis: int) -> Any:
        return np.median(above, axis=axis) / np.median(below, axis=axis)

    random = np.random.default_rng(0)
    found = bootstrap((above, below), statistic, vectorized=True, method="percentile", rng=random, **options)
    return Ratio(ratio, float(found.confidence_interval.low), float(found.confidence_interval.high))


def in_rounds(*samples: Sequence[float]) -> list[Any]:
    """As arrays with one value for each round."""
    arrays = [np.asarray(each) for each in samples]
    if len({array.shape for array in arrays}) != 1 or arrays[0].ndim != 1 or arrays[0].size == 0:
        raise ValueError(f"expected equally long lists of samples, got {[array.shape for array in arrays]}")
    return arrays
