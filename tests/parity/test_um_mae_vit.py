"""UM-MAE's ViT-B/16 with decoders of 2 and 8 blocks against the authors' code (implus/UM-MAE) on formula weights."""

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from baselines._um_mae_vit import UMViT, secondary_order
from baselines._uniform_sampling import num_unreplaced, one_of_every_cell, visible_first, visible_from_slots
from baselines.um_mae import UMMAE
from lmd_bench.nn.patches import patchify
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_input, reference_noise

IMAGES = reference_input(2, 3, 224, 224)
NOISE = reference_noise(2, 49)
"""Of the sampling mask and of the secondary mask alike."""
VISIBLE = visible_from_slots((4 * NOISE).long())


class Official(NamedTuple):
    """One released model: ours with its weights, and what the authors' code made of them."""

    method: UMMAE
    state: dict[str, Tensor]
    manifest: dict[str, Any]
    reference: dict[str, Any]


@pytest.fixture(scope="module", params=[2, 8], ids=lambda depth: f"dec512d{depth}b")
def official(request: pytest.FixtureRequest) -> Official:
    name = f"ummae_vit_base_patch16_dec512d{request.param}b_224"
    manifest = load_reference(f"{name}.manifest")
    state = filled_state_dict(manifest)
    method = UMMAE.from_official(state)
    assert isinstance(method.model, UMViT)
    assert method.config.decoder_depth == request.param
    return Official(method, state, manifest, load_reference(f"{name}.strong.reference"))


def test_layout_counts_and_weights_equal_the_authors_checkpoint(official: Official) -> None:
    back, parameters = official.method.to_official(), dict(official.method.model.named_parameters())
    assert list(back) == [entry["key"] for entry in official.manifest["keys"]]
    for entry in official.manifest["keys"]:
        assert list(back[entry["key"]].shape) == entry["shape"], entry["key"]
        assert parameters[entry["key"]].requires_grad == entry["trainable"], entry["key"]
        assert torch.equal(back[entry["key"]], official.state[entry["key"]]), entry["key"]
    assert sum(p.numel() for p in parameters.values()) == official.manifest["params_total"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == official.manifest["params_trainable"]


def test_sampling_and_secondary_masks_equal_the_authors(official: Official) -> None:
    reference, secondary = official.reference, official.reference["secondary"]
    assert bool(one_of_every_cell(VISIBLE).all())
    assert visible_first(VISIBLE)[:, :49].tolist() == reference["visible_positions"]
    assert reference["visible_per_sample"] == [49, 49]
    kept = num_unreplaced(49, official.method.config.secondary_ratio)
    assert (kept, 49 - kept) == (secondary["kept"], secondary["replaced_by_token"])
    replaced = secondary_order(NOISE)[:, kept:]
    assert replaced.sort(dim=1).values.tolist() == secondary["replaced_slots"]


def test_encoder_output_equals_the_authors(official: Official) -> None:
    model = official.method.model
    assert isinstance(model, UMViT)
    order = secondary_order(NOISE)
    ids_keep = visible_first(VISIBLE)[:, :49].gather(1, order)
    with torch.no_grad():
        features = model.encode(patchify(IMAGES, 16), ids_keep, num_replaced=13)
    tokens = features[:, 1:].gather(1, order.argsort(dim=1).unsqueeze(-1).expand(-1, -1, 768))
    assert_matches(torch.cat([features[:, :1], tokens], dim=1), official.reference["encoder_output"])


def test_prediction_of_visible_and_hidden_tokens_equals_the_authors(official: Official) -> None:
    with torch.no_grad():
        predicted = official.method.model(IMAGES, VISIBLE, NOISE, all_tokens=True)
        hidden = official.method.model(IMAGES, VISIBLE, NOISE)
    torch.testing.assert_close(hidden, predicted[:, 49:])
    for case in official.reference["cases"].values():
        assert_matches(predicted, case["pred"])


@pytest.mark.parametrize("normalize", [True, False])
def test_loss_and_gradient_equal_the_authors(official: Official, normalize: bool) -> None:
    method, case = official.method, official.reference["cases"][f"norm_pix_loss={normalize}"]
    method.config = method.config.model_copy(update={"normalize_targets": normalize})
    method.zero_grad()
    loss = method.loss(IMAGES, VISIBLE, NOISE)
    loss.backward()
    assert abs(loss.item() - case["loss"]) <= 1e-5 * case["loss"]
    norms = [p.grad.double().norm() for p in method.parameters() if p.grad is not None]
    wanted = case["grad"]["global_grad_norm"]
    assert abs(torch.stack(norms).norm().item() - wanted) <= 1e-4 * wanted
