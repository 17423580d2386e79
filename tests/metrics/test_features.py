"""Inception's weights from a file: which are taken, and that they give torch-fidelity's features."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.metrics.distribution import frechet_distance
from lmd_bench.metrics.features import INCEPTION_LAYER, InceptionFeatures
from lmd_bench.metrics.statistics import FeatureStatistics


def he_initialised_inception(path: Path) -> dict[str, Tensor]:
    """torch-fidelity's Inception as a state dict on disk, random but alive: with torch's default it would be dead."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, *_: Any, **__: Any) -> None:
            return

    torch.manual_seed(0)
    torch.save({}, path)
    network = Unloaded("inception-v3-compat", ["64"], feature_extractor_weights_path=path)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    state: dict[str, Tensor] = network.state_dict()
    torch.save(state, path)
    return state


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights-inception-2015-12-05-6726825d.pth"
    assert len(he_initialised_inception(path)) == 566
    return path


def pictures(number: int, seed: int) -> Tensor:
    """(N, 3, 64, 64) uint8."""
    return torch.randint(0, 256, (number, 3, 64, 64), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_features_are_torch_fidelitys_of_the_same_file(inception_file: Path) -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("x", ["64"], feature_extractor_weights_path=str(inception_file))
    ours = InceptionFeatures.open(inception_file, layer="64")
    assert torch.equal(ours(pictures(2, 0)), theirs(pictures(2, 0))[0])
    assert ours.num_features == 64
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())


def test_facts_name_the_file_and_its_hash(inception_file: Path) -> None:
    facts = InceptionFeatures.open(inception_file).facts
    assert facts.weights == inception_file.name
    assert facts.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert facts.num_features == 2048
    assert INCEPTION_LAYER == "2048"


def test_weights_of_another_network_are_refused_naming_the_keys(tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv1.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"missing Conv2d_1a_3x3.* and 563 more; unexpected conv1\.weight"):
        InceptionFeatures.open(path)


def test_weights_of_another_shape_are_refused(inception_file: Path, tmp_path: Path) -> None:
    state = torch.load(inception_file, weights_only=True)
    state["fc.bias"] = torch.zeros(3)
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match=r"not torch-fidelity's Inception v3 \(.*size mismatch for fc\.bias"):
        InceptionFeatures.open(tmp_path / "other.pth")


def test_a_file_that_holds_a_program_is_not_run(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"fc.bias": Bomb()}, tmp_path / "bomb.pth")
    with pytest.raises(WeightsError, match="holds pickled objects"):
        InceptionFeatures.open(tmp_path / "bomb.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
def test_fid_with_the_whole_network_of_a_local_file_tells_two_sets_apart(inception_file: Path) -> None:
    extractor = InceptionFeatures.open(inception_file)
    plain, ramp = FeatureStatistics(), FeatureStatistics()
    with torch.inference_mode():
        plain.update(extractor(pictures(8, 1)))
        ramp.update(extractor(pictures(8, 2) // 4))
    assert plain.features.shape == (8, 2048)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert frechet_distance(plain, ramp) > 0
