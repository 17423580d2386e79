"""The masking diffusion scheduler: how the mask ratio grows over training (paper sec. 3.2.3, fig. 5). No torch.

Every schedule is a function of t = 0 ... T - 1, T the number of training steps; the harness counts its steps from 1,
so t = step - 1. Where the authors' code differs from the paper in the piecewise form (its second ramp lacks the
"- T/3" and climbs past 1), the paper is followed.

Beside the four named schedules there are a user's own: points (progress, ratio) with straight lines between them, or
a function of the progress, named as "module:function" or "file.py:function". A function is sampled once, when the
options are read, and the points stand in its place from then on: a run's record and identity hold the curve itself,
so that a changed function is another experiment and a finished run can be loaded without the function's file.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from lmd_bench.config import near
from lmd_bench.errors import ConfigError

MaskScheduleName = Literal["uniform", "piecewise", "cosine", "constant"]
Point = tuple[float, float]
"""(progress t / T in [0, 1], mask ratio in [0, 1))."""
MaskSchedule = MaskScheduleName | tuple[Point, ...]

FUNCTION_INTERVALS = 256
"""A user's function is sampled at the ends of so many equal parts of the run. Between them straight lines are off by
at most max|f''| / (8 x 256^2), far less than one token; a jump becomes a ramp over 0.4 % of the run."""

_COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, eq. 17
_ON_A_LINE = 1e-9  # a sampled point this close to its neighbours' line says nothing


def mask_ratio(schedule: MaskSchedule, step: int, total_steps: int, *, start: float, mid: float, end: float) -> float:
    """Mask ratio of step 1 ... `total_steps` under a schedule.

    The named ones go from `start` to `end`; `mid` is the plateau of `piecewise` and unused elsewhere; `constant` is
    `end` throughout. Points carry their own ratios and use none of the three. Raises ValueError for a step outside
    1 ... `total_steps`.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step must be in 1..{total_steps}, got {step}")
    t = step - 1
    if not isinstance(schedule, str):
        return points_ratio(schedule, t / total_steps)
    if schedule == "uniform":
        return start + (end - start) * t / total_steps
    if schedule == "piecewise":
        return piecewise_ratio(t, total_steps, start, mid, end)
    if schedule == "cosine":
        return cosine_ratio(t, total_steps, start, end)
    return end


def piecewise_ratio(t: float, total_steps: int, start: float, mid: float, end: float) -> float:
    """Ramp to `mid` over T/6, hold it to T/3, ramp to `end` over the next T/3, hold that to T (LMD-PS)."""
    sixth = total_steps / 6
    if t < sixth:
        return start + (mid - start) * t / sixth
    if t < 2 * sixth:
        return mid
    if t < 4 * sixth:
        return mid + (end - mid) * (t - 2 * sixth) / (2 * sixth)
    return end


