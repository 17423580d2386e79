"""LPIPS on the common yardstick, from a file of random weights in torchvision's layout, and time to a target of it."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from helpers.methods import Tiny, TinyConfig
from torch import Tensor

from lmd_bench.config import EvaluationConfig, Suite
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.yardstick import hide, paste, yardstick_masks
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.harness.evaluate import YardstickRunner, open_lpips
from lmd_bench.harness.execute import DataShelf, Watcher, execute
from lmd_bench.harness.plan import make_plan
from lmd_bench.method import DataSpec
from lmd_bench.nn.perceptual import PerceptualDistance, _trunk_layers
from lmd_bench.pretrained import WeightsStore, read_manifest
from lmd_bench.records import RunRecord, Yardstick

CPU = torch.device("cpu")
CONFIG = EvaluationConfig(num_images=6, unit_px=16, batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of weights with a small AlexNet trunk that nobody has trained, under torchvision's name."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights")
    trunk = {f"features.{key}": value for key, value in _trunk_layers("alex").state_dict().items()}
    torch.save(trunk, path / "alexnet-owt-7be5be79.pth")
    return path


@pytest.fixture
def store(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightsStore:
    """A store whose manifest names this file's own hash in place of torchvision's."""
    monkeypatch.delenv("LMD_BENCH_WEIGHTS", raising=False)
    manifest = read_manifest()
    entry = manifest.entry("alexnet")
    digest = hashlib.sha256((folder / entry.files[0].name).read_bytes()).hexdigest()
    entry = entry.model_copy(update={"files": (entry.files[0].model_copy(update={"sha256": digest}),)})
    manifest = manifest.model_copy(update={"weights": {"alexnet": entry}})
    return WeightsStore(folder, True, manifest, tmp_path / "hashes.json")


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WeightsStore:
    """A store that finds nothing on any machine."""
    monkeypatch.delenv("LMD_BENCH_WEIGHTS", raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    return WeightsStore(None, True, hash_cache=tmp_path / "hashes.json")


def images() -> Tensor:
    return Scenes(0, 64).render(torch.arange(6))


class Grey(Tiny):
    """Fills with grey, and has a projector that passes images through unharmed."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return torch.full_like(images, 0.5)

    def round_trip(self, images: Tensor) -> Tensor:
        return images


def opened(store: WeightsStore) -> PerceptualDistance:
    perceptual = open_lpips(store, 64, download=False)
    assert isinstance(perceptual, PerceptualDistance)
    return perceptual


def test_it_is_the_mean_over_images_of_the_composite_against_the_truth(store: WeightsStore) -> None:
    perceptual = opened(store)
    method = Grey(TinyConfig(), DataSpec(64))
    check = YardstickRunner(images(), CONFIG, 0, CPU, perceptual).check(method, 3, 1.5)
    truth = images().float() / 255
    mask = yardstick_masks(6, 64, 16, CONFIG.keep)
    composite = paste(method.reconstruct(hide(truth, mask), mask), truth, mask)
    expected = torch.stack(
        [perceptual(2 * a[None] - 1, 2 * b[None] - 1)[0] for a, b in zip(composite, truth, strict=True)]
    )
    assert check.lpips == pytest.approx(float(expected.mean()), rel=1e-5)
    assert check.lpips is not None
    assert check.lpips > 0


def test_it_is_measured_in_full_single_precision(store: WeightsStore) -> None:
    perceptual, allowed = opened(store), []
    perceptual.register_forward_hook(lambda *_: allowed.append(torch.backends.cudnn.allow_tf32))
    assert torch.backends.cudnn.allow_tf32
    YardstickRunner(images(), CONFIG, 0, CPU, perceptual).check(Grey(TinyConfig(), DataSpec(64)), 0, 0.0)
    assert allowed == [False, False]
    assert torch.backends.cudnn.allow_tf32


def test_other_figures_are_bit_equal_with_and_without_it(store: WeightsStore) -> None:
    method = Grey(TinyConfig(), DataSpec(64))
    found: list[Yardstick] = []
    for perceptual in (opened(store), None):
        runner = YardstickRunner(images(), CONFIG, 0, CPU, perceptual)
        runner.check(method, 0, 0.0)
        found.append(runner.summary(method))
    measured, bare = (one.model_dump() for one in found)
    assert measured["checks"][0].pop("lpips") > 0
    assert bare["checks"][0].pop("lpips") is None
    assert (measured.pop("ceiling_lpips"), bare.pop("ceiling_lpips")) == (0.0, None), (
        "an unharmed image is at no distance"
    )
    assert measured == bare


def test_missing_and_unfit_weights_are_said_in_words_and_wrong_ones_raised(
    empty: WeightsStore, store: WeightsStore, folder: Path
) -> None:
    words = "no AlexNet weights: put alexnet-owt-7be5be79.pth into --weights DIR (lmd-bench doctor lists all)"
    assert open_lpips(empty, 64, download=True) == words, "offline, so nothing is downloaded"
    small = open_lpips(store, 30, download=False)
    assert isinstance(small, str)
    assert "images of 30 px are too small" in small
    with pytest.raises(WeightsError, match="wrong hash: expected 7be5be79"):
        open_lpips(WeightsStore(folder, True, hash_cache=store.hash_cache), 64, download=False)


