"""The table "one factor at a time": every row that is a change of another one, beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import RunEfficiency
from lmd_bench.metrics.intervals import Figure, Missing, over_seeds, ratio
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, label, missing, number, plain
from lmd_bench.report.load import Profile
from lmd_bench.report.quality import OWN_MASK, has_own_mask, yardsticks
from lmd_bench.report.row_cells import NAME_COLUMN, name_cell, ratio_lines
from lmd_bench.report.rows import RowResult
from lmd_bench.report.step_cost import RowRounds, measured_rows, paired_cell, ratio_parts

MOST_DIFFERENCES: Final = 6
"""Values in which two rows differ that a cell has room for."""
_RATIOS: Final[Mapping[str, tuple[str, Callable[[RunEfficiency], Figure]]]] = {
    "mit": ("MIT", lambda e: e.mit_ms),
    "mli": ("MLI", lambda e: e.headline.mli),
    "mlt": ("MLT", lambda e: e.headline.mlt_ms),
}
_PSNR_PARTS: Final = ("psnr_gain_db", "psnr_gain_low_db", "psnr_gain_high_db", "psnr_verdict")


def factors_table(suite: Suite, rows: Mapping[str, RowResult], profiles: Sequence[Profile]) -> Table:
    """What differs between each row and its base, and what that does to time, to the loss and to quality.

    Where no row was trained, only those of the speed runs stand here.
    """
    speed = [(profile, measured_rows(profile.record)) for profile in profiles]
    changed = [found for found in rows.values() if found.config is not None and found.config.base is not None]
    if not any(found.runs for found in rows.values()):
        changed = [found for found in changed if any(found.row in measured for _, measured in speed)]
    columns = [
        NAME_COLUMN,
        Column("Base", ("base", "base_label")),
        Column("Differs in", ("differs_in",), "base, then row"),
        *(Column(title, ratio_parts(key), "ratio to the base") for key, (title, _) in _RATIOS.items()),
        Column("Best PSNR", _PSNR_PARTS, "dB above the base"),
        *(
            Column(_speed_title(profile), ratio_parts(f"step{_speed_key(profile)}"), "ratio to the base", "Step")
            for profile, _ in speed
        ),
    ]
    body = tuple(_row(found, rows[_base(found)], suite.estimator.confidence, speed) for found in changed)
    title = f"One factor at a time: each row against its base ({suite.title})"
    return Table("factors", title, tuple(columns), (Section(None, body),), tuple(_notes(suite, bool(speed))))


def _base(found: RowResult) -> str:
    assert found.config is not None  # only rows with a base come here
    assert found.config.base is not None
    return found.config.base


def _speed_key(profile: Profile) -> str:
    return profile.tag.replace("-", "_").replace(".", "_")


def _speed_title(profile: Profile) -> str:
    record = profile.record
    compiled = ", compiled" if record.compile else ""
    return f"speed run, {record.batch_text}, {record.precision}{compiled}, {record.progress}"


def _row(
    found: RowResult, base: RowResult, confidence: float, speed: Sequence[tuple[Profile, dict[str, RowRounds]]]
) -> tuple[Cell, ...]:
    return (
        name_cell(found),
        Cell((base.label, base.row), "label", {"base": base.row, "base_label": base.label}),
        _difference_cell(found, base),
        *(_ratio_cell(found, base, pick, key, confidence) for key, (_, pick) in _RATIOS.items()),
        _psnr_cell(found, base, confidence),
        *(_speed_cell(found, base, profile, measured, confidence) for profile, measured in speed),
    )


# -- what differs -----------------------------------------------------------------------------------------------------


def _difference_cell(found: RowResult, base: RowResult) -> Cell:
    """The values that differ; rows of different methods name theirs otherwise, so the row's note speaks for them."""
    assert found.config is not None
    assert base.config is not None
    methods = found.config.method, base.config.method
    if methods[0] != methods[1]:
        return label(found.config.note or f"method: {methods[1]}, {methods[0]}")
    mine, others = _values(found, base), _values(base, found)
    names = [name for name in sorted({*mine, *others}) if mine.get(name) != others.get(name)]
    if not names:
        return label("nothing that the settings name")
    lines = [f"{name}: {_said(others, name)}, {_said(mine, name)}" for name in names[:MOST_DIFFERENCES]]
    if len(names) > MOST_DIFFERENCES:
        lines.append(f"and {len(names) - MOST_DIFFERENCES} more")
    return Cell(tuple(lines), "label", {"differs_in": "; ".join(lines)})


