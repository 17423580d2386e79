"""Figures with their intervals: within one run, over seeds, and as ratios with a verdict.

All figures here are positive (times, iterations), so every interval is built on the log scale. Lower is better.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

WITHIN_RUN = "block bootstrap within this run, says nothing of other seeds"
POINTS_ONLY = "points only: two seeds"
NO_INTERVAL: Literal["no interval"] = "no interval"

Verdict = Literal["faster", "slower", "not distinguishable", "no interval"]


@dataclass(frozen=True)
class Missing:
    """A figure that could not be measured. `reason` is what a table prints in its place."""

    reason: str

    def to_dict(self) -> dict[str, Any]:
        return {"reason": self.reason}


@dataclass(frozen=True)
class Interval:
    """A positive figure and what is known of its spread.

    `value`: the estimate (one run), or the geometric mean over seeds. `low`, `high`: bounds in the same unit, None
    where no interval is given. `kind`: where the bounds come from, or why there are none. `points`: the
    single seeds' values, empty for one run.
    """

    value: float
    low: float | None
    high: float | None
    kind: str
    points: tuple[float, ...] = ()

    @property
    def log_half_width(self) -> float | None:
        """Half the interval's length in units of log(value); None without an interval."""
        if self.low is None or self.high is None:
            return None
        return 0.5 * math.log(self.high / self.low)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `figure_from_dict` is the inverse."""
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "kind": self.kind,
            "points": list(self.points),
        }


Figure = Interval | Missing


@dataclass(frozen=True)
class Ratio:
    """How many times the first figure is the second, with an interval (None: none) and a verdict on the first."""

    value: float
    low: float | None
    high: float | None
    verdict: Verdict
    kind: str

    def to_dict(self) -> dict[str, Any]:
        return {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "verdict": self.verdict,
            "kind": self.kind,
        }


def figure_from_dict(data: dict[str, Any]) -> Figure:
    """Read back what `Interval.to_dict` or `Missing.to_dict` wrote."""
    if "reason" in data:
        return Missing(data["reason"])
    return Interval(data["value"], data["low"], data["high"], data["kind"], tuple(data["points"]))


def from_draws(value: float, draws: NDArray[np.float64], confidence: float, least_half_width: float = 0.0) -> Interval:
    """Interval of a positive `value` from bootstrap `draws` (B,) of the same statistic.

    Deviations of the draws are laid around the estimate, on the log scale and to both sides alike: half the distance
    between the two tail quantiles. Alike, because the skew of a few hundred draws is itself too uncertain to
    help: ends of their own covered 1-3 points less in simulation.
    `least_half_width` (log scale): the half-width is never less, for statistics that move in jumps.
    Draws that are not positive and finite carry no figure (no valid decrease in that resample); with more
    than 20 % of them no interval is given.
    """
    usable = draws[np.isfinite(draws) & (draws > 0)]
    if usable.size < 0.8 * draws.size or usable.size < 20:
        return Interval(value, None, None, f"{NO_INTERVAL}: undefined in over 20 % of the resamples")
    half = max(least_half_width, symmetric_half_width(usable, confidence))
    return Interval(value, value * math.exp(-half), value * math.exp(half), WITHIN_RUN)


def symmetric_half_width(draws: NDArray[np.float64], confidence: float) -> float:
    """Half the distance between the two tail quantiles of log draws; draws (B,) positive."""
    logs = np.sort(np.log(draws))
    # Order statistics (B + 1) p: with few draws the usual interpolated quantiles lie too far in.
    tail = (logs.size + 1) * (1 - confidence) / 2 - 1
    order = np.arange(logs.size)
    low, high = np.interp([tail, logs.size - 1 - tail], order, logs)
    return 0.5 * float(high - low)


def over_seeds(figures: Sequence[Figure | float], confidence: float = 0.95) -> Figure:
    """One figure from those of several seeds.

    One seed: its own figure, unchanged. Two: both points and their geometric mean, no interval. Three or more:
    geometric mean with Student's t on the logs. Seeds without a figure are left out and counted in `kind`
    ("over 3 of 4 seeds"); with none left the first reason stands. Values must be positive.
    """
    if not figures:
        raise ValueError("over_seeds needs at least one figure")
    found = [f for f in figures if not isinstance(f, Missing)]
    if not found:
        first = figures[0]
        assert isinstance(first, Missing)
        return first
    count = f"{len(found)} seeds" if len(found) == len(figures) else f"{len(found)} of {len(figures)} seeds"
    if len(found) == 1:
        return _single(found[0], None if len(figures) == 1 else count)
    points = tuple(f.value if isinstance(f, Interval) else float(f) for f in found)
    mean, half = _student_t(points, confidence)
    if len(points) == 2:
        kind = POINTS_ONLY if len(figures) == 2 else f"points only: {count}"
        return Interval(math.exp(mean), None, None, kind, points)
    return Interval(math.exp(mean), math.exp(mean - half), math.exp(mean + half), f"Student t over {count}", points)


def _single(figure: Interval | float, count: str | None) -> Interval:
    """A lone figure as it is; `count` ("1 of 3 seeds") is added to its kind when other seeds had none."""
    if not isinstance(figure, Interval):
        figure = Interval(float(figure), None, None, f"{NO_INTERVAL}: one value")
    if count is None:
        return figure
    return Interval(figure.value, figure.low, figure.high, f"{figure.kind} ({count})", figure.points)


def _student_t(values: Sequence[float], confidence: float) -> tuple[float, float]:
    """Mean of the logs and half-width of its Student-t interval (NaN-free; 0 for fewer than two values)."""
    from scipy import stats

    logs = np.log(np.asarray(values, dtype=float))
    mean = float(logs.mean())
    if logs.size < 2:
        return mean, 0.0
    quantile = float(stats.t.ppf(0.5 + confidence / 2, logs.size - 1))
    return mean, quantile * float(logs.std(ddof=1)) / math.sqrt(logs.size)


def ratio(a: Figure, b: Figure, confidence: float = 0.95) -> Ratio | Missing:
    """a / b of two independent rows' figures (same unit), and whether a is faster or slower than b.

    Three seeds or more on both sides: Welch's t on the logs (Welch 1947). One run on both: squared log
    half-widths add. One side of each kind: the same sum, from the intervals. A side without an interval (two seeds)
    gives the ratio with the verdict "no interval".
    """
    for figure in (a, b):
        if isinstance(figure, Missing):
            return figure
    assert isinstance(a, Interval)
    assert isinstance(b, Interval)
    center = math.log(a.value / b.value)
    if min(len(a.points), len(b.points)) >= 3:
        return _judged(center, _welch_half_width(a.points, b.points, confidence), "Welch t over seeds")
    if a.log_half_width is None or b.log_half_width is None:
        return Ratio(math.exp(center), None, None, NO_INTERVAL, "no interval on one of the two sides")
    kind = WITHIN_RUN if not (a.points or b.points) else "one side within one run, the other over seeds"
    return _judged(center, math.hypot(a.log_half_width, b.log_half_width), kind)


def ratio_of_rounds(a_rounds: Sequence[float], b_rounds: Sequence[float], confidence: float = 0.95) -> Ratio | Missing:
    """a / b from interleaved rounds: a_rounds[i] and b_rounds[i] were measured side by side (any one unit, > 0).

    Student's t on the paired log-ratios, so what slows a whole round down cancels. Missing below three rounds.
    Raises ValueError on unequal lengths.
    """
    if len(a_rounds) != len(b_rounds):
        raise ValueError(f"rounds must be paired: {len(a_rounds)} against {len(b_rounds)}")
    if len(a_rounds) < 3:
        return Missing(f"a ratio needs 3 rounds, there are {len(a_rounds)}")
    quotients = [x / y for x, y in zip(a_rounds, b_rounds, strict=True)]
    center, half = _student_t(quotients, confidence)
    return _judged(center, half, f"Student t over {len(quotients)} paired rounds")


def _welch_half_width(a: Sequence[float], b: Sequence[float], confidence: float) -> float:
    from scipy import stats

    logs = [np.log(np.asarray(side, dtype=float)) for side in (a, b)]
    variances = [float(x.var(ddof=1)) / x.size for x in logs]
    total = sum(variances)
    if total == 0:
        return 0.0
    dof = total**2 / sum(v**2 / (x.size - 1) for v, x in zip(variances, logs, strict=True))
    return float(stats.t.ppf(0.5 + confidence / 2, dof)) * math.sqrt(total)


def _judged(center: float, half: float, kind: str) -> Ratio:
    low, high = math.exp(center - half), math.exp(center + half)
    verdict: Verdict = "faster" if high < 1 else "slower" if low > 1 else "not distinguishable"
    return Ratio(math.exp(center), low, high, verdict, kind)
