"""Intervals of a single run hold the expectation over replicate runs as often as they say (reports/coverage.md).

All its cases run under `-m slow`, the longest with the first of their runs; the fast set has a few of them.
"""

from __future__ import annotations

import csv
import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from lmd_bench.metrics.simulate import (
    CASES,
    DECAY_STEPS,
    HEADLINE,
    STRESS_CASES,
    CoverageRow,
    Process,
    autoregressive_noise,
    coverage_study,
    simulate_losses,
    simulate_periods,
    write_coverage,
)

COMMITTED = Path(__file__).parents[2] / "reports" / "coverage.csv"
PROMISED = (0.90, 0.98)
STUDY_RUNS = 1000
RUNS = {150: STUDY_RUNS, 600: 249, 2400: 60}
"""Steps of a case -> runs that are drawn again: whole stacks of the study's resamples, so that they are its first."""


def promised(num_runs: int) -> tuple[float, float]:
    """The range of a coverage; of fewer runs than the study's, three standard errors of their share beyond it."""
    errors = 3 if num_runs < STUDY_RUNS else 0
    low, high = (
        p + sign * errors * math.sqrt(p * (1 - p) / num_runs) for p, sign in zip(PROMISED, (-1, 1), strict=True)
    )
    return low, high


def outside(rows: list[CoverageRow]) -> list[str]:
    return [
        f"{r.statistic} {r.durations} T={r.num_steps} noise={r.noise} rho={r.autocorrelation}: {r.coverage:.3f}"
        for r in rows
        if r.statistic in HEADLINE and not promised(r.num_runs)[0] <= r.coverage <= promised(r.num_runs)[1]
    ]


def test_coverage_holds_in_a_sample_of_the_cases():
    cases = [Process(150, 0.01, 0.0), Process(150, 0.1, 0.8), Process(600, 0.03, 0.8), Process(600, 0.1, 0.0)]
    rows = list(coverage_study(cases, num_runs=250, num_truth_runs=4000, seed=100))
    assert len(rows) == len(cases) * 2 * 9
    assert not outside(rows)
    assert max(r.undefined for r in rows) < 0.05


@pytest.mark.slow
def test_every_case_of_the_study_comes_out_as_committed():
    """The committed table keeps the promise (below); its runs are drawn again here, the first ones of long cases."""
    committed = {case_of(line): line for line in committed_rows()}
    rows = [
        row
        for seed, process in enumerate(CASES)
        for row in coverage_study([process], num_runs=RUNS[process.num_steps], seed=seed)
    ]
    assert len(rows) == len(CASES) * 2 * 9
    for row in rows:
        line = committed[case_of({name: str(value) for name, value in asdict(row).items()})]
        assert row.truth == pytest.approx(float(line["truth"]), rel=1e-4), line
        assert row.spread == pytest.approx(float(line["spread"]), rel=1e-3), line
        assert abs(row.coverage - float(line["coverage"])) <= 4 * sampling_error(row, float(line["coverage"])), line
        assert row.half_width == pytest.approx(float(line["half_width"]), rel=0.15), line
    assert not outside(rows)
    assert max(row.undefined for row in rows) < 0.05


def sampling_error(row: CoverageRow, coverage: float) -> float:
    """Of the first runs' coverage about that of all runs of the study; and one run, for another machine's rounding."""
    return math.sqrt(coverage * (1 - coverage) * (1 / row.num_runs - 1 / STUDY_RUNS)) + 1 / row.num_runs


def case_of(row: dict[str, str]) -> tuple[object, ...]:
    numbers = (float(row[name]) for name in ("num_steps", "noise", "autocorrelation", "decay_steps"))
    return row["statistic"], row["durations"], *numbers


def committed_rows() -> list[dict[str, str]]:
    return list(csv.DictReader(COMMITTED.read_text(encoding="utf-8").splitlines()[1:]))


def test_the_committed_table_covers_every_case_and_keeps_the_promise():
    assert COMMITTED.read_text(encoding="utf-8").splitlines()[0] == "# made by: lmd-bench coverage"
    rows = committed_rows()
    study = [row for row in rows if float(row["decay_steps"]) == DECAY_STEPS]
    assert len(study) == len(CASES) * 2 * 9
    assert len(rows) - len(study) == len(STRESS_CASES) * 2 * 9
    assert {int(row["num_runs"]) for row in rows} == {STUDY_RUNS}
    headline = [float(row["coverage"]) for row in study if row["statistic"] in HEADLINE]
    assert min(headline) >= PROMISED[0]
    assert max(headline) <= PROMISED[1]


def test_intervals_are_not_wide_for_their_coverage_in_longer_runs():
    """An interval could cover by being useless: its half-width must be about twice the true spread."""
    rows = committed_rows()
    ratios = [
        float(row["half_width"]) / float(row["spread"])
        for row in rows
        if row["statistic"] in HEADLINE and int(row["num_steps"]) >= 600
    ]
    assert min(ratios) > 1.6
    assert max(ratios) < 2.6


@pytest.mark.parametrize("heavy_tail", [False, True])
@pytest.mark.parametrize("rho", [0.0, 0.8])
def test_simulated_noise_has_the_stated_moments(rho, heavy_tail):
    noise = autoregressive_noise((4000, 200), rho, np.random.default_rng(0), heavy_tail=heavy_tail)
    assert noise.mean() == pytest.approx(0, abs=0.02)
    assert noise.std() == pytest.approx(1, abs=0.02)
    assert np.mean(noise[:, 1:] * noise[:, :-1]) == pytest.approx(rho, abs=0.02)
    assert (noise[:, -1].var()) == pytest.approx(noise[:, 0].var(), rel=0.15)


def test_simulated_runs_have_the_stated_means():
    process = Process(150, 0.1, 0.8)
    losses = simulate_losses(process, 4000, np.random.default_rng(0))
    np.testing.assert_allclose(losses.mean(axis=0)[-1], 0.4 + 0.6 * np.exp(-0.5), rtol=0.01)
    periods, tokens = simulate_periods(process, "scheduled", 4000, np.random.default_rng(0))
    assert (tokens[0], tokens[-1]) == (13, 4)
    np.testing.assert_allclose(periods.mean(axis=0), 40 + 60 * tokens / 16, rtol=0.01)
    assert periods.min() > 0


def test_the_report_of_a_study_has_a_line_a_case_and_names_its_command(tmp_path):
    rows = list(coverage_study([Process(150, 0.01, 0.0)], num_runs=20, num_truth_runs=50, num_resamples=40))
    write_coverage(rows, tmp_path, "lmd-bench coverage")
    text = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    assert "`lmd-bench coverage`" in text
    assert text.count("\n| 150 |") == 2
    read = list(csv.DictReader((tmp_path / "coverage.csv").read_text(encoding="utf-8").splitlines()[1:]))
    assert [row["statistic"] for row in read] == [row.statistic for row in rows]
