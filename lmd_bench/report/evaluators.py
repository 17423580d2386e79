"""The networks that images were measured with, in words and as a table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.records import EvaluatorFacts, ImageQuality, QualityBounds
from lmd_bench.report.cells import Cell, Column, Section, Table, label
from lmd_bench.report.rows import RowResult

_DIGEST_CHARACTERS: Final = 12
_HASH_NAME: Final = "SHA-256"
KINDS: Final = {"features": "Features (FID, KID, precision, recall)", "clip": "CLIP-score", "lpips": "LPIPS"}
"""Kind of an evaluator in a record -> the figures that come of it."""


def facts_text(facts: EvaluatorFacts) -> str:
    """An evaluator in one line: name, features, weights, the beginning of their hash, how images come to its size."""
    count = f", {facts.num_features} numbers an image" if facts.num_features else ""
    digest = f"{_HASH_NAME} {facts.sha256[:_DIGEST_CHARACTERS]}"
    return f"{facts.name}{count}; weights {facts.weights} ({digest}); images: {facts.resize}"


def all_qualities(rows: Mapping[str, RowResult], bounds: QualityBounds | None) -> list[ImageQuality]:
    """Every measurement of image quality: the rows', then those of the bounds."""
    of_rows = [quality for found in rows.values() for quality in found.image_qualities]
    return [*of_rows, *([bounds.truth, bounds.grey] if bounds else [])]


def distinct_facts(facts: Iterable[EvaluatorFacts | None]) -> list[EvaluatorFacts]:
    """Each evaluator once, in order."""
    found: list[EvaluatorFacts] = []
    for one in facts:
        if one is not None and one not in found:
            found.append(one)
    return found


def evaluators_table(suite: Suite, rows: Mapping[str, RowResult], bounds: QualityBounds | None) -> Table:
    """Every network that images were measured with, its weights' whole hash, and the rows it measured."""
    qualities = all_qualities(rows, bounds)
    columns = (
        Column("Figures", ("figures",)),
        Column("Evaluator", ("evaluator",)),
        Column("Weights", ("weights",)),
        Column(_HASH_NAME, ("sha256",)),
        Column("Features", ("num_features",), "numbers an image"),
        Column("Images come to its size", ("resize",)),
        Column("Rows", ("rows",)),
    )
    body: list[tuple[Cell, ...]] = []
    for kind, figures in KINDS.items():
        for facts in distinct_facts(quality.evaluators.get(kind) for quality in qualities):
            labels = [
                found.label
                for found in rows.values()
                if any(quality.evaluators.get(kind) == facts for quality in found.image_qualities)
            ]
            body.append(
                (
                    label(figures),
                    label(facts.name),
                    label(facts.weights),
                    label(facts.sha256),
                    label(str(facts.num_features) if facts.num_features else "none"),
                    label(facts.resize),
                    label(", ".join(labels) or "bounds alone"),
                )
            )
    return Table(
        "evaluators",
        f"What measured image quality ({suite.title})",
        columns,
        (Section(None, tuple(body)),),
        ("PSNR and SSIM are computed from pixels: PSNR over hidden ones, SSIM over the whole image.",),
    )
