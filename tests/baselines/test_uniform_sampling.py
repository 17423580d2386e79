"""UM-MAE's masks: one visible token of every 2 x 2, in balance."""

from collections import Counter
from itertools import permutations

import pytest
import torch

from baselines._um_mae_vit import secondary_order
from baselines._uniform_sampling import (
    draw_random,
    draw_uniform,
    num_unreplaced,
    one_of_every_cell,
    visible_first,
    visible_from_slots,
)

CPU = torch.device("cpu")


def slots_of(visible: torch.Tensor) -> torch.Tensor:
    """The visible slot of each cell, read with plain loops."""
    side = round(visible.shape[1] ** 0.5)
    slots = []
    for row in visible.tolist():
        grid = [row[start : start + side] for start in range(0, len(row), side)]
        cells = [(y, x) for y in range(0, side, 2) for x in range(0, side, 2)]
        four = [[grid[y][x], grid[y][x + 1], grid[y + 1][x], grid[y + 1][x + 1]] for y, x in cells]
        assert all(sum(cell) == 1 for cell in four), "one of every 2 x 2"
        slots.append([cell.index(True) for cell in four])
    return torch.tensor(slots)


@pytest.mark.parametrize("grid_size", [2, 6, 8, 14])
def test_every_cell_keeps_one_token(grid_size: int) -> None:
    torch.manual_seed(0)
    visible = draw_uniform(5, grid_size, CPU)
    assert visible.shape == (5, grid_size**2)
    assert visible.dtype == torch.bool
    assert torch.equal(visible_from_slots(slots_of(visible)), visible)


def test_a_mask_names_the_slots_it_was_made_of() -> None:
    slots = torch.randint(4, (3, 25), generator=torch.Generator().manual_seed(0))
    assert torch.equal(slots_of(visible_from_slots(slots)), slots)


def test_no_slot_is_dealt_to_more_cells_than_the_release_has_candidates_of_it() -> None:
    torch.manual_seed(0)
    counts = torch.stack([(slots_of(draw_uniform(2000, 6, CPU)) == slot).sum(dim=1) for slot in range(4)])
    assert counts.max() == 5, "9 cells draw from 20 candidates, five of each slot"
    free = torch.randint(4, (2000, 9), generator=torch.Generator().manual_seed(0))
    assert counts.float().var() < 0.8 * torch.stack([(free == slot).sum(dim=1) for slot in range(4)]).float().var()


def test_all_outcomes_of_four_cells_have_the_odds_of_a_shuffled_deck() -> None:
    deck = Counter(hand[:4] for hand in permutations([0, 1, 2, 3, 0, 1, 2, 3], 4))
    torch.manual_seed(0)
    num_draws = 40_000
    drawn = Counter(map(tuple, slots_of(draw_uniform(num_draws, 4, CPU)).tolist()))
    assert set(drawn) == set(deck)
    total = sum(deck.values())
    for outcome, ways in deck.items():
        expected = num_draws * ways / total
        assert abs(drawn[outcome] - expected) < 5 * expected**0.5


def test_samples_differ_and_a_seed_repeats_them() -> None:
    first, again = (draw_uniform(4, 8, CPU, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, again)
    assert len({tuple(row) for row in first.tolist()}) == 4


def test_plain_random_masks_hide_int_of_three_quarters_anywhere() -> None:
    torch.manual_seed(0)
    visible = draw_random(500, 49, CPU)
    assert visible.sum(dim=1).unique().tolist() == [49 - 36]
    share = visible.float().mean(dim=0)
    assert (share - 13 / 49).abs().max() < 0.1
    assert not one_of_every_cell(draw_random(50, 64, CPU)).all()


def test_a_cell_of_two_or_none_is_told() -> None:
    visible = draw_uniform(3, 4, CPU)
    assert one_of_every_cell(visible).tolist() == [True, True, True]
    visible[0, 0] = ~visible[0, 0]
    visible[2] = True
    assert one_of_every_cell(visible).tolist() == [False, True, False]


def test_visible_tokens_come_first_both_parts_in_raster_order() -> None:
    visible = draw_uniform(2, 6, CPU)
    for row, ids in zip(visible, visible_first(visible), strict=True):
        assert ids.tolist() == [*row.nonzero().flatten().tolist(), *(~row).nonzero().flatten().tolist()]


def test_a_quarter_of_the_visible_tokens_is_replaced_by_one_sort_of_the_noise() -> None:
    noise = torch.rand(3, 49, generator=torch.Generator().manual_seed(0))
    kept = num_unreplaced(49, 0.25)
    assert kept == 36
    replaced = secondary_order(noise)[:, kept:]
    for row, slots in zip(noise, replaced, strict=True):
        assert sorted(slots.tolist()) == [j for j, rank in enumerate(row.argsort().tolist()) if rank >= 36]
