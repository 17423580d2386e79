"""The table "inference": what a reconstructed and a sampled image cost each row."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Final

from lmd_bench.metrics.intervals import Missing, ratio_of_rounds
from lmd_bench.records import InferenceRecord, InferenceRound
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, missing, number, percent, plain, span
from lmd_bench.report.row_cells import ratio_lines
from lmd_bench.report.step_cost import median_of_rounds

RECONSTRUCT: Final = "reconstruct"
SAMPLE: Final = "sample"


def inference_table(record: InferenceRecord, confidence: float, stem: str = "inference") -> Table:
    """Every row's seconds, evaluations and memory by task and batch size, with paired ratios to the reference row."""
    builder = _Inference(record, confidence)
    sizes = " and ".join(map(str, record.batch_sizes))
    return Table(
        stem,
        f"Inference: batch {sizes}, {record.precision}",
        tuple(builder.columns()),
        tuple(builder.sections()),
        tuple(builder.notes()),
    )


class _Inference:
    def __init__(self, record: InferenceRecord, confidence: float) -> None:
        self.record = record
        self.confidence = confidence
        self.rounds: dict[tuple[str, str, int], list[InferenceRound]] = {}
        for part in sorted(record.rounds, key=lambda part: part.round):
            self.rounds.setdefault((part.row, part.task, part.batch_size), []).append(part)
        named = [*record.rows, *(part.row for part in record.rounds), *(miss.row for miss in record.not_measured)]
        self.rows = list(dict.fromkeys(named))

    def columns(self) -> list[Column]:
        """Heads in the order of `_row`."""
        columns = [
            Column("Row", ("row", "label", "task", "projector", "num_rounds")),
            Column("Function evaluations", ("function_evaluations",), "passes per image"),
        ]
        for size in self.record.batch_sizes:
            group, end = f"Batch {size}", f"_b{size}"
            seconds = tuple(f"s_per_image{end}{part}" for part in ("", "_low", "_high", "_coverage"))
            columns += [
                Column("Time", seconds, "s per image", group),
                Column(f"Ratio to {self.record.reference or 'no reference row'}", _ratio_parts(end), None, group),
                Column("Projector", _projector_parts(end), "share of the call; s per image", group),
                Column("Peak memory", (f"peak_memory_mib{end}",), "MiB", group),
            ]
        return columns

    def sections(self) -> Iterator[Section]:
        """Reconstruction and sampling for all rows; unveiling by levels for those that have levels."""
        yield self._section("Reconstruction, as each row is configured", RECONSTRUCT, self.rows)
        found = [part.task for part in self.record.rounds] + [miss.task or "" for miss in self.record.not_measured]
        for task in dict.fromkeys(task for task in found if task.startswith(f"{RECONSTRUCT}, ")):
            rows = [row for row in self.rows if self._has_task(row, task)]
            yield self._section(f"Reconstruction{task.removeprefix(RECONSTRUCT)}", task, rows)
        yield self._section("Sampling", SAMPLE, self.rows)

    def _has_task(self, row: str, task: str) -> bool:
        missed = any((miss.row, miss.task) == (row, task) for miss in self.record.not_measured)
        return missed or any(key[:2] == (row, task) for key in self.rounds)

    def _section(self, heading: str, task: str, rows: list[str]) -> Section:
        return Section(heading, tuple(self._row(row, task) for row in rows))

    def _row(self, row: str, task: str) -> tuple[Cell, ...]:
        cells = [self._name(row, task), self._evaluations(row, task)]
        for size in self.record.batch_sizes:
            parts = self.rounds.get((row, task, size), [])
            cells += self._costs(parts, f"_b{size}") if parts else [missing(self._why(row, task, size))] * 4
        return tuple(cells)

    def _why(self, row: str, task: str, size: int | None) -> str:
        """The reason that fits best; `size` None asks for any batch size."""
        for miss in self.record.not_measured:
            sizes = (None, size) if size is not None else (None, *self.record.batch_sizes)
            if miss.row == row and miss.task in (None, task) and miss.batch_size in sizes:
                return f"not measured: {plain(miss.reason)}"
        return "not measured: no round of it ended"

    def _name(self, row: str, task: str) -> Cell:
        about = self.record.rows.get(row)
        num_rounds = max((len(parts) for key, parts in self.rounds.items() if key[:2] == (row, task)), default=0)
        label, projector = (row, "not known") if about is None else (about.label, about.projector or "none")
        lines = [label, f"{row}, {num_rounds} rounds", f"projector: {projector}"]
        if about is not None and about.own_mask:
            lines.append(f"own mask: {about.own_mask}")
        parts: dict[str, Number | str] = {
            "row": row, "label": label, "task": task, "projector": projector, "num_rounds": num_rounds,
        }  # fmt: skip
        return Cell(tuple(lines), "label", parts)

    def _evaluations(self, row: str, task: str) -> Cell:
        parts = [part for key, found in self.rounds.items() if key[:2] == (row, task) for part in found]
        if not parts:
            return missing(self._why(row, task, None))
        counts = [part.function_evaluations for part in parts if part.function_evaluations is not None]
        if not counts:
            return missing("not counted: no trained layer was called")
        return Cell((number(max(counts)),), "value", {"function_evaluations": max(counts)})

    def _costs(self, parts: list[InferenceRound], end: str) -> list[Cell]:
        return [self._seconds(parts, end), self._ratio(parts, end), self._projector(parts, end), _memory(parts, end)]

    def _seconds(self, parts: list[InferenceRound], end: str) -> Cell:
        median = median_of_rounds([_seconds(part) for part in parts])
        name = f"s_per_image{end}"
        values: dict[str, Number | str] = {name: median.value, f"{name}_coverage": median.coverage}
        if median.coverage == 0:
            why = "no interval: one round"
            return Cell((number(median.value), why), "value", values | {f"{name}_low": why, f"{name}_high": why})
        lines = [number(median.value), span(median.value, median.low, median.high)]
        if median.coverage < self.confidence:
            lines.append(f"range, covers {percent(median.coverage)}")
        return Cell(tuple(lines), "value", values | {f"{name}_low": median.low, f"{name}_high": median.high})

    def _ratio(self, parts: list[InferenceRound], end: str) -> Cell:
        """Against the reference row's sampling, or its reconstruction as it is configured."""
        first, reference = parts[0], self.record.reference
        if reference is None:
            return missing("not measured: no reference row was measured")
        task = SAMPLE if first.task == SAMPLE else RECONSTRUCT
        if (first.row, first.task) == (reference, task):
            return Cell(("reference",), "label")
        base = {part.round: _seconds(part) for part in self.rounds.get((reference, task, first.batch_size), [])}
        pairs = [(_seconds(part), base[part.round]) for part in parts if part.round in base]
        if not pairs:
            return missing(f"no ratio: {reference}: {self._why(reference, task, first.batch_size)}")
        against = ratio_of_rounds([mine for mine, _ in pairs], [other for _, other in pairs], self.confidence)
        key = f"reference{end}"
        if isinstance(against, Missing):
            value = statistics.median(mine / other for mine, other in pairs)
            reasons: dict[str, Number | str] = dict.fromkeys(_ratio_parts(end), against.reason)
            return Cell((number(value), against.reason), "value", reasons | {f"{key}_ratio": value})
        lines, values = ratio_lines(against, reference, key)
        return Cell((number(against.value), *lines[1:]), "value", values)  # the heading names the other row

    def _projector(self, parts: list[InferenceRound], end: str) -> Cell:
        """Its share of the call: encoding and decoding once, for sampling decoding only."""
        spent = [_projector_ms(part) for part in parts]
        names = _projector_parts(end)
        if None in spent:
            return Cell(("none",), "value", {names[0]: 0.0, names[1]: 0.0})
        times = [value for value in spent if value is not None]
        shares = [ms / statistics.fmean(part.calls_ms) for ms, part in zip(times, parts, strict=True)]
        share, seconds = min(1.0, statistics.median(shares)), statistics.median(times) / 1e3 / parts[0].batch_size
        return Cell((percent(share), f"{number(seconds)} s"), "value", {names[0]: share, names[1]: seconds})

    def notes(self) -> list[str]:
        """What was timed and how."""
        record = self.record
        notes = [
            "Weights are random: times do not depend on them. Inputs are noise under the yardstick's masks "
            f"(units of {record.unit_px} px, {percent(record.keep)} kept); "
            "calls are whole, projector included, without gradients and not compiled.",
            "Time: median over rounds of the round's mean call, by the number of images in it; every row and batch "
            "size of a round in a fresh process, its interval between two rounds (order statistics). Ratios: "
            "Student's t on the logs of ratios within the same round; unveiling by levels stands against the "
            "reference row's reconstruction as it is configured.",
            "Function evaluations: counted calls of the trained layers. Projector: one encoding and decoding, timed "
            "alone in the same process, as a share of the call; for sampling the decoding.",
            f"Peak memory: {record.peak_memory_kind}.",
        ]
        if host_memory := record.environment.get("host_memory"):
            notes.append(f"Freed host memory: {host_memory}.")
        return notes


