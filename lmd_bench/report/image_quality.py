"""Figures of image quality as columns, and the table of them all.

Figures of the small evaluators that ship for generated scenes have keys and columns of their own: they are never
shown under the published evaluators' names.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

from lmd_bench.config import Suite
from lmd_bench.records import ImageQuality, QualityBounds
from lmd_bench.report.cells import Cell, Column, Section, Table, missing, number
from lmd_bench.report.evaluators import KINDS, all_qualities, distinct_facts, facts_text
from lmd_bench.report.quality import has_own_mask
from lmd_bench.report.rows import RowResult, in_short

Rows = Mapping[str, RowResult]
SCENES: Final = "_scenes"
"""Ends the keys of figures that the small evaluators measured."""
_LEAST: Final = 5e-5
"""FID and KID below this are rounding, of either sign."""
_NOT_MEASURED: Final = "not measured: "
_OWN_MASKS: Final = "own masks: "
_OTHER_MASKS: Final = "other masks"
LARGE_N: Final = 10_000
"""Below this many images FID alone says little, and KID stands beside it."""


@dataclass(frozen=True)
class Shown:
    """A figure of image quality as columns show it."""

    key: str
    title: str
    unit: str
    evaluator: str | None
    """Kind of evaluator in `ImageQuality.evaluators`; None: computed from pixels."""
    metric: str
    """Its name among `image_quality.metrics`."""
    decimals: int | None = None
    """None: three significant digits."""
    scenes: str | None = None
    """What the title gets where the small evaluators measured it; None: they never do."""

    @property
    def scenes_key(self) -> str | None:
        return None if self.scenes is None else self.key + SCENES

    def text(self, value: float) -> str:
        """A value as cells show it."""
        if self.decimals is not None:
            return f"{value:.{self.decimals}f}"
        return number(float(value)) if abs(value) >= _LEAST else f"{abs(value):.4f}"

    def title_of(self, key: str) -> str:
        """The column's title for this figure's real or scenes key."""
        return f"{self.title} ({self.scenes})" if key == self.scenes_key else self.title


FID: Final = Shown("fid", "FID", "lower is better", "features", "fid", scenes="scenes features")
KID: Final = Shown("kid", "KID", "lower is better", "features", "kid", scenes="scenes features")
PRECISION: Final = Shown(
    "precision", "Precision", "0 to 1, higher is better", "features", "precision_recall", 3, "scenes features"
)
RECALL: Final = Shown(
    "recall", "Recall", "0 to 1, higher is better", "features", "precision_recall", 3, "scenes features"
)
CLIP_SCORE: Final = Shown("clip_score", "CLIP-score", "cosine, higher is better", "clip", "clip_score", 4, "scenes")
LPIPS: Final = Shown("lpips", "LPIPS", "lower is better", "lpips", "lpips", 3)
PSNR: Final = Shown("psnr_db", "PSNR", "dB, higher is better", None, "psnr", 2)
SSIM: Final = Shown("ssim", "SSIM", "higher is better", None, "ssim", 3)
TABLE4: Final = (FID, KID, CLIP_SCORE, LPIPS)
ALL: Final = (FID, KID, PRECISION, RECALL, CLIP_SCORE, LPIPS, PSNR, SSIM)


def has_own_masks(found: RowResult) -> bool:
    """Whether a row filled images under masks of its own, not the common ones."""
    return has_own_mask(found) or any(_OWN_MASKS in quality.what for quality in found.image_qualities)


def has_image_quality(rows: Rows, bounds: QualityBounds | None) -> bool:
    """Whether any figure of image quality was measured."""
    return bounds is not None or any(found.image_qualities for found in rows.values())


def image_quality_table(suite: Suite, rows: Rows, bounds: QualityBounds | None) -> Table:
    """All figures of every row, with floor and ceiling."""
    measured = Measured(suite, rows, bounds, ALL)
    columns = (QUALITY_NAME, *measured.columns(group=None), Column("Images", ("num_images", "image_size_px", "what")))
    body = [(quality_name_cell(found), *measured.cells(found), measured.images_cell(found)) for found in rows.values()]
    sections = [Section(None, tuple(body))]
    if bounds is not None:
        bound_rows = [
            (name, *measured.bound_cells(quality), images_cell_of([quality])) for name, quality in bounds_named(bounds)
        ]
        sections.append(Section("Bounds", tuple(bound_rows)))
    return Table(
        "image-quality",
        f"Image quality of what every row fills in ({suite.title})",
        columns,
        tuple(sections),
        tuple(measured.notes()),
    )


# -- measured columns -------------------------------------------------------------------------------------------------


class Measured:
    """The measured columns of one table: which figures under which names, and whose can be compared."""

    def __init__(self, suite: Suite, rows: Rows, bounds: QualityBounds | None, shown: Sequence[Shown]) -> None:
        self.suite, self.rows, self.bounds = suite, rows, bounds
        self.of_rows = [quality for found in rows.values() for quality in found.image_qualities]
        self.everything = all_qualities(rows, bounds)
        self.keys = [(one, key) for one in shown for key in self._keys(one)]

    def _keys(self, shown: Shown) -> list[str]:
        """The figure's keys that anything was measured under; without any, the one that the suite asks for."""
        possible = [shown.key, *([shown.scenes_key] if shown.scenes_key else [])]
        found = [key for key in possible if any(key in quality.values for quality in self.everything)]
        if found:
            return found
        asked = self.suite.image_quality
        return [possible[-1] if asked is not None and asked.evaluators == "scenes" else shown.key]

    def columns(self, group: str | None) -> list[Column]:
        return [Column(shown.title_of(key), _parts(shown, key), shown.unit, group) for shown, key in self.keys]

    def cells(self, found: RowResult) -> list[Cell]:
        """A row's figures, or why they are missing."""
        qualities = found.image_qualities
        if not qualities:
            return [missing(_nothing_in_short(self.suite, found))] * len(self.keys)
        total = len(found.finished)
        return [
            _figure_cell(qualities, total, shown, key, self.not_ranked(found, shown, key)) for shown, key in self.keys
        ]

    def bound_cells(self, quality: ImageQuality) -> list[Cell]:
        return [
            _figure_cell([quality], 1, shown, key, _difference(quality, usual, shown) if usual else None)
            for shown, key in self.keys
            for usual in [self._usual(shown, key)]
        ]

    def images_cell(self, found: RowResult) -> Cell:
        qualities = found.image_qualities
        return images_cell_of(qualities) if qualities else missing(_nothing_in_short(self.suite, found))

    def not_ranked(self, found: RowResult, shown: Shown, key: str) -> str | None:
        """Why a row's figure cannot be compared with the others of its column; None where it can."""
        if has_own_masks(found):
            return "own mask"
        usual = self._usual(shown, key)
        differing = (_difference(quality, usual, shown) for quality in found.image_qualities if usual is not None)
        return next((text for text in differing if text), None)

    def _usual(self, shown: Shown, key: str) -> ImageQuality | None:
        """One of the measurements that most rows of the column share the conditions of."""
        held = [quality for quality in self.of_rows if key in quality.values]
        if not held:
            return None
        most, _ = Counter(_conditions(quality, shown) for quality in held).most_common(1)[0]
        return next(quality for quality in held if _conditions(quality, shown) == most)

    # -- notes ----------------------------------------------------------------------------------------------------

    def notes(self) -> list[str]:
        """What a reader must know: what was compared, N, by which evaluators, and what the figures mean."""
        notes = self._warnings() + self._what()
        if self.everything:
            notes.append(
                f"N = {listed(one.num_images for one in self.everything)} images; real images "
                f"{listed(one.real_digest for one in self.of_rows or self.everything)} (digest of their pixels); "
                f"seed {listed(one.seed for one in self.of_rows or self.everything)}. Several seeds: mean and range."
            )
        kinds = dict.fromkeys(shown.evaluator for shown, _ in self.keys if shown.evaluator)
        notes += [
            f"{KINDS[kind]}: {facts_text(facts)}."
            for kind in kinds
            for facts in distinct_facts(one.evaluators.get(kind) for one in self.everything)
        ]
        return notes + self._meanings() + self._reasons()

    def _warnings(self) -> list[str]:
        counts = sorted({quality.num_images for quality in self.everything})
        if len(counts) < 2:
            return []
        return [
            f"Mind: N differs between rows ({', '.join(map(str, counts))}). FID and precision and recall depend on N: "
            "rows with another N than most are marked, not ranked."
        ]

    def _what(self) -> list[str]:
        """What was compared, in words: of most rows, and of those that differ with their names."""
        said: dict[str, list[str]] = {}
        for found in self.rows.values():
            for text in dict.fromkeys(quality.what.rstrip(".") for quality in found.image_qualities):
                said.setdefault(text, []).append(found.label)
        most = max(said, key=lambda text: len(said[text]), default=None)
        others = [text for text in said if text != most]
        notes = [f"Compared: {most}."] if most else []
        return notes + [f"Other than that, {', '.join(said[text])}: {text}." for text in others]

    def _reasons(self) -> list[str]:
        """Whole reasons that cells only begin to say, each once with what it is the reason of."""
        reasons: dict[str, list[str]] = {}
        for shown, key in self.keys:
            for quality in self.everything:
                if key not in quality.values:
                    reason, title = _why_not([quality], shown, key), shown.title_of(key)
                    if title not in reasons.setdefault(reason, []):
                        reasons[reason].append(title)
        for found in self.rows.values():
            if not found.image_qualities:
                reason = _why_nothing(self.suite, found).removeprefix(_NOT_MEASURED)
                reasons.setdefault(reason, []).append(found.label)
        return [
            f"{', '.join(names)}: not measured: {reason.rstrip('.')}."
            for reason, names in reasons.items()
            if in_short(reason) != reason
        ]

    def _meanings(self) -> list[str]:
        notes = []
        if any(quality.num_images < LARGE_N for quality in self.everything):
            notes.append(
                f"FID is biased by the number of images, the more the fewer they are: with less than {LARGE_N:,} it is "
                "compared at equal N alone. KID has no such bias and stands beside it; ± is the standard deviation "
                "over its subsets."
            )
        if any(key == shown.scenes_key for shown, key in self.keys):
            notes.append(
                "Columns marked (scenes features) and (scenes) come from small networks trained on generated scenes "
                "that ship with the package. They order rows on these images; they are not the published FID, KID and "
                "CLIP-score and cannot be compared with any published number."
            )
        if self.bounds is not None:
            notes.append(
                "Bounds: the real images themselves in place of filled ones, and hidden pixels left mid-grey: the best "
                "that a column can show here, and what filling nothing in gives."
            )
        return notes


