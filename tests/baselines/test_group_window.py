"""Grouping by knapsack and attention within groups, against tables and window by window attention in plain words."""

from collections import defaultdict
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from baselines._group_window import (
    GroupAttention,
    Grouping,
    GroupSwin,
    StageShape,
    SwinShape,
    bias_rows,
    group_biases,
    group_slots,
    group_stages,
    group_tokens,
    group_windows,
    knapsack,
    nested_coordinates,
    nested_patches,
    pack_groupings,
    unpack_groupings,
    window_ids,
)
from lmd_bench.nn.patches import patchify

COUNTS = st.lists(st.integers(1, 49), min_size=1, max_size=12)
TINY = SwinShape(64, 2, 16, (2, 2, 2), (1, 2, 4), 4)


def knapsack_by_table(capacity: int, counts: list[int]) -> list[int]:
    """The textbook's table of best sums, traced from the last row."""
    best = [[0] * (capacity + 1)]
    for count in counts:
        row = best[-1]
        best.append([max(row[c], count + row[c - count]) if count <= c else row[c] for c in range(capacity + 1)])
    chosen, left = [], capacity
    for index in range(len(counts), 0, -1):
        if best[index][left] != best[index - 1][left]:
            chosen.append(index - 1)
            left -= counts[index - 1]
    return chosen[::-1]


def random_units(num_units: int, num_visible: int, seed: int) -> np.ndarray:
    return np.sort(np.random.default_rng(seed).permutation(num_units)[:num_visible])


@given(COUNTS, st.integers(49, 196))
@settings(deadline=None)
def test_the_knapsack_takes_what_the_trace_through_the_table_takes(counts: list[int], capacity: int) -> None:
    assert knapsack(capacity, counts) == knapsack_by_table(capacity, counts)


def test_ties_favour_lower_indices() -> None:
    assert knapsack(8, [4, 4, 4, 8]) == [0, 1]
    assert knapsack(3, [4, 5]) == []


@given(COUNTS)
@settings(deadline=None)
def test_every_window_lands_in_one_group_that_holds_it(counts: list[int]) -> None:
    size = max(counts)
    groups = group_windows(size, counts)
    assert sorted(window for group in groups for window in group) == list(range(len(counts)))
    assert all(sum(counts[window] for window in group) <= size for group in groups)


