"""What a record of image quality holds beside what is asked for now: what it lacks, and what can stand with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from lmd_bench.config import ImageMetricName
from lmd_bench.evaluation.result import figure_name, kind_of
from lmd_bench.metrics.image_metrics import FIGURES, SCENES_SUFFIX, WITH_EVALUATORS, figure_keys
from lmd_bench.records import PICTURES, ImageQuality

SAMPLES = "samples"
_CONSTANTS: dict[str, tuple[str, ...]] = {
    "kid": ("kid_subsets", "kid_subset_size"),
    "precision_recall": ("neighborhood",),
    "clip_score": ("clip_model", "clip_pretrained"),
}
"""Settings that a metric's figures depend on, beside its network."""


@dataclass(frozen=True)
class Overlap:
    """Figures that are there against those that would be measured now."""

    lacking: tuple[str, ...]
    """Figures that are asked for, can be measured, and are not there."""
    common: tuple[str, ...]
    """In what all of them differ, in words: no figure of both can stand in one record."""
    single: dict[str, str]
    """Figure that is there -> in what its network or constants differ, where what is asked for takes its place."""

    @property
    def obstacle(self) -> str | None:
        """Why what is asked for can only replace what is there; None where it can be added, or is there."""
        words = [*self.common, *dict.fromkeys(self.single.values())]
        return f"its figures are of other settings: {', '.join(words)}; --force replaces them" if words else None


def compare(found: ImageQuality, now: ImageQuality, *, drawn: bool = True) -> Overlap:
    """`found` in a record against `now`, whose values may be missing yet, and its `what` empty.

    drawn: whether a method filled the images, so that the batch size counts.
    """
    asked = [key for key in figure_keys(_asked(now), now.settings["evaluators"]) if key not in now.not_measured]
    return Overlap(
        lacking=tuple(key for key in asked if key not in found.values),
        common=tuple(_differences(found, now, drawn)),
        single=_other_measurements(found, now, asked),
    )


def merged(found: ImageQuality | None, new: ImageQuality, *, drawn: bool = True) -> ImageQuality:
    """`new`, with those of `found`'s figures that it does not hold and that are of the same images and settings."""
    if found is None:
        return new
    overlap = compare(found, new, drawn=drawn)
    if overlap.common:
        return new
    kept = {key: value for key, value in found.values.items() if key not in new.values and key not in overlap.single}
    if not kept:
        return new
    values = {**kept, **new.values}
    reasons = {key: why for key, why in found.not_measured.items() if key not in (PICTURES, SAMPLES)}
    return new.model_copy(
        update={
            "values": values,
            "evaluators": {**_facts_of(kept, found), **new.evaluators},
            "settings": _merged_settings(found, new, kept),
            "captions_digest": new.captions_digest or found.captions_digest,
            "not_measured": {k: why for k, why in {**reasons, **new.not_measured}.items() if k not in values},
            "notes": list(dict.fromkeys([*found.notes, *new.notes])),
        }
    )


def dropped_note(found: ImageQuality | None, now_there: ImageQuality) -> str | None:
    """Which figures of other settings `now_there` has replaced; None for none."""
    lost = [] if found is None else [figure_name(key) for key in found.values if key not in now_there.values]
    if found is None or not lost:
        return None
    overlap = compare(found, now_there)
    words = ", ".join([*overlap.common, *dict.fromkeys(overlap.single.values())])
    return f"{', '.join(lost)} that stood there are gone: of other settings{f' ({words})' if words else ''}"


# -- differences ------------------------------------------------------------------------------------------------------


def _differences(found: ImageQuality, now: ImageQuality, drawn: bool) -> list[str]:
    pairs = [
        ("images", found.num_images, now.num_images),
        ("px", found.image_size, now.image_size),
    ]
    words = [f"{there} {unit}, not {wanted}" for unit, there, wanted in pairs if there != wanted]
    if not words:  # other digests follow from another number or size
        digests = [
            ("real images", found.real_digest, now.real_digest),
            ("captions", found.captions_digest, now.captions_digest),
        ]
        words += [f"other {kind}" for kind, there, wanted in digests if None not in (there, wanted) and there != wanted]
    if found.seed != now.seed:
        words.append(f"seed {found.seed}, not {now.seed}")
    batch_sizes = found.settings.get("batch_size"), now.settings.get("batch_size")
    if drawn and batch_sizes[0] != batch_sizes[1]:
        words.append(f"filled {batch_sizes[0]} at a time, not {batch_sizes[1]}")
    if not words and now.what and found.what != now.what:
        words.append(f'"{found.what}"')
    return words


def _other_measurements(found: ImageQuality, now: ImageQuality, asked: Sequence[str]) -> dict[str, str]:
    """`Overlap.single`."""
    with_evaluators = [key for key in found.values if _metric_of(key) in WITH_EVALUATORS]
    evaluators = found.settings.get("evaluators"), now.settings["evaluators"]
    if evaluators[0] != evaluators[1] and any(_metric_of(key) in WITH_EVALUATORS for key in asked):
        return dict.fromkeys(with_evaluators, f"evaluators {evaluators[0]}, not {evaluators[1]}")
    single: dict[str, str] = {}
    for key in found.values:
        facts = found.evaluators.get(kind_of(key) or ""), now.evaluators.get(kind_of(key) or "")
        if facts[0] is not None and facts[1] is not None and facts[0] != facts[1]:
            same = facts[0].name == facts[1].name
            single[key] = f"other weights of {facts[0].name}" if same else f"{facts[0].name}, not {facts[1].name}"
        elif key in asked and (words := _other_constants(found, now, _metric_of(key))):
            single[key] = words
    return single


def _other_constants(found: ImageQuality, now: ImageQuality, metric: ImageMetricName) -> str:
    if now.settings["evaluators"] == "scenes" and metric == "clip_score":
        return ""  # has a model of its own
    names = [name for name in _CONSTANTS.get(metric, ()) if found.settings.get(name) != now.settings.get(name)]
    return ", ".join(f"{name} {found.settings.get(name)}, not {now.settings.get(name)}" for name in names)


# -- parts ------------------------------------------------------------------------------------------------------------


def _asked(quality: ImageQuality) -> list[ImageMetricName]:
    return [metric for metric in get_args(ImageMetricName) if metric in quality.settings["metrics"]]


def _metric_of(key: str) -> ImageMetricName:
    figure = key.removesuffix(SCENES_SUFFIX)
    return next(metric for metric, figures in FIGURES.items() if figure in figures)


def _facts_of(figures: Sequence[str] | dict[str, float], quality: ImageQuality) -> dict[str, object]:
    kinds = {kind_of(key) for key in figures}
    return {kind: facts for kind, facts in quality.evaluators.items() if kind in kinds}


def _merged_settings(found: ImageQuality, new: ImageQuality, kept: dict[str, float]) -> dict[str, object]:
    """Those of `new`, with `found`'s for the metrics whose figures were kept."""
    metrics = {_metric_of(key) for key in kept}
    names = [name for metric in metrics for name in _CONSTANTS.get(metric, ())]
    if metrics & set(WITH_EVALUATORS):
        names.append("evaluators")
    both = {*_asked(new), *metrics}
    return {
        **new.settings,
        **{name: found.settings[name] for name in names if name in found.settings},
        "metrics": [metric for metric in get_args(ImageMetricName) if metric in both],
    }
