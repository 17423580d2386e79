"""The table of the common yardstick: PSNR, SSIM, LPIPS and time to quality (TTQ), with what bounds them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Final, Literal

from lmd_bench.config import Suite, TargetConfig
from lmd_bench.metrics.intervals import Missing
from lmd_bench.metrics.quality import TTQ, QualityCheck, TargetRule, resolve_target, ttq, ttq_over_seeds
from lmd_bench.records import YARDSTICK_BOUNDS, Progressive, Yardstick
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, label, missing, number
from lmd_bench.report.rows import RowResult

QualityMetric = Literal["psnr", "lpips"]

OWN_MASK: Final = "not ranked: own mask"
"""Stands where a row that was measured under its own masks would be compared with others."""


def yardsticks(found: RowResult) -> list[Yardstick]:
    """The yardsticks of a row's finished runs that were read at least once."""
    read = [run.record.yardstick for run in found.finished]
    return [yardstick for yardstick in read if yardstick is not None and yardstick.checks]


def has_own_mask(found: RowResult) -> bool:
    """Whether a row was measured under masks of its own, not the common ones."""
    return any(yardstick.own_mask for yardstick in yardsticks(found))


def quality_checks(yardstick: Yardstick, metric: QualityMetric = "psnr") -> list[QualityCheck]:
    """A run's checks as the metrics take them, those without the metric left out."""
    values = [check.psnr_db if metric == "psnr" else check.lpips for check in yardstick.checks]
    return [
        QualityCheck(check.step, check.train_s, value)
        for check, value in zip(yardstick.checks, values, strict=True)
        if value is not None
    ]


def _ceiling(yardstick: Yardstick, metric: QualityMetric) -> float | None:
    return yardstick.ceiling_psnr_db if metric == "psnr" else yardstick.ceiling_lpips


def resolve(target: TargetConfig, rows: Mapping[str, RowResult]) -> float | Missing:
    """A target in its metric's unit from the reference row's checks; several seeds: their mean at each step.

    Missing where the row has no such checks, or was measured under masks of its own.
    """
    reference = rows.get(target.of)
    if reference is not None and has_own_mask(reference):
        return Missing(f"the reference {target.of} was measured under its own mask")
    if target.metric == "lpips" and reference is not None and (why := _why_no_lpips(reference)) is not None:
        return Missing(why)
    by_step: dict[int, list[QualityCheck]] = {}
    for yardstick in yardsticks(reference) if reference else []:
        for check in quality_checks(yardstick, target.metric):
            by_step.setdefault(check.step, []).append(check)
    means = [
        QualityCheck(step, fmean(c.train_seconds for c in checks), fmean(c.value for c in checks))
        for step, checks in sorted(by_step.items())
    ]
    rule = TargetRule(target.fraction, target.of)
    return resolve_target(rule, means, lower_is_better=target.metric == "lpips")


def _why_no_lpips(found: RowResult) -> str | None:
    """Why a row that was read on the yardstick has no LPIPS, as its record says; None where it has, or was not read."""
    read = yardsticks(found)
    if not read or any(quality_checks(yardstick, "lpips") for yardstick in read):
        return None
    return found.recorded_reason("lpips")


def quality_table(suite: Suite, rows: Mapping[str, RowResult]) -> Table:
    """Every row on the common yardstick."""
    with_lpips = _knows_lpips(rows)
    targets = [
        (target, resolve(target, rows)) for target in suite.evaluation.targets if target.metric != "lpips" or with_lpips
    ]
    ways = _ways(rows)
    columns = [
        Column("Method", ("row", "label")),
        Column("first", ("psnr_first_db",), "dB", "PSNR over hidden pixels"),
        Column("best", ("psnr_best_db",), "dB", "PSNR over hidden pixels"),
        Column("last", ("psnr_last_db",), "dB", "PSNR over hidden pixels"),
        Column("SSIM, last", ("ssim_last",), "0 to 1"),
        *([Column("LPIPS, last", ("lpips_last",), "AlexNet; less is better")] if with_lpips else []),
        *(_target_column(target, level) for target, level in targets),
        Column("Floor: mean colour", ("mean_colour_psnr_db",), "dB", "Bounds"),
        Column("Floor: nearest visible unit", ("nearest_unit_psnr_db",), "dB", "Bounds"),
        Column("Ceiling: projector alone", ("ceiling_psnr_db",), "dB", "Bounds"),
        Column("Latent leak", ("latent_leak_db",), "dB"),
        Column("Unveiled in levels, gain over one shot", _progressive_parts(ways), "dB"),
        Column("Evaluations", ("function_evaluations",), "per image"),
        Column("Masks", ("own_mask", "image_size_px", "unit_px")),
    ]
    body = tuple(_row(found, targets, len(columns), with_lpips=with_lpips) for found in rows.values())
    return Table(
        "ttq",
        f"The common yardstick: reconstruction quality over training time ({suite.title})",
        tuple(columns),
        (Section(None, body),),
        tuple(_notes(suite, rows, targets, with_lpips=with_lpips)),
    )