def cosine_ratio(t: float, total_steps: int, start: float, end: float) -> float:
    """iDDPM's cosine curve turned over, up to 2T/3, then `end` (LMD-CS; the authors' engine_pretrain)."""
    rise_steps = int(2 * total_steps / 3)
    if rise_steps == 0 or t > 2 * total_steps / 3:
        return start if t == 0 else end

    def curve(u: float) -> float:
        return math.cos((u + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

    return min(end, start + (end - start) * (1 - curve(t / rise_steps) / curve(0.0)))


def points_ratio(points: Sequence[Point], progress: float) -> float:
    """The ratio at `progress` in [0, 1], on straight lines between `points`; at a jump, the ratio after it."""
    after = bisect_right(points, progress, key=lambda point: point[0])
    if after == len(points):
        return points[-1][1]
    (left, low), (right, high) = points[after - 1], points[after]
    return min(high, low + (high - low) * (progress - left) / (right - left))


# -- a user's own -----------------------------------------------------------------------------------------------------


def read_schedule(value: Any) -> MaskSchedule:
    """A schedule from what a suite says: a name, a list of points, or a function to be sampled.

    Raises ValueError saying what was wrong and where along the run.
    """
    if isinstance(value, str):
        if value in get_args(MaskScheduleName):
            return value  # type: ignore[return-value]  # a Literal, as just seen
        if ":" in value:
            return sample_schedule(load_function(value), value)
        raise ValueError(
            f"no schedule {value!r} (nor a list of [progress, ratio] points, module:function or file.py:function)"
            f"{near(value, get_args(MaskScheduleName))}"
        )
    return check_points(_as_points(value))


def _as_points(value: Any) -> tuple[Point, ...]:
    if not isinstance(value, Sequence):
        raise ValueError(f"a schedule is a name, a list of [progress, ratio] points or module:function, got {value!r}")
    for number, point in enumerate(value, start=1):
        fits = isinstance(point, Sequence) and not isinstance(point, str) and len(point) == 2
        if not fits or not all(_is_number(part) for part in point):
            raise ValueError(f"point {number} must be two numbers [progress, ratio], got {point!r}")
    return tuple((float(progress), float(ratio)) for progress, ratio in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_points(points: tuple[Point, ...], what: str = "the schedule") -> tuple[Point, ...]:
    """`points` as they are.

    Raises ValueError unless they lead from progress 0 to 1, never back, with ratios in [0, 1) that never fall. Two
    points of the same progress are a jump.
    """
    if len(points) < 2 or points[0][0] != 0.0 or points[-1][0] != 1.0:
        ends = f"from {points[0][0]:g} to {points[-1][0]:g}" if points else "no points"
        raise ValueError(f"{what} must have points from progress 0 to progress 1, got {ends}")
    for progress, ratio in points:
        if not 0 <= ratio < 1:
            raise ValueError(f"{what} has the mask ratio {ratio:g} at progress {progress:g}; ratios lie in [0, 1)")
    for (left, low), (right, high) in pairwise(points):
        if right < left:
            raise ValueError(f"{what} goes back from progress {left:g} to {right:g}; points stand in order")
        if high < low:
            raise ValueError(
                f"{what} falls from a mask ratio of {low:g} at progress {left:g} to {high:g} at {right:g}; "
                f"it may only rise"
            )
    if points[-2][0] == 1.0:
        raise ValueError(f"{what} jumps at progress 1, which no step reaches; leave its last point out")
    return points


def load_function(target: str) -> Callable[[float], Any]:
    """The function that "module:function" or "file.py:function" names. Raises ValueError where there is none."""
    place, _, name = target.rpartition(":")
    if not place or not name.isidentifier():
        raise ValueError(f"{target!r}: write it as module:function or file.py:function")
    if place.endswith(".py") and not Path(place).expanduser().is_file():
        raise ValueError(f"{target!r}: no file {place}")
    try:
        module = _module_of_file(place) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # the user's own code: whatever it raises is the user's to see, in one line
        raise ValueError(f"{target!r}: importing {place} failed: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        names = [key for key, found in vars(module).items() if callable(found) and not key.startswith("_")]
        raise ValueError(f"{target!r}: {place} has no function {name}{near(name, names)}")
    return function  # type: ignore[no-any-return]


def _module_of_file(place: str) -> Any:
    path = Path(place).expanduser()
    spec = importlib.util.spec_from_file_location(f"lmd_bench_schedule_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # noqa: PT018  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # what the file defines may look its own module up, as dataclasses do
    spec.loader.exec_module(module)
    return module


def sample_schedule(function: Callable[[float], Any], name: str) -> tuple[Point, ...]:
    """A function of the progress as points. Raises ValueError where it fails, leaves [0, 1) or falls."""
    points = []
    for index in range(FUNCTION_INTERVALS + 1):
        progress = index / FUNCTION_INTERVALS
        try:
            ratio = function(progress)
        except Exception as error:  # the user's own code, as above
            raise ValueError(f"{name} failed at progress {progress:g}: {type(error).__name__}: {error}") from error
        try:
            ratio = float(ratio)
        except (TypeError, ValueError):
            raise ValueError(f"{name} must return a number, got {ratio!r} at progress {progress:g}") from None
        points.append((progress, ratio))
    return _without_points_on_lines(check_points(tuple(points), name))


def _without_points_on_lines(points: tuple[Point, ...]) -> tuple[Point, ...]:
    """Equally spaced points without those that lie on the line through their two neighbours."""
    inner = [
        point
        for before, point, after in zip(points, points[1:], points[2:], strict=False)
        if abs(before[1] + after[1] - 2 * point[1]) > _ON_A_LINE
    ]
    return (points[0], *inner, points[-1])


# -- tokens -----------------------------------------------------------------------------------------------------------


def num_kept(num_tokens: int, ratio: float) -> int:
    """Visible tokens at a mask ratio: int(L * (1 - r)) as in the authors' code.

    At least one token stays visible and one hidden, or there would be nothing to encode or to predict.
    """
    return max(1, min(num_tokens - 1, int(num_tokens * (1 - ratio))))


def schedule_range(schedule: MaskSchedule, *, start: float, end: float) -> Point:
    """The smallest and the largest mask ratio of a schedule, which are its first and its last."""
    if not isinstance(schedule, str):
        return schedule[0][1], schedule[-1][1]
    return (end if schedule == "constant" else start), end


def check_leaves_tokens(num_tokens: int, ratio: float, option: str) -> None:
    """Raise ConfigError where a mask ratio, set by `option`, leaves none of the tokens visible."""
    if int(num_tokens * (1 - ratio)) < 1:
        raise ConfigError(
            f"{option}: a mask ratio of {ratio:g} leaves none of {num_tokens} tokens visible; "
            f"stay below {1 - 1 / num_tokens:.4g}, or use smaller tokens (patch_size)"
        )


def mask_levels(num_tokens: int, start: float, end: float) -> range:
    """The numbers of visible tokens that a schedule walks through, from most to fewest.

    One less than its length is the number of transitions, the paper's "diffusion steps": 29 for 49 tokens from 0.15
    to 0.75 (Table 3), 38 for 64, 117 for 196, 9 for 16.
    """
    return range(num_kept(num_tokens, start), num_kept(num_tokens, end) - 1, -1)
