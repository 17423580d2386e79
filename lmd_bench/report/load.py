"""Everything a suite's folder holds, read once: runs with their steps, speed runs, and what could not be read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from lmd_bench.config import Suite
from lmd_bench.errors import RecordError
from lmd_bench.records import (
    QUALITY_BOUNDS,
    STEP_COLUMNS,
    InferenceRecord,
    ProfileRecord,
    QualityBounds,
    RunRecord,
    find_runs,
    read_bounds,
    read_inference,
    read_profile,
    read_run,
    read_steps,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class Run:
    """One cell (row x seed) as it lies on disk."""

    record: RunRecord
    path: Path
    """Of `record.json`, relative to the report's folder."""
    steps: dict[str, NDArray[np.float64]]
    """Columns of `steps.csv`, measured steps only, empty fields as NaN; no columns where there is no such file."""

    @property
    def seconds(self) -> NDArray[np.float64]:
        """Training time at the end of each measured step, s."""
        import numpy as np

        return np.asarray(np.cumsum(self.steps["period_ms"]) / 1000.0)


@dataclass(frozen=True)
class Profile:
    """One speed run as it lies on disk."""

    record: ProfileRecord
    path: Path
    """Relative to the report's folder."""
    tag: str
    """What sets it apart from other speed runs, for names of files: "-b64-bf16"; empty where there is only one."""


@dataclass(frozen=True)
class Inference:
    """One measurement of inference as it lies on disk."""

    record: InferenceRecord
    path: Path
    """Relative to the report's folder."""
    tag: str
    """As of a `Profile`."""


@dataclass(frozen=True)
class Results:
    """What a report is made of."""

    folder: Path
    runs: dict[str, list[Run]]
    """Row -> its runs in order of seed: the suite's rows first, in their order, others after them."""
    profiles: list[Profile]
    problems: list[str]
    """What could not be read or does not belong, one line each."""
    inferences: list[Inference] = field(default_factory=list)
    bounds: QualityBounds | None = None
    """Floor and ceiling of image quality; None where the suite has none."""

    def finished(self, row: str) -> list[Run]:
        """The runs of a row that ended well."""
        return [run for run in self.runs.get(row, []) if run.record.status == "finished"]

    @property
    def all_runs(self) -> list[Run]:
        """Every run, row by row."""
        return [run for runs in self.runs.values() for run in runs]


def load_results(folder: Path, suite: Suite) -> Results:
    """Read OUT/<suite>. Raises RecordError where not one record can be read."""
    problems: list[str] = []
    runs: dict[str, list[Run]] = {row: [] for row in suite.methods}
    for path in find_runs(folder):
        try:
            run = _read_run(path, folder)
        except RecordError as error:
            problems.append(str(error))
            continue
        if run.record.suite != suite.name:
            problems.append(f"{path}: a record of suite {run.record.suite!r}, left out of {suite.name!r}")
            continue
        runs.setdefault(run.record.row, []).append(run)
        problems += _doubts(run, suite)
    profiles = _read_profiles(folder, suite, problems)
    inferences = [Inference(*found) for found in _read_tagged(folder, suite, "inference", read_inference, problems)]
    bounds = _read_bounds(folder, problems)
    runs = {row: sorted(found, key=lambda run: run.record.seed) for row, found in runs.items()}
    if not profiles and not inferences and not any(runs.values()):
        found = f": {'; '.join(problems)}" if problems else ""
        raise RecordError(
            f"{folder}: no readable record (seed-*/record.json, profile.json, inference.json) "
            f"of suite {suite.name!r}{found}"
        )
    # Relative paths: a report must not tell where on a machine it was made.
    problems = [problem.replace(f"{folder}/", "") for problem in problems]
    return Results(folder, runs, profiles, problems, inferences, bounds)


def _read_bounds(folder: Path, problems: list[str]) -> QualityBounds | None:
    path = folder / QUALITY_BOUNDS
    try:
        return read_bounds(path) if path.is_file() else None
    except RecordError as error:
        problems.append(str(error))
        return None


def _read_run(path: Path, folder: Path) -> Run:
    record = read_run(path)
    table = path.with_name("steps.csv")
    return Run(record, path.relative_to(folder), _measured_steps(table) if table.is_file() else {})


def _measured_steps(path: Path) -> dict[str, NDArray[np.float64]]:
    import numpy as np

    columns = read_steps(path)
    arrays = {
        name: np.array([np.nan if value is None else value for value in columns[name]], dtype=np.float64)
        for name in STEP_COLUMNS
    }
    measured = arrays["step"] > 0  # untimed steps count -k..-1
    return {name: values[measured] for name, values in arrays.items()}


def _doubts(run: Run, suite: Suite) -> list[str]:
    """What makes a readable run one to be careful with."""
    doubts = []
    if run.record.row not in suite.methods:
        doubts.append(f"{run.path}: row {run.record.row!r} is not in the suite as it is now; shown last")
    if run.record.status == "finished" and run.record.num_steps and not run.steps:
        doubts.append(f"{run.path}: no steps.csv beside it; its curves are missing")
    return doubts


def _read_profiles(folder: Path, suite: Suite, problems: list[str]) -> list[Profile]:
    return [Profile(*found) for found in _read_tagged(folder, suite, "profile", read_profile, problems)]


_Record = TypeVar("_Record", ProfileRecord, InferenceRecord)
_KINDS = {"profile": "a speed run", "inference": "an inference run"}


def _read_tagged(
    folder: Path, suite: Suite, stem: str, read: Callable[[Path], _Record], problems: list[str]
) -> list[tuple[_Record, Path, str]]:
    """All records in files `stem`*.json with their relative paths and what sets each apart from the others."""
    found: list[tuple[_Record, Path]] = []
    for path in sorted(folder.glob(f"**/{stem}*.json")):
        try:
            record = read(path)
        except RecordError as error:
            problems.append(str(error))
            continue
        if record.suite != suite.name:
            problems.append(f"{path}: {_KINDS[stem]} of suite {record.suite!r}, left out of {suite.name!r}")
            continue
        found.append((record, path.relative_to(folder)))
    if len(found) == 1:
        return [(record, path, "") for record, path in found]
    return [(record, path, _tag(path, stem)) for record, path in found]


def _tag(path: Path, stem: str) -> str:
    tag = "-".join(["", *path.parent.parts, path.stem.removeprefix(stem).strip("-")])
    return tag.rstrip("-") or "-1"
