"""Means, paired differences and their intervals: Student's t, two-sided, 95 %."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values, and how far to each side the interval reaches; infinitely far for a single value."""

    mean: float
    half_width: float
    n: int

    @property
    def low(self) -> float:
        """The lower end."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """The upper end."""
        return self.mean + self.half_width

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


def confidence_interval(values: Sequence[float]) -> Interval:
    """In which the mean of many more values lies."""
    return _interval(values, lambda n: math.sqrt(1 / n))


def prediction_interval(values: Sequence[float]) -> Interval:
    """In which one new value lies."""
    return _interval(values, lambda n: math.sqrt(1 + 1 / n))


def _interval(values: Sequence[float], scale: Callable[[int], float]) -> Interval:
    n = len(values)
    if n < 2:
        return Interval(statistics.fmean(values), math.inf, n)
    quantile = float(student.ppf((1 + CONFIDENCE) / 2, n - 1))
    return Interval(statistics.fmean(values), quantile * statistics.stdev(values) * scale(n), n)


def paired_difference(ours: Mapping[int, float], baseline: Mapping[int, float]) -> Interval | None:
    """The mean difference over the seeds that both have, with its confidence interval; None where there are none."""
    differences = [ours[seed] - baseline[seed] for seed in sorted(ours.keys() & baseline.keys())]
    return confidence_interval(differences) if differences else None


def verdict(difference: Interval, claim: int) -> str:
    """One word, or three.

    Args:
        claim: +1, the difference is positive; -1, negative; 0, nothing is claimed.

    Returns:
        with a claim "holds", "does not hold" (the interval lies on the other side of 0) or "not resolved" (0 is in
        it); without one "higher", "lower" or "not resolved".
    """
    if 0 in difference:
        return "not resolved"
    sign = 1 if difference.mean > 0 else -1
    if claim == 0:
        return "higher" if sign > 0 else "lower"
    return "holds" if sign == claim else "does not hold"
