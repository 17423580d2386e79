"""The yardstick's masks: fixed for ever, the same for all, and blind to hidden pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmd_bench.data.yardstick import hide, paste, yardstick_masks
from lmd_bench.errors import ConfigError, DataError
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask


@given(st.sampled_from([(64, 16), (224, 32), (192, 32), (256, 16)]), st.floats(0.1, 0.9))
def test_exactly_the_stated_share_stays_visible(sizes: tuple[int, int], keep: float) -> None:
    image_size, unit = sizes
    units = (image_size // unit) ** 2
    masks = yardstick_masks(5, image_size, unit, keep)
    assert masks.shape == (5, image_size // unit, image_size // unit)
    assert masks.dtype == torch.bool
    assert ((~masks).sum(dim=(1, 2)) == int(keep * units)).all()


# python -c "from lmd_bench.data.yardstick import yardstick_masks as y; print([(~m).nonzero()[:, 0].tolist() for m in
# y(4, 64, 16, 0.25).flatten(1)])"
GOLDEN_VISIBLE = [[4, 7, 12, 14], [4, 5, 10, 14], [1, 2, 13, 14], [1, 5, 12, 14]]


def test_masks_are_the_ones_they_always_were() -> None:
    """Golden: visible units of the demo's first four images. A change makes old records incomparable."""
    masks = yardstick_masks(4, 64, 16, 0.25).flatten(1)
    assert [(~mask).nonzero().flatten().tolist() for mask in masks] == GOLDEN_VISIBLE


def test_a_mask_depends_on_seed_image_and_number_of_units_alone() -> None:
    few, many = yardstick_masks(3, 64, 16, 0.25), yardstick_masks(300, 128, 32, 0.25)
    assert torch.equal(few, many[:3])
    assert not torch.equal(few, yardstick_masks(3, 64, 16, 0.25, seed=1))
    assert len({tuple(mask.flatten().tolist()) for mask in many}) > 250


def test_every_unit_is_visible_equally_often() -> None:
    visible = (~yardstick_masks(4000, 224, 32, 0.25)).float().mean(dim=0)
    assert (visible - 12 / 49).abs().max() < 4.5 * (0.245 * 0.755 / 4000) ** 0.5


def test_sizes_that_do_not_tile_are_refused() -> None:
    with pytest.raises(ConfigError, match="units of 24 px do not tile images of 64 px"):
        yardstick_masks(1, 64, 24, 0.25)
    with pytest.raises(ConfigError, match="leaves 0 visible"):
        yardstick_masks(1, 64, 64, 0.25)
    with pytest.raises(DataError, match="g dividing the size"):
        pixel_mask(torch.zeros(1, 3, 3, dtype=torch.bool), 64)


def test_hide_paste_and_pixels_agree() -> None:
    images, filled = torch.rand(3, 3, 64, 64), torch.rand(3, 3, 64, 64)
    mask = yardstick_masks(3, 64, 16, 0.25)
    pixels = pixel_mask(mask, 64)
    assert pixels.shape == (3, 1, 64, 64)
    assert pixels[1, 0, 16 * 2 + 5, 16 * 3 + 15] == mask[1, 2, 3]
    hidden = hide(images, mask)
    assert torch.equal(hidden, images * ~pixels)
    composite = paste(filled, images, mask)
    assert torch.equal(hide(composite, mask), hidden)
    assert torch.equal(composite * pixels, filled * pixels)


def test_the_mean_colour_is_that_of_visible_pixels_whatever_is_hidden() -> None:
    mask = yardstick_masks(2, 64, 16, 0.25)
    pixels = pixel_mask(mask, 64).expand(2, 3, 64, 64)
    images = torch.rand(2, 3, 64, 64)
    filled = fill_with_visible_mean(images, pixel_mask(mask, 64))
    for number in range(2):
        for channel in range(3):
            plane, hidden = images[number, channel], pixels[number, channel]
            expected = plane[~hidden].double().mean()
            assert (filled[number, channel][hidden].double() - expected).abs().max() < 1e-6
            assert torch.equal(filled[number, channel][~hidden], plane[~hidden])
    perturbed = torch.where(pixels, torch.full_like(images, float("nan")), images)
    assert torch.equal(fill_with_visible_mean(perturbed, pixel_mask(mask, 64)), filled)
    assert torch.equal(hide(perturbed, mask), hide(images, mask))