def _conditions(quality: ImageQuality, shown: Shown) -> tuple[object, ...]:
    """What must be equal for two figures to be comparable."""
    facts = quality.evaluators.get(shown.evaluator or "")
    return (
        quality.num_images,
        quality.image_size,
        quality.real_digest,
        _hidden(quality),
        quality.captions_digest if shown is CLIP_SCORE else None,
        facts.sha256 if facts else None,
        quality.settings.get("neighborhood") if shown in (PRECISION, RECALL) else None,
    )


def _hidden(quality: ImageQuality) -> str | None:
    """Share hidden and unit, as words say it; None of real images in place of filled ones, which no mask concerns."""
    match = re.search(r"\S+ % hidden in units of \d+ px", quality.what)
    return match[0] if match else None


def _difference(quality: ImageQuality, usual: ImageQuality, shown: Shown) -> str | None:
    """In which condition a measurement differs from the usual one; None: in none."""
    names = (
        f"N = {quality.num_images}",
        f"{quality.image_size} px",
        "other real images",
        _OTHER_MASKS,
        "other captions",
        "other weights of the evaluator",
        f"balls of {quality.settings.get('neighborhood')} neighbours",
    )
    pairs = zip(names, _conditions(quality, shown), _conditions(usual, shown), strict=True)
    return next(
        (name for name, own, common in pairs if own != common and not (name == _OTHER_MASKS and own is None)), None
    )


