"""What was measured in words: figures by name, and lines of the table that `lmd-bench evaluate` prints. No torch."""

from __future__ import annotations

from collections.abc import Iterable

from lmd_bench.records import EvaluatorFacts, ImageQuality

SCENES = "_scenes"
"""Ends the figures that the small shipped evaluators measured."""
_NAMES = {
    "fid": "FID",
    "kid": "KID",
    "kid_std": "KID, deviation over subsets",
    "precision": "precision",
    "recall": "recall",
    "clip_score": "CLIP-score",
    "lpips": "LPIPS",
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "pictures": "pictures",
    "samples": "samples",
}
_KINDS = {
    "features": ("fid", "kid", "kid_std", "precision", "recall"),
    "clip": ("clip_score",),
    "lpips": ("lpips",),
}


def figure_name(figure: str) -> str:
    """A figure as tables name it: "FID (scenes features)" for `fid_scenes`."""
    stem = figure.removesuffix(SCENES)
    name = _NAMES.get(stem, stem)
    if stem == figure:
        return name
    return f"{name} (scenes)" if stem == "clip_score" else f"{name} (scenes features)"


def kind_of(figure: str) -> str | None:
    """The kind of network behind a figure: features, clip or lpips; None for figures that need none."""
    stem = figure.removesuffix(SCENES)
    return next((kind for kind, figures in _KINDS.items() if stem in figures), None)


def evaluator_of(figure: str, evaluators: dict[str, EvaluatorFacts]) -> str:
    """The network that measured a figure, "-" for figures that need none."""
    kind = kind_of(figure)
    facts = None if kind is None else evaluators.get(kind)
    return "-" if facts is None else facts.name


def table_rows(quality: ImageQuality) -> list[tuple[str, str, str, str]]:
    """(figure, value, evaluator, N) for every figure that was measured, in the fixed order."""
    number = str(quality.num_images)
    return [
        (figure_name(name), _value_text(name, quality.values[name]), evaluator_of(name, quality.evaluators), number)
        for name in _in_order(quality.values)
    ]


def missing_lines(quality: ImageQuality) -> list[str]:
    """ "FID: not measured: why", one line for each figure; figures with the same reason share a line."""
    by_reason: dict[str, list[str]] = {}
    for figure in _in_order(quality.not_measured):
        by_reason.setdefault(quality.not_measured[figure], []).append(figure_name(figure))
    return [f"{', '.join(names)}: not measured: {reason}" for reason, names in by_reason.items()]


def _in_order(figures: Iterable[str]) -> list[str]:
    known = list(_NAMES)

    def place(figure: str) -> int:
        stem = figure.removesuffix(SCENES)
        return known.index(stem) if stem in known else len(known)

    return sorted(figures, key=place)


def _value_text(figure: str, value: float) -> str:
    stem = figure.removesuffix(SCENES)
    if stem == "psnr_db":
        return f"{value:.2f}"
    return f"{value:.5f}" if stem.startswith("kid") else f"{value:.4f}"


def short_text(quality: ImageQuality) -> str:
    """All figures on one line."""
    return ", ".join(f"{name} {value}" for name, value, _, _ in table_rows(quality)) or "nothing could be measured"
