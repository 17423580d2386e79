"""Statistics of features: streamed without losing digits, saved, and used again only for what they are of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lmd_bench.errors import DataError, RecordError
from lmd_bench.metrics.statistics import FeatureStatistics

IDENTITY = {"extractor": "tiny", "images": "0123456789abcdef"}


def rows(number: int, seed: int = 0) -> Tensor:
    return torch.randn(number, 6, generator=torch.Generator().manual_seed(seed))


def gathered(features: Tensor, batch: int) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for part in features.split(batch):
        statistics.update(part)
    return statistics


@pytest.mark.parametrize("batch", [1, 37, 512, 700, 5000])
def test_streamed_statistics_equal_those_of_all_rows_at_once(batch: int) -> None:
    features = rows(1300) * 3 + 1
    statistics = gathered(features, batch)
    theirs = features.double().numpy()
    np.testing.assert_allclose(statistics.mean.numpy(), theirs.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(theirs, rowvar=False), rtol=1e-10, atol=1e-12)
    assert torch.equal(statistics.features, features)
    assert statistics.num_images == 1300


def test_a_mean_far_from_zero_does_not_swallow_the_spread() -> None:
    features = rows(2000).double() + 4096  # exact in float32 up to 1e-4 or so
    features = features.float()
    statistics = gathered(features, 100)
    theirs = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(statistics.covariance.numpy(), theirs, rtol=1e-9, atol=1e-11)


def test_statistics_may_be_read_between_updates() -> None:
    features = rows(900)
    statistics = FeatureStatistics()
    for part in features.split(100):
        statistics.update(part)
        assert statistics.mean.shape == (6,)
    torch.testing.assert_close(statistics.covariance, gathered(features, 900).covariance, rtol=1e-12, atol=1e-14)


def test_features_may_come_in_inference_mode_and_be_read_outside() -> None:
    features, statistics = rows(1100), FeatureStatistics()
    with torch.inference_mode():
        for part in (features * 1).split(300):
            statistics.update(part)
    torch.testing.assert_close(statistics.covariance, gathered(features, 300).covariance, rtol=1e-12, atol=1e-14)


def test_saved_statistics_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "real.safetensors"
    statistics = gathered(rows(600), 64)
    statistics.save(path, IDENTITY)
    found = FeatureStatistics.load(path, IDENTITY)
    assert found is not None
    assert found.num_images == 600
    assert torch.equal(found.features, statistics.features)
    assert torch.equal(found.mean, statistics.mean)
    torch.testing.assert_close(found.covariance, statistics.covariance, rtol=1e-15, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["real.safetensors"]


def test_loaded_statistics_can_go_on_growing(tmp_path: Path) -> None:
    features = rows(700)
    gathered(features[:400], 64).save(tmp_path / "x.safetensors", IDENTITY)
    found = FeatureStatistics.load(tmp_path / "x.safetensors", IDENTITY)
    assert found is not None
    found.update(features[400:])
    torch.testing.assert_close(found.covariance, gathered(features, 700).covariance, rtol=1e-12, atol=1e-14)


def test_statistics_of_something_else_are_not_taken(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    assert FeatureStatistics.load(path, IDENTITY) is None
    gathered(rows(10), 10).save(path, IDENTITY)
    assert FeatureStatistics.load(path, {**IDENTITY, "images": "fedcba9876543210"}) is None


def test_a_damaged_file_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    gathered(rows(10), 10).save(path, IDENTITY)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(RecordError, match="delete it to compute it again"):
        FeatureStatistics.load(path, IDENTITY)
    save_file({"features": torch.zeros(2, 2)}, path)
    with pytest.raises(RecordError, match="not a file of feature statistics"):
        FeatureStatistics.load(path, IDENTITY)


def test_unfit_features_are_refused() -> None:
    statistics = gathered(rows(3), 3)
    with pytest.raises(DataError, match="5 numbers for each image, 6 before"):
        statistics.update(torch.zeros(2, 5))
    with pytest.raises(DataError, match=r"need floats \(B, D\)"):
        statistics.update(torch.zeros(2, 6, dtype=torch.uint8))
    statistics.update(torch.full((1, 6), float("nan")))
    with pytest.raises(DataError, match="not finite"):
        _ = statistics.mean


def test_a_covariance_needs_two_images() -> None:
    with pytest.raises(DataError, match="needs at least 2 images, got 1"):
        _ = gathered(rows(1), 1).covariance
    with pytest.raises(DataError, match="no images"):
        _ = FeatureStatistics().features
