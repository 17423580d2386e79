"""UM-MAE's PVT-S and Swin-T against the authors' code (implus/UM-MAE) on formula weights."""

import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from baselines._um_mae_grid import quadtree_order, raster_ranks
from baselines._um_mae_pyramid import PyramidAutoencoder
from baselines._um_mae_shape import PyramidShape
from baselines._uniform_sampling import visible_first, visible_from_slots
from baselines.um_mae import UMMAE
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_input, reference_noise

NUM_CELLS = 64
IMAGES = reference_input(2, 3, 256, 256)
VISIBLE = visible_from_slots((4 * reference_noise(2, NUM_CELLS)).long())
SLOTS = VISIBLE.view(2, 8, 2, 8, 2).transpose(2, 3).reshape(2, NUM_CELLS, 4)
"""The same by cell: whether each of a cell's four tokens is visible."""


class Official(NamedTuple):
    """One released model: ours with its weights, and what the authors' code made of them."""

    method: UMMAE
    model: PyramidAutoencoder
    state: dict[str, Tensor]
    manifest: dict[str, Any]
    reference: dict[str, Any]


@pytest.fixture(scope="module", params=["pvt_small", "swin_tiny"])
def official(request: pytest.FixtureRequest) -> Official:
    name = f"ummae_{request.param}_256"
    manifest = load_reference(f"{name}.manifest")
    state = filled_state_dict(manifest)
    method = UMMAE.from_official(state)
    assert isinstance(method.model, PyramidAutoencoder)
    assert method.model.shape == PyramidShape.published(request.param, official_order=True)
    return Official(method, method.model, state, manifest, load_reference(f"{name}.strong.reference"))


def secondary_noise() -> Tensor:
    """The authors draw for all tokens and rank the visible ones: their numbers, cell by cell."""
    drawn = reference_noise(2, 4 * NUM_CELLS).view(2, 8, 2, 8, 2).transpose(2, 3).reshape(2, NUM_CELLS, 4)
    return (drawn * SLOTS).sum(dim=2)


def test_layout_counts_and_weights_equal_the_authors_checkpoint(official: Official) -> None:
    back, parameters = official.method.to_official(), dict(official.model.named_parameters())
    assert list(back) == [entry["key"] for entry in official.manifest["keys"]]
    for entry in official.manifest["keys"]:
        assert list(back[entry["key"]].shape) == entry["shape"], entry["key"]
        assert parameters[entry["key"]].requires_grad == entry["trainable"], entry["key"]
        assert torch.equal(back[entry["key"]], official.state[entry["key"]]), entry["key"]
    assert sum(p.numel() for p in parameters.values()) == official.manifest["params_total"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == official.manifest["params_trainable"]


def test_visible_tokens_and_their_two_orders_equal_the_authors(official: Official) -> None:
    reference, check = official.reference, official.reference["decoder_order_check"]
    raster = visible_first(VISIBLE)[:, :NUM_CELLS]
    assert raster.tolist() == reference["visible_positions"]
    assert reference["visible_per_sample"] == [NUM_CELLS, NUM_CELLS]
    rows, columns = official.model._visible_positions(VISIBLE)
    compact = (16 * rows + columns)[0, raster_ranks(8)]
    assert compact[:16].tolist() == check["compact_first16"]
    assert raster[0, :16].tolist() == check["raster_first16"]
    assert int((compact != raster[0]).sum()) == check["n_mismatch"]


def test_decoder_positions_are_the_authors_or_the_tokens_own(official: Official) -> None:
    model, raster = official.model, visible_first(VISIBLE)[:, :NUM_CELLS]
    assert torch.equal(model._decoder_ids(VISIBLE, raster)[:, raster_ranks(8)], raster)
    model.shape = dataclasses.replace(model.shape, official_order=False)
    repaired = model._decoder_ids(VISIBLE, raster)
    model.shape = dataclasses.replace(model.shape, official_order=True)
    assert torch.equal(repaired.sort(dim=1).values, raster)
    cells = repaired // 32 * 8 + repaired % 16 // 2
    assert torch.equal(cells, torch.from_numpy(quadtree_order(8)).expand(2, -1))


def test_encoder_output_equals_the_authors(official: Official) -> None:
    with torch.no_grad():
        features = official.model.encode(IMAGES, VISIBLE, official.model.replaced_cells(secondary_noise()))
    assert_matches(features[:, raster_ranks(4)], official.reference["encoder_output"])


def test_prediction_of_visible_and_hidden_tokens_equals_the_authors(official: Official) -> None:
    with torch.no_grad():
        predicted = official.model(IMAGES, VISIBLE, secondary_noise(), all_tokens=True)
        hidden = official.model(IMAGES, VISIBLE, secondary_noise())
    torch.testing.assert_close(hidden, predicted[:, NUM_CELLS:])
    for case in official.reference["cases"].values():
        assert_matches(predicted, case["pred"])


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_gradient_equal_the_authors(official: Official, normalize: bool) -> None:
    method, case = official.method, official.reference["cases"][f"norm_pix_loss={normalize}"]
    method.config = method.config.model_copy(update={"normalize_targets": normalize})
    method.zero_grad()
    loss = method.loss(IMAGES, VISIBLE, secondary_noise())
    loss.backward()
    assert abs(loss.item() - case["loss"]) <= 1e-5 * case["loss"]
    norms = [p.grad.double().norm() for p in method.parameters() if p.grad is not None]
    wanted = case["grad"]["global_grad_norm"]
    assert abs(torch.stack(norms).norm().item() - wanted) <= 1e-4 * wanted