def _knows_lpips(rows: Mapping[str, RowResult]) -> bool:
    """Whether any record holds LPIPS on the yardstick or says why not: older ones do neither."""
    return any(
        "lpips" in run.record.not_measured or any(quality_checks(one, "lpips") for one in yardsticks(found))
        for found in rows.values()
        for run in found.finished
    )


Way = tuple[int | None, str]
"""Levels asked for (None: all) and order of unveiling in several predictions."""


def _ways(rows: Mapping[str, RowResult]) -> list[Way]:
    """Every way of unveiling in levels that any row has tried: fewest levels first, all levels last."""
    found = {_way(tried) for row in rows.values() for one in yardsticks(row) for tried in one.progressive}
    return sorted((way for way in found if way[0] != 1), key=lambda way: (way[0] is None, way[0] or 0, way[1]))


def _way(tried: Progressive) -> Way:
    return tried.levels, tried.order


def _way_key(way: Way) -> str:
    return f"progressive_{'all' if way[0] is None else way[0]}_{way[1]}"


def _progressive_parts(ways: Sequence[Way]) -> tuple[str, ...]:
    parts = tuple(f"{_way_key(way)}_{part}" for way in ways for part in ("gain_db", "evaluations"))
    return parts or ("progressive",)


def _most_progressive_images(rows: Mapping[str, RowResult]) -> int:
    counts = [way.num_images for found in rows.values() for one in yardsticks(found) for way in one.progressive]
    return max(counts, default=0)


def _key(target: TargetConfig) -> str:
    metric = "" if target.metric == "psnr" else f"_{target.metric}"
    return f"ttq{metric}_{100 * target.fraction:g}_of_{target.of}".replace("-", "_")


def _unit(target: TargetConfig) -> str:
    """Ends the names of a target's figures."""
    return "_db" if target.metric == "psnr" else ""


def _gain(target: TargetConfig) -> str:
    return "gain" if target.metric == "psnr" else "gain in LPIPS"


def _sign(target: TargetConfig) -> str:
    return "plus" if target.metric == "psnr" else "less"


def _level_text(target: TargetConfig, level: float, digits: int) -> str:
    return f"{level:.{digits}f} dB" if target.metric == "psnr" else f"LPIPS {level:.{digits + 1}f}"


def _target_column(target: TargetConfig, level: float | Missing) -> Column:
    key = _key(target)
    wanted = "no target" if isinstance(level, Missing) else _level_text(target, level, 2)
    return Column(
        f"{100 * target.fraction:g} % of the {_gain(target)} of {target.of} ({wanted})",
        (f"{key}_s", f"{key}_after_s", f"{key}_state", f"{key}_target{_unit(target)}"),
        "s",
        "TTQ",
    )


