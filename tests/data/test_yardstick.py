"""The yardstick's masks: fixed for ever, the same for all, and blind to hidden pixels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lmd_bench.data.yardstick import fill_nearest_unit, hide, paste, yardstick_masks
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


def test_every_hidden_unit_is_a_copy_of_the_nearest_visible_one_the_first_in_raster_order_of_several() -> None:
    units = torch.arange(9.0).view(1, 1, 3, 3).repeat_interleave(4, 2).repeat_interleave(4, 3).expand(1, 3, 12, 12)
    mask = torch.ones(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 0] = mask[0, 0, 2] = mask[0, 2, 1] = False  # units 0, 2 and 7
    filled = fill_nearest_unit(units, mask)[0, 0, ::4, ::4]
    # unit 1 is as far from 0 as from 2; unit 4 is nearer to 7 than to the corners; 3 to 0, 5 to 2, by one step
    assert filled.tolist() == [[0, 0, 2], [0, 7, 2], [7, 7, 7]]


@given(st.integers(0, 2**32), st.integers(1, 15))
def test_nearest_units_agree_with_a_search_one_by_one(seed: int, visible: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(16, dtype=torch.bool)
    mask[torch.randperm(16, generator=generator)[:visible]] = False
    units = torch.rand(4, 4, generator=generator)
    filled = fill_nearest_unit(units.view(1, 1, 4, 4), mask.view(1, 4, 4))[0, 0]
    for number in range(16):
        nearest = min(
            (place for place in range(16) if not mask[place]),
            key=lambda place: ((place // 4 - number // 4) ** 2 + (place % 4 - number % 4) ** 2, place),
        )
        assert filled.flatten()[number] == units.flatten()[nearest]


def test_the_nearest_unit_never_looks_at_what_is_hidden_and_keeps_what_is_visible() -> None:
    images = torch.rand(4, 3, 64, 64)
    mask = yardstick_masks(4, 64, 16, 0.25)
    pixels = pixel_mask(mask, 64)
    spoilt = images.masked_fill(pixels, float("nan"))
    filled = fill_nearest_unit(spoilt, mask)
    assert torch.equal(filled, fill_nearest_unit(images, mask))
    assert filled.isfinite().all()
    assert torch.equal(filled.masked_fill(pixels, 0), images.masked_fill(pixels, 0))
    with pytest.raises(DataError, match="no visible unit at all"):
        fill_nearest_unit(images, torch.ones_like(mask))
