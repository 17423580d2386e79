"""MIT, MLI and MLT of one run: mean iteration time, iterations per valid loss decrease, and their product.

Ma et al., "LMD: Faster Image Reconstruction with Latent Masking Diffusion" (arXiv 2312.07971), name these figures
without a public definition; what stands here is this project's, printed with every report. All three are counted
in one window, from the first measured step to t90, the first step at which the smoothed loss has made 90 % of
its drop, so MLT = MIT x MLI holds exactly. A "valid decrease" has four estimators, see `EstimatorConfig`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lmd_bench.metrics._bootstrap import AutoregressiveTrend, spline_design, token_design
from lmd_bench.metrics.intervals import (
    NO_INTERVAL,
    Figure,
    Interval,
    Missing,
    figure_from_dict,
    from_draws,
)

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    Array = NDArray[np.float64]

Estimator = Literal["relative", "fraction", "grid", "slope"]
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)

NO_DECREASE = "no valid decrease"
STILL_FALLING = "still falling: lower bound"

_MIN_STEPS_FOR_INTERVAL = 50
_LOSS_TREND_SPREAD = 0.5
"""Share of the fitted curve's own uncertainty that resamples of the loss carry. Chosen in simulation: at 150 steps
a 95 % interval of MLI covered 90-95 % with 0 and 93-98 % with 1; 0.5 keeps every case of the study inside."""
_MAX_ELEMENTS = 8_000_000  # of one chunk of resamples: 64 MB
_MAX_TOTAL_ELEMENTS = 40_000_000  # beyond it fewer resamples are made, never under _MIN_RESAMPLES
_MIN_RESAMPLES = 200


@dataclass(frozen=True)
class EstimatorConfig:
    """How decreases are counted and intervals made.

    headline: the estimator that heads the tables.
      `relative`: an event when s_i <= (1 - delta) m, m the smoothed loss at the last event (first s_first).
      `fraction`: an event at each 1/levels of the method's own drop s_first - s_best, up to t_fraction of it.
      `grid`: an event at each multiple of grid_step that the smoothed loss reaches, in the loss's own units.
      `slope`: no events; N is the percentage of s_first lost in the window.
    delta: relative decrease that counts, in (0, 1). levels: parts of the drop. grid_step: > 0, loss units.
    half_life_steps: of the smoothing. t_fraction: share of the drop that ends the window.
    lower_bound_tail: a best smoothed loss in this last share of the run marks it as still falling.
    num_resamples: bootstrap resamples (fewer are made in very long runs). confidence: of every interval.
    """

    headline: Estimator = "relative"
    delta: float = 0.01
    levels: int = 20
    grid_step: float = 0.01
    half_life_steps: int = 20
    t_fraction: float = 0.9
    lower_bound_tail: float = 0.05
    num_resamples: int = 1000
    confidence: float = 0.95


@dataclass(frozen=True)
class DecreaseFigures:
    """One estimator's figures in the window.

    num_decreases: N, None without a window; a whole number except for `slope` (percent).
    mli: iterations per decrease. mlt_ms: milliseconds per decrease (`slope`: per percent).
    """

    num_decreases: float | None
    mli: Figure
    mlt_ms: Figure


@dataclass(frozen=True)
class RunEfficiency:
    """Every figure of one run; times in milliseconds per step.

    window_steps: steps of the window, so t90 is this step, counted from 1; None with the reason in
    `window_reason`. mask_ratio_at_t90: None where the method has none. s_first, s_t90, s_best: smoothed
    losses that span the drop, None where the run is too short. still_falling: the figures are lower bounds.
    num_resamples: bootstrap resamples really made. mit_ms: over the window, the one with
    MLT = MIT x MLI; the other `mit_*` are over the whole run, `mit_trimmed_ms` without its fastest and slowest 5 %.
    """

    num_steps: int
    config: EstimatorConfig
    num_resamples: int
    window_steps: int | None
    window_reason: str | None
    mask_ratio_at_t90: float | None
    s_first: float | None
    s_t90: float | None
    s_best: float | None
    still_falling: bool
    mit_ms: Figure
    mit_whole_ms: Figure
    mit_trimmed_ms: Figure
    mit_median_ms: Figure
    mit_p95_ms: Figure
    mit_last_quarter_ms: Figure
    estimators: dict[Estimator, DecreaseFigures] = field(default_factory=dict)

    @property
    def headline(self) -> DecreaseFigures:
        """Figures of the estimator that heads the tables."""
        return self.estimators[self.config.headline]

    @property
    def note(self) -> str | None:
        """What a table must say beside the figures, or None."""
        return STILL_FALLING if self.still_falling else None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without NaN or infinity; `from_dict` is the inverse."""
        return asdict_with_figures(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RunEfficiency:
        values = dict(data)
        values["config"] = EstimatorConfig(**data["config"])
        for name in _MIT_FIELDS:
            values[name] = figure_from_dict(data[name])
        values["estimators"] = {
            name: DecreaseFigures(
                part["num_decreases"], figure_from_dict(part["mli"]), figure_from_dict(part["mlt_ms"])
            )
            for name, part in data["estimators"].items()
        }
        return cls(**values)


_WHOLE_RUN_FIELDS = (
    "mit_whole_ms",
    "mit_trimmed_ms",
    "mit_median_ms",
    "mit_p95_ms",
    "mit_last_quarter_ms",
)
_MIT_FIELDS = ("mit_ms", *_WHOLE_RUN_FIELDS)


def asdict_with_figures(run: RunEfficiency) -> dict[str, Any]:
    """`dataclasses.asdict`, but figures by their own `to_dict`."""
    values = {name: getattr(run, name) for name in run.__dataclass_fields__}
    values["config"] = asdict(run.config)
    for name in _MIT_FIELDS:
        values[name] = values[name].to_dict()
    values["estimators"] = {
        name: {
            "num_decreases": part.num_decreases,
            "mli": part.mli.to_dict(),
            "mlt_ms": part.mlt_ms.to_dict(),
        }
        for name, part in run.estimators.items()
    }
    return values


def smoothed_loss(loss: ArrayLike, half_life_steps: int = 20) -> Array:
    """Exponential moving average with bias correction along the last axis. `loss` (..., T), any real values."""
    from scipy.signal import lfilter

    values = np.asarray(loss, dtype=np.float64)
    alpha = 1 - 0.5 ** (1 / half_life_steps)
    average: Array = lfilter([alpha], [1.0, alpha - 1], values, axis=-1)
    average /= 1 - (1 - alpha) ** np.arange(1, values.shape[-1] + 1)
    return average


@dataclass(frozen=True)
class Windows:
    """Windows of several loss series (V, T).

    smoothed (V, T); first: index of s_first; steps (V,): length of each window; s_first, s_last, s_best (V,):
    smoothed loss at the start, at t90 and at best; best_step (V,) counted from 1; valid (V,): False where
    nothing was lost.
    """

    smoothed: Array
    first: int
    steps: NDArray[np.intp]
    s_first: Array
    s_last: Array
    s_best: Array
    best_step: NDArray[np.intp]
    valid: NDArray[np.bool_]


def find_windows(loss: ArrayLike, config: EstimatorConfig) -> Windows:
    """Smooth `loss` (V, T) and find each t90. T must exceed one half-life."""
    smoothed = smoothed_loss(loss, config.half_life_steps)
    rows = np.arange(smoothed.shape[0])
    first = config.half_life_steps - 1
    s_first = smoothed[:, first]
    best = first + np.argmin(smoothed[:, first:], axis=1)
    s_best = smoothed[rows, best]
    drop = s_first - s_best
    # At t_fraction = 1 rounding could put the threshold just below the best loss itself.
    threshold = np.maximum(s_first - config.t_fraction * drop, s_best)
    last = first + np.argmax(smoothed[:, first:] <= threshold[:, None], axis=1)
    # Smoothing a constant leaves differences of rounding size, which are no drop.
    valid = drop > 1e-9 * np.abs(s_first)
    return Windows(smoothed, first, last + 1, s_first, smoothed[rows, last], s_best, best + 1, valid)


def count_decreases(windows: Windows, config: EstimatorConfig) -> dict[Estimator, Array]:
    """N of each estimator in each window (V,); 0 where there is none."""
    s_first, s_last = windows.s_first, windows.s_last
    # s_last is the least value of its window (t90 is a first passage), so levels need no scan.
    levels = np.full(s_first.shape, math.floor(config.levels * config.t_fraction + 1e-9), dtype=np.float64)
    grid = np.ceil(s_first / config.grid_step) - np.ceil(s_last / config.grid_step)
    positive = s_first > 0
    slope = 100 * (s_first - s_last) / np.where(positive, s_first, 1.0)
    counts: dict[Estimator, Array] = {
        "relative": _count_relative(windows, config.delta),
        "fraction": levels,
        "grid": grid,
        "slope": np.where(positive, slope, 0.0),
    }
    return {name: np.where(windows.valid, n, 0.0) for name, n in counts.items()}


def _count_relative(windows: Windows, delta: float) -> Array:
    """Events s_i <= (1 - delta) m with m the loss at the last event; a scan over steps, vectorised over series."""
    by_step = np.ascontiguousarray(windows.smoothed[:, : windows.steps.max()].T)
    mark = windows.s_first.copy()
    count = np.zeros_like(mark)
    for step in range(windows.first + 1, by_step.shape[0]):
        # A loss at or below zero has no relative decrease: mark <= 0 never fires.
        event = (by_step[step] <= (1 - delta) * mark) & (step < windows.steps) & (mark > 0)
        count += event
        np.copyto(mark, by_step[step], where=event)
    return count


def measure_run(
    loss: ArrayLike,
    period_ms: ArrayLike,
    *,
    tokens: ArrayLike | None = None,
    mask_ratio: ArrayLike | None = None,
    config: EstimatorConfig | None = None,
    seed: int = 0,
) -> RunEfficiency:
    """All efficiency figures of one run with their intervals.

    loss, period_ms: (T,), measured steps only (no untimed ones), in order; finite, periods > 0. tokens: (T,)
    token count of each step, None where it never changes; durations are resampled around the mean of their own
    count. mask_ratio: (T,) in [0, 1] or None. seed: of the bootstrap, so the same numbers give the same intervals.
    Intervals estimate the expectation over replicate runs of the same length and say nothing of other seeds.
    Raises ValueError on arrays of unequal length, non-finite values or periods that are not positive.
    """
    config = config or EstimatorConfig()
    loss, period = _checked("loss", loss), _checked("period_ms", period_ms)
    if loss.size != period.size or loss.size == 0:
        raise ValueError(f"loss and period_ms must be of one length > 0: {loss.size} and {period.size}")
    if np.any(period <= 0):
        raise ValueError("period_ms must be positive")
    token_counts = None if tokens is None else _checked("tokens", tokens)
    if token_counts is not None and token_counts.size != loss.size:
        raise ValueError(f"tokens must be as long as loss: {token_counts.size} and {loss.size}")
    masks = None if mask_ratio is None else _checked("mask_ratio", mask_ratio)
    if masks is not None and masks.size != loss.size:
        raise ValueError(f"mask_ratio must be as long as loss: {masks.size} and {loss.size}")
    draws = _resampled_statistics(loss, period, token_counts, config, seed)
    return _summary(loss, period, masks, draws, config)


def _checked(name: str, values: ArrayLike) -> Array:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not np.all(np.isfinite(array)):
        raise ValueError(f"{name} must be one-dimensional and finite")
    return array


def _window_reason(loss: Array, windows: Windows | None, config: EstimatorConfig) -> str | None:
    """Why a run has no window, or None."""
    if windows is None:
        return f"run of {loss.size} steps is no longer than the smoothing half-life ({config.half_life_steps})"
    return None if windows.valid[0] else f"{NO_DECREASE}: the smoothed loss never fell below its start"


def _summary(
    loss: Array,
    period: Array,
    mask_ratio: Array | None,
    draws: dict[str, Array] | None,
    config: EstimatorConfig,
) -> RunEfficiency:
    windows = find_windows(loss[None], config) if loss.size > config.half_life_steps else None
    reason = _window_reason(loss, windows, config)
    own = {**duration_statistics(period[None]), **window_statistics(windows, period[None], config)}

    def figure(name: str, no_value: str) -> Figure:
        value = float(own[name][0]) if name in own else math.nan
        return _figure(value, name, own, draws, no_value, config.confidence)

    steps = int(windows.steps[0]) if windows is not None and reason is None else None
    found = windows if reason is None else None
    return RunEfficiency(
        num_steps=loss.size,
        config=config,
        num_resamples=0 if draws is None else int(draws["mit_whole_ms"].size),
        window_steps=steps,
        window_reason=reason,
        mask_ratio_at_t90=None if mask_ratio is None or steps is None else float(mask_ratio[steps - 1]),
        s_first=None if windows is None else float(windows.s_first[0]),
        s_t90=None if found is None else float(found.s_last[0]),
        s_best=None if windows is None else float(windows.s_best[0]),
        still_falling=found is not None and _is_still_falling(found, loss.size, config),
        mit_ms=figure("mit_ms", reason or ""),
        mit_whole_ms=figure("mit_whole_ms", ""),
        mit_trimmed_ms=figure("mit_trimmed_ms", ""),
        mit_median_ms=figure("mit_median_ms", ""),
        mit_p95_ms=figure("mit_p95_ms", ""),
        mit_last_quarter_ms=figure("mit_last_quarter_ms", ""),
        estimators={name: _decrease_figures(name, own, figure, reason) for name in ESTIMATORS},
    )


def _is_still_falling(windows: Windows, num_steps: int, config: EstimatorConfig) -> bool:
    return bool(windows.best_step[0] > num_steps * (1 - config.lower_bound_tail))


def _decrease_figures(
    name: Estimator, own: dict[str, Array], figure: Callable[[str, str], Figure], reason: str | None
) -> DecreaseFigures:
    """One estimator's N, MLI and MLT; the product rule is asserted here, on the numbers that are stored."""
    why = reason or f"{NO_DECREASE} in the window"
    result = DecreaseFigures(
        None if reason else float(own[f"n_{name}"][0]),
        figure(f"mli_{name}", why),
        figure(f"mlt_{name}", why),
    )
    if isinstance(result.mli, Interval) and isinstance(result.mlt_ms, Interval):
        product = float(own["mit_ms"][0]) * result.mli.value
        assert math.isclose(result.mlt_ms.value, product, rel_tol=1e-9), "MLT must equal MIT x MLI"
    return result


def _figure(
    value: float,
    name: str,
    own: dict[str, Array],
    draws: dict[str, Array] | None,
    no_value: str,
    confidence: float,
) -> Figure:
    if not math.isfinite(value):
        return Missing(no_value)
    if draws is None or name not in draws:
        return Interval(value, None, None, f"{NO_INTERVAL}: under {_MIN_STEPS_FOR_INTERVAL} steps")
    return from_draws(value, draws[name], confidence, count_resolution(name, own))


def count_resolution(name: str, own: dict[str, Array], row: int = 0) -> float:
    """Least half-width (log scale) of a figure per counted event: half an event; 0 for all other figures.

    A count that no resample changes still does not locate its expectation more finely than that.
    """
    kind, _, estimator = name.partition("_")
    if kind not in ("mli", "mlt") or estimator not in ("relative", "grid"):
        return 0.0
    return math.log1p(0.5 / float(own[f"n_{estimator}"][row]))


def duration_statistics(period_ms: Array) -> dict[str, Array]:
    """Whole-run figures of step periods (V, T): name -> (V,)."""
    num_steps = period_ms.shape[1]
    ordered = np.sort(period_ms, axis=1)
    cut = int(0.05 * num_steps)
    return {
        "mit_whole_ms": period_ms.mean(axis=1),
        "mit_trimmed_ms": ordered[:, cut : num_steps - cut].mean(axis=1),
        "mit_median_ms": _sorted_quantile(ordered, 0.5),
        "mit_p95_ms": _sorted_quantile(ordered, 0.95),
        "mit_last_quarter_ms": period_ms[:, num_steps - max(1, num_steps // 4) :].mean(axis=1),
    }


def _sorted_quantile(ordered: Array, q: float) -> Array:
    """Linearly interpolated quantile of rows already in order (V, T) -> (V,)."""
    position = q * (ordered.shape[1] - 1)
    low = math.floor(position)
    high = min(low + 1, ordered.shape[1] - 1)
    result: Array = ordered[:, low] + (position - low) * (ordered[:, high] - ordered[:, low])
    return result


def window_statistics(windows: Windows | None, period_ms: Array, config: EstimatorConfig) -> dict[str, Array]:
    """MIT, N, MLI and MLT of each window: name -> (V,), NaN where a series has no such figure. period_ms (V, T)."""
    if windows is None:
        return {}
    time = np.cumsum(period_ms, axis=1)[np.arange(period_ms.shape[0]), windows.steps - 1]
    result = {"mit_ms": np.where(windows.valid, time / windows.steps, np.nan)}
    for name, count in count_decreases(windows, config).items():
        divisor = np.where(count > 0, count, np.nan)
        result[f"n_{name}"] = count
        result[f"mli_{name}"] = windows.steps / divisor
        result[f"mlt_{name}"] = time / divisor
    return result


class RunResampler:
    """Draws replicates of runs that share a length and token counts; built once, used for any number of runs."""

    def __init__(self, num_steps: int, tokens: Array | None) -> None:
        self._loss_model = AutoregressiveTrend(*spline_design(num_steps))
        self._token_means = token_design(tokens, num_steps)
        self._period_model = AutoregressiveTrend(self._token_means)

    def losses(self, loss: Array, num_resamples: int, rng: np.random.Generator) -> Array:
        """Replicates (B, T) of a loss (T,). Noise is relative; a loss that reaches zero or below has it absolute."""
        relative = bool(np.all(loss > 0))
        fit = self._loss_model.fit(np.log(loss) if relative else loss)
        drawn = self._loss_model.resample(fit, num_resamples, rng, trend_spread=_LOSS_TREND_SPREAD)
        return np.exp(drawn) if relative else drawn

    def periods(self, period_ms: Array, num_resamples: int, rng: np.random.Generator) -> Array:
        """Replicates (B, T) of step periods (T,): noise relative to the mean of the same token count."""
        coefficients = np.linalg.lstsq(self._token_means, period_ms, rcond=None)[0]
        mean: Array = np.maximum(self._token_means @ coefficients, period_ms.min())
        # The means themselves stay fixed: the sum over a window feels them and the noise alike.
        fit = self._period_model.fit(period_ms / mean)
        drawn = self._period_model.resample(fit, num_resamples, rng, trend_spread=0.0)
        return drawn * mean


def _resampled_statistics(
    loss: Array, period: Array, tokens: Array | None, config: EstimatorConfig, seed: int
) -> dict[str, Array] | None:
    """Every statistic on every resample: name -> (B,); None where the run is too short to resample."""
    num_steps = loss.size
    if num_steps < max(_MIN_STEPS_FOR_INTERVAL, config.half_life_steps + 1):
        return None
    rng = np.random.default_rng(seed)
    resampler = RunResampler(num_steps, tokens)
    total = min(config.num_resamples, max(_MIN_RESAMPLES, _MAX_TOTAL_ELEMENTS // num_steps))
    chunk = max(10, min(total, _MAX_ELEMENTS // num_steps))
    parts = []
    for start in range(0, total, chunk):
        size = min(chunk, total - start)
        periods = resampler.periods(period, size, rng)
        windows = find_windows(resampler.losses(loss, size, rng), config)
        parts.append({**duration_statistics(periods), **window_statistics(windows, periods, config)})
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
