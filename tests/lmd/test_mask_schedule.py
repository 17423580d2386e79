"""The masking diffusion scheduler against the authors' tables, the paper's arithmetic and its own properties."""

import collections
import itertools
import math
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmd_bench.errors import ConfigError
from lmd_bench.lmd.mask_schedule import (
    FUNCTION_INTERVALS,
    MaskScheduleName,
    check_leaves_tokens,
    cosine_ratio,
    mask_levels,
    mask_ratio,
    num_kept,
    piecewise_ratio,
    points_ratio,
    read_schedule,
    sample_schedule,
    schedule_range,
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


# -- a user's own -----------------------------------------------------------------------------------------------------


def test_two_points_are_the_uniform_schedule_and_five_the_piecewise_one() -> None:
    two = read_schedule([[0, 0.15], [1, 0.75]])
    five = read_schedule([(0, 0.15), (1 / 6, 0.4), (1 / 3, 0.4), (2 / 3, 0.75), (1, 0.75)])
    for step in range(1, 301):
        assert mask_ratio(two, step, 300, **PUBLISHED) == pytest.approx(mask_ratio("uniform", step, 300, **PUBLISHED))
        assert mask_ratio(five, step, 300, **PUBLISHED) == pytest.approx(
            mask_ratio("piecewise", step, 300, **PUBLISHED)
        )
    assert schedule_range(two, start=0.0, end=0.0) == (0.15, 0.75)


def test_two_points_of_one_progress_are_a_jump() -> None:
    points = read_schedule([[0, 0.1], [0.5, 0.2], [0.5, 0.6], [1, 0.6]])
    assert not isinstance(points, str)
    assert points_ratio(points, 0.25) == pytest.approx(0.15)
    assert points_ratio(points, 0.5 - 1e-12) == pytest.approx(0.2)
    assert points_ratio(points, 0.5) == points_ratio(points, 1.0) == 0.6


points_that_rise = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 0.99)), min_size=2, max_size=8).map(
    lambda pairs: [
        (0.0 if i == 0 else 1.0 if i == len(pairs) - 1 else progress, ratio)
        for i, (progress, ratio) in enumerate(
            zip(sorted(p for p, _ in pairs), sorted(r for _, r in pairs), strict=True)
        )
    ]
)