# -- cells ------------------------------------------------------------------------------------------------------------

QUALITY_NAME: Final = Column("Method", ("row", "label", "seeds"))


def quality_name_cell(found: RowResult) -> Cell:
    parts: dict[str, float | int | str] = {"row": found.row, "label": found.label, "seeds": len(found.finished)}
    return Cell((found.label, f"{found.row}, {found.seeds_text}"), "label", parts)


def bounds_named(bounds: QualityBounds) -> list[tuple[Cell, ImageQuality]]:
    named = (("Ground truth", "truth", bounds.truth), ("Hidden part grey", "grey", bounds.grey))
    return [
        (Cell((name,), "label", {"row": row, "label": name, "seeds": "none"}), quality) for name, row, quality in named
    ]


def _parts(shown: Shown, key: str) -> tuple[str, ...]:
    deviation = (_deviation_key(key),) if shown is KID else ()
    return (key, *deviation, f"{key}_ranked", f"{key}_seeds")


def _deviation_key(key: str) -> str:
    return f"kid_std{SCENES}" if key.endswith(SCENES) else "kid_std"


def _figure_cell(qualities: Sequence[ImageQuality], total: int, shown: Shown, key: str, not_ranked: str | None) -> Cell:
    """The mean over seeds, with several their range below it; KID with its deviation over subsets.

    total: the row's seeds; it is said where not all of them have the figure.
    """
    values = [quality.values[key] for quality in qualities if key in quality.values]
    if not values:
        return missing(f"not measured: {in_short(_why_not(qualities, shown, key))}")
    mean = fmean(values)
    lines = [shown.text(mean)]
    parts: dict[str, float | int | str] = {key: mean, f"{key}_ranked": f"no: {not_ranked}" if not_ranked else "yes"}
    parts[f"{key}_seeds"] = len(values)
    if len(values) > 1:
        lines.append(f"{shown.text(min(values))} to {shown.text(max(values))}")
    if shown is KID:
        deviations = [quality.values.get(_deviation_key(key)) for quality in qualities if key in quality.values]
        known = [value for value in deviations if value is not None]
        parts[_deviation_key(key)] = fmean(known) if known else _why_not(qualities, _KID_STD, _deviation_key(key))
        if known:
            lines.append(f"± {number(float(fmean(known)))}")
    if len(values) < total:
        lines.append(f"{len(values)} of {total} seeds")
    if not_ranked:
        lines.append(f"{not_ranked}: not ranked")
    return Cell(tuple(lines), "value", parts)


