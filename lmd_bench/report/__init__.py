"""Records and published numbers into tables, figures and one page. Imports no torch."""

from lmd_bench.report.build import Report, TerminalTable, build_report, terminal_tables

__all__ = ["Report", "TerminalTable", "build_report", "terminal_tables"]
