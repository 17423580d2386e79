"""Filling: what a method sees, what comes out, and that it depends on nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from helpers.methods import Tiny, TinyConfig
from torch import Tensor

from lmd_bench.data.scenes import Scenes
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import DataError, TrainingError
from lmd_bench.evaluation.fill import Chunk, chunks, fill, grey_filled
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import pixel_mask

CPU = torch.device("cpu")
IMAGES = Scenes(0, 32).render(range(6))
MASKS = yardstick_masks(6, 32, 16, 0.25)
CAPTIONS = [f"scene {number}" for number in range(6)]


class Drawing(Tiny):
    """Fills with noise, and keeps what it was shown."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        self.shown = images
        return torch.rand_like(images)


class Reading(Drawing):
    """Reads captions too."""

    def reconstruct_captioned(self, images: Tensor, mask: Tensor, captions: Sequence[str]) -> Tensor:
        self.captions = list(captions)
        return self.reconstruct(images, mask)


class Odd(Tiny):
    """Fills with one value."""

    value = 0.0

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return torch.full_like(images, self.value)


def build(method: type[Tiny]) -> Tiny:
    return method(TinyConfig(), DataSpec(32)).eval()


def parts(captions: Sequence[str] | None = None) -> list[Chunk]:
    return chunks(IMAGES, MASKS, captions, 4)


def test_chunks_cover_all_images_in_order_with_their_captions() -> None:
    found = parts(CAPTIONS)
    assert [(chunk.start, len(chunk.images)) for chunk in found] == [(0, 4), (4, 2)]
    assert torch.equal(torch.cat([chunk.images for chunk in found]), IMAGES)
    assert [caption for chunk in found for caption in chunk.captions or ()] == CAPTIONS


def test_visible_pixels_come_out_as_they_went_in_and_hidden_ones_are_never_seen() -> None:
    method = build(Drawing)
    chunk = parts()[0]
    filled = fill(method, chunk, 0, CPU)
    hidden = pixel_mask(chunk.mask, 32).expand_as(filled)
    assert filled.dtype == torch.uint8
    assert torch.equal(filled[~hidden], chunk.images[~hidden])
    assert not torch.equal(filled[hidden], chunk.images[hidden])
    assert not method.shown[hidden].any()  # type: ignore[operator, index]


def test_a_chunk_is_filled_the_same_whatever_was_drawn_before_and_another_chunk_otherwise() -> None:
    method = build(Drawing)
    first, second = parts()
    found = fill(method, first, 7, CPU)
    torch.rand(100)
    assert torch.equal(fill(method, first, 7, CPU), found)
    assert not torch.equal(fill(method, first, 8, CPU), found)
    moved = Chunk(second.start, first.images, first.mask, None)
    assert not torch.equal(fill(method, moved, 7, CPU), found)


def test_captions_are_handed_over_where_there_are_any() -> None:
    method = build(Reading)
    fill(method, parts(CAPTIONS)[1], 0, CPU)
    assert method.captions == CAPTIONS[4:]
    del method.captions
    fill(method, parts()[1], 0, CPU)
    assert not hasattr(method, "captions")


@pytest.mark.parametrize(("value", "error"), [(float("nan"), TrainingError), (1.5, DataError), (-0.1, DataError)])
def test_what_is_not_finite_or_outside_the_range_is_refused(value: float, error: type[Exception]) -> None:
    method = build(Odd)
    method.value = value  # type: ignore[assignment]
    with pytest.raises(error):
        fill(method, parts()[0], 0, CPU)


def test_grey_is_rounded_up_and_leaves_visible_pixels_alone() -> None:
    chunk = parts()[0]
    grey = grey_filled(chunk)
    hidden = pixel_mask(chunk.mask, 32).expand_as(grey)
    assert bool((grey[hidden] == 128).all())
    assert torch.equal(grey[~hidden], chunk.images[~hidden])


def test_a_method_fills_under_autocast_where_that_is_asked_for() -> None:
    class Watching(Tiny):
        def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
            self.under = torch.is_autocast_enabled("cpu")
            return images

    method = build(Watching)
    for precision in ("fp32", "bf16"):
        fill(method, parts()[0], 0, CPU, precision)
        assert method.under == (precision == "bf16")
