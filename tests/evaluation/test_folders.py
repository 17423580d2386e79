"""Two folders compared: figures, pairs, reuse, and every fault named before a network looks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import SafetensorError

from lmd_bench.config import ImageQualityConfig
from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError, DataError, RecordError, WeightsError
from lmd_bench.evaluation import folders
from lmd_bench.evaluation.folders import NOT_PAIRED, FolderRequest, evaluate_folders
from lmd_bench.evaluation.held_out import pixel_digest
from lmd_bench.harness.image_quality import SCENES_NOTE
from lmd_bench.metrics.image_metrics import EvaluatorSet
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import ImageQuality
from tests.evaluation.fakes import CountingFeatures, use_counting_features

COUNT = 12
IMAGES = Scenes(0, 32).render(range(2 * COUNT))
CONFIG = ImageQualityConfig(batch_size=5)


def write(folder: Path, images: torch.Tensor, ending: str = "png") -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number:03d}.{ending}", lossless=True)
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> FolderRequest:
    """Two folders of different scenes under the same names, in two formats."""
    real = write(tmp_path / "real", IMAGES[:COUNT])
    fake = write(tmp_path / "fake", IMAGES[COUNT:], "webp")
    return FolderRequest(real, fake)


@pytest.fixture
def features() -> Iterator[CountingFeatures]:
    with pytest.MonkeyPatch.context() as patched:
        yield use_counting_features(patched)


def evaluate(request: FolderRequest, config: ImageQualityConfig = CONFIG) -> ImageQuality:
    return evaluate_folders(request, config, WeightsStore(offline=True), torch.device("cpu"))


# -- figures ------------------------------------------------------------------------------------------------------


def test_a_folder_against_itself_has_no_distance(sides: FolderRequest, features: CountingFeatures) -> None:
    found = evaluate(replace(sides, fake=sides.real))
    assert abs(found.values["fid"]) < 1e-6
    assert found.values["precision"] == found.values["recall"] == found.values["ssim"] == 1.0
    assert found.values["psnr_db"] == 100.0


def test_figures_say_what_they_are_of(sides: FolderRequest, features: CountingFeatures) -> None:
    found = evaluate(sides)
    assert found.num_images == COUNT
    assert found.image_size == 32
    assert found.what == "fake against real"
    assert found.values["fid"] > 0.01
    assert found.real_digest == pixel_digest(IMAGES[:COUNT])
    assert found.not_measured["clip_score"]
    assert features.num_seen == 2 * COUNT


def test_pairs_are_made_by_name_without_ending_in_any_folder(sides: FolderRequest, features: CountingFeatures) -> None:
    """The fake images are the real ones, in a subfolder on both sides, in another format."""
    for number in range(COUNT):
        name = f"{number:03d}"
        (sides.fake / f"{name}.webp").unlink()
        for folder in (sides.real, sides.fake):
            (folder / "sub").mkdir(exist_ok=True)
        (sides.real / f"{name}.png").rename(sides.real / "sub" / f"{name}.png")
        with Image.open(sides.real / "sub" / f"{name}.png") as image:
            image.save(sides.fake / "sub" / f"{name}.bmp")
    assert evaluate(sides).values["psnr_db"] == 100.0


def test_where_names_do_not_pair_only_metrics_over_pairs_are_left_out(
    sides: FolderRequest, features: CountingFeatures
) -> None:
    (sides.fake / "000.webp").rename(sides.fake / "zzz.webp")
    found = evaluate(sides)
    assert {name for name, why in found.not_measured.items() if why == NOT_PAIRED} == {"lpips", "psnr_db", "ssim"}
    assert found.values.keys() == {"fid", "kid", "precision", "recall"}


def test_images_that_do_not_fit_in_memory_are_decoded_again_to_the_same_figures(
    sides: FolderRequest, features: CountingFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = evaluate(sides)
    monkeypatch.setattr(folders, "KEPT_BYTES", 7 * 32 * 32 * 3)
    assert evaluate(sides) == kept


def test_the_real_sides_statistics_are_used_again(
    sides: FolderRequest, features: CountingFeatures, tmp_path: Path
) -> None:
    request = replace(sides, statistics=tmp_path / "real.safetensors")
    first = evaluate(request)
    assert features.num_seen == 2 * COUNT
    second = evaluate(request)
    assert features.num_seen == 3 * COUNT
    assert second == first
    with pytest.raises(RecordError, match="of other images, another network or another size"):
        evaluate(replace(request, num_images=6))


def test_sizes_are_made_one_where_that_is_asked_for(sides: FolderRequest, features: CountingFeatures) -> None:
    Image.fromarray(np.zeros((50, 40, 3), np.uint8)).save(sides.real / "000.png")
    found = evaluate(replace(sides, image_size=24))
    assert found.image_size == 24
    assert found.what == "fake against real, resized and cropped to 24 px"


def test_the_first_images_by_name_are_taken(sides: FolderRequest, features: CountingFeatures) -> None:
    for number in range(5, COUNT):
        (sides.fake / f"{number:03d}.webp").unlink()
    found = evaluate(replace(sides, num_images=5))
    assert found.num_images == 5
    assert found.real_digest == pixel_digest(IMAGES[:5])


def test_captions_belong_to_images_by_name_or_stem(
    sides: FolderRequest, features: CountingFeatures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["file,caption", *(f"{number:03d}.png,caption {number}" for number in reversed(range(COUNT)))]
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    seen: list[str] = []
    opened = EvaluatorSet.open

    def watched(*words: object, **facts: object) -> EvaluatorSet:
        assert facts["has_captions"] is True
        found = opened(*words, **facts)  # type: ignore[arg-type]
        metrics = found.metrics()
        monkeypatch.setattr(EvaluatorSet, "metrics", lambda self, *_: metrics)
        update = metrics.update
        monkeypatch.setattr(metrics, "update", lambda *a, captions, **b: (seen.extend(captions), update(*a, **b)))
        return found

    monkeypatch.setattr(EvaluatorSet, "open", watched)
    evaluate(replace(sides, captions=tmp_path / "captions.csv"))
    assert seen == [f"caption {number}" for number in range(COUNT)]


@pytest.mark.parametrize("other", [IMAGES[0], torch.zeros(3, 64, 16, dtype=torch.uint8)])
def test_an_image_that_changes_between_the_check_and_the_measurement_is_named(
    sides: FolderRequest, features: CountingFeatures, monkeypatch: pytest.MonkeyPatch, other: torch.Tensor
) -> None:
    monkeypatch.setattr(folders, "KEPT_BYTES", 7 * 32 * 32 * 3)
    opened = EvaluatorSet.open

    def changing(*words: object, **facts: object) -> EvaluatorSet:
        Image.fromarray(other.permute(1, 2, 0).numpy()).save(sides.real / "009.png")
        return opened(*words, **facts)  # type: ignore[arg-type]

    monkeypatch.setattr(EvaluatorSet, "open", changing)
    with pytest.raises(DataError, match=r"009\.png: changed while it was measured"):
        evaluate(sides)


def test_warning_filters_are_as_they_were(
    sides: FolderRequest, features: CountingFeatures, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "KEPT_BYTES", 0)  # both sides are read in turns
    before = list(warnings.filters)
    evaluate(sides)
    assert warnings.filters == before
    (sides.fake / "002.webp").write_text("no image")
    refusal(sides)
    assert warnings.filters == before


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("I/O error: no space")])
def test_statistics_that_cannot_be_saved_are_a_note(
    sides: FolderRequest,
    features: CountingFeatures,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(FeatureStatistics, "save", full)
    found = evaluate(replace(sides, statistics=tmp_path / "real.safetensors"))
    assert "fid" in found.values
    (note,) = found.notes
    assert "real.safetensors: not saved: " in note


def test_through_the_evaluators_that_ship_reasons_and_what_figures_are_for_are_told(sides: FolderRequest) -> None:
    scenes = CONFIG.model_copy(update={"evaluators": "scenes"})
    found = evaluate(replace(sides, image_size=8), scenes)
    assert found.values.keys() == {"fid_scenes", "kid_scenes", "precision_scenes", "recall_scenes", "psnr_db"}
    assert found.not_measured["lpips"].startswith("LPIPS: images of 8 px are too small")
    assert found.not_measured["ssim"] == "SSIM: images of 8 px are smaller than its window of 11 px"
    assert found.not_measured["kid_std_scenes"].startswith("KID: each subset holds all 12 images")
    assert found.not_measured["clip_score_scenes"] == "no captions"
    assert found.notes == [SCENES_NOTE]
    small = scenes.model_copy(update={"metrics": ("kid",), "kid_subset_size": 5, "kid_subsets": 10})
    assert evaluate(sides, small).values["kid_std_scenes"] > 0
    assert evaluate(sides, scenes.model_copy(update={"metrics": ("psnr",)})).notes == []


# -- bad input ----------------------------------------------------------------------------------------------------


@pytest.fixture
def untouched() -> Iterator[None]:
    """No network may be opened."""

    def refuse(*words: object, **facts: object) -> None:
        raise AssertionError("evaluators were opened before the input was checked")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(EvaluatorSet, "open", refuse)
        yield


def refusal(request: FolderRequest, config: ImageQualityConfig = CONFIG) -> str:
    with pytest.raises(DataError) as caught:
        evaluate(request, config)
    return str(caught.value)


@pytest.mark.usefixtures("untouched")
def test_weights_that_are_there_and_wrong_are_refused_where_they_are_needed(
    sides: FolderRequest, tmp_path: Path
) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "alexnet-owt-7be5be79.pth").write_bytes(b"others")
    store = WeightsStore(tmp_path / "weights", True, hash_cache=tmp_path / "hashes.json")
    with pytest.raises(WeightsError, match=r"alexnet-owt-7be5be79\.pth: "):
        evaluate_folders(sides, ImageQualityConfig(metrics=("lpips", "ssim")), store, torch.device("cpu"))
    with pytest.raises(AssertionError, match="evaluators were opened"):
        evaluate_folders(sides, ImageQualityConfig(metrics=("ssim",)), store, torch.device("cpu"))


@pytest.mark.usefixtures("untouched")
def test_different_counts_are_refused_with_the_way_out(sides: FolderRequest) -> None:
    (sides.fake / "003.webp").unlink()
    found = refusal(sides)
    assert "holds 12 images" in found
    assert "fake 11" in found
    assert "--num-images 11 takes the first 11 of each by name" in found
    assert "--num-images 12" in refusal(replace(sides, num_images=12))


@pytest.mark.usefixtures("untouched")
def test_different_sizes_name_two_files_and_a_rectangle_is_no_square(sides: FolderRequest) -> None:
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(sides.fake / "003.webp")
    found = refusal(sides)
    assert "real/000.png: 32 x 32 px" in found
    assert "fake/003.webp: 40 x 40 px" in found
    assert "--image-size" in found
    for folder, ending in ((sides.real, "png"), (sides.fake, "webp")):
        for number in range(COUNT):
            Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(folder / f"{number:03d}.{ending}")
    assert "40 x 20 px, not a square" in refusal(sides)


@pytest.mark.usefixtures("untouched")
def test_grey_and_transparent_images_are_named(sides: FolderRequest) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(sides.real / "004.png")
    found = refusal(sides)
    assert "real/004.png: one channel" in found
    assert "real/000.png: three" in found
    assert "--grey-to-rgb" in found
    Image.fromarray(np.zeros((32, 32, 4), np.uint8)).save(sides.real / "005.png")
    assert "real/005.png: has transparent pixels" in refusal(replace(sides, grey_to_rgb=True))


def test_grey_images_are_taken_as_coloured_on_request_and_opaque_alpha_is_no_fault(
    sides: FolderRequest, features: CountingFeatures
) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(sides.real / "004.png")
    opaque = np.full((32, 32, 4), 255, np.uint8)
    Image.fromarray(opaque).save(sides.real / "005.png")
    assert evaluate(replace(sides, grey_to_rgb=True)).num_images == COUNT


@pytest.mark.usefixtures("untouched")
def test_unreadable_files_are_named_with_the_reason_and_all_problems_come_at_once(sides: FolderRequest) -> None:
    (sides.real / "001.png").write_bytes((sides.real / "001.png").read_bytes()[:200])
    (sides.fake / "002.webp").write_text("no image")
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(sides.fake / "003.webp")
    lines = refusal(sides).splitlines()
    assert len(lines) == 3
    assert "1 of 12 images cannot be used: 001.png (" in lines[0]
    assert "002.webp (not a readable image of any known format)" in lines[1]
    assert "--image-size" in lines[2]


@pytest.mark.usefixtures("untouched")
def test_images_without_captions_are_named(sides: FolderRequest, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("file,caption\n000.webp,a scene\n")
    found = refusal(replace(sides, captions=tmp_path / "captions.csv"))
    assert "11 of 12 images have no caption: 001.webp, 002.webp" in found


@pytest.mark.usefixtures("untouched")
def test_names_that_differ_in_their_endings_alone_make_no_clear_pairs(sides: FolderRequest) -> None:
    (sides.real / "001.png").rename(sides.real / "000.jpg")
    (sides.fake / "001.webp").rename(sides.fake / "000.png")
    lines = refusal(sides).splitlines()
    assert len(lines) == 2
    assert f"--real {sides.real}: 000.jpg, 000.png differ in their endings alone" in lines[0]
    assert f"--fake {sides.fake}: 000.png, 000.webp differ" in lines[1]
    assert "rename them, or leave out lpips, psnr, ssim" in lines[1]


def test_such_names_do_where_both_sides_have_the_same_or_no_pairs_are_measured(
    sides: FolderRequest, features: CountingFeatures
) -> None:
    (sides.real / "001.png").rename(sides.real / "000.jpg")
    assert evaluate(replace(sides, fake=sides.real)).values["psnr_db"] == 100.0
    (sides.fake / "001.webp").rename(sides.fake / "000.png")
    found = evaluate(sides, CONFIG.model_copy(update={"metrics": ("fid",)}))
    assert found.values.keys() == {"fid"}


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("both", [False, True])
def test_captions_by_stem_that_are_not_clear_are_refused(sides: FolderRequest, tmp_path: Path, both: bool) -> None:
    """Two captions for one image, or one caption for two images."""
    lines = ["file,caption", *(f"{number:03d}.png,caption {number}" for number in range(COUNT))]
    if both:
        lines.append("003.jpg,another caption")
    else:
        (sides.fake / "004.webp").rename(sides.fake / "003.bmp")
    (tmp_path / "captions.csv").write_text("\n".join(lines))
    config = CONFIG.model_copy(update={"metrics": ("clip_score",)})
    found = refusal(replace(sides, captions=tmp_path / "captions.csv"), config)
    named = "003.webp" if both else "003.bmp, 003.webp"
    assert f"{named}: only names with other endings have captions" in found


@pytest.mark.usefixtures("untouched")
def test_files_that_would_go_unused_are_refused(sides: FolderRequest, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"metrics": ("psnr",)})
    with pytest.raises(ConfigError, match="--captions: clip_score is not among the metrics"):
        evaluate(replace(sides, captions=tmp_path / "captions.csv"), config)
    with pytest.raises(ConfigError, match="--statistics: none of fid, kid, precision_recall"):
        evaluate(replace(sides, statistics=tmp_path / "real.safetensors"), config)


@pytest.mark.usefixtures("untouched")
def test_fewer_images_than_a_metric_needs_are_refused(sides: FolderRequest) -> None:
    found = refusal(replace(sides, num_images=3))
    assert "at least 4 images a side are needed" in found
    assert len(refusal(replace(sides, num_images=1)).splitlines()) == 3


@pytest.mark.usefixtures("untouched")
def test_folders_that_are_not_there_or_empty_are_refused(sides: FolderRequest, tmp_path: Path) -> None:
    assert "--real" in refusal(replace(sides, real=tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    assert "the folder is empty" in refusal(replace(sides, fake=tmp_path / "empty"))