def _values(found: RowResult, other: RowResult) -> dict[str, Any]:
    """A row's settings by dotted name: as they ran, defaults filled in, where both rows have; else as they are set."""
    if found.finished and other.finished:
        ran = found.finished[0].record.config
        recipe = {name: value for name, value in (ran.get("recipe") or {}).items() if name != "source"}
        return _flat({**(ran.get("options") or {}), "image_size": ran.get("image_size"), "recipe": recipe})
    config = found.config
    assert config is not None
    return _flat({**config.options, "image_size": config.image_size, "recipe": config.recipe})


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _said(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "not set"
    value = values[name]
    return "none" if value is None else plain(str(value), 60)


# -- what it does -----------------------------------------------------------------------------------------------------


def _ratio_cell(
    found: RowResult, base: RowResult, pick: Callable[[RunEfficiency], Figure], key: str, confidence: float
) -> Cell:
    figure = found.figure(pick, key)
    if isinstance(figure, Missing):
        return missing(figure.reason)
    lines, parts = ratio_lines(ratio(figure, base.figure(pick, key), confidence), base.row, key)
    return Cell(tuple(lines), "value", parts)


def _psnr_cell(found: RowResult, base: RowResult, confidence: float) -> Cell:
    """Best PSNR less the base's. In dB the ratio of two errors is a difference, so intervals are those of ratios."""
    for one in (found, base):
        if not yardsticks(one):
            why = one.why_nothing or f"not measured: {one.recorded_reason('yardstick', 'ttq')}"
            return missing(why if one is found else f"no difference: {one.row}: {why}")
        if has_own_mask(one):
            return missing(OWN_MASK if one is found else f"no difference: {one.row}: {OWN_MASK}")
    against = ratio(_gain(found, confidence), _gain(base, confidence), confidence)
    assert not isinstance(against, Missing)  # both sides were read
    value = _decibels(against.value)
    if against.low is None or against.high is None:
        why = "no interval: fewer than three seeds"
        return Cell((f"{value:+.2f}", why), "value", dict(zip(_PSNR_PARTS, (value, why, why, why), strict=True)))
    low, high = _decibels(against.low), _decibels(against.high)
    verdict = "better" if low > 0 else "worse" if high < 0 else "not distinguishable"
    parts: dict[str, Number | str] = dict(zip(_PSNR_PARTS, (value, low, high, verdict), strict=True))
    return Cell((f"{value:+.2f}", f"[{low:+.2f}, {high:+.2f}]", verdict), "value", parts)


def _gain(found: RowResult, confidence: float) -> Figure:
    """1 / mean squared error of every seed's best check, of which PSNR is ten times the decimal logarithm."""
    best = [max(check.psnr_db for check in yardstick.checks) for yardstick in yardsticks(found)]
    return over_seeds([10 ** (psnr / 10) for psnr in best], confidence)


def _decibels(share: float) -> float:
    return 10 * math.log10(share)


def _speed_cell(
    found: RowResult, base: RowResult, profile: Profile, measured: Mapping[str, RowRounds], confidence: float
) -> Cell:
    for one in (found, base):
        if one.row not in measured:
            reason = profile.record.not_measured.get(one.row, "not in this speed run")
            return missing(f"not measured: {one.row}: {plain(reason)}")
    values, others = measured[found.row].periods, measured[base.row].periods
    return paired_cell(values, others, f"step{_speed_key(profile)}", base.row, confidence)


def _notes(suite: Suite, has_speed: bool) -> list[str]:
    percentage = f"{number(100 * suite.estimator.confidence)} %"
    notes = [
        "Every row stands against its own base, not against the suite's reference. Differs in: the base's value, then "
        "the row's; of rows of different methods their note speaks.",
        f"Ratios below 1 are faster than the base; verdicts are on the {percentage} interval of the ratio. Losses in "
        "different spaces fall differently: across such a change MLI and MLT do not rank, PSNR does.",
        "Best PSNR: the best check over hidden pixels, mean over seeds; an interval needs three seeds of both rows "
        "(Welch's t on the seeds).",
    ]
    if has_speed:
        notes.append("Step: paired rounds of a speed run, Student's t on the logs of ratios within the same round.")
    return notes
