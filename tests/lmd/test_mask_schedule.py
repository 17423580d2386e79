"""The masking diffusion scheduler against the authors' tables, the paper's arithmetic and its own properties."""

import collections
import itertools
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd_bench.lmd.mask_schedule import (
    MaskScheduleName,
    cosine_ratio,
    mask_levels,
    mask_ratio,
    num_kept,
    piecewise_ratio,
)
from tests.parity.fill import load_reference

REFERENCE = load_reference("lmd_schedules.reference")
PUBLISHED = {"start": 0.15, "mid": 0.40, "end": 0.75}
SCHEDULES: list[MaskScheduleName] = ["uniform", "piecewise", "cosine", "constant"]


@pytest.mark.parametrize("row", REFERENCE["rows"], ids=lambda row: f"step {row['step']}")
def test_ratios_equal_the_authors_table(row: dict[str, float]) -> None:
    t = row["step"]
    assert cosine_ratio(t, 1000, 0.15, 0.75) == pytest.approx(row["cosine"], abs=1e-12)
    assert piecewise_ratio(t, 1000, 0.15, 0.40, 0.75) == pytest.approx(row["piecewise_offset_corrected"], abs=1e-12)
    assert num_kept(49, cosine_ratio(t, 1000, 0.15, 0.75)) == row["len_keep_cosine"]


def test_token_counts_of_a_whole_run_equal_the_authors() -> None:
    counts = {
        name: [num_kept(49, mask_ratio(name, s, 1000, **PUBLISHED)) for s in range(1, 1001)] for name in SCHEDULES
    }
    expected = {int(kept): times for kept, times in REFERENCE["len_keep_counts_1000_step_cosine"].items()}
    assert collections.Counter(counts["cosine"]) == expected
    assert sum(counts["piecewise"]) / 1000 == REFERENCE["mean_len_keep_piecewise_corrected_1000"]
    assert len(set(counts["piecewise"])) == REFERENCE["distinct_piecewise_corrected_1000"]
    assert set(counts["constant"]) == {12}


@pytest.mark.parametrize(("tokens", "transitions"), [(16, 9), (49, 29), (64, 38), (196, 117)])
def test_mask_transitions_of_a_token_count(tokens: int, transitions: int) -> None:
    assert len(mask_levels(tokens, 0.15, 0.75)) - 1 == transitions


def test_levels_go_from_most_to_fewest_visible_tokens() -> None:
    assert list(mask_levels(16, 0.15, 0.75)) == [13, 12, 11, 10, 9, 8, 7, 6, 5, 4]


def test_a_150_step_run_of_16_tokens_visits_all_levels() -> None:
    for name in ("uniform", "piecewise", "cosine"):
        visited = {num_kept(16, mask_ratio(name, s, 150, **PUBLISHED)) for s in range(1, 151)}
        assert visited == set(mask_levels(16, 0.15, 0.75)), name


ratios = st.lists(st.floats(0, 0.99), min_size=3, max_size=3).map(sorted)


@given(name=st.sampled_from(SCHEDULES), total=st.integers(1, 400), bounds=ratios)
def test_schedules_rise_from_start_and_stay_within_their_bounds(
    name: MaskScheduleName, total: int, bounds: list[float]
) -> None:
    start, mid, end = bounds
    values = [mask_ratio(name, step, total, start=start, mid=mid, end=end) for step in range(1, total + 1)]
    assert values[0] == pytest.approx(end if name == "constant" else start)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert all(start - 1e-12 <= value <= end + 1e-12 for value in values)


@pytest.mark.parametrize("name", ["piecewise", "cosine"])
def test_the_last_third_holds_the_end_exactly(name: MaskScheduleName) -> None:
    assert {mask_ratio(name, step, 900, **PUBLISHED) for step in range(602, 901)} == {0.75}


def test_uniform_reaches_the_end_exactly_one_step_after_the_last() -> None:
    assert mask_ratio("uniform", 1000, 1000, **PUBLISHED) == pytest.approx(0.75 - 0.6 / 1000)


def test_at_least_one_token_is_visible_and_one_hidden() -> None:
    assert [num_kept(4, ratio) for ratio in (0.0, 0.5, 0.99)] == [3, 2, 1]


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_refused(step: int) -> None:
    with pytest.raises(ValueError, match=r"step must be in 1\.\.10"):
        mask_ratio("cosine", step, 10, **PUBLISHED)


def test_the_schedule_imports_no_torch() -> None:
    code = "import sys, lmd_bench.lmd.mask_schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
