"""GreenMIM Swin-B 224 against the authors' code (LayneH/GreenMIM) on formula weights."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from baselines._group_window import SwinShape, group_slots, group_windows, knapsack, nested_coordinates, window_ids
from baselines._relative_position import relative_position_index
from baselines.greenmim import GreenMIM, UnitMask
from lmd_bench.nn.patches import patchify
from lmd_bench.nn.pos_embed import sincos_pos_embed
from tests.baselines.test_group_window import full_attention
from tests.parity.fill import assert_matches, filled_tensor, load_reference, reference_input, reference_noise

MANIFEST = load_reference("greenmim_swin_base_224.manifest")
REFERENCE = load_reference("greenmim_swin_base_224.strong.reference")
VARIANTS = load_reference("greenmim_fixed_order.strong.reference")
FIXED_ORDER = VARIANTS["decoder order fixed"]
FULL_ATTENTION = VARIANTS["grouping replaced by masked full attention in every stage"]
GROUPING = load_reference("greenmim_grouping.reference")["cases"] + REFERENCE["group_windows_calls_first_forward"]
IMAGES = reference_input(2, 3, 224, 224)
SHAPE = SwinShape()


def official_weights() -> dict[str, Tensor]:
    fixed = {
        "decoder_pos_embed": sincos_pos_embed(512, 7)[:, 1:],
        "relative_position_index": relative_position_index(7),
    }
    return {
        entry["key"]: fixed[entry["key"].rpartition(".")[2]] if entry["fill"] == "fixed" else filled_tensor(entry)
        for entry in MANIFEST["keys"]
    }


def reference_mask(*, official_order: bool) -> UnitMask:
    return UnitMask.of(reference_noise(1, 49)[0].argsort(), 12, SHAPE, official_order=official_order)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    return official_weights()


@pytest.fixture(scope="module")
def method(weights: dict[str, Tensor]) -> GreenMIM:
    return GreenMIM.from_official(weights)


@pytest.fixture(scope="module")
def features(method: GreenMIM) -> Tensor:
    mask = reference_mask(official_order=False)
    with torch.no_grad():
        return method.model.encode(patchify(IMAGES, 32)[:, mask.visible], mask)


def test_counts_keys_and_shapes_equal_the_authors_checkpoint_and_come_back_bit_for_bit(
    method: GreenMIM, weights: dict[str, Tensor]
) -> None:
    parameters = list(method.parameters())
    assert sum(p.numel() for p in parameters) == MANIFEST["params_total"] == 92_022_968
    assert sum(p.numel() for p in parameters if p.requires_grad) == MANIFEST["params_trainable"] == 91_997_880
    back = method.to_official()
    assert list(back) == [entry["key"] for entry in MANIFEST["keys"]]
    for entry in MANIFEST["keys"]:
        assert list(back[entry["key"]].shape) == entry["shape"], entry["key"]
        assert torch.equal(back[entry["key"]], weights[entry["key"]]), entry["key"]


def test_encoder_output_equals_the_authors(features: Tensor) -> None:
    assert_matches(features, REFERENCE["encoder_output"])


def predicted(method: GreenMIM, features: Tensor, mask: UnitMask) -> Tensor:
    """All units in raster order."""
    with torch.no_grad():
        shuffled = method.model.decode(features, mask, all_units=True)
    return torch.empty_like(shuffled).index_copy_(1, torch.cat([mask.places, mask.hidden]), shuffled)


@pytest.mark.parametrize(
    ("expected", "official_order"),
    [*((case["pred"], True) for case in REFERENCE["cases"].values()), (FIXED_ORDER["pred"], False)],
)
def test_predictions_equal_the_authors_in_their_order_of_the_decoder_and_in_the_repaired_one(
    method: GreenMIM, features: Tensor, expected: dict[str, Any], official_order: bool
) -> None:
    assert_matches(predicted(method, features, reference_mask(official_order=official_order)), expected)


def test_repairing_the_order_changes_predictions_by_what_the_reference_says(method: GreenMIM, features: Tensor) -> None:
    ours, official = (predicted(method, features, reference_mask(official_order=order)) for order in (False, True))
    assert (ours - official).abs().max().item() == pytest.approx(FIXED_ORDER["pred_max_abs_diff"], rel=1e-4)
    assert official.std().item() == pytest.approx(FIXED_ORDER["pred_std"], abs=2e-5)  # the scale of that difference


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_loss_and_gradient_equal_the_authors(method: GreenMIM, name: str) -> None:
    case = REFERENCE["cases"][name]
    method.model.normalize_targets = name.startswith("norm_pix_loss=True")
    method.zero_grad()
    loss = method.model(IMAGES, reference_mask(official_order=True))
    loss.backward()
    assert abs(loss.item() - case["loss"]) <= 1e-5 * case["loss"]
    norms = [p.grad.double().norm() for p in method.parameters() if p.grad is not None]
    wanted = case["grad"]["global_grad_norm"]
    assert abs(torch.stack(norms).norm().item() - wanted) <= 1e-4 * wanted


def test_the_repaired_loss_equals_the_authors_with_the_order_repaired(method: GreenMIM) -> None:
    method.model.normalize_targets = True
    with torch.no_grad():
        loss = method.model(IMAGES, reference_mask(official_order=False)).item()
    assert abs(loss - FIXED_ORDER["loss"]) <= 1e-5 * FIXED_ORDER["loss"]
    assert loss - REFERENCE["loss"] == pytest.approx(FIXED_ORDER["loss_change"], abs=1e-5 * loss)


def test_grouping_equals_masked_full_attention_at_published_size_as_closely_as_the_authors(
    method: GreenMIM, features: Tensor
) -> None:
    method.model.normalize_targets = True
    grouped = reference_mask(official_order=True)
    full = replace(grouped, groupings=full_attention(grouped.visible.numpy(), SHAPE.stages))
    with torch.no_grad():
        losses = [method.model(IMAGES, mask).item() for mask in (grouped, full)]
        other = method.model.encode(patchify(IMAGES, 32)[:, full.visible], full)
    assert abs(losses[0] - losses[1]) <= 2 * abs(FULL_ATTENTION["loss_change"])
    gap = (predicted(method, features, grouped) - predicted(method, other, full)).abs().max().item()
    assert gap <= 2 * FULL_ATTENTION["pred_max_abs_diff"]


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_the_mask_hides_what_the_authors_hide_for_the_whole_batch(name: str) -> None:
    case, mask = REFERENCE["cases"][name], reference_mask(official_order=False)
    assert mask.visible.tolist() == case["visible"]
    assert [len(mask.hidden)] * len(IMAGES) == case["mask_sum"]
    assert [list(reference_noise(1, 49).shape)] == case["rand_calls"]


def test_the_official_order_misplaces_the_visible_tokens_as_the_authors_do() -> None:
    mask, check = reference_mask(official_order=True), REFERENCE["decoder_placement_check"]
    pairs = sorted([place, unit] for place, unit in zip(mask.places.tolist(), mask.visible.tolist(), strict=True))
    assert [place for place, _ in pairs] == check["visible_positions"]
    assert [pair for pair in pairs if pair[0] != pair[1]] == check["misplaced"]


@pytest.mark.parametrize("case", GROUPING)
def test_windows_are_packed_into_the_authors_groups(case: dict[str, Any]) -> None:
    counts, groups = case["num_ele_win"], group_windows(case["group_size"], case["num_ele_win"])
    assert groups == case["grouped_idx"]
    assert [sum(counts[window] for window in group) for group in groups] == case["num_ele_group"]
    if "knapsack_first" in case:
        chosen = knapsack(case["group_size"], counts)
        assert chosen == case["knapsack_first"]["idx"]
        assert sum(counts[window] for window in chosen) == case["knapsack_first"]["value"]
        assert len(groups) == case["n_groups"]


def test_each_stage_is_grouped_as_the_authors_group_it() -> None:
    mask, calls = reference_mask(official_order=False), iter(REFERENCE["grouping_calls_first_forward"])
    packed = iter(REFERENCE["group_windows_calls_first_forward"])
    for number, stage in enumerate(SHAPE.stages):
        coords = nested_coordinates(mask.visible.numpy(), 7, 3 - number)
        for kind, shift in enumerate(stage.shifts):
            call, grouping = next(calls), mask.groupings[number][kind]
            windows = window_ids(coords, stage.window, shift)
            assert (stage.window, shift, len(coords)) == (call["window"], call["shift"], call["num_tokens"])
            assert ("masking" if grouping.order is None else "grouping") == call["mode"]
            assert list(grouping.pairs.shape) == call["attn_mask_shape"]
            assert group_slots(windows, stage.window).shape[1] == call["group_size"]
            together = grouping.pairs < (2 * stage.window - 1) ** 2
            assert int(together.sum()) == call["attn_mask_zeros"]
            rows = grouping.pairs.where(together, torch.zeros(1, dtype=torch.int64))
            if grouping.order is None:  # in this mode the authors leave pairs of different windows their own offset
                rows = torch.from_numpy((coords[:, None] - coords + stage.window - 1) @ (2 * stage.window - 1, 1))
            else:
                assert np.unique(windows, return_counts=True)[1].tolist() == next(packed)["num_ele_win"]
            assert [int(rows.min()), int(rows.max())] == call["rel_pos_idx_min_max"]
    assert next(calls, None) is next(packed, None) is None
