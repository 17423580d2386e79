"""What is printed, and how: the commands' only way to the terminal."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from lmd_bench.config import Suite


def new_console() -> Console:
    """A console on standard output, wide where it is no terminal."""
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe or file has no width of its own; rich would take 80 and fold the tables
    return console


def say(text: str = "") -> None:
    """Print a line as it is."""
    new_console().print(text, markup=False, highlight=False, soft_wrap=True)


def complain(text: str, *, red: bool = False) -> None:
    """Print a line to standard error as it is."""
    Console(stderr=True).print(text, style="red" if red else None, markup=False, highlight=False, soft_wrap=True)


def command_line() -> str:
    """This command as one would type it again."""
    return shlex.join(["lmd-bench", *sys.argv[1:]])


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def report_on(folder: Path, suite: Suite) -> None:
    """Write a suite's report from its records, and print its tables."""
    from lmd_bench.report import build_report, terminal_tables

    built = build_report(folder, suite, command=command_line())
    console = new_console()
    for title, columns, rows in terminal_tables(built):
        table = Table(title=title, title_justify="left", show_lines=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for problem in built.problems:
        say(f"note: {problem}")
    say(f"report: {built.page}")
