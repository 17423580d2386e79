"""Figures in words: names that nobody can mistake, values, evaluators, and reasons."""

from __future__ import annotations

from lmd_bench.evaluation.result import figure_name, missing_lines, short_text, table_rows
from lmd_bench.records import EvaluatorFacts, ImageQuality

FEATURES = EvaluatorFacts(name="scenes features", weights="w", sha256="0" * 64, resize="none")
QUALITY = ImageQuality(
    num_images=20,
    image_size=64,
    what="a against b",
    values={"ssim": 0.5, "fid_scenes": 1.25, "kid_scenes": -0.00012, "psnr_db": 21.0},
    evaluators={"features": FEATURES},
    real_digest="d",
    seed=0,
    not_measured={"lpips": "no AlexNet weights", "clip_score_scenes": "no captions"},
)


def test_figures_of_the_small_evaluators_have_names_of_their_own() -> None:
    assert figure_name("fid") == "FID"
    assert figure_name("fid_scenes") == "FID (scenes features)"
    assert figure_name("clip_score_scenes") == "CLIP-score (scenes)"


def test_the_table_names_value_evaluator_and_number_in_a_fixed_order() -> None:
    assert table_rows(QUALITY) == [
        ("FID (scenes features)", "1.2500", "scenes features", "20"),
        ("KID (scenes features)", "-0.00012", "scenes features", "20"),
        ("PSNR, dB", "21.00", "-", "20"),
        ("SSIM", "0.5000", "-", "20"),
    ]
    assert short_text(QUALITY).startswith("FID (scenes features) 1.2500, KID")


def test_what_is_missing_says_why() -> None:
    assert missing_lines(QUALITY) == [
        "CLIP-score (scenes): not measured: no captions",
        "LPIPS: not measured: no AlexNet weights",
    ]