@given(points=points_that_rise, total=st.integers(1, 300))
def test_points_rise_and_stay_within_their_bounds(points: list[tuple[float, float]], total: int) -> None:
    if points[-2][0] == 1.0:
        return  # a jump that no step reaches is refused, below
    schedule = read_schedule(points)
    values = [mask_ratio(schedule, step, total, **PUBLISHED) for step in range(1, total + 1)]
    low, high = schedule_range(schedule, start=0.0, end=0.0)
    assert all(later >= earlier - 1e-12 for earlier, later in itertools.pairwise(values))
    assert all(low - 1e-12 <= value <= high + 1e-12 for value in values)


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([], "from progress 0 to progress 1, got no points"),
        ([[0, 0.1]], "from progress 0 to progress 1, got from 0 to 0"),
        ([[0.1, 0.1], [1, 0.5]], "got from 0.1 to 1"),
        ([[0, 0.1], [0.9, 0.5]], "got from 0 to 0.9"),
        ([[0, 0.1], [0.5, 1.0], [1, 1.0]], "mask ratio 1 at progress 0.5"),
        ([[0, -0.1], [1, 0.5]], "mask ratio -0.1 at progress 0"),
        ([[0, 0.1], [0.6, 0.2], [0.4, 0.3], [1, 0.5]], "goes back from progress 0.6 to 0.4"),
        ([[0, 0.1], [0.6, 0.4], [1, 0.3]], "falls from a mask ratio of 0.4 at progress 0.6 to 0.3 at 1"),
        ([[0, 0.1], [1, 0.2], [1, 0.3]], "jumps at progress 1"),
        ([[0, 0.1], [1]], r"point 2 must be two numbers \[progress, ratio\], got \[1\]"),
        ([[0, 0.1], [1, "much"]], "point 2 must be two numbers"),
        ([[0, 0.1], [1, float("nan")]], "point 2 must be two numbers"),
        (0.75, "a name, a list of .* points or module:function, got 0.75"),
        ("cosin", r"no schedule 'cosin' \(nor a list .* did you mean 'cosine'"),
    ],
)
def test_points_that_are_no_schedule_are_refused_with_the_place(points: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_schedule(points)


def test_a_function_becomes_points_that_follow_it_closely() -> None:
    def curve(progress: float) -> float:
        return 0.15 + 0.6 * math.sin(progress * math.pi / 2)

    points = sample_schedule(curve, "mine:curve")
    assert len(points) == FUNCTION_INTERVALS + 1
    assert all(points_ratio(points, i / 999) == pytest.approx(curve(i / 999), abs=5e-6) for i in range(1000))


def test_points_that_lie_on_a_line_are_left_out() -> None:
    points = sample_schedule(lambda progress: min(0.7, 0.1 + progress), "mine:ramp")
    assert points[0] == (0.0, 0.1)
    assert points[-1] == (1.0, 0.7)
    assert len(points) <= 5
    assert all(points_ratio(points, i / 512) == pytest.approx(min(0.7, 0.1 + i / 512), abs=2e-3) for i in range(513))


def write_schedule(folder: Path, body: str) -> str:
    path = folder / "my_schedule.py"
    path.write_text(f"calls = []\n\ndef grow(progress):\n    {body}\n")
    return f"{path}:grow"


def test_a_function_in_a_file_is_read_again_when_the_file_changes(tmp_path: Path) -> None:
    first = read_schedule(write_schedule(tmp_path, "return 0.1 + 0.5 * progress"))
    assert first == ((0.0, 0.1), (1.0, pytest.approx(0.6)))
    second = read_schedule(write_schedule(tmp_path, "return 0.1 + 0.6 * progress"))
    assert second == ((0.0, 0.1), (1.0, pytest.approx(0.7)))


def test_a_function_of_an_importable_module_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schedules_of_mine.py").write_text("def late(progress):\n    return 0.9 * progress**2\n")
    monkeypatch.syspath_prepend(tmp_path)
    points = read_schedule("schedules_of_mine:late")
    assert not isinstance(points, str)
    assert points_ratio(points, 0.5) == pytest.approx(0.225)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("return 0.8 - progress / 2", "grow falls from a mask ratio of 0.8 at progress 0 to 0.79"),
        ("return progress", "grow has the mask ratio 1 at progress 1"),
        ("return float('nan')", "grow has the mask ratio nan at progress 0"),
        ("return 'much'", "grow must return a number, got 'much' at progress 0"),
        ("return None", "grow must return a number, got None at progress 0"),
        ("return 1 / (progress - 0.5)", "grow failed at progress 0.5: ZeroDivisionError|mask ratio -2 at progress 0"),
    ],
)
def test_a_function_that_is_no_schedule_is_refused_with_the_place(tmp_path: Path, body: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_schedule(write_schedule(tmp_path, body))


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("{folder}/none.py:grow", "no file .*none.py"),
        ("{folder}/my_schedule.py:shrink", "has no function shrink; there is: grow"),
        ("{folder}/my_schedule.py:calls", "has no function calls"),
        ("{folder}/broken.py:grow", "importing .*broken.py failed: SyntaxError"),
        ("no_such_module_at_all:grow", "importing no_such_module_at_all failed: ModuleNotFoundError"),
        ("math:not a name", "write it as module:function or file.py:function"),
        (":grow", "write it as module:function or file.py:function"),
    ],
)
def test_a_function_that_cannot_be_had_is_refused(tmp_path: Path, target: str, words: str) -> None:
    write_schedule(tmp_path, "return 0.5")
    (tmp_path / "broken.py").write_text("def grow(:\n")
    with pytest.raises(ValueError, match=words):
        read_schedule(target.format(folder=tmp_path))


def test_a_ratio_that_leaves_no_token_is_refused() -> None:
    check_leaves_tokens(49, 0.75, "mask_ratio")
    check_leaves_tokens(16, 0.9, "mask_ratio")
    with pytest.raises(
        ConfigError, match=r"^mask_ratio: a mask ratio of 0.95 leaves none of 16 tokens visible; stay below 0.9375"
    ):
        check_leaves_tokens(16, 0.95, "mask_ratio")


def test_the_range_of_a_named_schedule_is_from_start_to_end_but_constant_has_one_ratio() -> None:
    assert schedule_range("cosine", start=0.15, end=0.75) == (0.15, 0.75)
    assert schedule_range("constant", start=0.15, end=0.75) == (0.75, 0.75)


def test_the_schedule_imports_no_torch() -> None:
    code = "import sys, lmd_bench.lmd.mask_schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
