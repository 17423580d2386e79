"""LPIPS from local weights, against the package it follows. Trunks here are random: real ones are a download."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.nn.perceptual import PerceptualDistance, perceptual_obstacle


def _package_distance(net: str) -> nn.Module:
    """The lpips package's distance: its heads on a random trunk."""
    import lpips

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision's, about the package's arguments
        torch.manual_seed(0)
        distance: nn.Module = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    return distance


def _trunk(distance: Any) -> dict[str, Tensor]:
    """The trunk's weights as torchvision's checkpoint names them."""
    return {f"features.{key.split('.', 1)[1]}": value.clone() for key, value in distance.net.state_dict().items()}


@pytest.fixture(scope="module")
def package() -> nn.Module:
    return _package_distance("alex")


@pytest.fixture(scope="module")
def trunk_file(package: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As downloaded: with the classifier behind the trunk."""
    path = tmp_path_factory.mktemp("trunk") / "alexnet.pth"
    torch.save({**_trunk(package), "classifier.6.bias": torch.zeros(1000)}, path)
    return path


def _images(size: int, seed: int) -> Tensor:
    return torch.rand(3, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize("size", [31, 64])
def test_alex_equals_the_package(package: nn.Module, trunk_file: Path, size: int) -> None:
    images, others = _images(size, 1), _images(size, 2)
    found = PerceptualDistance.open("alex", trunk_file)(images, others)
    assert found.shape == (3,)
    torch.testing.assert_close(found, package(images, others).flatten(), rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_vgg_equals_the_package() -> None:
    package = _package_distance("vgg")
    heads = {key: value for key, value in package.state_dict().items() if key.startswith("lin")}
    distance = PerceptualDistance("vgg", _trunk(package), heads)
    images, others = _images(16, 1), _images(16, 2)
    torch.testing.assert_close(distance(images, others), package(images, others).flatten(), rtol=1e-5, atol=1e-7)


def test_equal_images_are_at_distance_zero_and_others_are_not(trunk_file: Path) -> None:
    distance, images = PerceptualDistance.open("alex", trunk_file), _images(40, 3)
    assert not distance(images, images).any()
    assert (distance(images, images.roll(1, 0)) > 0).all()


def test_gradients_reach_the_images_alone_and_stay_finite_where_features_vanish(trunk_file: Path) -> None:
    distance = PerceptualDistance.open("alex", trunk_file)
    with torch.no_grad():
        distance.features[0].bias.fill_(-100.0)  # no feature of the first depth is left
    images = _images(40, 4).requires_grad_()
    distance(images, _images(40, 5)).sum().backward()
    assert images.grad is not None
    assert images.grad.isfinite().all()
    assert not any(parameter.requires_grad for parameter in distance.parameters())


def test_missing_weights_are_told_and_never_replaced_by_random_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    reason = perceptual_obstacle("vgg")
    assert reason is not None
    assert "vgg16-397923af.pth is missing" in reason
    with pytest.raises(WeightsError, match=r"vgg16-397923af\.pth is missing; put torchvision's"):
        PerceptualDistance.open("vgg")


def test_a_file_in_torch_hubs_folder_is_found(
    trunk_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "alexnet-owt-7be5be79.pth").symlink_to(trunk_file)
    assert perceptual_obstacle("alex") is None
    assert PerceptualDistance.open("alex").net == "alex"


def test_a_download_that_fails_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(url: str, **options: object) -> None:
        asked.append((url, options["weights_only"], options["check_hash"]))
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    with pytest.raises(WeightsError, match=r"cannot be fetched \(no route to host\)"):
        PerceptualDistance.open("alex", download=True)
    assert asked == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", True, True)]


def test_weights_of_another_network_are_refused(trunk_file: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="not the weights of torchvision's vgg"):
        PerceptualDistance.open("vgg", trunk_file)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="not the weights of torchvision's alex"):
        PerceptualDistance.open("alex", tmp_path / "other.pth")


@pytest.mark.parametrize(("net", "size", "fits"), [("alex", 30, False), ("alex", 31, True), ("vgg", 15, False)])
def test_images_that_are_too_small_are_an_obstacle(trunk_file: Path, net: Any, size: int, fits: bool) -> None:
    reason = perceptual_obstacle(net, trunk_file, image_size=size)
    assert (reason is None) == fits
    if not fits:
        assert reason is not None
        assert f"images of {size} px are too small for {net}" in reason


def test_an_unknown_net_is_an_obstacle() -> None:
    assert perceptual_obstacle("squeeze") == "perceptual distance: no net 'squeeze'; known are vgg, alex"  # type: ignore[arg-type]
