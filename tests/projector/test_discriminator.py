"""The patch discriminator: logits, receptive field, start values. Parity stands in tests/parity/test_vqgan.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lmd_bench.projector.discriminator import PatchDiscriminator


@pytest.mark.parametrize(("num_layers", "logits_px"), [(1, 126), (2, 62), (3, 30), (4, 14)])
def test_images_of_256_px_get_a_grid_of_logits(num_layers: int, logits_px: int) -> None:
    discriminator = PatchDiscriminator(width=4, num_layers=num_layers)
    assert discriminator(torch.zeros(1, 3, 256, 256)).shape == (1, 1, logits_px, logits_px)


@pytest.mark.parametrize("num_layers", [1, 2, 3])
def test_the_smallest_image_leaves_one_logit_and_a_smaller_one_none(num_layers: int) -> None:
    discriminator = PatchDiscriminator(width=4, num_layers=num_layers).eval()
    size = discriminator.smallest_image_px
    assert discriminator(torch.zeros(1, 3, size, size)).shape == (1, 1, 1, 1)
    with pytest.raises(RuntimeError):
        discriminator(torch.zeros(1, 3, size - 1, size - 1))


def test_a_logit_of_three_layers_sees_70_pixels() -> None:
    discriminator = PatchDiscriminator(width=4, num_layers=3).eval()
    images = torch.randn(1, 3, 128, 128, requires_grad=True)
    discriminator(images)[0, 0, 7, 7].backward()
    assert images.grad is not None
    touched = images.grad.abs().sum((0, 1)).nonzero()
    assert (touched.max(0).values - touched.min(0).values + 1).tolist() == [70, 70]


def test_widths_double_up_to_eight_times_the_first() -> None:
    layers = PatchDiscriminator(in_channels=1, width=4, num_layers=5).main
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [layer.in_channels for layer in convolutions] == [1, 4, 8, 16, 32, 32, 32]
    assert [layer.stride[0] for layer in convolutions] == [2, 2, 2, 2, 2, 1, 1]
    assert [layer.bias is not None for layer in convolutions] == [True, False, False, False, False, False, True]


def test_it_starts_from_narrow_normal_weights() -> None:
    torch.manual_seed(0)
    discriminator = PatchDiscriminator()
    convolution, norm = discriminator.main[8], discriminator.main[9]
    assert convolution.weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert convolution.weight.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert norm.weight.mean().item() == pytest.approx(1.0, abs=5e-3)
    assert norm.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not norm.bias.any()


@pytest.mark.parametrize("options", [{"num_layers": 0}, {"width": 0}, {"in_channels": 0}])
def test_counts_below_one_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        PatchDiscriminator(**options)
