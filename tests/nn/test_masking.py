"""Which tokens are hidden."""

import pytest
import torch

from lmd_bench.errors import DataError
from lmd_bench.nn import masking


def test_random_ids_are_permutations_that_differ_between_samples() -> None:
    torch.manual_seed(0)
    ids = masking.random_ids(8, 49, torch.device("cpu"))
    assert torch.equal(ids.sort(dim=1).values, torch.arange(49).expand(8, -1))
    assert len({tuple(row.tolist()) for row in ids}) == 8


def test_every_token_is_hidden_equally_often() -> None:
    torch.manual_seed(0)
    kept = masking.random_ids(4000, 16, torch.device("cpu"))[:, :4]
    share = torch.bincount(kept.flatten(), minlength=16) / 4000
    assert (share - 0.25).abs().max() < 0.03  # 4.4 standard deviations of a binomial share


def test_tokens_with_the_least_noise_stay_visible() -> None:
    ids = masking.ids_from_noise(torch.tensor([[0.7, 0.1, 0.9, 0.4]]))
    assert ids.tolist() == [[1, 3, 0, 2]]


def test_a_given_mask_puts_visible_tokens_first_in_raster_order() -> None:
    mask = torch.tensor([[True, False, True, False], [False, False, True, True]])
    ids, num_kept = masking.ids_from_mask(mask)
    assert (ids.tolist(), num_kept) == ([[1, 3, 0, 2], [0, 1, 2, 3]], 2)


def test_a_batch_of_unequal_masks_is_refused_and_can_be_grouped() -> None:
    mask = torch.tensor([[True, False], [False, False], [False, True]])
    with pytest.raises(DataError, match=r"different numbers of tokens \[1, 2\]"):
        masking.ids_from_mask(mask)
    groups = [rows.tolist() for rows in masking.groups_of_equal_count(mask)]
    assert sorted(groups) == [[0, 2], [1]]


def test_tokens_are_taken_sample_by_sample() -> None:
    tokens = torch.arange(12.0).view(2, 3, 2)
    taken = masking.take_tokens(tokens, torch.tensor([[2, 0], [1, 1]]))
    assert taken.tolist() == [[[4, 5], [0, 1]], [[8, 9], [8, 9]]]


@pytest.mark.parametrize("token_px", [8, 16, 32])
def test_a_token_is_hidden_exactly_where_it_touches_a_hidden_pixel(token_px: int) -> None:
    torch.manual_seed(0)
    hidden = masking.pixel_mask(torch.rand(5, 4, 4) < 0.1, 64)
    tokens = masking.token_mask(hidden, token_px).view(5, 64 // token_px, 64 // token_px)
    for sample, row, column in torch.cartesian_prod(*map(torch.arange, tokens.shape)).tolist():
        area = hidden[sample, 0, row * token_px : (row + 1) * token_px, column * token_px : (column + 1) * token_px]
        assert tokens[sample, row, column] == area.any()


def test_tokens_that_do_not_align_with_units_are_hidden_when_touched() -> None:
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 0, 1] = True  # px 16..31 of 48; tokens of 24 px: 0..23 and 24..47
    assert masking.token_mask(masking.pixel_mask(mask, 48), 24).tolist() == [[True, True, False, False]]


def test_an_image_without_a_visible_token_is_refused() -> None:
    hidden = masking.pixel_mask(torch.eye(2, dtype=torch.bool).unsqueeze(0), 8)
    with pytest.raises(DataError, match="every token of image 0 touches a hidden unit: tokens of 8 px"):
        masking.token_mask(hidden, 8)


def test_a_mask_that_does_not_cut_the_image_is_refused() -> None:
    with pytest.raises(DataError, match=r"mask of shape \(1, 3, 3\) for images of 64 px"):
        masking.pixel_mask(torch.zeros(1, 3, 3, dtype=torch.bool), 64)


def test_hidden_pixels_get_the_mean_of_the_visible_ones_whatever_they_held() -> None:
    torch.manual_seed(0)
    images = torch.rand(2, 3, 8, 8)
    hidden = masking.pixel_mask(torch.tensor([[[True, False], [False, False]], [[True, True], [True, False]]]), 8)
    filled = masking.fill_with_visible_mean(images.masked_fill(hidden, float("nan")), hidden)
    for sample in range(2):
        visible = ~hidden[sample, 0]
        assert torch.equal(filled[sample][:, visible], images[sample][:, visible])
        mean = images[sample][:, visible].mean(dim=1)
        torch.testing.assert_close(filled[sample][:, ~visible], mean.unsqueeze(1).expand(3, int((~visible).sum())))
