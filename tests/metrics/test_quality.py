"""Time to quality where less is better."""

from __future__ import annotations

import pytest

from lmd_bench.metrics.intervals import Missing
from lmd_bench.metrics.quality import TTQ, QualityCheck, TargetRule, resolve_target, ttq


def checks(*values: float) -> list[QualityCheck]:
    """A check every 10 steps and 5 s."""
    return [QualityCheck(10 * i, 5.0 * i, value) for i, value in enumerate(values)]


def test_a_distance_counts_once_it_is_at_or_below_the_target_twice_in_a_row() -> None:
    found = ttq(checks(0.9, 0.5, 0.7, 0.6, 0.4), 0.6, lower_is_better=True)
    assert (found.state, found.seconds, found.after_seconds) == ("reached", 15.0, 10.0)
    assert ttq(checks(0.9, 0.8), 0.6, lower_is_better=True).text == "not reached in 5 s"
    assert ttq(checks(0.9, 0.6), 0.6, lower_is_better=True).state == "not confirmed"


def test_a_target_nearer_than_the_projector_comes_cannot_be_reached() -> None:
    found = ttq(checks(0.9, 0.1, 0.1), 0.2, 0.3, lower_is_better=True)
    assert found.text == "below what its projector reaches"
    assert TTQ.from_dict(found.to_dict()) == found
    assert ttq(checks(0.9, 0.1, 0.1), 0.2, 0.2, lower_is_better=True).state == "reached"


def test_its_target_lies_below_the_first_check_by_a_share_of_the_gain() -> None:
    rule = TargetRule(0.8, "mae")
    assert resolve_target(rule, checks(0.9, 0.4, 0.6), lower_is_better=True) == pytest.approx(0.5)
    worse = resolve_target(rule, checks(0.5, 0.6, 0.9), lower_is_better=True)
    assert isinstance(worse, Missing)
    assert worse.reason == "the reference mae never got better than untrained"


def test_mirrored_figures_give_the_same_times() -> None:
    values = (10.0, 12.5, 11.0, 14.0, 15.0, 13.0)
    upwards = ttq(checks(*values), 12.0, 16.0)
    downwards = ttq(checks(*(-value for value in values)), -12.0, -16.0, lower_is_better=True)
    assert (upwards.state, upwards.seconds, upwards.after_seconds) == (
        downwards.state,
        downwards.seconds,
        downwards.after_seconds,
    )
