"""One interface for all measures: input is checked, the real side is looked at once, what is missing says why."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from helpers.tiny_clip import write_tiny_clip
from torch import Tensor, nn

from lmd_bench.config import ImageQualityConfig
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.evaluators.classifier import ScenesFeatures
from lmd_bench.metrics.clip_score import ClipModel
from lmd_bench.metrics.distribution import frechet_distance, kernel_distance, precision_recall
from lmd_bench.metrics.features import FeatureExtractor
from lmd_bench.metrics.image import psnr, psnr_hidden, ssim
from lmd_bench.metrics.image_metrics import (
    ClipScore,
    DistributionMetrics,
    DistributionOptions,
    EvaluatorSet,
    ImageBatch,
    ImageMetrics,
    Lpips,
    Psnr,
    Ssim,
)
from lmd_bench.metrics.statistics import FeatureStatistics
from lmd_bench.nn.perceptual import PerceptualDistance
from lmd_bench.pretrained import Manifest, WeightsStore
from lmd_bench.records import EvaluatorFacts

CPU = torch.device("cpu")


class TinyFeatures(FeatureExtractor):
    """Random convolutions; counts the images that it has looked at."""

    name = "tiny"
    num_features = 12

    def __init__(self, suffix: str = "") -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.network = nn.Sequential(
                nn.Conv2d(3, 12, 5, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            ).requires_grad_(False)
        self.suffix = suffix
        self.facts = EvaluatorFacts(name="tiny", weights="tiny.pth", sha256="0" * 64, resize="none", num_features=12)
        self.seen = 0

    def forward(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        self.seen += len(images)
        found: Tensor = self.network(images.float() / 255)
        return found


def pictures(number: int, seed: int, size: int = 32) -> Tensor:
    """(N, 3, S, S) uint8 of different colours."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (number, 3, 1, 1), generator=generator)
    noise = torch.randint(0, 256, (number, 3, size, size), generator=generator)
    return ((2 * colours + noise) // 3).to(torch.uint8)


def alexnet_tensors() -> dict[str, Tensor]:
    """A trunk of random weights under torchvision's names."""
    from lmd_bench.nn.perceptual import _trunk_layers

    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = _trunk_layers("alex")
    return {f"features.{name}": value for name, value in layers.state_dict().items()}


@pytest.fixture(scope="module")
def trunk_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trunk") / "alexnet-owt-7be5be79.pth"
    torch.save(alexnet_tensors(), path)
    return path


@pytest.fixture(scope="module")
def clip_files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_tiny_clip(tmp_path_factory.mktemp("clip"))


def measured(metric: Any, real: Tensor | None, fake: Tensor, batch: int = 16, **extra: Any) -> dict[str, float]:
    for start in range(0, len(fake), batch):
        part = slice(start, start + batch)
        metric.update(
            None if real is None else real[part], fake[part], **{name: value[part] for name, value in extra.items()}
        )
    found: dict[str, float] = metric.compute()
    return found


# -- the measures ---------------------------------------------------------------------------------------------------


def test_batches_give_the_figures_of_all_images_at_once() -> None:
    real, fake, extractor = pictures(50, 1), pictures(50, 2), TinyFeatures()
    options = DistributionOptions(kid_subsets=5, kid_subset_size=20, seed=4)
    found = measured(DistributionMetrics(extractor, options), real, fake)
    a, b = FeatureStatistics(), FeatureStatistics()
    a.update(extractor(real))
    b.update(extractor(fake))
    kid, deviation = kernel_distance(a, b, subsets=5, subset_size=20, seed=4)
    precision, recall = precision_recall(a, b)
    expected = {"kid": kid, "kid_std": deviation, "precision": precision, "recall": recall}
    assert found == pytest.approx({"fid": frechet_distance(a, b), **expected}, rel=1e-5)


def test_many_images_are_folded_in_parts_and_can_be_read_outside(tmp_path: Path) -> None:
    """Features come out of inference mode in several blocks, which are joined and read outside of it."""
    real, fake, extractor = pictures(1100, 1, 16), pictures(1100, 2, 16), TinyFeatures()
    metric = DistributionMetrics(extractor, DistributionOptions(kid_subsets=3))
    found = measured(metric, real, fake, batch=100)
    a, b = FeatureStatistics(), FeatureStatistics()
    a.update(extractor(real))
    b.update(extractor(fake))
    torch.testing.assert_close(metric.fake_statistics.features, b.features, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metric.real_statistics.covariance, a.covariance, rtol=1e-5, atol=1e-9)
    assert found["fid"] == pytest.approx(frechet_distance(a, b), rel=1e-3)
    metric.real_statistics.save(tmp_path / "real.safetensors", {})
    metric.update(real[:100], fake[:100])
    assert metric.compute()["kid_std"] > 0


def test_networks_look_in_full_single_precision_and_leave_the_settings_as_they_were() -> None:
    def tf32() -> tuple[bool, bool]:
        return torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32

    seen: list[tuple[bool, bool]] = []

    class Watching(TinyFeatures):
        def forward(self, images: Tensor) -> Tensor:
            seen.append(tf32())
            return super().forward(images)

    before = tf32()
    for chosen in ((True, True), (True, False), (False, False)):
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = chosen
        try:
            DistributionMetrics(Watching()).update(pictures(2, 1), pictures(2, 2))
            assert tf32() == chosen
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
    assert set(seen) == {(False, False)}


def test_what_resizes_gets_images_where_they_came_from_and_all_others_on_the_device() -> None:
    class Resizing(TinyFeatures):
        resizes = True

    class Places(Ssim):
        place: torch.device

        def add(self, batch: ImageBatch) -> None:
            self.place = batch.fake.device

    class OfFeatures(DistributionMetrics):
        place: torch.device

        def add(self, batch: ImageBatch) -> None:
            self.place = batch.fake.device
            assert batch.real is batch.fake

    parts = [OfFeatures(Resizing()), OfFeatures(TinyFeatures()), Places()]
    images = pictures(2, 1)
    ImageMetrics(parts, torch.device("meta")).update(images, images)
    assert [part.place.type for part in parts] == ["cpu", "meta", "meta"]
    assert ScenesFeatures.resizes
    assert ClipScore.resizes


def test_floats_and_their_8_bits_give_the_same_figures() -> None:
    real, fake = pictures(20, 1), pictures(20, 2)
    as_bits = measured(DistributionMetrics(TinyFeatures()), real, fake)
    assert measured(DistributionMetrics(TinyFeatures()), real / 255, fake / 255) == as_bits
    assert measured(Ssim(), real / 255, fake) == measured(Ssim(), real, fake)


def test_the_small_evaluators_figures_have_names_of_their_own() -> None:
    found = measured(DistributionMetrics(TinyFeatures("_scenes")), pictures(20, 1), pictures(20, 2))
    assert set(found) == {"fid_scenes", "kid_scenes", "precision_scenes", "recall_scenes"}


def test_subsets_of_all_images_have_no_deviation_to_report() -> None:
    options = DistributionOptions(metrics=("kid",), kid_subset_size=20)
    assert set(measured(DistributionMetrics(TinyFeatures(), options), pictures(20, 1), pictures(20, 2))) == {"kid"}
    assert set(measured(DistributionMetrics(TinyFeatures(), options), pictures(21, 1), pictures(21, 2))) == {
        "kid",
        "kid_std",
    }


def test_the_real_side_is_looked_at_once_and_never_again_with_its_statistics(tmp_path: Path) -> None:
    real, extractor, identity = pictures(40, 1), TinyFeatures(), {"images": "of a test"}
    first = DistributionMetrics(extractor)
    figures = measured(first, real, pictures(40, 2))
    assert extractor.seen == 80
    first.real_statistics.save(tmp_path / "real.safetensors", identity)
    loaded = FeatureStatistics.load(tmp_path / "real.safetensors", identity)
    again = measured(DistributionMetrics(extractor, real_statistics=loaded), None, pictures(40, 2))
    assert extractor.seen == 120
    assert again == figures


def test_one_tensor_on_both_sides_is_looked_at_once() -> None:
    extractor, images = TinyFeatures(), pictures(30, 1)
    whole = ImageMetrics([DistributionMetrics(extractor)], CPU)
    whole.update(images, images)
    figures = whole.compute()
    assert extractor.seen == 30
    assert figures["fid"] == pytest.approx(0, abs=1e-5)
    assert (figures["precision"], figures["recall"]) == (1.0, 1.0)


def test_psnr_is_over_hidden_pixels_where_there_is_a_mask() -> None:
    real, fake = pictures(10, 1), pictures(10, 2)
    masks = yardstick_masks(10, 32, 8, 0.25)
    hidden = psnr_hidden(fake / 255, real / 255, masks).mean()
    assert measured(Psnr(), real, fake, batch=3, mask=masks)["psnr_db"] == pytest.approx(float(hidden))
    assert measured(Psnr(), real, fake, batch=3)["psnr_db"] == pytest.approx(float(psnr(fake / 255, real / 255).mean()))


def test_ssim_is_the_mean_over_images() -> None:
    real, fake = pictures(10, 1), pictures(10, 2)
    assert measured(Ssim(), real, fake, batch=3)["ssim"] == pytest.approx(float(ssim(fake / 255, real / 255).mean()))


def test_lpips_equals_the_package_on_the_same_trunk(trunk_file: Path) -> None:
    import warnings

    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the package's arguments
        package = lpips.LPIPS(net="alex", pnet_rand=True, verbose=False)
    trunk = {key.split(".", 1)[1]: value for key, value in alexnet_tensors().items()}
    package.net.load_state_dict({key: trunk[key.split(".", 1)[1]] for key in package.net.state_dict()})
    real, fake = pictures(6, 1, 40), pictures(6, 2, 40)
    with torch.no_grad():
        theirs = float(package(fake / 255, real / 255, normalize=True).mean())
    found = measured(Lpips(PerceptualDistance.open("alex", trunk_file)), real, fake, batch=4)
    assert found["lpips"] == pytest.approx(theirs, rel=1e-5)


def test_clip_score_is_the_mean_cosine_and_named_after_its_model(clip_files: tuple[Path, Path]) -> None:
    clip, fake = ClipModel.open(*clip_files, suffix="_scenes"), pictures(6, 2)
    captions = [f"picture number {number}" for number in range(6)]
    found = measured(ClipScore(clip), None, fake, batch=4, captions=captions)
    assert found == {"clip_score_scenes": pytest.approx(float(clip.similarity(fake, captions).mean()), rel=1e-5)}


# -- what goes in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("real", "fake", "extra", "message"),
    [
        (pictures(4, 1), pictures(3, 1), {}, "4 real images and 3 others"),
        (pictures(3, 1), pictures(3, 1, 40), {}, r"sizes differ: 32 x 32 px and 40 x 40 px \(real and other\)"),
        (pictures(3, 1)[:, :1], pictures(3, 1)[:, :1], {}, "grey images; three channels are needed"),
        (pictures(3, 1), torch.zeros(3, 4, 32, 32), {}, "images of 4 channels; three channels are needed"),
        (pictures(3, 1), pictures(3, 1)[0], {}, r"need images \(B, 3, H, W\), got shape \[3, 32, 32\]"),
        (pictures(0, 1), pictures(0, 1), {}, r"need images \(B, 3, H, W\)"),
        (pictures(3, 1), pictures(3, 1).float(), {}, r"floats must lie in \[0, 1\]"),
        (pictures(3, 1), pictures(3, 1) / 255 - 0.5, {}, r"floats must lie in \[0, 1\]"),
        (pictures(3, 1), torch.full((3, 3, 32, 32), float("nan")), {}, r"floats must lie in \[0, 1\], got \[nan"),
        (pictures(3, 1), pictures(3, 1).int(), {}, r"need uint8, or floats in \[0, 1\], got torch.int32"),
        (pictures(3, 1), pictures(3, 1), {"captions": ["one"]}, "1 captions for 3 images"),
        (pictures(3, 1), pictures(3, 1), {"mask": torch.ones(2, 2, 2, dtype=torch.bool)}, "masks must be bool, one"),
        (pictures(3, 1), pictures(3, 1), {"mask": torch.ones(3, 2, 2)}, "masks must be bool, one for each of 3"),
    ],
)
def test_unfit_batches_are_refused_before_anything_is_computed(
    real: Tensor, fake: Tensor, extra: dict[str, Any], message: str
) -> None:
    extractor = TinyFeatures()
    metric = ImageMetrics([DistributionMetrics(extractor), Psnr()], CPU)
    with pytest.raises(DataError, match=message):
        metric.update(real, fake, **extra)
    assert extractor.seen == 0


