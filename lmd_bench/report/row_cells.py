"""Cells that several tables share: a row's name, its figures with ratio and verdict, its shares and set-up."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Final

from lmd_bench.metrics.intervals import NO_INTERVAL, Figure, Interval, Missing, Ratio, ratio
from lmd_bench.records import CACHED_LATENTS
from lmd_bench.report.cells import Cell, Column, Number, label, missing, number, percent, span
from lmd_bench.report.rows import RowResult, points_text, short_kind


def name_cell(found: RowResult, *, tuning: bool = False) -> Cell:
    """What names a row, with the kind of its intervals (MLT's, else MIT's) and, from the fourth line on, its marks.

    tuning: those of fine-tuning too.
    """
    figure = found.figure(lambda e: e.headline.mlt_ms, "mlt")
    if isinstance(figure, Missing):
        figure = found.figure(lambda e: e.mit_whole_ms, "mit")
    return _name_cell(found, figure, list(dict.fromkeys([*found.marks, *(found.tuning_marks if tuning else ())])))


def tuning_name_cell(found: RowResult, figure: Figure) -> Cell:
    """The same for a table of fine-tuning: the kind is that of `figure`."""
    return _name_cell(found, figure, found.tuning_marks)


def _name_cell(found: RowResult, figure: Figure, marks: Sequence[str]) -> Cell:
    kind = short_kind(figure.kind) if isinstance(figure, Interval) else "none"
    parts: dict[str, Number | str] = {
        "row": found.row, "label": found.label, "seeds": len(found.finished), "interval_kind": kind,
        "marks": "; ".join(marks) or "none",
    }  # fmt: skip
    said = kind if kind.startswith(NO_INTERVAL) else f"interval: {kind}"
    return Cell((found.label, f"{found.row}, {found.seeds_text}", said, *marks), "label", parts)


def measured_parts(key: str, unit: str) -> tuple[str, ...]:
    """CSV columns of a measured figure: value, interval, ratio to the reference row, its interval and verdict."""
    figure = (f"{key}{unit}", f"{key}{unit}_low", f"{key}{unit}_high")
    return (*figure, f"{key}_ratio", f"{key}_ratio_low", f"{key}_ratio_high", f"{key}_verdict")


NAME_COLUMN: Final = Column("Method", ("row", "label", "seeds", "interval_kind", "marks"))


def measured_cell(
    found: RowResult,
    reference: RowResult | None,
    figure_of: Callable[[RowResult], Figure],
    key: str,
    unit: str,
    scale: float,
    obstacle: str | None = None,
) -> Cell:
    """A figure with its interval, and its ratio to the reference row with a verdict; `obstacle`: why there is none."""
    figure = figure_of(found)
    if isinstance(figure, Missing):
        return missing(figure.reason)
    lines, parts = figure_lines(figure, f"{key}{unit}", scale)
    names = measured_parts(key, unit)[3:]
    if reference is None:
        return Cell((*lines, "no reference row"), "value", parts | dict.fromkeys(names, "no reference row"))
    if reference.row == found.row:
        return Cell((*lines, "reference"), "value", parts | dict.fromkeys(names[:3], 1.0) | {names[3]: "reference"})
    against = Missing(obstacle) if obstacle else ratio(figure, figure_of(reference), found.confidence)
    more, more_parts = ratio_lines(against, reference.row, key)
    return Cell((*lines, *more), "value", parts | more_parts)


def figure_lines(figure: Interval, name: str, scale: float = 1.0) -> tuple[list[str], dict[str, Number | str]]:
    """A figure's value and interval as lines, and as CSV parts `name`, `name_low`, `name_high`."""
    value = figure.value * scale
    if figure.low is None or figure.high is None:
        points = points_text(_scaled(figure, scale))
        why = points or short_kind(figure.kind)
        lines = [number(value), why, *(_seeds_behind(figure) if points else ())]
        return lines, {name: value, f"{name}_low": why, f"{name}_high": why}
    low, high = figure.low * scale, figure.high * scale
    lines = [number(value), span(value, low, high), *_seeds_behind(figure)]
    return lines, {name: value, f"{name}_low": low, f"{name}_high": high}


