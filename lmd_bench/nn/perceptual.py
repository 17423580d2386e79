"""LPIPS as a training loss and a measure, from published weights."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor, nn

from lmd_bench.checkpoints.files import one_line, read_checkpoint
from lmd_bench.errors import WeightsError

PerceptualNet = Literal["vgg", "alex"]


@dataclass(frozen=True)
class _Trunk:
    """A classifier's convolutions as far as LPIPS reads them, and torchvision's file of its weights."""

    file: str
    smallest_px: int
    read_after: tuple[int, ...]  # indices into the layers


_TRUNKS: Mapping[PerceptualNet, _Trunk] = {
    "vgg": _Trunk("vgg16-397923af.pth", smallest_px=16, read_after=(3, 8, 15, 22, 29)),
    "alex": _Trunk("alexnet-owt-7be5be79.pth", smallest_px=31, read_after=(1, 4, 7, 9, 11)),
}
_TORCHVISION_WEIGHTS = "https://download.pytorch.org/models/"


class PerceptualDistance(nn.Module):
    """LPIPS v0.1 (Zhang et al. 2018, arXiv 1801.03924): how unlike two images look to a network trained on ImageNet.

    Features of five depths, each position scaled to length 1, squared differences weighted per channel by the heads
    that the `lpips` package ships, mean over positions, summed. Frozen; gradients flow to the images. Written out here
    because the package builds the whole classifier and draws random weights for it first, and relies on arguments
    torchvision is about to remove; a test holds the two equal.

    trunk: torchvision's weights, `features.N.weight` and `.bias`. heads: `linN.model.1.weight` of shape (1, C, 1, 1).
    Use `open`, which finds both. Raises WeightsError where one does not fit.
    """

    def __init__(self, net: PerceptualNet, trunk: Mapping[str, Tensor], heads: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.net = net
        self.features = _trunk_layers(net)
        try:
            own = {key: trunk[f"features.{key}"] for key in self.features.state_dict()}
            self.features.load_state_dict(own)
            weights = [heads[f"lin{depth}.model.1.weight"].flatten() for depth in range(5)]
        except (KeyError, RuntimeError) as error:
            raise WeightsError(
                f"perceptual distance: not the weights of torchvision's {net} ({one_line(error)})"
            ) from None
        for depth, weight in enumerate(weights):
            self.register_buffer(f"head{depth}", weight.clone())
        # ImageNet's mean and deviation in [-1, 1], rounded as LPIPS rounds them.
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1))
        self.requires_grad_(False)
        self.eval()

    @classmethod
    def open(cls, net: PerceptualNet = "vgg", trunk_weights: Path | None = None, *, download: bool = False) -> Self:
        """The distance with weights from this machine.

        trunk_weights: torchvision's checkpoint of VGG16 or AlexNet (.pth or .safetensors); None means its usual file in
        torch hub's `checkpoints` folder, which `download` allows to be fetched from download.pytorch.org.
        Raises WeightsError where the weights are not there, do not fit, or hold more than tensors. Nothing is random.
        """
        if download and trunk_weights is None and not _default_trunk(net).is_file():
            trunk = _download_trunk(net)
        else:
            obstacle = perceptual_obstacle(net, trunk_weights)
            if obstacle is not None:
                raise WeightsError(obstacle)
            trunk = read_checkpoint(trunk_weights or _default_trunk(net)).tensors
        return cls(net, trunk, read_checkpoint(_heads_file(net)).tensors)

    def forward(self, images: Tensor, others: Tensor) -> Tensor:
        """Two batches of images (B, 3, H, W) in [-1, 1] -> distances (B,) >= 0, float32.

        H and W are at least 16 (vgg) or 31 (alex). Images in [0, 1] would give a plausible number that is too small.
        """
        total = images.new_zeros(len(images), dtype=torch.float32)
        for depth, (one, other) in enumerate(zip(self._features(images), self._features(others), strict=True)):
            difference = (_unit_length(one) - _unit_length(other)).square()
            head: Tensor = self.get_buffer(f"head{depth}")
            total = total + torch.einsum("bchw,c->bhw", difference, head).mean(dim=(1, 2)).float()
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        hidden, found = (images - self.get_buffer("shift")) / self.get_buffer("scale"), []
        for index, layer in enumerate(self.features):
            hidden = layer(hidden)
            if index in _TRUNKS[self.net].read_after:
                found.append(hidden)
        return found


def perceptual_obstacle(
    net: PerceptualNet = "vgg", trunk_weights: Path | None = None, *, image_size: int | None = None
) -> str | None:
    """Why `PerceptualDistance.open` could not serve on this machine, in one line; None where it can. Reads no weights.

    image_size: shorter side in px of the images to compare; None leaves it unchecked.
    """
    if net not in _TRUNKS:
        return f"perceptual distance: no net {net!r}; known are {', '.join(_TRUNKS)}"
    if image_size is not None and (too_small := size_obstacle(net, image_size)) is not None:
        return f"perceptual distance: {too_small}"
    file = trunk_weights or _default_trunk(net)
    if not file.is_file():
        return (
            f"perceptual distance: {file} is missing; put torchvision's {_TRUNKS[net].file} there, or name the file,"
            f" from {_TORCHVISION_WEIGHTS}{_TRUNKS[net].file}"
        )
    return None


def size_obstacle(net: PerceptualNet, image_size: int) -> str | None:
    """Why images whose shorter side is `image_size` px cannot be compared, None where they can."""
    smallest = _TRUNKS[net].smallest_px
    if image_size < smallest:
        return f"images of {image_size} px are too small for {net}; it takes {smallest} px or more"
    return None


def _default_trunk(net: PerceptualNet) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / _TRUNKS[net].file


def _download_trunk(net: PerceptualNet) -> Mapping[str, Tensor]:
    url = _TORCHVISION_WEIGHTS + _TRUNKS[net].file
    try:
        found: Mapping[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise WeightsError(f"perceptual distance: {url} cannot be fetched ({one_line(error)})") from None
    return found


def _heads_file(net: PerceptualNet) -> Path:
    """LPIPS' heads, version 0.1, out of the installed package (without importing it)."""
    spec = importlib.util.find_spec("lpips")
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError("perceptual distance: the package lpips, whose heads are used, is not installed")
    return Path(spec.submodule_search_locations[0]) / "weights" / "v0.1" / f"{net}.pth"


def _trunk_layers(net: PerceptualNet) -> nn.Sequential:
    layers = _vgg16_layers() if net == "vgg" else _alexnet_layers()
    return nn.Sequential(*layers)


def _vgg16_layers() -> list[nn.Module]:
    """VGG16's convolutions (Simonyan and Zisserman 2014, column D) without its last pooling."""
    layers: list[nn.Module] = []
    channels = 3
    for stage, (width, repeats) in enumerate([(64, 2), (128, 2), (256, 3), (512, 3), (512, 3)]):
        if stage:
            layers.append(nn.MaxPool2d(2, 2))
        for _ in range(repeats):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True)]
            channels = width
    return layers


def _alexnet_layers() -> list[nn.Module]:
    """AlexNet's convolutions in one tower (Krizhevsky 2014, arXiv 1404.5997) without the last pooling."""
    return [
        nn.Conv2d(3, 64, 11, stride=4, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(384, 256, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(256, 256, 3, padding=1),
        nn.ReLU(inplace=True),
    ]


def _unit_length(features: Tensor) -> Tensor:
    """Each position's channels (dim 1) scaled to length 1; a position without any stays 0, and so does its gradient."""
    scaled: Tensor = features / (torch.linalg.vector_norm(features, dim=1, keepdim=True) + 1e-10)
    return scaled
