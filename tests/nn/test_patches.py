"""Cutting maps into patches and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lmd_bench.nn.patches import patchify, unpatchify


@settings(deadline=None, max_examples=25)
@given(patch=st.integers(1, 5), grid=st.integers(1, 5), channels=st.integers(1, 4), batch=st.integers(1, 3))
def test_unpatchify_undoes_patchify(patch: int, grid: int, channels: int, batch: int) -> None:
    images = torch.randn(batch, channels, patch * grid, patch * grid)
    patches = patchify(images, patch)
    assert patches.shape == (batch, grid**2, patch**2 * channels)
    assert torch.equal(unpatchify(patches, patch, channels), images)


@pytest.mark.parametrize(("token", "row", "column", "channel"), [(0, 0, 0, 0), (5, 1, 2, 1), (15, 3, 0, 2)])
def test_values_of_a_patch_stand_in_the_order_row_column_channel(
    token: int, row: int, column: int, channel: int
) -> None:
    images = torch.arange(3 * 16 * 16.0).view(1, 3, 16, 16)
    value = patchify(images, 4)[0, token, (row * 4 + column) * 3 + channel]
    assert value == images[0, channel, 4 * (token // 4) + row, 4 * (token % 4) + column]
