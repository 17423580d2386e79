"""MIT, MLI, MLT, their estimators and windows; ratios, seeds, targets and TTQ."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd_bench.errors import ConfigError
from lmd_bench.metrics.efficiency import (
    ESTIMATORS,
    EstimatorConfig,
    RunEfficiency,
    count_decreases,
    find_windows,
    measure_run,
    smoothed_loss,
)
from lmd_bench.metrics.intervals import (
    Interval,
    Missing,
    figure_from_dict,
    from_draws,
    over_seeds,
    ratio,
    ratio_of_rounds,
)
from lmd_bench.metrics.quality import (
    TTQ,
    QualityCheck,
    TargetRule,
    TTQOverSeeds,
    mean_accuracy_increase_time,
    parse_target,
    resolve_target,
    ttq,
    ttq_over_seeds,
)
from lmd_bench.metrics.simulate import Process, simulate_losses, simulate_periods, token_schedule

FAST = EstimatorConfig(num_resamples=60)


def simulated(seed: int, num_steps: int = 300, noise: float = 0.03, scale: float = 1.0):
    """Loss, periods and token counts of one run with a scheduled mask; `scale` stretches the decay and the steps."""
    rng = np.random.default_rng(seed)
    process = Process(num_steps, noise, 0.3, decay_steps=80.0 * scale)
    periods, tokens = simulate_periods(process, "scheduled", 1, rng)
    return simulate_losses(process, 1, rng)[0], periods[0], tokens


def value(figure: Interval | Missing) -> float:
    assert isinstance(figure, Interval), figure
    return figure.value


# --- the smoothed loss and the window ---


def test_smoothing_halves_a_step_change_after_one_half_life_and_keeps_a_constant():
    late = smoothed_loss(np.r_[np.zeros(10_000), np.ones(20)], half_life_steps=20)
    assert late[-1] == pytest.approx(0.5, abs=1e-12)
    np.testing.assert_allclose(smoothed_loss(np.full(50, 3.0)), 3.0, rtol=1e-12)


def test_smoothing_equals_the_weighted_mean_it_is_defined_by():
    loss = np.random.default_rng(0).random(37)
    weights = 0.5 ** (np.arange(37)[::-1] / 20)
    assert smoothed_loss(loss)[-1] == pytest.approx(np.average(loss, weights=weights), rel=1e-12)


def test_the_window_ends_at_the_first_step_that_has_ninety_percent_of_the_drop():
    loss, _, _ = simulated(1)
    windows = find_windows(loss[None], EstimatorConfig())
    smoothed = smoothed_loss(loss)
    level = smoothed[19] - 0.9 * (smoothed[19] - smoothed[19:].min())
    t90 = next(i for i in range(19, loss.size) if smoothed[i] <= level)
    assert windows.steps[0] == t90 + 1
    assert windows.s_first[0] == smoothed[19]
    assert windows.s_best[0] == smoothed[19:].min()


def test_counts_agree_with_a_plain_scan_of_each_definition():
    loss, _, _ = simulated(2, noise=0.1)
    config = EstimatorConfig()
    windows = find_windows(loss[None], config)
    counts = {name: n[0] for name, n in count_decreases(windows, config).items()}
    s = smoothed_loss(loss)[19 : windows.steps[0]]
    drop = s[0] - windows.s_best[0]
    mark, relative, lowest, fraction, grid = s[0], 0, s[0], 0, 0
    for x in s[1:]:
        if x <= 0.99 * mark:
            mark, relative = x, relative + 1
        fraction += sum(x <= s[0] - k * drop / 20 < lowest for k in range(1, 19))
        grid += sum(x <= k * 0.01 < lowest for k in range(200))
        lowest = min(lowest, x)
    assert counts["relative"] == relative
    assert counts["fraction"] == fraction == 18
    assert counts["grid"] == grid
    assert counts["slope"] == pytest.approx(100 * (1 - s[-1] / s[0]))


# --- the figures of one run ---


def test_mli_does_not_grow_with_the_steps_after_convergence():
    """Golden figures of the definition: decay constant 300, 200 runs each, `Process(T, 0.01, 0)`, seed 0.

    In the window 10.5 and 10.6 (2400 and 9600 steps); counted over the whole run the same rule gives 28.8 and 114.
    """
    in_window, whole = {}, {}
    for num_steps in (2400, 9600):
        losses = simulate_losses(Process(num_steps, 0.01, 0.0), 200, np.random.default_rng(0))
        windows = find_windows(losses, EstimatorConfig())
        in_window[num_steps] = np.mean(windows.steps / count_decreases(windows, EstimatorConfig())["relative"])
        to_best = EstimatorConfig(t_fraction=1.0)  # no event can follow the best loss
        events = count_decreases(find_windows(losses, to_best), to_best)["relative"]
        whole[num_steps] = np.mean(num_steps / events)
    assert in_window[2400] == pytest.approx(10.5, abs=0.15)
    assert in_window[9600] == pytest.approx(10.6, abs=0.15)
    assert whole[2400] == pytest.approx(28.8, rel=0.03)
    assert whole[9600] == pytest.approx(114, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), noise=st.sampled_from([0.0, 0.01, 0.1]), num_steps=st.integers(60, 400))
def test_mlt_is_mit_times_mli_for_every_estimator(seed, noise, num_steps):
    loss, periods, tokens = simulated(seed, num_steps, noise)
    run = measure_run(loss, periods, tokens=tokens, config=FAST)
    for name in ESTIMATORS:
        part = run.estimators[name]
        if isinstance(part.mli, Missing):
            assert part.mli == part.mlt_ms
            continue
        assert value(part.mlt_ms) == pytest.approx(value(run.mit_ms) * value(part.mli), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.floats(1e-3, 1e3))
def test_slower_steps_scale_mit_and_mlt_and_leave_mli(seed, factor):
    loss, periods, tokens = simulated(seed)
    run = measure_run(loss, periods, tokens=tokens, config=FAST)
    scaled = measure_run(loss, periods * factor, tokens=tokens, config=FAST)
    assert value(scaled.mit_ms) == pytest.approx(factor * value(run.mit_ms))
    assert scaled.mit_ms.low == pytest.approx(factor * run.mit_ms.low, rel=1e-6)
    for name in ESTIMATORS:
        before, after = run.estimators[name], scaled.estimators[name]
        assert after.mli == before.mli
        assert value(after.mlt_ms) == pytest.approx(factor * value(before.mlt_ms))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), factor=st.sampled_from([2.0**k for k in range(-9, 10)]))
def test_the_unit_of_the_loss_matters_to_the_grid_alone(seed, factor):
    # Powers of two scale floating-point numbers without rounding, so counts must be equal, not close.
    loss, _, _ = simulated(seed)
    config = EstimatorConfig()
    before = count_decreases(find_windows(loss[None], config), config)
    after = count_decreases(find_windows(loss[None] * factor, config), config)
    for name in ("relative", "fraction", "slope"):
        np.testing.assert_allclose(after[name], before[name], rtol=1e-12)
    if factor >= 2:
        assert after["grid"] > before["grid"]


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_a_method_three_times_slower_has_three_times_the_mlt(seed):
    fast = simulate_losses(Process(2400, 0.01, 0.0), 1, np.random.default_rng(seed))[0]
    slow = simulate_losses(Process(7200, 0.01, 0.0, decay_steps=900.0), 1, np.random.default_rng(seed + 1))[0]
    rng = np.random.default_rng(seed)
    a, b = (
        measure_run(loss, 100 + rng.standard_normal(loss.size), config=EstimatorConfig(num_resamples=200))
        for loss in (fast, slow)
    )
    assert value(b.headline.mlt_ms) / value(a.headline.mlt_ms) == pytest.approx(3, rel=0.15)
    result = ratio(b.headline.mlt_ms, a.headline.mlt_ms)
    assert result.verdict == "slower"
    assert result.low < result.value < result.high
    assert ratio(a.headline.mlt_ms, b.headline.mlt_ms).verdict == "faster"


@pytest.mark.parametrize("loss", [np.ones(200), np.linspace(1, 2, 200)], ids=["flat", "rising"])
def test_a_loss_that_never_falls_has_no_valid_decrease_and_still_a_whole_run_mit(loss):
    run = measure_run(loss, np.full(200, 5.0), config=FAST)
    assert run.window_steps is None
    for part in run.estimators.values():
        assert part.num_decreases is None
        assert "no valid decrease" in part.mli.reason
        assert "no valid decrease" in part.mlt_ms.reason
    assert value(run.mit_whole_ms) == 5.0
    assert "no valid decrease" in run.mit_ms.reason


def test_a_drop_too_small_for_one_event_gives_a_reason_for_that_estimator_only():
    run = measure_run(1 - 1e-5 * np.arange(300), np.ones(300), config=FAST)
    assert run.estimators["relative"].num_decreases == 0
    assert run.estimators["relative"].mli == Missing("no valid decrease in the window")
    assert value(run.estimators["fraction"].mli) > 0


def test_a_loss_below_zero_has_no_relative_decrease_but_a_fraction_of_its_own_drop():
    loss, periods, tokens = simulated(4)
    run = measure_run(loss - 2, periods, tokens=tokens, config=FAST)
    assert isinstance(run.estimators["relative"].mli, Missing)
    assert isinstance(run.estimators["slope"].mli, Missing)
    assert run.estimators["fraction"].mli.low < value(run.estimators["fraction"].mli)


@pytest.mark.parametrize("num_steps", [1, 3, 20])
def test_a_run_of_a_few_steps_says_that_it_is_too_short(num_steps):
    run = measure_run(np.ones(num_steps), np.ones(num_steps))
    assert run.window_reason == f"run of {num_steps} steps is no longer than the smoothing half-life (20)"
    assert value(run.mit_whole_ms) == 1.0
    assert run.mit_whole_ms.low is None


def test_a_run_that_is_still_falling_is_marked_as_a_lower_bound():
    step = np.arange(300)
    falling = measure_run(1 - step / 400, np.ones(300), config=FAST)
    done = measure_run(np.maximum(0.3, 1 - step / 100) + step / 1e4, np.ones(300), config=FAST)
    assert falling.still_falling
    assert falling.note == "still falling: lower bound"
    assert not done.still_falling
    assert done.note is None


def test_the_mask_ratio_at_t90_is_that_of_the_last_step_of_the_window():
    loss, periods, tokens = simulated(5)
    ratios = np.linspace(0.15, 0.75, loss.size)
    run = measure_run(loss, periods, tokens=tokens, mask_ratio=ratios, config=FAST)
    assert run.mask_ratio_at_t90 == ratios[run.window_steps - 1]
    assert measure_run(loss, periods, config=FAST).mask_ratio_at_t90 is None


def test_whole_run_durations_are_the_textbook_statistics():
    loss, periods, tokens = simulated(6)
    run = measure_run(loss, periods, tokens=tokens, config=FAST)
    assert value(run.mit_whole_ms) == pytest.approx(periods.mean())
    assert value(run.mit_median_ms) == pytest.approx(np.median(periods))
    assert value(run.mit_p95_ms) == pytest.approx(np.quantile(periods, 0.95))
    assert value(run.mit_last_quarter_ms) == pytest.approx(periods[225:].mean())
    assert value(run.mit_trimmed_ms) == pytest.approx(np.sort(periods)[15:285].mean())
    assert value(run.mit_ms) == pytest.approx(periods[: run.window_steps].mean())


def test_a_falling_duration_does_not_widen_the_interval_of_its_mean():
    rng = np.random.default_rng(0)
    tokens = token_schedule(600)
    periods = tokens * (1 + 0.01 * rng.standard_normal(600))
    loss = simulated(7, 600)[0]
    known = measure_run(loss, periods, tokens=tokens, config=FAST).mit_whole_ms
    assert known.log_half_width < 4 * 1.96 * 0.01 / math.sqrt(600)


def test_the_same_numbers_and_seed_give_the_same_intervals():
    loss, periods, tokens = simulated(8)
    one, two, other = (measure_run(loss, periods, tokens=tokens, config=FAST, seed=s) for s in (0, 0, 1))
    assert one == two
    assert one != other


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), num_steps=st.integers(1, 200))
def test_figures_survive_json_without_nan_or_infinity(seed, num_steps):
    loss, periods, tokens = simulated(seed, num_steps)
    run = measure_run(loss, periods, tokens=tokens, mask_ratio=np.full(num_steps, 0.5), config=FAST)
    text = json.dumps(run.to_dict(), allow_nan=False)
    assert RunEfficiency.from_dict(json.loads(text)) == run


@pytest.mark.parametrize(
    ("loss", "period", "extra", "message"),
    [
        ([1.0, math.nan], [1.0, 1.0], {}, "loss must be one-dimensional and finite"),
        ([1.0], [1.0, 1.0], {}, "one length"),
        ([], [], {}, "one length"),
        ([1.0], [0.0], {}, "positive"),
        ([1.0], [1.0], {"tokens": [1.0, 2.0]}, "tokens must be as long"),
        ([1.0], [1.0], {"mask_ratio": [0.5, 0.5]}, "mask_ratio must be as long"),
    ],
)
def test_arrays_that_cannot_be_one_run_are_refused(loss, period, extra, message):
    with pytest.raises(ValueError, match=message):
        measure_run(loss, period, **extra)


# --- intervals, seeds, ratios ---


def test_draws_are_laid_around_the_estimate_by_their_deviation_from_their_mean():
    draws = 7.0 * np.exp(np.linspace(-0.1, 0.1, 999))
    interval = from_draws(5.0, draws, 0.95)
    assert interval.value == 5.0
    assert math.sqrt(interval.low * interval.high) == pytest.approx(5.0)
    assert interval.log_half_width == pytest.approx(0.095, abs=0.002)


def test_no_interval_where_too_many_resamples_have_no_figure():
    draws = np.r_[np.full(30, np.nan), np.full(70, 2.0)]
    interval = from_draws(2.0, draws, 0.95)
    assert interval.low is None
    assert "20 %" in interval.kind


def test_one_seed_passes_through_two_are_points_three_have_students_t_on_the_log():
    lone = Interval(2.0, 1.0, 4.0, "kind")
    assert over_seeds([lone]) is lone
    pair = over_seeds([2.0, 8.0])
    assert (pair.value, pair.low, pair.points) == (pytest.approx(4.0), None, (2.0, 8.0))
    three = over_seeds([1.0, 2.0, 4.0])
    half = 4.302653 * math.log(2) / math.sqrt(3)  # t quantile 0.975 with 2 degrees of freedom
    assert three.value == pytest.approx(2.0)
    assert three.high == pytest.approx(2.0 * math.exp(half), rel=1e-6)
    assert figure_from_dict(json.loads(json.dumps(three.to_dict()))) == three


def test_seeds_without_a_figure_are_counted_not_dropped_in_silence():
    missing = Missing("no valid decrease")
    assert over_seeds([missing, missing]) == missing
    assert over_seeds([1.0, missing, 2.0, 4.0]).kind == "Student t over 3 of 4 seeds"
    assert over_seeds([missing, Interval(2.0, 1.0, 4.0, "kind")]).kind == "kind (1 of 2 seeds)"


def test_ratio_of_single_runs_adds_their_log_variances():
    a, b = Interval(6.0, 6 / 1.3, 6 * 1.3, "w"), Interval(2.0, 2 / 1.4, 2 * 1.4, "w")
    result = ratio(a, b)
    assert result.value == pytest.approx(3.0)
    assert result.high == pytest.approx(3 * math.exp(math.hypot(math.log(1.3), math.log(1.4))))
    assert result.verdict == "slower"
    assert ratio(a, Interval(5.5, 5, 6.1, "w")).verdict == "not distinguishable"


def test_ratio_over_seeds_is_welchs_t_on_the_logs():
    from scipy import stats

    a, b = [1.0, 1.1, 1.3], [2.0, 2.1, 2.6, 2.2]
    result = ratio(over_seeds(a), over_seeds(b))
    reference = stats.ttest_ind(np.log(a), np.log(b), equal_var=False).confidence_interval(0.95)
    assert (result.low, result.high) == (
        pytest.approx(math.exp(reference.low)),
        pytest.approx(math.exp(reference.high)),
    )
    assert result.verdict == "faster"


def test_a_ratio_to_two_seeds_has_no_verdict_and_to_a_missing_figure_no_value():
    assert ratio(over_seeds([1.0, 2.0]), over_seeds([1.0, 2.0, 3.0])).verdict == "no interval"
    assert ratio(Missing("why"), Interval(1.0, 0.9, 1.1, "w")) == Missing("why")


def test_paired_rounds_cancel_what_slows_a_whole_round():
    rng = np.random.default_rng(0)
    drift = np.exp(rng.normal(0, 0.5, 12))
    result = ratio_of_rounds(list(2 * drift * rng.normal(1, 0.01, 12)), list(drift))
    assert result.verdict == "slower"
    assert result.high / result.low < 1.03
    assert ratio_of_rounds([1.0, 2.0], [1.0, 2.0]) == Missing("a ratio needs 3 rounds, there are 2")
    with pytest.raises(ValueError, match="paired"):
        ratio_of_rounds([1.0], [1.0, 2.0])


# --- time to quality ---


def checks(*psnr: float) -> list[QualityCheck]:
    """Checks every 10 steps and 5 seconds, the first before training."""
    return [QualityCheck(10 * i, 5.0 * i, p) for i, p in enumerate(psnr)]


def test_ttq_is_the_first_check_that_holds_at_the_next_with_its_bracket():
    result = ttq(checks(10, 21, 19, 20, 22, 18), 20)
    assert (result.state, result.seconds, result.after_seconds) == ("reached", 15.0, 10.0)
    assert "15 s (10 to 15)" in result.text
    assert TTQ.from_dict(json.loads(json.dumps(result.to_dict()))) == result


def test_a_miss_is_censored_and_a_last_check_alone_is_not_confirmed():
    assert ttq(checks(10, 21, 19), 20).text == "not reached in 10 s"
    last = ttq(checks(10, 19, 20), 20)
    assert (last.state, last.seconds) == ("not confirmed", 10.0)
    assert last.text.endswith("not confirmed")
    assert ttq(checks(20, 21), 20).after_seconds is None


def test_a_target_above_the_ceiling_says_so():
    assert ttq(checks(10, 30, 30), 25, ceiling=24.0).text == "above its projector's ceiling"
    assert ttq(checks(10, 30, 30), 25, ceiling=26.0).state == "reached"


def test_ttq_over_seeds_counts_misses_as_infinite():
    hit, miss = ttq(checks(10, 21, 21), 20), ttq(checks(10, 11), 20)
    two = ttq_over_seeds([hit, miss, hit])
    assert (two.median_seconds, two.text) == (5.0, "5 s (2 of 3 reached)")
    one = ttq_over_seeds([hit, miss, miss])
    assert (one.median_seconds, one.text) == (None, "not reached (1 of 3 reached)")
    assert ttq_over_seeds([hit, miss]).median_seconds is None
    assert TTQOverSeeds.from_dict(json.loads(json.dumps(two.to_dict()))) == two


def test_a_target_is_a_share_of_the_gain_of_the_reference():
    rule = parse_target({"fraction": 0.9, "of": "mae"})
    assert rule == TargetRule(0.9, "mae")
    assert resolve_target(rule, checks(10, 20, 18)) == pytest.approx(19)
    assert resolve_target(parse_target(21.5), []) == 21.5
    assert "never got better" in resolve_target(rule, checks(10, 9)).reason
    assert "no checks" in resolve_target(rule, []).reason
    assert "before its first step" in resolve_target(rule, checks(10, 20)[1:]).reason


@pytest.mark.parametrize(
    "bad",
    ["0.9 of mae", {"fraction": 0.9}, {"fraction": 1.5, "of": "mae"}, {"fraction": 0.5, "of": ""}, math.nan, True],
)
def test_a_target_that_cannot_be_read_is_a_config_error_naming_its_place(bad):
    with pytest.raises(ConfigError, match=r"^evaluation\.target"):
        parse_target(bad, "evaluation.target")


def test_mat_is_seconds_per_percentage_point_gained():
    assert mean_accuracy_increase_time([(0.0, 10.0), (30.0, 25.0), (60.0, 22.0)]) == pytest.approx(4.0)
    assert mean_accuracy_increase_time([(0.0, 10.0), (60.0, 10.0)]) == Missing("no increase")


# --- architecture ---


def test_the_metrics_import_neither_torch_nor_scipy():
    code = (
        "import sys, lmd_bench.metrics.efficiency, lmd_bench.metrics.quality, lmd_bench.metrics.simulate\n"
        "assert not {'torch', 'scipy'} & set(sys.modules), sorted(set(sys.modules) & {'torch', 'scipy'})"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