def _seconds(part: InferenceRound) -> float:
    """Seconds of an image in a round."""
    return statistics.fmean(part.calls_ms) / 1e3 / part.batch_size


def _projector_ms(part: InferenceRound) -> float | None:
    if part.encode_ms is None or part.decode_ms is None:
        return None
    return part.decode_ms if part.task == SAMPLE else part.encode_ms + part.decode_ms


def _memory(parts: list[InferenceRound], end: str) -> Cell:
    peaks = [part.peak_memory_bytes / 2**20 for part in parts if part.peak_memory_bytes is not None]
    if not peaks:
        return missing("not measured: this system cannot tell")
    return Cell((number(max(peaks)),), "value", {f"peak_memory_mib{end}": max(peaks)})


def _projector_parts(end: str) -> tuple[str, str]:
    return f"projector_share{end}", f"projector_s_per_image{end}"


def _ratio_parts(end: str) -> tuple[str, ...]:
    return tuple(f"reference{end}_{part}" for part in ("ratio", "ratio_low", "ratio_high", "verdict"))


# -- on a terminal ----------------------------------------------------------------------------------------------------


def terminal_inference(table: Table) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of an inference table that a terminal has room for: all but the projector's."""
    kept = [i for i, column in enumerate(table.columns) if column.title != "Projector"]
    heads = [
        f"{column.group}: {column.title}" if column.group else column.title
        for column in (table.columns[i] for i in kept)
    ]
    rows = []
    for section in table.sections:
        for cells in section.rows:
            name = (f"{cells[0].lines[0]}\n{cells[0].parts['task']}",)
            rows.append((*name, *("\n".join(cells[i].lines) for i in kept[1:])))
    return tuple(heads), rows