def test_a_file_of_another_layout_is_said_not_used(store: WeightsStore, tmp_path: Path) -> None:
    entry = store.manifest.entry("alexnet")
    file = entry.files[0].model_copy(update={"sha256": None, "hash_source": None})
    manifest = store.manifest.model_copy(update={"weights": {"alexnet": entry.model_copy(update={"files": (file,)})}})
    other = tmp_path / "other"
    other.mkdir()
    torch.save({"weight": torch.zeros(1)}, other / file.name)
    said = open_lpips(WeightsStore(other, True, manifest, tmp_path / "hashes.json"), 64, download=False)
    assert isinstance(said, str)
    assert "not the weights of torchvision's alex" in said


# -- in a run -------------------------------------------------------------------------------------------------------

SUITE = Suite.model_validate(
    {
        "name": "tiny",
        "title": "Tiny",
        "data": {"name": "scenes", "image_size": 32, "num_train": 16, "num_held_out": 4},
        "steps": 2,
        "untimed_steps": 0,
        "recipes": {"equal": {"batch_size": 4, "lr": {"base": 1e-3}}},
        "methods": {
            "mae": {
                "label": "MAE",
                "method": "mae",
                "recipe": "equal",
                "options": {
                    "patch_size": 8,
                    "encoder_width": 32,
                    "encoder_depth": 1,
                    "encoder_heads": 2,
                    "decoder_width": 32,
                    "decoder_depth": 1,
                    "decoder_heads": 2,
                },
            }
        },
        "evaluation": {
            "num_checks": 2,
            "num_images": 4,
            "unit_px": 16,
            "targets": [{"fraction": 0.5, "of": "mae"}, {"fraction": 0.5, "of": "mae", "metric": "lpips"}],
        },
        "estimator": {"half_life_steps": 2, "num_resamples": 100},
    }
)


class Quiet:
    """Watches and says nothing."""

    def __getattr__(self, name: str) -> object:
        return lambda *words, **named: None


def run(store: WeightsStore, out: Path, watcher: Watcher | None = None) -> RunRecord:
    plan = make_plan(SUITE, ["mae"], device="cpu", out=out, added={}, force=True, save_weights=False, weights=store)
    shelf = DataShelf(plan)
    try:
        return execute(plan.cells[0], shelf, command="test", environment={}, watcher=watcher or Quiet())
    finally:
        shelf.close()


def test_a_run_measures_it_at_every_check_and_names_the_weights(store: WeightsStore, tmp_path: Path) -> None:
    record = run(store, tmp_path / "out")
    assert record.status == "finished", record.error
    assert record.yardstick is not None
    assert len(record.yardstick.checks) == 3
    assert all(check.lpips is not None and check.lpips > 0 for check in record.yardstick.checks)
    assert "lpips" not in record.not_measured
    note = f"LPIPS on the yardstick: alexnet-owt-7be5be79.pth, SHA-256 {store.sha256_of('alexnet')}"
    assert note in record.notes


def test_a_file_that_goes_during_the_training_takes_nothing_with_it(
    store: WeightsStore, folder: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(folder, tmp_path / "own")
    file = own / "alexnet-owt-7be5be79.pth"
    digest = store.sha256_of("alexnet")

    class Removing(Quiet):
        def checked(self, step: int, psnr_db: float) -> None:
            file.unlink(missing_ok=True)

    moved = WeightsStore(own, True, store.manifest, tmp_path / "other-hashes.json")
    record = run(moved, tmp_path / "out", Removing())
    assert not file.exists()
    assert record.status == "finished", record.error
    assert f"LPIPS on the yardstick: {file.name}, SHA-256 {digest}" in record.notes


def test_wrong_weights_are_refused_by_the_plan_of_every_suite_with_a_yardstick(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("LMD_BENCH_WEIGHTS", raising=False)
    wrong = WeightsStore(folder, True, hash_cache=tmp_path / "hashes.json")
    with pytest.raises(ConfigError, match=r"alexnet-owt-7be5be79\.pth: wrong hash: expected 7be5be79"):
        run(wrong, tmp_path / "out")
    bare = SUITE.model_copy(update={"evaluation": EvaluationConfig(num_checks=0)})
    plan = make_plan(bare, ["mae"], device="cpu", out=tmp_path, added={}, force=True, weights=wrong)
    assert len(plan.cells) == 1, "without a yardstick nothing is measured with them"


def test_a_run_without_weights_finishes_and_says_why(empty: WeightsStore, tmp_path: Path) -> None:
    record = run(empty, tmp_path / "out")
    assert record.status == "finished", record.error
    assert record.not_measured["lpips"].startswith("no AlexNet weights: put alexnet-owt-7be5be79.pth")
    assert record.yardstick is not None
    assert all(check.lpips is None for check in record.yardstick.checks)
    assert not any("LPIPS" in note for note in record.notes)
