"""Do the 95 % intervals of a single run cover what they claim? Runs whose true expectations are known.

A simulated loss decays exponentially to a floor under multiplicative autocorrelated noise; step durations are a mean,
constant or falling with the token count of a cosine mask schedule, under autocorrelated noise with a heavy right
tail. The truth of a case is the mean of each statistic over thousands of independent runs; its coverage is the
share of other runs whose interval holds that truth.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from lmd_bench.metrics.efficiency import (
    ESTIMATORS,
    EstimatorConfig,
    RunResampler,
    count_resolution,
    find_windows,
    window_statistics,
)
from lmd_bench.metrics.intervals import from_draws

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

Durations = Literal["flat", "scheduled"]
DURATIONS: tuple[Durations, ...] = ("flat", "scheduled")

HEADLINE = ("mit_ms", "mli_relative", "mlt_relative")
"""The statistics that the coverage of 90-98 % is promised for in every case."""

DECAY_STEPS = 300.0
FLOOR = 0.4
MEAN_PERIOD_MS = 100.0
_TAIL = 0.6  # of the log-normal innovations: skewness 2.3, excess kurtosis 10
_CHUNK_ELEMENTS = 4_000_000  # 32 MB an array
_STATISTICS = ("mit_ms", *(f"{kind}_{name}" for name in ESTIMATORS for kind in ("mli", "mlt")))


@dataclass(frozen=True)
class Process:
    """What a simulated run is drawn from.

    num_steps: length. noise: standard deviation of loss and duration relative to their mean. autocorrelation: of
    both, lag one. decay_steps: time constant of the loss. floor: share of the first loss that is never lost.
    """

    num_steps: int
    noise: float
    autocorrelation: float
    decay_steps: float = DECAY_STEPS
    floor: float = FLOOR


CASES: tuple[Process, ...] = tuple(
    Process(num_steps, noise, rho)
    for num_steps in (150, 600, 2400)
    for noise in (0.01, 0.03, 0.1)
    for rho in (0.0, 0.8)
)
"""The processes of the study; each is met with flat and with scheduled durations, 36 cases in all."""

STRESS_CASES: tuple[Process, ...] = tuple(
    Process(num_steps, noise, rho, decay_steps=num_steps / 3)
    for num_steps in (150, 600)
    for noise in (0.01, 0.1)
    for rho in (0.0, 0.5, 0.9)
)
"""Processes that the method was not tuned on: other autocorrelations, and a loss that is near its floor at the end."""


@dataclass(frozen=True)
class CoverageRow:
    """Coverage of one statistic in one case.

    truth: expectation over replicate runs (ms or iterations). spread: standard deviation of the estimate
    over replicate runs, as a share of truth. half_width: median half-width of the intervals, as a share of the
    estimate. undefined: share of runs without a figure or an interval. coverage: share of the others whose interval
    holds the truth.
    """

    statistic: str
    durations: Durations
    num_steps: int
    noise: float
    autocorrelation: float
    decay_steps: float
    num_runs: int
    truth: float
    spread: float
    half_width: float
    undefined: float
    coverage: float


def autoregressive_noise(
    shape: tuple[int, int], rho: float, rng: np.random.Generator, *, heavy_tail: bool = False
) -> Array:
    """Stationary AR(1) noise (V, T), mean 0, variance 1; Gaussian, or with skewed log-normal innovations."""
    from scipy.signal import lfilter

    drawn = rng.standard_normal(shape)
    if heavy_tail:
        variance = math.exp(_TAIL**2)
        drawn = (np.exp(_TAIL * drawn) - math.sqrt(variance)) / math.sqrt(variance * (variance - 1))
    drawn[:, 1:] *= math.sqrt(1 - rho**2)
    noise: Array = lfilter([1.0], [1.0, -rho], drawn, axis=-1)
    return noise


def simulate_losses(process: Process, num_runs: int, rng: np.random.Generator) -> Array:
    """Losses (num_runs, T): floor + (1 - floor) exp(-step / decay_steps), times log-normal noise of mean 1."""
    step = np.arange(1, process.num_steps + 1)
    curve = process.floor + (1 - process.floor) * np.exp(-step / process.decay_steps)
    noise = autoregressive_noise((num_runs, process.num_steps), process.autocorrelation, rng)
    result: Array = curve * np.exp(process.noise * noise - process.noise**2 / 2)
    return result


def token_schedule(num_steps: int) -> Array:
    """Visible tokens of 16 (T,), falling in whole tokens from 13 to 4 along half a cosine."""
    mask_ratio = 0.45 - 0.30 * np.cos(np.pi * np.arange(num_steps) / num_steps)
    result: Array = np.floor(16 * (1 - mask_ratio))
    return result


def simulate_periods(
    process: Process, durations: Durations, num_runs: int, rng: np.random.Generator
) -> tuple[Array, Array | None]:
    """Step periods in ms (num_runs, T) and their token counts (T,), None if flat.

    Scheduled: 40 % of a step's cost is fixed, the rest goes with the token count.
    """
    tokens = token_schedule(process.num_steps) if durations == "scheduled" else None
    mean = MEAN_PERIOD_MS * (np.ones(process.num_steps) if tokens is None else 0.4 + 0.6 * tokens / 16)
    shape = (num_runs, process.num_steps)
    noise = autoregressive_noise(shape, process.autocorrelation, rng, heavy_tail=True)
    return mean * (1 + process.noise * noise), tokens


def true_expectations(
    process: Process, num_runs: int, config: EstimatorConfig, rng: np.random.Generator
) -> dict[tuple[Durations, str], tuple[float, float]]:
    """Mean and standard deviation of every statistic over independent runs, in which it exists."""
    values: dict[tuple[Durations, str], list[Array]] = {}
    for size in _chunks(num_runs, process.num_steps):
        windows = find_windows(simulate_losses(process, size, rng), config)
        for durations in DURATIONS:
            periods, _ = simulate_periods(process, durations, size, rng)
            statistics = window_statistics(windows, periods, config)
            for name in _STATISTICS:
                values.setdefault((durations, name), []).append(statistics[name])
    joined = {key: np.concatenate(parts) for key, parts in values.items()}
    return {key: (float(np.nanmean(v)), float(np.nanstd(v))) for key, v in joined.items()}


def _chunks(num_runs: int, num_columns: int) -> Iterator[int]:
    chunk = max(1, _CHUNK_ELEMENTS // num_columns)
    for start in range(0, num_runs, chunk):
        yield min(chunk, num_runs - start)


def coverage_of(
    process: Process, num_runs: int, num_truth_runs: int, config: EstimatorConfig, seed: int
) -> list[CoverageRow]:
    """Coverage of every statistic of one process, with flat and with scheduled durations."""
    rng = np.random.default_rng(seed)
    truth = true_expectations(process, num_truth_runs, config, rng)
    resamplers = {
        durations: RunResampler(
            process.num_steps, token_schedule(process.num_steps) if durations == "scheduled" else None
        )
        for durations in DURATIONS
    }
    outcomes: dict[tuple[Durations, str], list[tuple[float, float]]] = {key: [] for key in truth}
    for size in _chunks(num_runs, process.num_steps * config.num_resamples):
        _collect(outcomes, truth, process, size, resamplers, config, rng)
    return [_row(process, key, outcomes[key], truth[key]) for key in truth]


def _collect(
    outcomes: dict[tuple[Durations, str], list[tuple[float, float]]],
    truth: dict[tuple[Durations, str], tuple[float, float]],
    process: Process,
    num_runs: int,
    resamplers: dict[Durations, RunResampler],
    config: EstimatorConfig,
    rng: np.random.Generator,
) -> None:
    """Add (estimate / truth on the log scale, interval half-width) of `num_runs` runs; NaN where there is none.

    Resamples of all runs are stacked, so that the scan over steps is paid once for many runs.
    """
    num = config.num_resamples
    losses = simulate_losses(process, num_runs, rng)
    windows = find_windows(losses, config)
    redrawn = np.concatenate([resamplers["flat"].losses(loss, num, rng) for loss in losses])
    redrawn_windows = find_windows(redrawn, config)
    for durations in DURATIONS:
        periods, _ = simulate_periods(process, durations, num_runs, rng)
        estimates = window_statistics(windows, periods, config)
        again = np.concatenate([resamplers[durations].periods(row, num, rng) for row in periods])
        draws = window_statistics(redrawn_windows, again, config)
        for name in _STATISTICS:
            expected = truth[durations, name][0]
            for row, sample in enumerate(draws[name].reshape(num_runs, num)):
                value = float(estimates[name][row])
                error = half = math.nan
                if math.isfinite(value):
                    error = math.log(value / expected)
                    least = count_resolution(name, estimates, row)
                    found = from_draws(value, sample, config.confidence, least).log_half_width
                    half = math.nan if found is None else found
                outcomes[durations, name].append((error, half))


def _row(
    process: Process,
    key: tuple[Durations, str],
    outcomes: Sequence[tuple[float, float]],
    truth: tuple[float, float],
) -> CoverageRow:
    error, half = np.asarray(outcomes).T
    defined = np.isfinite(half)
    covered = np.abs(error[defined]) <= half[defined]
    durations, statistic = key
    return CoverageRow(
        statistic=statistic,
        durations=durations,
        num_steps=process.num_steps,
        noise=process.noise,
        autocorrelation=process.autocorrelation,
        decay_steps=process.decay_steps,
        num_runs=len(outcomes),
        truth=truth[0],
        spread=truth[1] / truth[0],
        half_width=float(np.median(half[defined])) if defined.any() else 0.0,
        undefined=1 - float(defined.mean()),
        coverage=float(covered.mean()) if defined.any() else 0.0,
    )


def coverage_study(
    processes: Sequence[Process] = CASES + STRESS_CASES,
    *,
    num_runs: int = 1000,
    num_truth_runs: int = 4000,
    num_resamples: int = 80,
    seed: int = 0,
) -> Iterator[CoverageRow]:
    """Rows of every process as they are done: 9 statistics x 2 kinds of durations each.

    The resamples are fewer than a report's 1000 only to save time; the interval rule allows for their number.
    """
    config = EstimatorConfig(num_resamples=num_resamples)
    for index, process in enumerate(processes):
        yield from coverage_of(process, num_runs, num_truth_runs, config, seed + index)


def write_coverage(rows: Sequence[CoverageRow], folder: Path, command: str) -> None:
    """Write coverage.csv (every row) and coverage.md (MIT and the four estimators by case) into `folder`.

    `command` is what made them, named at the head of both.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "coverage.csv").open("w", newline="", encoding="utf-8") as file:
        file.write(f"# made by: {command}\n")
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([f.name for f in fields(CoverageRow)])
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in astuple(row)])
    (folder / "coverage.md").write_text(coverage_table(rows, command), encoding="utf-8")