def _row(
    found: RowResult, targets: Sequence[tuple[TargetConfig, float | Missing]], width: int, *, with_lpips: bool
) -> tuple[Cell, ...]:
    name = Cell((found.label, f"{found.row}, {found.seeds_text}"), "label", {"row": found.row, "label": found.label})
    read = yardsticks(found)
    if not read:
        why = found.why_nothing or f"not measured: {found.recorded_reason('yardstick', 'ttq')}"
        return (name, *(missing(why) for _ in range(width - 1)))
    psnrs = [[check.psnr_db for check in yardstick.checks] for yardstick in read]
    lacking = None
    if any(YARDSTICK_BOUNDS in run.record.not_measured for run in found.finished):
        lacking = f"not measured: {found.recorded_reason(YARDSTICK_BOUNDS)}"
    return (
        name,
        _mean_cell([values[0] for values in psnrs], "psnr_first_db"),
        _mean_cell([max(values) for values in psnrs], "psnr_best_db"),
        _mean_cell([values[-1] for values in psnrs], "psnr_last_db"),
        _mean_cell([yardstick.checks[-1].ssim for yardstick in read], "ssim_last", digits=3),
        *([_lpips_cell(found, read)] if with_lpips else []),
        *(_ttq_cell(found, read, target, level) for target, level in targets),
        _optional(read, "mean_colour_psnr_db", lacking or "not measured: not in the record"),
        _optional(read, "nearest_unit_psnr_db", lacking or "not measured: not in the record"),
        _optional(read, "ceiling_psnr_db", lacking or "none: works on pixels"),
        _optional(read, "latent_leak_db", lacking or "none: no projector to leak"),
        _progressive_cell(read, lacking),
        Cell((str(read[0].function_evaluations),), "value", {"function_evaluations": read[0].function_evaluations}),
        _masks_cell(read[0]),
    )


def _mean_cell(values: Sequence[float], name: str, digits: int = 2) -> Cell:
    """The mean over seeds; with several, their range below it."""
    mean = fmean(values)
    lines = [f"{mean:.{digits}f}"]
    if len(values) > 1:
        lines.append(f"{min(values):.{digits}f} to {max(values):.{digits}f}")
    return Cell(tuple(lines), "value", {name: mean})


def _lpips_cell(found: RowResult, read: Sequence[Yardstick]) -> Cell:
    values = [value for yardstick in read if (value := yardstick.checks[-1].lpips) is not None]
    if not values:
        return missing(f"not measured: {found.recorded_reason('lpips')}")
    return _mean_cell(values, "lpips_last", digits=3)


def _optional(read: Sequence[Yardstick], name: str, otherwise: str) -> Cell:
    values = [value for yardstick in read if (value := getattr(yardstick, name)) is not None]
    if values:
        return _mean_cell(values, name)
    return missing(otherwise) if otherwise.startswith("not measured") else label(otherwise)


def _progressive_cell(read: Sequence[Yardstick], lacking: str | None) -> Cell:
    """What walking the mask levels gains or loses, each way for itself; several seeds: the mean gain."""
    gains: dict[Way, list[float]] = {}
    evaluations: dict[Way, int] = {}
    for yardstick in read:
        one_shot = next((tried.psnr_db for tried in yardstick.progressive if tried.levels == 1), None)
        for tried in yardstick.progressive:
            if one_shot is not None and tried.levels != 1:
                gains.setdefault(_way(tried), []).append(tried.psnr_db - one_shot)
                evaluations[_way(tried)] = max(tried.function_evaluations, evaluations.get(_way(tried), 0))
    if not gains:
        return missing(lacking) if lacking else label("none: one prediction only")
    lines: list[str] = []
    parts: dict[str, Number | str] = {}
    for way, values in gains.items():
        levels, order = way
        lines.append(f"{fmean(values):+.2f}: {levels or 'all'} levels, {order}, {evaluations[way]} evaluations")
        parts |= {f"{_way_key(way)}_gain_db": fmean(values), f"{_way_key(way)}_evaluations": evaluations[way]}
    return Cell(tuple(lines), "value", parts)


def _masks_cell(yardstick: Yardstick) -> Cell:
    parts: dict[str, Number | str] = {"image_size_px": yardstick.image_size, "unit_px": yardstick.unit_px}
    size = f"{yardstick.image_size} px, units of {yardstick.unit_px} px"
    if yardstick.own_mask:
        lines = (f"own mask: {yardstick.own_mask}", "not ranked", size)
        return Cell(lines, "value", parts | {"own_mask": yardstick.own_mask})
    return Cell(("common", size), "value", parts | {"own_mask": "common"})


