"""SimMIM Swin-B and ViT-B against the authors' code (microsoft/SimMIM) on formula weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines._relative_position import relative_position_index, relative_position_index_with_class_token
from baselines._swin import WindowOrder
from baselines.simmim import SimMIM, SimMIMConfig, UnitMasks, from_cells, num_hidden_units
from lmd_bench.nn.masking import ids_from_noise
from tests.parity.fill import assert_matches, filled_tensor, load_reference, reference_input, reference_noise

BACKBONES = ["simmim_swin_base_192_w6", "simmim_vit_base_224"]
MASK_CASES = load_reference("simmim_maskgenerator.reference")["cases"]


@dataclass(frozen=True)
class Run:
    """One model on the reference's weights, with what it made of the reference's input."""

    method: SimMIM
    weights: dict[str, Tensor]
    manifest: dict[str, Any]
    reference: dict[str, Any]
    images: Tensor

    @property
    def ids(self) -> Tensor:
        return torch.tensor(self.reference["mask"]["masked_units"])


@pytest.fixture(scope="module", params=BACKBONES)
def run(request: pytest.FixtureRequest) -> Run:
    manifest = load_reference(f"{request.param}.manifest")
    weights = {e["key"]: _table(e) if e["fill"] == "fixed" else filled_tensor(e) for e in manifest["keys"]}
    method = SimMIM.from_official(weights).eval()
    images = reference_input(2, 3, method.data.image_size, method.data.image_size)
    return Run(method, weights, manifest, load_reference(f"{request.param}.strong.reference"), images)


def _table(entry: dict[str, Any]) -> Tensor:
    """What the authors' constructor makes, held against plain rules in tests/baselines/test_swin.py."""
    if entry["key"].endswith("attn_mask"):
        return WindowOrder(6 * math.isqrt(entry["shape"][0]), window=6, shift=3).shift_mask()
    side = math.isqrt(entry["shape"][0])
    return relative_position_index(side) if side == 6 else relative_position_index_with_class_token(side)


def test_layout_and_counts_equal_the_authors_checkpoint(run: Run) -> None:
    own, entries = run.method.to_official(), run.manifest["keys"]
    assert list(own) == [entry["key"] for entry in entries]
    assert all(list(own[entry["key"]].shape) == entry["shape"] for entry in entries)
    assert all(str(own[entry["key"]].dtype) == f"torch.{entry['dtype']}" for entry in entries)
    kinds = dict(run.method.model.named_parameters()).keys()
    assert kinds == {entry["key"] for entry in entries if entry["kind"] == "parameter"}
    assert sum(p.numel() for p in run.method.parameters() if p.requires_grad) == run.manifest["params_trainable"]


def test_the_checkpoint_comes_back_bit_for_bit(run: Run) -> None:
    back = run.method.to_official()
    assert all(torch.equal(back[key], tensor) for key, tensor in run.weights.items())
    published = SimMIMConfig(backbone={"kind": run.method.config.backbone.kind})
    assert run.method.config == published
    assert run.method.data.image_size == {"swin": 192, "vit": 224}[published.backbone.kind]


def test_masks_equal_the_authors(run: Run) -> None:
    masks, wanted = run.method.masks, run.reference["mask"]
    order = ids_from_noise(reference_noise(2, wanted["token_count"]))
    assert torch.equal(order[:, : masks.num_hidden], run.ids)
    assert masks.num_units == wanted["token_count"]
    hidden = masks.hidden_patches(run.ids)
    assert hidden.sum(dim=1).tolist() == wanted["sum_per_sample"]
    assert hidden.numel() == 2 * wanted["shape"][1] * wanted["shape"][2]
    units = hidden.view(2, wanted["rand_size"], wanted["scale"], wanted["rand_size"], wanted["scale"])
    assert torch.equal(units[:, :, 0, :, -1].flatten(1), masks.unit_mask(run.ids))


def test_features_and_prediction_equal_the_authors(run: Run) -> None:
    model, hidden = run.method.model, run.method.masks.hidden_patches(run.ids)
    with torch.no_grad():
        features = model.encoder(run.images, hidden)
        head = model.decoder[0]
        cells = torch.nn.functional.linear(features, head.weight.flatten(1), head.bias)
    grid = run.reference["encoder_output"]["shape"][-1]
    assert_matches(features.transpose(1, 2).unflatten(2, (grid, grid)), run.reference["encoder_output"])
    assert_matches(from_cells(cells, model.stride), run.reference["x_rec"])


def test_loss_and_gradient_equal_the_authors(run: Run) -> None:
    model = run.method.model
    loss = model.loss(run.images, run.method.masks, run.ids)
    loss.backward()
    assert abs(loss.item() - run.reference["loss"]) <= 1e-5 * run.reference["loss"]
    norm = torch.stack([p.grad.double().norm() for p in model.parameters() if p.grad is not None]).norm().item()
    wanted = run.reference["grad"]["global_grad_norm"]
    assert abs(norm - wanted) <= 1e-4 * wanted
    model.zero_grad()


@pytest.mark.parametrize("case", MASK_CASES, ids=lambda case: "-".join(map(str, case["args"].values())))
def test_mask_counts_equal_the_authors_generator(case: dict[str, Any]) -> None:
    size, patch = case["args"]["input_size"], case["args"]["model_patch_size"]
    config = SimMIMConfig(
        backbone={"kind": "vit", "patch_size": patch},
        mask_unit_px=case["args"]["mask_patch_size"],
        mask_ratio=case["args"]["mask_ratio"],
    )
    assert num_hidden_units(config, size) == case["mask_count"]
    masks = UnitMasks(config, size)
    assert masks.num_units == case["token_count"]
    hidden = masks.hidden_patches(masks.draw(2, torch.device("cpu")))
    assert hidden.shape == (2, case["shape"][0] * case["shape"][1])
    assert hidden.sum(dim=1).tolist() == [case["ones_in_mask"]] * 2