def test_what_a_measure_needs_and_lacks_is_named(clip_files: tuple[Path, Path]) -> None:
    with pytest.raises(DataError, match="real images, or statistics of them, are needed"):
        DistributionMetrics(TinyFeatures()).update(None, pictures(2, 1))
    with pytest.raises(DataError, match="real images are needed beside the others"):
        Psnr().update(None, pictures(2, 1))
    with pytest.raises(DataError, match="CLIP-score: captions are needed"):
        ClipScore(ClipModel.open(*clip_files)).update(None, pictures(2, 1))


def test_figures_of_no_or_too_few_images_are_refused() -> None:
    with pytest.raises(DataError, match="ssim of no images"):
        Ssim().compute()
    metric = DistributionMetrics(TinyFeatures())
    metric.update(pictures(1, 1), pictures(1, 2))
    with pytest.raises(DataError, match="FID: at least 2 images a side are needed, there are 1"):
        metric.compute()


def test_statistics_of_another_number_of_images_are_refused() -> None:
    statistics = FeatureStatistics()
    statistics.update(TinyFeatures()(pictures(9, 1)))
    metric = DistributionMetrics(TinyFeatures(), real_statistics=statistics)
    metric.update(None, pictures(8, 2))
    with pytest.raises(DataError, match="statistics of 9 real images and 8 others"):
        metric.compute()