@pytest.mark.parametrize("shift", [0, 1, 2])
def test_window_ids_part_tokens_as_rolling_and_cutting_the_grid_does(shift: int) -> None:
    coords = np.array(list(product(range(8), range(8))))
    ids = window_ids(coords, 4, shift)
    blocks = [((row - shift) // 4, (column - shift) // 4) for row, column in coords.tolist()]
    assert len(set(ids.tolist())) == len(set(blocks)) == len(set(zip(ids.tolist(), blocks, strict=True)))


@pytest.mark.parametrize("shift", [0, 2])
def test_tokens_go_to_their_groups_and_come_back(shift: int) -> None:
    coords = nested_coordinates(random_units(64, 16, 0), 8, 2)
    grouping = group_tokens(coords, 4, shift)
    assert grouping.order is not None
    assert grouping.restore is not None
    assert grouping.order[grouping.restore].tolist() == list(range(len(coords)))
    slots = group_slots(window_ids(coords, 4, shift), 4)
    assert slots.size == len(grouping.order) >= len(coords)
    assert sorted(slots[slots >= 0].tolist()) == list(range(len(coords)))


def test_few_tokens_stay_in_their_order_in_one_group() -> None:
    coords = nested_coordinates(random_units(64, 8, 0), 8, 1)
    assert len(coords) == 2 * 4**2
    grouping = group_tokens(coords, 4, 2)
    assert grouping.order is grouping.restore is None
    assert tuple(grouping.pairs.shape) == (1, 32, 32)


def test_one_more_token_is_grouped() -> None:
    assert group_tokens(np.array(list(product(range(3), range(11)))), 4, 0).order is not None


def attention_by_window(attention: GroupAttention, x: Tensor, coords: np.ndarray, window: int, shift: int) -> Tensor:
    """Window attention as Swin's paper puts it: each window by itself, a bias for every offset."""
    windows = defaultdict(list)
    for token, (row, column) in enumerate(coords.tolist()):
        windows[(row - shift) // window, (column - shift) // window].append(token)
    query, key, value = attention.qkv(x).unflatten(-1, (3, attention.num_heads, -1)).unbind(2)
    out = torch.empty_like(value)
    for tokens in windows.values():
        scores = torch.einsum("bihd,bjhd->bhij", query[:, tokens], key[:, tokens]) / query.shape[-1] ** 0.5
        for (i, one), (j, other) in product(enumerate(tokens), repeat=2):
            down, right = coords[one] - coords[other] + window - 1
            scores[:, :, i, j] += attention.relative_position_bias_table[down * (2 * window - 1) + right]
        out[:, tokens] = torch.einsum("bhij,bjhd->bihd", scores.softmax(dim=-1), value[:, tokens])
    return attention.proj(out.flatten(2))


@pytest.mark.parametrize(("num_visible", "shift"), [(16, 0), (16, 2), (5, 2), (64, 2)])
def test_group_attention_is_attention_within_each_window(num_visible: int, shift: int) -> None:
    torch.manual_seed(0)
    attention = GroupAttention(8, 2, 4).double()
    torch.nn.init.normal_(attention.relative_position_bias_table)
    coords = nested_coordinates(random_units(64, num_visible, 1), 8, 1)
    grouping, x = group_tokens(coords, 4, shift), torch.randn(2, len(coords), 8, dtype=torch.float64)
    (bias,) = group_biases([attention.relative_position_bias_table], grouping.pairs)
    with torch.no_grad():
        grouped, wanted = attention(x, grouping, bias), attention_by_window(attention, x, coords, 4, shift)
    torch.testing.assert_close(grouped, wanted, rtol=0, atol=1e-12)


def full_attention(units: np.ndarray, stages: list[StageShape]) -> list[tuple[Grouping, ...]]:
    """All visible tokens in one group, whatever their number, masked between windows."""
    groupings = []
    for number, stage in enumerate(stages):
        coords = nested_coordinates(units, stages[-1].grid_size, len(stages) - 1 - number)
        whole = np.arange(len(coords))[None]
        windows = [window_ids(coords, stage.window, shift) for shift in stage.shifts]
        rows = [torch.from_numpy(bias_rows(coords, of_kind, whole, stage.window)) for of_kind in windows]
        groupings.append(tuple(map(Grouping, rows)))
    return groupings


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-13)])
def test_the_grouped_encoder_equals_masked_full_attention_with_its_gradients(
    dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(0)
    encoder, units = GroupSwin(TINY).to(dtype), random_units(64, 16, 2)
    visible = patchify(torch.rand(2, 3, 64, 64, dtype=dtype), 8)[:, units]
    results = []
    for groupings in (group_stages(units, TINY.stages), full_attention(units, TINY.stages)):
        encoder.zero_grad()
        features = encoder(visible, groupings)
        features.square().mean().backward()
        results.append((features, {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}))
    (grouped, gradients), (full, wanted) = results
    torch.testing.assert_close(grouped, full, rtol=tolerance, atol=tolerance)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=10 * tolerance, atol=tolerance, msg=name)


def test_patches_stand_where_their_coordinates_say() -> None:
    images, units = torch.rand(2, 3, 32, 32), random_units(16, 5, 3)
    patches = nested_patches(patchify(images, 8)[:, units], 2)
    coords = nested_coordinates(units, 4, 2)
    for number, (row, column) in enumerate(coords.tolist()):
        cut = images[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.equal(patches[:, number], cut.permute(0, 2, 3, 1).flatten(1))


def test_groupings_survive_the_trip_as_named_tensors() -> None:
    stages = TINY.stages
    groupings = group_stages(random_units(64, 16, 4), stages)
    packed = pack_groupings(groupings)
    assert len(packed) == 6 + 2 * 4  # pairs everywhere, two more where tokens move: not in the last stage
    for of_stage, back in zip(groupings, unpack_groupings(packed, stages), strict=True):
        assert [vars(one) for one in of_stage] == [vars(one) for one in back]


def test_a_stage_of_one_window_is_not_shifted() -> None:
    assert [stage.shifts for stage in SwinShape().stages] == [(0, 3), (0, 3), (0, 3), (0,)]
    assert [stage.window for stage in SwinShape(window_size=14).stages] == [14, 14, 14, 7]
