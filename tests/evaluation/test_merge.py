"""What is asked for against what is there: what is lacking, what stands in the way, what stays."""

from __future__ import annotations

from typing import Any

import pytest

from lmd_bench.config import ImageQualityConfig
from lmd_bench.evaluation.merge import compare, dropped_note, merged
from lmd_bench.records import EvaluatorFacts, ImageQuality

INCEPTION = EvaluatorFacts(name="Inception", weights="w", sha256="0" * 64, resize="none")
ALL = {"fid": 1.0, "kid": 0.1, "precision": 0.5, "recall": 0.6, "clip_score": 0.2, "lpips": 0.3, "psnr_db": 20.0}


def quality(values: dict[str, float], *, settings: dict[str, Any] | None = None, **changes: Any) -> ImageQuality:
    """Figures of 8 images, with settings that ask for all metrics but SSIM unless they say otherwise."""
    metrics = ("fid", "kid", "precision_recall", "clip_score", "lpips", "psnr")
    config = ImageQualityConfig.model_validate({"metrics": metrics, **(settings or {})})
    found = ImageQuality(
        num_images=8,
        image_size=32,
        what="filled against real",
        values=values,
        evaluators={"features": INCEPTION},
        real_digest="a",
        captions_digest="c",
        seed=0,
        settings=config.model_dump(mode="json"),
        not_measured={"kid_std": "one subset"},
    )
    return found.model_copy(update=changes)


def test_what_is_there_in_whole_lacks_nothing_and_nothing_is_in_the_way() -> None:
    overlap = compare(quality(ALL), quality({}, what=""))
    assert overlap.lacking == ()
    assert overlap.obstacle is None


def test_what_cannot_be_measured_now_is_not_lacking() -> None:
    found = quality({"fid": 1.0, "psnr_db": 20.0})
    now = quality({}, not_measured={"kid": "w", "kid_std": "w", "precision": "w", "recall": "w", "lpips": "w"})
    assert compare(found, now).lacking == ("clip_score",)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_images": 6, "real_digest": "b"}, "6 images, not 8"),
        ({"image_size": 64, "real_digest": "b"}, "64 px, not 32"),
        ({"real_digest": "b"}, "other real images"),
        ({"captions_digest": "b"}, "other captions"),
        ({"seed": 1}, "seed 1, not 0"),
        ({"what": "other masks"}, '"other masks"'),
        ({"settings": {"batch_size": 4}}, "filled 4 at a time, not 32"),
    ],
)
def test_figures_of_other_images_masks_or_draws_cannot_stand_together(changes: dict[str, Any], words: str) -> None:
    found, new = quality(ALL, **changes), quality({"psnr_db": 21.0})
    obstacle = compare(found, new).obstacle
    assert obstacle is not None
    assert words in obstacle
    assert merged(found, new) == new
    assert "FID, KID" in str(dropped_note(found, new))


def test_only_what_filled_images_depend_on_counts_for_bounds() -> None:
    found = quality(ALL, settings={"batch_size": 4})
    assert compare(found, quality({}), drawn=False).obstacle is None


def test_figures_are_added_with_what_is_known_of_them() -> None:
    found = quality({"fid": 1.0}, settings={"metrics": ["fid"]}, not_measured={"lpips": "no weights"}, fill_s=2.0)
    new = quality({"psnr_db": 20.0}, settings={"metrics": ["psnr"]}, evaluators={}, not_measured={}, fill_s=3.0)
    whole = merged(found, new)
    assert whole.values == {"fid": 1.0, "psnr_db": 20.0}
    assert whole.evaluators == {"features": INCEPTION}
    assert whole.settings["metrics"] == ["fid", "psnr"]
    assert whole.not_measured == {"lpips": "no weights"}
    assert dropped_note(found, whole) is None


def test_captions_that_have_come_since_add_their_score() -> None:
    found = quality({"psnr_db": 20.0}, captions_digest=None, not_measured={"clip_score": "no captions"})
    new = quality({"clip_score": 0.2}, settings={"metrics": ["clip_score"]}, not_measured={})
    assert compare(found, new).obstacle is None
    whole = merged(found, new)
    assert (whole.values, whole.captions_digest) == ({"clip_score": 0.2, "psnr_db": 20.0}, "c")
    assert whole.not_measured == {}


def test_other_weights_or_constants_concern_the_figures_that_depend_on_them() -> None:
    found = quality(ALL)
    other = INCEPTION.model_copy(update={"sha256": "1" * 64})
    new = quality({"fid": 2.0}, settings={"metrics": ["fid"]}, evaluators={"features": other})
    assert "other weights of Inception" in str(compare(found, new).obstacle)
    assert merged(found, new).values == {"fid": 2.0, "clip_score": 0.2, "lpips": 0.3, "psnr_db": 20.0}
    new = quality({"kid": 0.2}, settings={"metrics": ["kid"], "kid_subsets": 5})
    assert "kid_subsets 100, not 5" in str(compare(found, new).obstacle)
    whole = merged(found, new)
    assert whole.values == {**ALL, "kid": 0.2}
    assert whole.settings["kid_subsets"] == 5
    new = quality({"psnr_db": 21.0}, settings={"metrics": ["psnr"], "kid_subsets": 5})
    assert compare(found, new).obstacle is None
    assert merged(found, new).settings["kid_subsets"] == 100


def test_one_record_holds_the_figures_of_one_kind_of_evaluators() -> None:
    found = quality(ALL)
    new = quality({"fid_scenes": 3.0}, settings={"metrics": ["fid"], "evaluators": "scenes"}, evaluators={})
    assert "evaluators real, not scenes" in str(compare(found, new).obstacle)
    whole = merged(found, new)
    assert whole.values == {"fid_scenes": 3.0, "lpips": 0.3, "psnr_db": 20.0}
    pixels = quality({"psnr_db": 21.0}, settings={"metrics": ["psnr"], "evaluators": "scenes"}, evaluators={})
    assert compare(found, pixels).obstacle is None
    assert merged(found, pixels).settings["evaluators"] == "real"
