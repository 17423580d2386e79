"""What fine-tuning does to a batch on its device: random erasing, mixup and cutmix.

All draws come from torch's global generators, which the harness reseeds for every step: a batch's share and box from
the CPU's, so that the host need not wait for a device to know them, all others from the device's own. timm's classes
of these names draw from the generators of numpy and of Python, which are not reseeded.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

_ERASED_AREA = (0.02, 1 / 3)
_ERASED_ASPECT = (0.3, 1 / 0.3)
_TRIES = 10
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def mix_pairs(
    images: Tensor, targets: Tensor, *, mixup_alpha: float = 0.0, cutmix_alpha: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Mix every image of a batch, and its target, with the one at the same place from the end.

    Mixup (Zhang et al. 2017, arXiv 1710.09412) blends by a share from Beta(alpha, alpha); cutmix (Yun et al. 2019,
    arXiv 1905.04899) pastes a rectangle of that area, and the share becomes that of the pixels left. One share, and one
    of the two where both are on, for the whole batch, as in MAE's fine-tuning.

    images: (B, 3, S, S). targets: (B, K) rows that sum to 1. An alpha of 0 turns that kind off; with both off the batch
    comes back as it is.
    """
    if mixup_alpha <= 0 and cutmix_alpha <= 0:
        return images, targets
    pastes = cutmix_alpha > 0 and (mixup_alpha <= 0 or float(torch.rand(())) < 0.5)
    share = _beta(cutmix_alpha if pastes else mixup_alpha)
    if pastes:
        images, share = _paste_box(images, share)
    else:
        images = torch.lerp(images.flip(0), images, share)
    return images, torch.lerp(targets.flip(0), targets, share)


def one_hot(labels: Tensor, num_classes: int) -> Tensor:
    """Labels (B,) int64 -> targets (B, num_classes) float32. Unlike torch's, it never looks at the labels' values."""
    targets = torch.zeros(len(labels), num_classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1.0)


class RandomErasing(nn.Module):
    """Replaces a rectangle of some images by noise (Zhong et al. 2017, arXiv 1708.04896), one draw for every pixel.

    With `probability` an image loses a rectangle of 2 to 33 % of its area and of aspect 0.3 to 3.3, tried ten times
    to lie within the image. MAE draws the noise after normalisation, normal with deviation 1: here, before it, that is
    normal with ImageNet's mean and deviation, and may leave [0, 1].
    """

    mean: Tensor
    std: Tensor

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability
        for name, values in (("mean", _IMAGENET_MEAN), ("std", _IMAGENET_STD)):
            self.register_buffer(name, torch.tensor(values).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) -> the same with rectangles erased. Drawn on the images' device: the host does not wait."""
        if self.probability <= 0:
            return images
        erased = torch.rand(len(images), device=images.device) < self.probability
        boxes, fits = _erased_boxes(len(images), images.shape[-1], images.device)
        inside = _inside(boxes, images.shape[-1]) & (erased & fits).view(-1, 1, 1, 1)
        return torch.where(inside, self.mean + self.std * torch.randn_like(images), images)


def _beta(alpha: float) -> float:
    """A draw from Beta(alpha, alpha) by the CPU's generator."""
    concentration = torch.full((), alpha, dtype=torch.float64)
    return float(torch.distributions.Beta(concentration, concentration, validate_args=False).sample())


def _paste_box(images: Tensor, share: float) -> tuple[Tensor, float]:
    """A rectangle of 1 - `share` of the area, centred anywhere and cut at the edges, and the share that is left."""
    size = images.shape[-1]
    side = int(size * math.sqrt(1 - share))
    row, column = torch.randint(0, size, (2,)).tolist()
    top, bottom = max(0, row - side // 2), min(size, row + (side + 1) // 2)
    left, right = max(0, column - side // 2), min(size, column + (side + 1) // 2)
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = images.flip(0)[:, :, top:bottom, left:right]
    return mixed, 1.0 - (bottom - top) * (right - left) / size**2


def _erased_boxes(count: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(boxes int64 (count, 4): top, left, height, width; bool (count,): one of ten tries fitted)."""
    draws = torch.rand(count, _TRIES, 4, dtype=torch.float64, device=device)
    area = size**2 * (_ERASED_AREA[0] + (_ERASED_AREA[1] - _ERASED_AREA[0]) * draws[..., 0])
    low, high = (math.log(value) for value in _ERASED_ASPECT)
    aspect = (low + (high - low) * draws[..., 1]).exp()
    heights, widths = (area * aspect).sqrt().round().long(), (area / aspect).sqrt().round().long()
    fits = (heights < size) & (widths < size)
    tops = (draws[..., 2] * (size - heights + 1)).long()
    lefts = (draws[..., 3] * (size - widths + 1)).long()
    boxes = torch.stack((tops, lefts, heights, widths), dim=-1)
    first = fits.int().argmax(dim=1)
    return boxes.gather(1, first.view(-1, 1, 1).expand(-1, 1, 4))[:, 0], fits.any(dim=1)


def _inside(boxes: Tensor, size: int) -> Tensor:
    """Boxes (K, 4) -> bool (K, 1, size, size), True inside."""
    top, left, height, width = boxes.view(-1, 4, 1).unbind(1)
    place = torch.arange(size, device=boxes.device)
    rows = (place >= top) & (place < top + height)
    columns = (place >= left) & (place < left + width)
    return (rows[:, :, None] & columns[:, None, :])[:, None]
