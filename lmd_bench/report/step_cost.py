"""The table "step cost" of a speed run: interleaved rounds in fresh processes. It never fills the MIT column."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from lmd_bench.metrics.intervals import Missing, Ratio, ratio_of_rounds
from lmd_bench.records import CACHED_LATENTS, CALIBRATOR, PHASES, ProfileRecord, ProfileRound, ProfileRow
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, missing, number, percent, plain, span
from lmd_bench.report.row_cells import ratio_lines, two_shares

LARGEST_INSTRUMENT_SHARE: Final = 0.003
"""The instrument may cost this share of the smallest step."""


@dataclass(frozen=True)
class Median:
    """Median of a few rounds with the interval between two of them."""

    value: float
    low: float
    high: float
    coverage: float
    """Share of intervals made this way that hold the true median; 0 for one round."""


def median_of_rounds(values: Sequence[float], confidence: float = 0.95) -> Median:
    """Median with the narrowest symmetric pair of order statistics that covers it with `confidence`.

    Distribution-free: the pair (k-th smallest, k-th largest) of n holds the median with probability
    1 - 2 P(Binomial(n, 1/2) < k). Where n is too small for `confidence` the whole range stands, with what it covers.
    """
    ordered = sorted(values)
    count = len(ordered)
    best, covered = 1, 1 - 2 * 0.5**count
    for k in range(2, count // 2 + 1):
        coverage = 1 - 2 * sum(math.comb(count, i) for i in range(k)) * 0.5**count
        if coverage < confidence:
            break
        best, covered = k, coverage
    return Median(statistics.median(ordered), ordered[best - 1], ordered[count - best], max(0.0, covered))


@dataclass(frozen=True)
class RowRounds:
    """All rounds of one row, in order of their number."""

    name: str
    about: ProfileRow
    rounds: list[ProfileRound]

    def per_round(self, pick: Callable[[ProfileRound], float]) -> dict[int, float]:
        """Round number -> figure."""
        return {part.round: pick(part) for part in self.rounds}

    @property
    def periods(self) -> dict[int, float]:
        """Mean period of each round, ms."""
        return self.per_round(lambda part: statistics.fmean(part.period_ms))

    @property
    def without_projector(self) -> dict[int, float]:
        """Mean period less the projector's phase, ms."""
        return self.per_round(lambda part: statistics.fmean(part.period_ms) - phase_ms(part, "projector"))

    @property
    def step_ms(self) -> float:
        """Median over rounds of the mean period."""
        return statistics.median(self.periods.values())

    def times(self, bare: bool) -> dict[int, float]:
        """Milliseconds of each round, with or without the projector."""
        return self.without_projector if bare else self.periods


def phase_ms(part: ProfileRound, phase: str) -> float:
    """Mean milliseconds of a phase in a round; 0 where the round has no such phase."""
    times = part.phases_ms.get(phase)
    return statistics.fmean(times) if times else 0.0


def step_cost_table(record: ProfileRecord, confidence: float, stem: str = "step-cost") -> Table:
    """Every profiled row with its phases, costs and paired ratios to the reference row and to the calibrator."""
    rows = record.rows
    builder = _StepCost(record, measured_rows(record), confidence)
    names = [name for name in rows if name != CALIBRATOR] + [CALIBRATOR] * (CALIBRATOR in rows)
    lost = {name: reason for name, reason in record.not_measured.items() if name not in rows}
    body = [builder.row(name, rows[name].label) for name in names]
    body += [builder.row(name, name, reason) for name, reason in lost.items()]
    return Table(
        stem,
        f"Step cost: {record.batch_text}, {record.precision}{', compiled' if record.compile else ''}, "
        f"{record.progress}",
        tuple(builder.columns()),
        (Section(None, tuple(body)),),
        tuple(builder.notes()),
    )


def measured_rows(record: ProfileRecord) -> dict[str, RowRounds]:
    """The rows of a speed run that have at least one round."""
    found = {
        name: RowRounds(name, about, sorted((r for r in record.rounds if r.row == name and r.period_ms), key=_number))
        for name, about in record.rows.items()
    }
    return {name: row for name, row in found.items() if row.rounds}


def paired_cell(values: dict[int, float], base: dict[int, float], key: str, name: str, confidence: float) -> Cell:
    """Ratio of two rows over the rounds that both have, compared one by one; `name` is the other row."""
    shared = sorted(values.keys() & base.keys())
    if not shared:
        return missing(f"not measured: no round has both rows ({name})")
    against = ratio_of_rounds([values[i] for i in shared], [base[i] for i in shared], confidence)
    if isinstance(against, Missing):
        plain_ratio = statistics.median(values[i] / base[i] for i in shared)
        parts: dict[str, Number | str] = dict.fromkeys(ratio_parts(key), against.reason)
        return Cell((number(plain_ratio), against.reason), "value", parts | {f"{key}_ratio": plain_ratio})
    lines, parts = ratio_lines(against, name, key)
    return Cell((number(against.value), *lines[1:]), "value", parts)  # a heading or a column names the other row