# -- the networks -----------------------------------------------------------------------------------------------------


def entry(file: Path, **values: Any) -> dict[str, Any]:
    return {
        "title": file.stem,
        "what": "of a test",
        "used_for": "a test",
        "licence": "none",
        "files": [{"name": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}],
        **values,
    }


Opened = Callable[..., EvaluatorSet]


@pytest.fixture
def open_set(
    trunk_file: Path, clip_files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Opened:
    """EvaluatorSet.open with weights of the test's own: AlexNet and a CLIP, unless left `out`."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr("lmd_bench.metrics.features._inception", lambda *_: nn.Identity())
    monkeypatch.setattr("lmd_bench.metrics.clip_score._known", lambda *_: _tiny_config(clip_files[0]))
    folder = tmp_path / "weights"
    folder.mkdir()
    inception = tmp_path / "weights-inception.pth"
    torch.save({"fc.bias": torch.zeros(2)}, inception)
    files = {"alexnet": trunk_file, "clip-vit-l-14": clip_files[1], "inception": inception}
    origins = {
        "alexnet": {"url": "https://example.org/alexnet.pth"},
        "clip-vit-l-14": {"hub": "timm/vit_large_patch14_clip_224.openai", "open_clip_model": "ViT-L-14-quickgelu"},
        "inception": {"url": "https://example.org/inception.pth"},
    }
    manifest = Manifest.model_validate({"weights": {name: entry(files[name], **origins[name]) for name in files}})

    def make(
        *, out: tuple[str, ...] = (), size: int = 40, captions: bool = True, number: int = 2000, **values: Any
    ) -> Any:
        for name, file in files.items():
            (folder / file.name).unlink(missing_ok=True)
            if name not in out:
                (folder / file.name).symlink_to(file)
        store = WeightsStore(folder, offline=True, manifest=manifest, hash_cache=tmp_path / "hashes.json")
        config = ImageQualityConfig.model_validate(values)
        return EvaluatorSet.open(config, store, CPU, image_size=size, has_captions=captions, num_images=number)

    return make


def _tiny_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    import json

    return json.loads(path.read_text()), {}


def test_everything_that_is_there_is_opened_and_named_with_its_hash(
    open_set: Opened, trunk_file: Path, clip_files: tuple[Path, Path]
) -> None:
    evaluators = open_set()
    assert evaluators.not_measured == {}
    assert set(evaluators.facts) == {"features", "clip", "lpips"}
    assert evaluators.facts["lpips"].sha256 == hashlib.sha256(trunk_file.read_bytes()).hexdigest()
    assert evaluators.facts["clip"].sha256 == hashlib.sha256(clip_files[1].read_bytes()).hexdigest()
    assert evaluators.facts["clip"].name == "CLIP ViT-L-14 (openai)"
    assert evaluators.facts["features"].name == "Inception v3 (torch-fidelity)"


def test_missing_weights_are_a_reason_for_each_figure_and_the_others_are_measured(open_set: Opened) -> None:
    evaluators = open_set(out=("inception", "alexnet"))
    figures = {"fid", "kid", "kid_std", "precision", "recall", "lpips"}
    assert set(evaluators.not_measured) == figures
    assert evaluators.not_measured["fid"].startswith("no weights-inception weights: put weights-inception.pth into")
    assert evaluators.extractor is None
    metrics = evaluators.metrics()
    metrics.update(pictures(4, 1), pictures(4, 2), captions=["a", "b", "c", "d"])
    assert set(metrics.compute()) == {"clip_score", "psnr_db", "ssim"}
    assert metrics.real_statistics is None


def test_a_file_that_cannot_be_used_is_a_reason_for_its_own_figures_alone(
    open_set: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*words: object) -> None:
        raise WeightsError("weights-inception.pth: not torch-fidelity's Inception v3")

    monkeypatch.setattr("lmd_bench.metrics.features._inception", refuse)
    evaluators = open_set()
    reason = "weights-inception.pth: not torch-fidelity's Inception v3"
    assert evaluators.not_measured == dict.fromkeys(("fid", "kid", "kid_std", "precision", "recall"), reason)
    metrics = evaluators.metrics()
    metrics.update(pictures(2, 1, 40), pictures(2, 2, 40), captions=["a", "b"])
    assert set(metrics.compute()) == {"clip_score", "lpips", "psnr_db", "ssim"}
    monkeypatch.setattr(WeightsStore, "_sha256", lambda *_: "f" * 64)
    reasons = open_set(metrics=("lpips", "ssim")).not_measured
    assert reasons.keys() == {"lpips"}
    assert "wrong hash: expected" in reasons["lpips"]


def test_reasons_in_words(open_set: Opened) -> None:
    assert open_set(captions=False).not_measured == {"clip_score": "no captions"}
    small = open_set(size=24).not_measured
    assert small == {"lpips": "LPIPS: images of 24 px are too small for alex; it takes 31 px or more"}
    assert open_set(size=10, metrics=("ssim",)).not_measured["ssim"].startswith("SSIM: images of 10 px")
    few = open_set(number=3).not_measured
    assert few["precision"] == few["recall"]
    assert "at least 4 images a side are needed" in few["recall"]
    assert few["kid_std"] == "KID: each subset holds all 3 images, so subsets do not differ"
    assert "fid" not in few


def test_what_is_not_asked_for_is_neither_opened_nor_missed(open_set: Opened) -> None:
    evaluators = open_set(out=("inception", "alexnet", "clip-vit-l-14"), metrics=("psnr",), captions=False)
    assert evaluators.not_measured == {}
    assert evaluators.facts == {}
    metrics = evaluators.metrics()
    metrics.update(pictures(2, 1), pictures(2, 2))
    assert set(metrics.compute()) == {"psnr_db"}


def test_a_clip_that_the_manifest_does_not_list_is_a_reason_and_one_that_nobody_knows_an_error(
    open_set: Opened,
) -> None:
    reasons = open_set(clip_model="RN50", clip_pretrained="cc12m").not_measured
    assert reasons["clip_score"].startswith("no RN50 (cc12m) weights: the manifest lists tiny alone")
    with pytest.raises(ConfigError, match="clip_model: open_clip has no model 'ViT-L-99'"):
        open_set(clip_model="ViT-L-99")


def test_the_scenes_evaluators_are_a_choice_and_their_figures_say_so(
    open_set: Opened, clip_files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Features(TinyFeatures):
        @classmethod
        def open(cls, device: torch.device) -> TinyFeatures:
            return TinyFeatures("_scenes")

    _replace(monkeypatch, "classifier", ScenesFeatures=Features)
    _replace(monkeypatch, "clip", open_scenes_clip=lambda device: ClipModel.open(*clip_files, suffix="_scenes"))
    evaluators = open_set(out=("inception", "clip-vit-l-14"), evaluators="scenes", kid_subset_size=10)
    assert evaluators.not_measured == {}
    metrics = evaluators.metrics(seed=3)
    metrics.update(pictures(40, 1), pictures(40, 2), captions=["a"] * 40, mask=yardstick_masks(40, 32, 8, 0.25))
    assert set(metrics.compute()) == {
        "fid_scenes", "kid_scenes", "kid_std_scenes", "precision_scenes", "recall_scenes", "clip_score_scenes",
        "lpips", "psnr_db", "ssim",
    }  # fmt: skip
    known = metrics.real_statistics
    assert known is not None
    extractor = evaluators.extractor
    assert isinstance(extractor, TinyFeatures)
    seen = extractor.seen
    again = evaluators.metrics(known, seed=3)
    again.update(pictures(40, 1), pictures(40, 2), captions=["a"] * 40)
    assert again.compute()["fid_scenes"] == metrics.compute()["fid_scenes"]
    assert extractor.seen == seen + 40
    assert open_set(evaluators="scenes", captions=False, number=1).not_measured.keys() == {
        "fid_scenes", "kid_scenes", "kid_std_scenes", "precision_scenes", "recall_scenes", "clip_score_scenes",
    }  # fmt: skip


def _replace(monkeypatch: pytest.MonkeyPatch, name: str, **values: Any) -> None:
    """A small module in place of one of the evaluators'."""
    module = ModuleType(f"lmd_bench.evaluators.{name}")
    for key, value in values.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, module.__name__, module)
