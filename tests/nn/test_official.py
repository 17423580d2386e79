"""What an authors' checkpoint does not say: the numbers of attention heads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmd_bench.errors import WeightsError
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.nn.official import shape_of_checkpoint


def state(encoder_width: int, decoder_width: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        shape = MaskedAutoencoderShape(32, 8, 3, encoder_width, 1, 1, decoder_width, 1, 1)
        return MaskedAutoencoder(shape).state_dict()


@pytest.mark.parametrize(("width", "heads"), [(192, 3), (384, 6), (768, 12), (1024, 16), (1280, 16)])
def test_published_widths_have_the_heads_they_were_published_with(width: int, heads: int) -> None:
    shape = shape_of_checkpoint(state(width, 512))
    assert (shape.encoder_heads, shape.decoder_heads) == (heads, 16)
    assert (shape.encoder_width, shape.decoder_width) == (width, 512)


def test_heads_that_are_given_win() -> None:
    shape = shape_of_checkpoint(state(384, 512), encoder_heads=12, decoder_heads=8)
    assert (shape.encoder_heads, shape.decoder_heads) == (12, 8)


def test_other_widths_need_their_heads() -> None:
    with pytest.raises(
        WeightsError, match=r"no published encoder has the width 96.*give encoder_heads \(--set encoder"
    ):
        shape_of_checkpoint(state(96, 512))
    with pytest.raises(WeightsError, match=r"no published decoder has the width 128.*known widths \(heads\): 512 \(16"):
        shape_of_checkpoint(state(384, 128))
    shape = shape_of_checkpoint(state(96, 128), encoder_heads=2, decoder_heads=4)
    assert (shape.encoder_heads, shape.decoder_heads) == (2, 4)


@pytest.mark.parametrize("heads", [0, -1, 5])
def test_heads_that_do_not_divide_the_width_are_refused(heads: int) -> None:
    with pytest.raises(WeightsError, match=f"encoder_heads: {heads} heads do not divide the encoder's width 384"):
        shape_of_checkpoint(state(384, 512), encoder_heads=heads)
