"""FID, KID, precision and recall against torch-fidelity's own entry point, on one small extractor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

import lmd_bench
from lmd_bench.errors import DataError
from lmd_bench.metrics.distribution import frechet_distance, kernel_distance, precision_recall
from lmd_bench.metrics.statistics import FeatureStatistics

WIDTH = 16
NAME = "lmd-bench-test-tiny"


def tiny_network() -> nn.Module:
    """Random convolutions whose features differ between images."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 16, 5, stride=2),
            nn.ReLU(),
            nn.Conv2d(16, WIDTH, 3, stride=2),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        ).requires_grad_(False)


def features_of(images: Tensor) -> Tensor:
    found: Tensor = tiny_network()(images.float() / 255)
    return found


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


def pictures(number: int, seed: int, contrast: int = 256) -> Tensor:
    """(N, 3, 24, 24) uint8."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (number, 3, 1, 1), generator=generator)
    noise = torch.randint(0, contrast, (number, 3, 24, 24), generator=generator)
    return ((levels + noise) // 2).to(torch.uint8)


@pytest.fixture(scope="module")
def registered() -> str:
    """The tiny extractor under a name that torch-fidelity knows."""
    assert lmd_bench is not None
    from torch_fidelity import FeatureExtractorBase, register_feature_extractor

    class Tiny(FeatureExtractorBase):  # type: ignore[misc]
        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)
            self.network = tiny_network()

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        def forward(self, images: Tensor) -> tuple[Tensor]:
            return (self.network(images.float() / 255),)

    register_feature_extractor(NAME, Tiny)
    return NAME


def torch_fidelitys(name: str, fake: Tensor, real: Tensor, **options: Any) -> dict[str, float]:
    from torch_fidelity import calculate_metrics

    found: dict[str, float] = calculate_metrics(
        input1=Images(fake),
        input2=Images(real),
        feature_extractor=name,
        fid=True,
        kid=True,
        prc=True,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        batch_size=50,
        **options,
    )
    return found


def statistics_of(images: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics()
    for part in images.split(50):
        statistics.update(features_of(part))
    return statistics


@pytest.mark.parametrize(("number", "contrast"), [(60, 160), (400, 160), (400, 250), (1200, 240)])
def test_all_three_equal_torch_fidelitys_entry_point(registered: str, number: int, contrast: int) -> None:
    """Close sets too: there an average in another precision would already show."""
    real, fake = pictures(number, 1), pictures(number, 2, contrast)
    theirs = torch_fidelitys(registered, fake, real, kid_subsets=7, kid_subset_size=50, rng_seed=3)
    a, b = statistics_of(real), statistics_of(fake)
    assert frechet_distance(a, b) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6, abs=0)
    kid, deviation = kernel_distance(a, b, subsets=7, subset_size=50, seed=3)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=0)
    assert deviation == pytest.approx(theirs["kernel_inception_distance_std"], rel=1e-6, abs=0)
    assert precision_recall(a, b) == (theirs["precision"], theirs["recall"])


def test_kids_seed_draws_its_subsets() -> None:
    a, b = statistics_of(pictures(100, 1)), statistics_of(pictures(100, 2))
    first = kernel_distance(a, b, subsets=3, subset_size=20, seed=0)
    assert kernel_distance(a, b, subsets=3, subset_size=20, seed=0) == first
    assert kernel_distance(a, b, subsets=3, subset_size=20, seed=1) != first


def test_subsets_that_hold_all_images_are_computed_once(registered: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_fidelity import metric_kid

    real, fake = pictures(60, 1), pictures(60, 2, 160)
    theirs = torch_fidelitys(registered, fake, real, kid_subsets=7, kid_subset_size=60, rng_seed=3)
    computed: list[int] = []
    own = metric_kid.kernel_mmd
    monkeypatch.setattr(metric_kid, "kernel_mmd", lambda *a, **b: (computed.append(1), own(*a, **b))[1])
    a, b = statistics_of(real), statistics_of(fake)
    for size in (60, 1000):
        kid, deviation = kernel_distance(a, b, subsets=7, subset_size=size, seed=3)
        assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)  # theirs is rounded to float32
        assert deviation == 0.0
        assert kernel_distance(a, b, subset_size=size, seed=4) == (pytest.approx(kid, rel=1e-9), 0.0)
    assert len(computed) == 4
    fewer = statistics_of(pictures(50, 2))
    kernel_distance(a, fewer, subsets=7, subset_size=50)  # all of one side, parts of the other
    assert len(computed) == 4 + 7


def test_a_set_has_no_distance_from_itself() -> None:
    a = statistics_of(pictures(100, 1))
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-5)
    assert precision_recall(a, a) == (1.0, 1.0)


def test_precision_falls_for_images_unlike_any_real_one_and_recall_for_images_all_alike() -> None:
    real = statistics_of(pictures(100, 1))
    strange = statistics_of(torch.cat([pictures(50, 2), torch.zeros(50, 3, 24, 24, dtype=torch.uint8)]))
    alike = statistics_of(pictures(1, 3).expand(100, -1, -1, -1))
    assert precision_recall(real, strange)[0] < precision_recall(real, real)[0]
    assert precision_recall(real, alike)[1] == 0.0


def test_fid_grows_with_the_difference() -> None:
    real = statistics_of(pictures(200, 1))
    distances = [frechet_distance(real, statistics_of(pictures(200, 2, contrast))) for contrast in (200, 120, 40)]
    assert distances == sorted(distances)
    assert distances[0] > 0


def test_too_few_images_are_refused_naming_the_metric() -> None:
    one, three = statistics_of(pictures(1, 1)), statistics_of(pictures(3, 1))
    with pytest.raises(DataError, match="FID: at least 2 images a side are needed, there are 1"):
        frechet_distance(three, one)
    with pytest.raises(DataError, match="KID: at least 2"):
        kernel_distance(one, three)
    with pytest.raises(DataError, match="at least 4 images a side are needed for balls of 3 neighbours, there are 3"):
        precision_recall(three, three)


def test_features_of_two_extractors_are_refused() -> None:
    other = FeatureStatistics()
    other.update(torch.zeros(5, WIDTH + 1))
    with pytest.raises(DataError, match="16 numbers for each real image and 17 for the others"):
        frechet_distance(statistics_of(pictures(5, 1)), other)
