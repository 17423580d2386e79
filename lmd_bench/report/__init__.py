"""Records and published numbers into tables, figures and one page. Imports no torch."""

from lmd_bench.report.build import Report, build_report
from lmd_bench.report.terminal import TerminalTable, terminal_tables

__all__ = ["Report", "TerminalTable", "build_report", "terminal_tables"]
