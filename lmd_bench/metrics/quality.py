"""Time to a stated quality: TTQ on the common reconstruction yardstick, and MAT of fine-tuning.

Both count training seconds only; evaluation is off the clock. A target that is never reached is a censored
observation, never a number.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal, NamedTuple

from lmd_bench.errors import ConfigError
from lmd_bench.metrics.intervals import Missing

ABOVE_CEILING = "above its projector's ceiling"
BELOW_FLOOR = "below what its projector reaches"
NO_INCREASE = "no increase"

TTQState = Literal["reached", "not confirmed", "not reached", "above ceiling"]


class QualityCheck(NamedTuple):
    """One check of the yardstick: steps and training seconds so far, and what was measured: PSNR in dB, or LPIPS."""

    step: int
    train_seconds: float
    value: float


@dataclass(frozen=True)
class TargetRule:
    """A target as a share of what a reference method gains: value_0 + fraction (value_best - value_0).

    fraction: in (0, 1]. of: name of the reference row, whose first check is that of the untrained model.
    """

    fraction: float
    of: str


@dataclass(frozen=True)
class TTQ:
    """Time until a target was first reached and still held at the next check.

    state: "reached"; "not confirmed" (only the last check reaches it); "not reached"; "above ceiling" (the row's
    projector cannot show it). seconds: training seconds at the confirming stretch's first check, None unless
    reached or not confirmed. after_seconds: the check before it, so the true time lies in (after_seconds, seconds];
    None if that check was the first. observed_seconds: where the checks end. lower_is_better: of LPIPS.
    """

    target: float
    state: TTQState
    seconds: float | None
    after_seconds: float | None
    observed_seconds: float
    lower_is_better: bool = False

    @property
    def text(self) -> str:
        """What a table cell says."""
        if self.state == "above ceiling":
            return BELOW_FLOOR if self.lower_is_better else ABOVE_CEILING
        if self.seconds is None:
            return f"not reached in {self.observed_seconds:.4g} s"
        lower = "start" if self.after_seconds is None else f"{self.after_seconds:.4g}"
        bracket = f"{self.seconds:.4g} s ({lower} to {self.seconds:.4g})"
        return bracket if self.state == "reached" else f"{bracket}, last check, not confirmed"

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TTQ:
        return cls(**data)


@dataclass(frozen=True)
class TTQOverSeeds:
    """TTQ of several seeds: how many reached the target, and the median with misses as infinite.

    median_seconds: None where the median itself is a miss. points: seconds of each seed, None for a miss.
    """

    num_reached: int
    num_seeds: int
    median_seconds: float | None
    points: tuple[float | None, ...]

    @property
    def text(self) -> str:
        """What a table cell says, such as "41.2 s (2 of 3 reached)"."""
        value = "not reached" if self.median_seconds is None else f"{self.median_seconds:.4g} s"
        return f"{value} ({self.num_reached} of {self.num_seeds} reached)"

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "points": list(self.points)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> TTQOverSeeds:
        return cls(**{**data, "points": tuple(data["points"])})


def parse_target(value: object, where: str = "target") -> TargetRule | float:
    """A target from a suite file: a PSNR in dB, or {fraction: 0.9, of: mae}.

    `where` is the place named in errors. Raises ConfigError on anything else.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise ConfigError(f"{where}: {value} is no PSNR; give a finite number of dB")
        return float(value)
    if not isinstance(value, dict) or set(value) != {"fraction", "of"}:
        raise ConfigError(f"{where}: {value!r} is no target; give a PSNR in dB or {{fraction: 0.9, of: mae}}")
    fraction, of = value["fraction"], value["of"]
    if isinstance(fraction, bool) or not isinstance(fraction, (int, float)) or not 0 < fraction <= 1:
        raise ConfigError(f"{where}.fraction: {fraction!r} must be a number above 0 and at most 1")
    if not isinstance(of, str) or not of:
        raise ConfigError(f"{where}.of: {of!r} must name a row of the suite")
    return TargetRule(float(fraction), of)


def resolve_target(
    rule: TargetRule | float, reference_checks: Sequence[QualityCheck], *, lower_is_better: bool = False
) -> float | Missing:
    """The target in the checks' own unit. Missing where the reference has no checks or never got better than untrained.

    lower_is_better: true for LPIPS, whose gain is a fall.
    """
    if not isinstance(rule, TargetRule):
        return rule
    if not reference_checks:
        return Missing(f"the reference {rule.of} has no checks")
    start = reference_checks[0]
    if start.step != 0:
        return Missing(f"the reference {rule.of} has no check before its first step")
    best = (min if lower_is_better else max)(check.value for check in reference_checks)
    change = best - start.value
    if change == 0:  # the start is among the checks, so that nothing can be worse than it
        return Missing(f"the reference {rule.of} never got better than untrained")
    return start.value + rule.fraction * change


def ttq(
    checks: Sequence[QualityCheck], target: float, ceiling: float | None = None, *, lower_is_better: bool = False
) -> TTQ:
    """Time to quality of one run.

    checks: in order of training time, at least one. target: in their unit. ceiling: what the row's projector
    alone reaches, None for pixels. lower_is_better: true for LPIPS: target and ceiling are then reached from above.
    Raises ValueError without checks or with checks out of order.
    """
    if not checks:
        raise ValueError("ttq needs at least one check")
    times = [check.train_seconds for check in checks]
    if any(later < earlier for earlier, later in pairwise(times)):
        raise ValueError("checks must be in order of training time")
    end = times[-1]
    reached = operator.le if lower_is_better else operator.ge
    if ceiling is not None and not reached(ceiling, target):
        return TTQ(target, "above ceiling", None, None, end, lower_is_better)
    good = [reached(check.value, target) for check in checks]
    held = (i for i in range(len(good) - 1) if good[i] and good[i + 1])
    index = next(held, None)
    if index is None and not good[-1]:
        return TTQ(target, "not reached", None, None, end, lower_is_better)
    state: TTQState = "not confirmed" if index is None else "reached"
    at = len(checks) - 1 if index is None else index
    return TTQ(target, state, times[at], times[at - 1] if at else None, end, lower_is_better)


def ttq_over_seeds(results: Sequence[TTQ]) -> TTQOverSeeds:
    """k of n reached, and the median with misses as infinite; a reach that is not confirmed is a miss.

    With an even number of seeds the median lies half-way between two, so one miss of two is a miss.
    """
    if not results:
        raise ValueError("ttq_over_seeds needs at least one result")
    points = tuple(r.seconds if r.state == "reached" else None for r in results)
    middle = median(math.inf if p is None else p for p in points)
    return TTQOverSeeds(
        sum(p is not None for p in points), len(points), middle if math.isfinite(middle) else None, points
    )


def mean_accuracy_increase_time(checks: Sequence[tuple[float, float]]) -> float | Missing:
    """MAT@k: training seconds of the fine-tuning per percentage point gained.

    checks: (train_seconds, top-k accuracy in percent) in order, the first before any step. The time is that of
    the whole fine-tuning, the gain that of its best check. No gain is "no increase".
    """
    if not checks:
        return Missing("no accuracy was measured")
    gain = max(accuracy for _, accuracy in checks) - checks[0][1]
    if gain <= 0:
        return Missing(NO_INCREASE)
    return (checks[-1][0] - checks[0][0]) / gain