def _ttq_cell(found: RowResult, read: Sequence[Yardstick], target: TargetConfig, level: float | Missing) -> Cell:
    key = _key(target)
    lower = target.metric == "lpips"
    wanted = f"{key}_target{_unit(target)}"
    if lower and (why := _why_no_lpips(found)) is not None:
        return missing(f"not measured: {why}")
    if isinstance(level, Missing):
        return missing(f"no target: {level.reason}")
    if any(yardstick.own_mask for yardstick in read):
        return Cell((OWN_MASK,), "missing", {wanted: level})
    results = [
        ttq(checks, level, _ceiling(yardstick, target.metric), lower_is_better=lower)
        for yardstick in read
        if (checks := quality_checks(yardstick, target.metric))
    ]
    if len(results) == 1:
        return _single_ttq(results[0], key, wanted)
    if all(result.state == "above ceiling" for result in results):
        return Cell((results[0].text,), "missing", {wanted: level})
    together = ttq_over_seeds(results)
    points = ", ".join("missed" if point is None else f"{point:.4g}" for point in together.points)
    parts: dict[str, Number | str] = {
        f"{key}_s": "not reached" if together.median_seconds is None else together.median_seconds,
        f"{key}_after_s": f"points: {points}",
        f"{key}_state": f"{together.num_reached} of {together.num_seeds} reached",
        wanted: level,
    }
    return Cell((together.text, f"points: {points}"), "value", parts)


def _single_ttq(result: TTQ, key: str, wanted: str) -> Cell:
    state: dict[str, Number | str] = {f"{key}_state": result.state, wanted: result.target}
    if result.seconds is None:
        return Cell((result.text,), "missing", state)
    after = "start" if result.after_seconds is None else number(float(result.after_seconds))
    lines = [number(float(result.seconds)), f"between {after} and {number(float(result.seconds))}"]
    if result.state != "reached":
        lines.append("last check: not confirmed")
    edge: Number | str = "start" if result.after_seconds is None else result.after_seconds
    return Cell(tuple(lines), "value", {f"{key}_s": result.seconds, f"{key}_after_s": edge} | state)


def _who_is_compared(own: Sequence[str]) -> str:
    return f"All rows but {', '.join(own)} (own mask, not ranked) fill" if own else "All rows fill"


def _notes(
    suite: Suite,
    rows: Mapping[str, RowResult],
    targets: Sequence[tuple[TargetConfig, float | Missing]],
    *,
    with_lpips: bool,
) -> list[str]:
    evaluation = suite.evaluation
    own = [found.label for found in rows.values() if has_own_mask(found)]
    notes = [
        f"{_who_is_compared(own)} the same hidden parts of the same {evaluation.num_images} held-out images "
        f"(squares of {evaluation.unit_px} px, {100 * evaluation.keep:g} % of them visible), off the clock; the "
        "harness pastes the visible pixels back. PSNR over hidden pixels only, "
        f"SSIM{' and LPIPS' if with_lpips else ''} over the whole; several seeds: mean and range.",
        "TTQ: training seconds until the target is first reached and held at the next check; the time itself lies "
        "between that check and the one before. A target above its projector's ceiling cannot be reached.",
        "Latent leak: PSNR gained when the projector sees the whole image before latents are masked; the other columns "
        "are without it. Evaluations: forward passes of the trained network per reconstruction.",
        "Floors need no learning: hidden pixels filled with the mean colour of the visible ones, or every hidden unit "
        "with a copy of the nearest visible one.",
    ]
    if images := _most_progressive_images(rows):
        notes.append(
            f"Unveiled in levels: PSNR gained over one shot, on the first {images} of the images, when tokens are "
            "filled in over several predictions: in a random order, or those first whose prediction has settled most "
            "(confidence). All ways are compared on the same images: the best of them is chosen with hindsight, and "
            "its gain is more than other images would show."
        )
    notes += [
        f"{100 * target.fraction:g} % of the {_gain(target)} of {target.of}: "
        + (f"no target: {level.reason}." if isinstance(level, Missing) else f"{_level_text(target, level, 3)}, the "
           f"first check of {target.of} {_sign(target)} that share of its gain to its best check.")
        for target, level in targets
    ]  # fmt: skip
    if not targets:
        notes.append("The suite names no target, so there is no TTQ.")
    sizes = {yardstick.image_size for found in rows.values() for yardstick in yardsticks(found)}
    if len(sizes) > 1:
        listed = ", ".join(map(str, sorted(sizes)))
        notes.append(f"Rows of different image sizes ({listed} px) cannot be ranked together.")
    return notes