_KID_STD: Final = Shown("kid_std", "KID, deviation over subsets", "", "features", "kid", scenes="scenes features")


def _why_not(qualities: Sequence[ImageQuality], shown: Shown, key: str) -> str:
    for quality in qualities:
        for name in (key, shown.key, shown.metric):
            if name in quality.not_measured:
                return quality.not_measured[name].removeprefix(f"{shown.title}: ")
    if key == shown.scenes_key and any(shown.key in quality.values for quality in qualities):
        return "measured with the published evaluator"
    if key == shown.key and any(shown.scenes_key in quality.values for quality in qualities):
        return "measured with the scenes evaluator"
    return "not among image_quality.metrics"


def _nothing_in_short(suite: Suite, found: RowResult) -> str:
    text = _why_nothing(suite, found)
    if not text.startswith(_NOT_MEASURED):
        return text
    return _NOT_MEASURED + in_short(text.removeprefix(_NOT_MEASURED))


def _why_nothing(suite: Suite, found: RowResult) -> str:
    if found.why_nothing_in_full:
        return found.why_nothing_in_full
    otherwise = "the suite measures no image quality" if suite.image_quality is None else "the record does not hold it"
    return f"not measured: {found.recorded_reason('image_quality', otherwise=otherwise)}"


def images_cell_of(qualities: Sequence[ImageQuality]) -> Cell:
    """How many images of which size, and (in the CSV) what was compared."""
    one = qualities[0]
    parts: dict[str, float | int | str] = {
        "num_images": one.num_images, "image_size_px": one.image_size, "what": one.what
    }  # fmt: skip
    return Cell((f"N = {listed(q.num_images for q in qualities)}", f"{one.image_size} px"), "label", parts)


def listed(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
