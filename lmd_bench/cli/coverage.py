"""A check of the statistics by simulation: `coverage`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd_bench.cli.terminal import command_line, say


def coverage(
    out: Annotated[Path, typer.Option("--out", help="Folder for coverage.md and coverage.csv.")] = Path("reports"),
    runs: Annotated[int, typer.Option("--runs", min=10, help="Simulated runs per case.")] = 1000,
) -> None:
    """Check by simulation that the intervals of a single run hold what they promise."""
    from lmd_bench.metrics.simulate import coverage_study, write_coverage

    write_coverage(list(coverage_study(num_runs=runs)), out, command_line())
    say(f"written: {out / 'coverage.md'}, {out / 'coverage.csv'}")
