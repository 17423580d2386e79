"""PSNR over hidden pixels and SSIM against scikit-image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from lmd_bench.data.decode import center_square
from lmd_bench.data.yardstick import paste, yardstick_masks
from lmd_bench.errors import DataError
from lmd_bench.metrics.image import PSNR_CAP_DB, psnr, psnr_hidden, resize_square, ssim, to_uint8
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


def test_psnr_over_all_pixels_is_scikit_images() -> None:
    images, filled = photographs(), spoilt(photographs(), 0.1)
    theirs = [
        peak_signal_noise_ratio(a.double().numpy(), b.double().numpy(), data_range=1.0)
        for a, b in zip(images, filled, strict=True)
    ]
    torch.testing.assert_close(psnr(filled, images), torch.tensor(theirs, dtype=torch.float64))
    whole = torch.ones(3, 1, 1, dtype=torch.bool)
    torch.testing.assert_close(psnr(filled, images), psnr_hidden(filled, images, whole))


def test_floats_are_rounded_to_the_nearest_level_not_cut_off() -> None:
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_uint8((levels[:-1] + 0.6) / 255), levels[1:].to(torch.uint8))
    assert torch.equal(to_uint8((levels[:-1] + 0.4) / 255), levels[:-1].to(torch.uint8))
    assert to_uint8((levels / 255).half()).dtype == torch.uint8


def test_images_of_8_bits_are_left_alone() -> None:
    images = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    assert to_uint8(images) is images


@pytest.mark.parametrize("value", [-0.01, 1.01, float("nan")])
def test_floats_outside_the_unit_range_are_not_rounded(value: float) -> None:
    with pytest.raises(DataError, match=r"floats must lie in \[0, 1\]"):
        to_uint8(torch.tensor([0.5, value]))


def test_integers_other_than_8_bits_are_refused() -> None:
    with pytest.raises(DataError, match=r"need uint8, or floats in \[0, 1\], got torch.int64"):
        to_uint8(torch.tensor([255]))


@pytest.mark.parametrize("size", [16, 64, 100])
@pytest.mark.parametrize("shape", [(64, 64), (48, 65), (65, 32)])
def test_tensors_are_resized_as_files_are_read(shape: tuple[int, int], size: int) -> None:
    array = data.astronaut()[50 : 50 + shape[0], 190 : 190 + shape[1]]
    theirs = np.asarray(center_square(Image.fromarray(array), size, Image.Resampling.BICUBIC))
    found = resize_square(torch.from_numpy(np.stack([array, array])).permute(0, 3, 1, 2), size)
    assert found.dtype == torch.uint8
    assert np.array_equal(found[1].permute(1, 2, 0).numpy(), theirs)


def test_images_of_the_size_are_not_resized() -> None:
    images = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    assert resize_square(images, 16) is images