def _seeds_behind(figure: Interval) -> list[str]:
    """ "2 of 3 seeds" where some have no such figure; nothing where all have."""
    match = re.search(r"\d+ of \d+ seeds", figure.kind)
    return [match[0]] if match else []


def seeds_line(count: int, found: RowResult) -> tuple[str, ...]:
    """ "2 of 3 seeds" where a mean is of `count` of the row's finished runs alone; nothing where it is of all."""
    total = len(found.finished)
    return () if count == total else (f"{count} of {total} seeds",)


def _scaled(figure: Interval, scale: float) -> Interval:
    return Interval(figure.value * scale, None, None, figure.kind, tuple(point * scale for point in figure.points))


def ratio_lines(against: Ratio | Missing, name: str, key: str) -> tuple[list[str], dict[str, Number | str]]:
    """A ratio to the row `name` as lines with its verdict, and as CSV parts `key_ratio`, ..., `key_verdict`."""
    columns = (f"{key}_ratio", f"{key}_ratio_low", f"{key}_ratio_high", f"{key}_verdict")
    if isinstance(against, Missing):
        reason = f"no ratio: {name}: {against.reason}"
        return [reason], dict.fromkeys(columns, reason)
    head = f"{number(against.value)} × {name}"
    if against.low is None or against.high is None:
        return [head, against.verdict], {
            columns[0]: against.value, columns[1]: against.kind, columns[2]: against.kind, columns[3]: against.verdict
        }  # fmt: skip
    values = (against.value, against.low, against.high, against.verdict)
    return [head, span(against.value, against.low, against.high), against.verdict], dict(
        zip(columns, values, strict=True)
    )


def setup(found: RowResult) -> Cell:
    """What was trained here: parameters, image size, batch, optimizer, precision."""
    if found.why_nothing and not found.runs:
        return missing(found.why_nothing)
    record = next((run.record for run in found.finished), found.runs[0].record)
    config, lines = record.config, []
    if record.cost:
        text = f"{number(record.cost.trainable_parameters / 1e6)} M trainable"
        if record.cost.projector_parameters:
            text += f", {number(record.cost.projector_parameters / 1e6)} M frozen projector"
        if found.comes_trained:
            text = f"{number(record.cost.parameters / 1e6)} M, comes trained"
        lines.append(text)
    recipe = {} if record.num_steps == 0 else config.get("recipe") or {}
    described = [
        f"{config['image_size']} px" if "image_size" in config else "",
        f"batch {recipe['batch_size']}" if "batch_size" in recipe else "",
        str((recipe.get("optimizer") or {}).get("name", "")),
        str(config.get("precision", "")),
        f"{record.num_steps} steps" if record.num_steps else "nothing trained",
    ]
    lines.append(", ".join(text for text in described if text))
    return Cell(tuple(lines), "label", {"setup": ", ".join(lines)})


def mask_ratio_cell(found: RowResult) -> Cell:
    """The mask ratio of the first and the last step."""
    if found.why_nothing:
        return missing(found.why_nothing)
    if found.mask_range is None:
        return label("no mask") if any(run.steps for run in found.finished) else missing("not measured: no steps.csv")
    first, last = found.mask_range
    lines = (number(first),) if first == last else (number(first), f"to {number(last)}")
    return Cell(lines, "value", {"mask_ratio_first": first, "mask_ratio_last": last})


DIFFUSION_STEPS: Final = ("diffusion_steps", "reverse_steps", "mask_levels")
"""CSV columns of `diffusion_steps_cell`."""
_NAMES_OF_T: Final = ("num_timesteps", "num_train_timesteps", "timesteps", "diffusion_steps")


def diffusion_steps_cell(found: RowResult) -> Cell:
    """Steps of a diffusion method, which its options name: T in training, and the reverse ones of a reconstruction.

    For other rows that mask: the mask levels walked in training.
    """
    if found.why_nothing:
        return missing(found.why_nothing)
    timesteps = _num_timesteps(found)
    if timesteps is not None:
        return _timesteps_cell(found, timesteps)
    if found.mask_range is None:
        return label("no mask; the record names no number of timesteps")
    levels = found.mask_levels
    if levels is None:
        return missing("not measured: token counts were not recorded")
    parts: dict[str, Number | str] = dict.fromkeys(DIFFUSION_STEPS[:2], "no diffusion")
    return Cell((f"{levels} mask levels",), "value", parts | {DIFFUSION_STEPS[2]: levels})


