"""PSNR over hidden pixels and SSIM against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lmd_bench.data.yardstick import paste, yardstick_masks
from lmd_bench.errors import DataError
from lmd_bench.metrics.image import PSNR_CAP_DB, psnr_hidden, ssim
from lmd_bench.nn.masking import pixel_mask


def photographs() -> Tensor:
    """(3, 3, 64, 64) in [0, 1]."""
    pictures = [data.astronaut()[50:114, 190:254], data.coffee()[100:164, 200:264], data.chelsea()[80:144, 150:214]]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255


def spoilt(images: Tensor, strength: float) -> Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    return (images + strength * noise).clamp(0, 1)


@pytest.mark.parametrize("strength", [0.0, 0.01, 0.1, 0.5])
def test_ssim_is_scikit_images(strength: float) -> None:
    images = photographs()
    other = spoilt(images, strength)
    theirs = [
        structural_similarity(
            a.permute(1, 2, 0).double().numpy(),
            b.permute(1, 2, 0).double().numpy(),
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
            data_range=1.0,
            channel_axis=2,
        )
        for a, b in zip(images, other, strict=True)
    ]
    torch.testing.assert_close(ssim(images, other), torch.tensor(theirs, dtype=torch.float64), atol=1e-6, rtol=0)


def test_psnr_over_a_hidden_half_is_that_halfs_own() -> None:
    images, filled = photographs(), spoilt(photographs(), 0.1)
    mask = torch.tensor([[[True, False], [True, False]]]).expand(3, 2, 2)
    theirs = [
        peak_signal_noise_ratio(a[:, :, :32].double().numpy(), b[:, :, :32].double().numpy(), data_range=1.0)
        for a, b in zip(images, filled, strict=True)
    ]
    torch.testing.assert_close(psnr_hidden(filled, images, mask), torch.tensor(theirs, dtype=torch.float64))


def test_visible_pixels_do_not_count() -> None:
    images = photographs()
    mask = yardstick_masks(3, 64, 16, 0.25)
    filled = spoilt(images, 0.2)
    assert torch.equal(psnr_hidden(filled, images, mask), psnr_hidden(paste(filled, images, mask), images, mask))
    off_by = torch.where(pixel_mask(mask, 64), 0.5, 0.0)
    psnr = psnr_hidden(0.25 + off_by.expand(3, 3, 64, 64), torch.full((3, 3, 64, 64), 0.25), mask)
    torch.testing.assert_close(psnr, torch.full((3,), -20 * math.log10(0.5), dtype=torch.float64))


def test_equal_images_have_the_capped_psnr_and_an_ssim_of_one() -> None:
    images = photographs()
    assert (psnr_hidden(images, images, yardstick_masks(3, 64, 16, 0.25)) == PSNR_CAP_DB).all()
    torch.testing.assert_close(ssim(images, images), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan"), float("inf")])
def test_values_outside_the_unit_range_are_refused(value: float) -> None:
    images = photographs()
    wrong = images.clone()
    wrong[1, 2, 3, 4] = value
    with pytest.raises(DataError, match=r"must be floats in \[0, 1\]"):
        ssim(images, wrong)
    with pytest.raises(DataError, match=r"must be floats in \[0, 1\]"):
        psnr_hidden(wrong, images, yardstick_masks(3, 64, 16, 0.25))


def test_unfit_tensors_are_refused() -> None:
    images = photographs()
    with pytest.raises(DataError, match="uint8"):
        ssim((images > 0.5).to(torch.uint8), (images > 0.5).to(torch.uint8))
    with pytest.raises(DataError, match="two equal"):
        ssim(images, images[:2])
    with pytest.raises(DataError, match="smaller than its window"):
        ssim(images[..., :10], images[..., :10])
    with pytest.raises(DataError, match="hidden"):
        psnr_hidden(images, images, torch.zeros(3, 4, 4, dtype=torch.bool))
