"""The report's figures, each with the numbers behind it. Colours are Okabe and Ito's, one a row in every figure."""

from lmd_bench.report.figures.drawing import Drawing
from lmd_bench.report.figures.sheet import Figure

__all__ = ["Drawing", "Figure"]