def coverage_table(rows: Sequence[CoverageRow], command: str) -> str:
    """The study as Markdown, in percent, cells outside 90-98 % in bold; stress cases in a table of their own."""
    study = [row for row in rows if row.decay_steps == DECAY_STEPS]
    stress = [row for row in rows if row.decay_steps != DECAY_STEPS]
    lines = [
        "# Coverage of the 95 % intervals of a single run",
        "",
        f"Made by `{command}`.",
        "",
        *_study_notes(study),
        "",
    ]
    lines += _table_lines(study)
    if stress:
        found = [row.coverage for row in stress if row.statistic in HEADLINE]
        lines += [
            "",
            "## Beyond the study",
            "",
            "Other autocorrelations, and a loss that decays within a third of the run; the method was not tuned "
            "on these and no range is promised. "
            f"Headline statistics: {min(found):.1%} to {max(found):.1%}.",
            "",
            *_table_lines(stress),
        ]
    return "\n".join(lines) + "\n"


def _table_lines(rows: Sequence[CoverageRow]) -> list[str]:
    """A line per case and a column per statistic."""
    cases: dict[tuple[int, str, float, str, Durations], dict[str, CoverageRow]] = {}
    for row in rows:
        case = (row.num_steps, f"{row.noise:.0%}", row.autocorrelation, f"{row.decay_steps:g}", row.durations)
        cases.setdefault(case, {})[row.statistic] = row
    titles = ["steps", "noise", "autocorrelation", "decay", "durations", "MIT"]
    titles += [f"{kind.upper()} {name}" for name in ESTIMATORS for kind in ("mli", "mlt")]
    titles.append("spread / half-width of MLI relative")
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for case, found in cases.items():
        headline = found["mli_relative"]
        cells = [str(part) for part in case] + [_coverage_cell(found[name]) for name in _STATISTICS]
        cells.append(f"{headline.spread:.1%} / {headline.half_width:.1%}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _coverage_cell(row: CoverageRow) -> str:
    text = f"{row.coverage:.1%}".removesuffix("%")
    if not 0.90 <= row.coverage <= 0.98:
        text = f"**{text}**"
    return text if row.undefined == 0 else f"{text} ({row.undefined:.1%} undefined)"


def _study_notes(rows: Sequence[CoverageRow]) -> list[str]:
    headline = [r.coverage for r in rows if r.statistic in HEADLINE]
    others = [r for r in rows if r.statistic not in HEADLINE]
    outside = [r for r in others if not 0.90 <= r.coverage <= 0.98]
    goal = sum(0.93 <= c <= 0.97 for c in headline)
    runs = rows[0].num_runs
    chance = 196 * math.sqrt(0.95 * 0.05 / runs)
    return [
        f"Share of {runs} simulated runs, in percent, whose interval holds the expectation over replicate runs of "
        f"the same length. By chance a true 95 % shows as {95 - chance:.1f} to {95 + chance:.1f}. Loss: "
        f"{FLOOR} + {1 - FLOOR} exp(-step / {DECAY_STEPS:.0f}) under log-normal noise; durations: constant, or falling "
        "with the token count of a cosine schedule, under noise with a heavy right tail; noise and lag-one "
        "autocorrelation as given, for both. Bold: outside 90-98 %.",
        "",
        "MIT over the window, MLI and MLT of `relative` (the default headline): "
        f"{min(headline):.1%} to {max(headline):.1%}, {goal} of {len(headline)} within 93-97 %. "
        f"The other three estimators: {len(outside)} of {len(others)} outside 90-98 %.",
    ]