def ratio_parts(key: str) -> tuple[str, ...]:
    """CSV columns of a ratio: value, interval and verdict."""
    return (f"{key}_ratio", f"{key}_ratio_low", f"{key}_ratio_high", f"{key}_verdict")


def _number(part: ProfileRound) -> int:
    return part.round


class _StepCost:
    def __init__(self, record: ProfileRecord, rows: dict[str, RowRounds], confidence: float) -> None:
        self.record = record
        self.rows = rows
        self.confidence = confidence
        self.reference = rows.get(record.reference or "")
        self.calibrator = rows.get(CALIBRATOR)
        self.reference_name = record.reference or "no reference row"

    def columns(self) -> list[Column]:
        """Heads in the order of `row`."""
        to_reference = f"Ratio to {self.reference_name}"
        return [
            Column("Row", ("row", "label", "optimizer", "projector", "num_rounds")),
            Column("Step", ("step_ms", "step_ms_low", "step_ms_high", "step_ms_coverage"), "ms"),
            *(Column(phase, (f"{phase}_ms",), "ms", "Phases") for phase in PHASES),
            Column("Projector, stall", ("projector_share", "stall_share"), "shares of the step"),
            Column("Step without projector", ("bare_ms", "bare_ms_low", "bare_ms_high"), "ms"),
            Column("whole step", ratio_parts("reference"), None, to_reference),
            Column("without projector", ratio_parts("reference_bare"), None, to_reference),
            Column("whole step", ratio_parts("calibrator"), None, "Ratio to the calibrator"),
            Column("without projector", ratio_parts("calibrator_bare"), None, "Ratio to the calibrator"),
            Column("Parameters", ("parameters_m", "projector_parameters_m"), "M"),
            Column("Operations", ("gflop_per_step",), "GFLOP per step"),
            Column("Achieved", ("gflop_per_s",), "GFLOP/s"),
            Column("Peak memory", ("peak_memory_mib",), "MiB"),
            Column("Instrument", ("instrument_share",), "share of the step"),
            Column("Marks on / off", ratio_parts("marks"), "ratio"),
        ]

    def row(self, name: str, label: str, reason: str | None = None) -> tuple[Cell, ...]:
        """One row's cells; a row that was not measured says why in each."""
        row = self.rows.get(name)
        if row is None:
            why = f"not measured: {plain(reason or self.record.not_measured.get(name, 'no round of it ended'))}"
            named = Cell((label, name) if label != name else (label,), "label", {"row": name, "label": label})
            return (named, *(missing(why) for _ in self.columns()[1:]))
        return (self._name(row), *self._times(row), *self._ratios(row), *self._costs(row))

    def _name(self, row: RowRounds) -> Cell:
        about = row.about
        projector = about.projector or "none"
        lines = (
            about.label,
            f"{row.name}, batch {about.batch_size}, {about.optimizer}, {len(row.rounds)} rounds",
            f"projector: {projector}",
        )
        parts: dict[str, Number | str] = {
            "row": row.name, "label": about.label, "optimizer": about.optimizer, "projector": projector,
            "num_rounds": len(row.rounds),
        }  # fmt: skip
        return Cell(lines, "label", parts)

    def _times(self, row: RowRounds) -> list[Cell]:
        step, bare = (median_of_rounds(list(row.times(part).values())) for part in (False, True))
        cells = [self._median_cell(step, "step_ms")]
        for phase in PHASES:
            value = statistics.median(row.per_round(lambda part, p=phase: phase_ms(part, p)).values())  # type: ignore[misc]
            cells.append(Cell((number(value),), "value", {f"{phase}_ms": value}))
        projector, stall = (
            statistics.median(phase_ms(part, phase) / statistics.fmean(part.period_ms) for part in row.rounds)
            for phase in ("projector", "data")
        )
        named = row.about.projector
        cached = named is not None and named.endswith(CACHED_LATENTS)
        shares = two_shares(
            projector, stall, instead=("no projector",) if named is None else (CACHED_LATENTS,) if cached else ()
        )
        return [*cells, shares, self._median_cell(bare, "bare_ms")]

    def _median_cell(self, median: Median, name: str) -> Cell:
        parts: dict[str, Number | str] = {name: median.value}
        if median.coverage == 0:
            why = "no interval: one round"
            return Cell((number(median.value), why), "value", parts | {f"{name}_low": why, f"{name}_high": why})
        parts |= {f"{name}_low": median.low, f"{name}_high": median.high, f"{name}_coverage": median.coverage}
        lines = [number(median.value), span(median.value, median.low, median.high)]
        if median.coverage < self.confidence:
            lines.append(f"range, covers {percent(median.coverage)}")
        return Cell(tuple(lines), "value", parts)

    def _ratios(self, row: RowRounds) -> list[Cell]:
        cells = []
        for other, key, absent in (
            (self.reference, "reference", "no reference row was profiled"),
            (self.calibrator, "calibrator", "the calibrator was not profiled"),
        ):
            for bare in (False, True):
                if other is None:
                    cells.append(missing(f"not measured: {absent}"))
                elif other.name == row.name:
                    cells.append(Cell((key,), "label"))
                else:
                    name = f"{key}_bare" if bare else key
                    cells.append(paired_cell(row.times(bare), other.times(bare), name, other.name, self.confidence))
        return cells

    def _costs(self, row: RowRounds) -> list[Cell]:
        about, step_ms = row.about, row.step_ms
        cells = [_parameters(about)]
        if about.flops_per_step is None:
            cells += [missing("not measured: operations were not counted")] * 2
        else:
            work, rate = about.flops_per_step / 1e9, about.flops_per_step / 1e6 / step_ms
            cells += [
                Cell((number(work),), "value", {"gflop_per_step": work}),
                Cell((number(rate),), "value", {"gflop_per_s": rate}),
            ]
        peaks = [part.peak_memory_bytes / 2**20 for part in row.rounds if part.peak_memory_bytes is not None]
        cells.append(
            Cell((number(max(peaks)),), "value", {"peak_memory_mib": max(peaks)})
            if peaks
            else missing("not measured: this system cannot tell")
        )
        share = self.record.instrument_us_per_step / 1e3 / step_ms
        return [*cells, Cell((percent(share),), "value", {"instrument_share": share}), self._marks(row, share)]

    def _marks(self, row: RowRounds, share: float) -> Cell:
        """Steps with the inner marks over steps without, and whether that agrees with the isolated cost."""
        pairs = [(row.periods[part.round], part.unmarked_period_ms) for part in row.rounds]
        kept = [(on, off) for on, off in pairs if off]
        if not kept:
            return missing("not measured: no steps with the marks off")
        against = ratio_of_rounds([on for on, _ in kept], [off for _, off in kept], self.confidence)
        if isinstance(against, Missing):
            return missing(f"not measured: {against.reason}")
        low, high = against.low or 0.0, against.high or math.inf
        agrees = "holds" if low <= 1 + share <= high else "misses"
        lines = (number(against.value, 4), _fine(against), f"{agrees} {1 + share:.4f}")
        _, parts = ratio_lines(against, "off", "marks")
        return Cell(lines, "value", parts)

    def notes(self) -> list[str]:
        """What was timed and how, and whether the instrument is cheap enough."""
        record = self.record
        notes = [
            f"Timed: {record.progress}. Interleaved rounds, every row of a round in a fresh process; inputs are noise "
            "in memory. Step: median over rounds of the round's mean; its interval lies between two rounds (order "
            "statistics). Ratios: Student's t on the logs of ratios within the same round.",
            "What a method has data workers make in a run (Method.collate, such as GreenMIM's groups of windows) is "
            "made within the step here: in the phase data, and so in the share of the stall.",
            "Calibrator: timm vit_base_patch16_224, batch 4, fp32, torch.optim.AdamW, whole step, so that ratios "
            "travel between machines. These times are not MIT, which comes from whole runs only.",
            "Marks on / off: steps with the timer's inner marks over steps without, interleaved in one process; "
            '"holds" says that the interval includes the cost of the instrument timed in isolation.',
        ]
        if host_memory := record.environment.get("host_memory"):
            notes.append(f"Freed host memory: {host_memory}.")
        if self.rows:
            notes.append(self._instrument_note())
        return notes + [f"{name}: {plain(reason)}" for name, reason in record.not_measured.items()]

    def _instrument_note(self) -> str:
        smallest = min(self.rows.values(), key=lambda row: row.step_ms)
        share = self.record.instrument_us_per_step / 1e3 / smallest.step_ms
        verdict = "within" if share <= LARGEST_INSTRUMENT_SHARE else "ABOVE"
        return (
            f"Instrument: {number(self.record.instrument_us_per_step)} us per step in isolation, {percent(share)} of "
            f"the smallest step ({smallest.about.label}): {verdict} the limit of {percent(LARGEST_INSTRUMENT_SHARE)}."
        )


def _fine(against: Ratio) -> str:
    return f"[{against.low:.4f}, {against.high:.4f}]"


def _parameters(about: ProfileRow) -> Cell:
    """Those of the method, and on a second line those of its frozen projector."""
    own, frozen = about.parameters / 1e6, about.projector_parameters / 1e6
    lines = (number(own), f"+ {number(frozen)} frozen projector") if frozen else (number(own),)
    return Cell(lines, "value", {"parameters_m": own, "projector_parameters_m": frozen})
