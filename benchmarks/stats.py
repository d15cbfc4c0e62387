"""Summaries of samples: quantiles, geometric mean, bootstrap interval of a ratio of medians."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians with its 95 % bootstrap interval."""

    ratio: float
    low: float
    high: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


def quantiles(samples: Sequence[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantile."""
    p20, p50, p80 = np.quantile(np.asarray(samples), (0.2, 0.5, 0.8))
    return float(p20), float(p50), float(p80)


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The samples as fields of a record."""
    p20, p50, p80 = quantiles(samples)
    return {"p20": p20, "p50": p50, "p80": p80, "samples": len(samples)}


def median_ratio(numerator: Sequence[float], denominator: Sequence[float], resamples: int = 2000) -> Ratio:
    """median(numerator) / median(denominator). Samples were taken in turn, so rounds are resampled as pairs."""
    above, below = np.asarray(numerator), np.asarray(denominator)
    if above.shape != below.shape or above.ndim != 1 or above.size == 0:
        raise ValueError(f"expected two equally long lists of samples, got {above.shape} and {below.shape}")
    rounds = np.random.default_rng(0).integers(above.size, size=(resamples, above.size))
    ratios = np.median(above[rounds], axis=1) / np.median(below[rounds], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    return Ratio(float(np.median(above) / np.median(below)), float(low), float(high))


def geometric_mean(values: Sequence[float]) -> float:
    return float(np.exp(np.mean(np.log(np.asarray(values)))))