def _timesteps_cell(found: RowResult, timesteps: int) -> Cell:
    read = [run.record.yardstick for run in found.finished if run.record.yardstick is not None]
    parts: dict[str, Number | str] = {DIFFUSION_STEPS[0]: timesteps, DIFFUSION_STEPS[2]: "no mask levels"}
    if not read:
        why = f"not measured: {found.recorded_reason('yardstick', 'ttq')}"
        return Cell((f"{timesteps} in training", f"reverse: {why}"), "value", parts | {DIFFUSION_STEPS[1]: why})
    reverse = read[0].function_evaluations
    lines = (f"{timesteps} in training", f"{reverse} to reconstruct")
    return Cell(lines, "value", parts | {DIFFUSION_STEPS[1]: reverse})


def _num_timesteps(found: RowResult) -> int | None:
    options = [run.record.config.get("options") or {} for run in found.finished]
    return next((int(values[name]) for values in options for name in _NAMES_OF_T if values.get(name)), None)


def share_cell(found: RowResult, share: float | None, name: str) -> Cell:
    """A share of the step as a percentage; the CSV holds the share itself."""
    if found.why_nothing:
        return missing(found.why_nothing)
    if share is None:
        return missing(f"not measured: {found.recorded_reason(name, 'phases')}")
    return Cell((percent(share),), "value", {name: share})


def shares_cell(found: RowResult) -> Cell:
    """The projector's share of the step and the stall's."""
    projector = found.share(lambda phases: phases.projector_share)
    stall = found.share(lambda phases: phases.stall_share)
    if found.why_nothing or projector is None or stall is None:
        return share_cell(found, None, "phases")
    if (cache := found.latent_cache) is not None:
        before = f"encoded before: {number(cache['seconds'])} s, {number(cache['num_bytes'] / 2**20)} MiB"
        return two_shares(projector, stall, instead=(CACHED_LATENTS, before))
    return two_shares(projector, stall, instead=() if found.has_projector else ("no projector",))


def two_shares(projector: float, stall: float, *, instead: tuple[str, ...] = ()) -> Cell:
    """Projector and stall in one cell.

    `instead` stands for the projector's share where steps project nothing: its phase is the cost of one more mark.
    """
    lines = (*(instead or (percent(projector),)), f"stall {percent(stall)}")
    return Cell(lines, "value", {"projector_share": projector, "stall_share": stall})


def decreases_cell(found: RowResult) -> Cell:
    """N, the step of t90 and the mask ratio there; several seeds: the range."""
    if found.why_nothing:
        return missing(found.why_nothing)
    windows = [e for e in found.efficiencies if e.window_steps is not None]
    if not windows:
        reasons = [e.window_reason for e in found.efficiencies if e.window_reason]
        return missing(reasons[0] if reasons else f"not measured: {found.recorded_reason('efficiency')}")
    counts = [e.headline.num_decreases or 0.0 for e in windows]
    steps = [e.window_steps or 0 for e in windows]
    ratios = [e.mask_ratio_at_t90 for e in windows if e.mask_ratio_at_t90 is not None]
    lines = [range_text(counts), f"t90: step {range_text(steps)}"]
    lines.append(f"mask {range_text(ratios)}" if ratios else "no mask")
    return Cell(
        tuple(lines),
        "value",
        {
            "num_decreases": fmean(counts),
            "t90_step": fmean(steps),
            "mask_ratio_at_t90": fmean(ratios) if ratios else "no mask",
        },
    )


def range_text(values: Sequence[float] | Sequence[int]) -> str:
    """Smallest to largest, once where they are equal."""
    texts = [number(round(value, 6)) if value % 1 else str(int(value)) for value in (min(values), max(values))]
    return texts[0] if texts[0] == texts[1] else f"{texts[0]} to {texts[1]}"
