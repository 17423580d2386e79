"""What the parity tests of MAE and LMD share: both are held against runs of the authors' code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.nn.masking import ids_from_noise
from lmd_bench.nn.patches import patchify
from tests.parity.fill import assert_matches, reference_noise


def assert_layout_matches(model: MaskedAutoencoder, manifest: dict[str, Any]) -> None:
    """Same keys in the same order, same shapes, same counts, same frozen tables."""
    own = model.state_dict()
    assert list(own) == [entry["key"] for entry in manifest["keys"]]
    parameters = dict(model.named_parameters())
    for entry in manifest["keys"]:
        assert list(own[entry["key"]].shape) == entry["shape"], entry["key"]
        assert parameters[entry["key"]].requires_grad == entry["trainable"], entry["key"]
    assert sum(p.numel() for p in parameters.values()) == manifest["params_total"]
    assert sum(p.numel() for p in parameters.values() if p.requires_grad) == manifest["params_trainable"]


def assert_tables_and_encoder_match(model: MaskedAutoencoder, images: Tensor, reference: dict[str, Any]) -> None:
    """Position tables, and the encoder's output at mask ratio 0.75."""
    assert_matches(model.pos_embed, reference["pos_embed"])
    assert_matches(model.decoder_pos_embed, reference["decoder_pos_embed"])
    ids = ids_from_noise(reference_noise(len(images), model.shape.num_tokens))
    num_kept = reference["encoder_output"]["shape"][1] - 1
    with torch.no_grad():
        features = model.encode(patchify(images, model.shape.patch_size), ids[:, :num_kept])
    assert_matches(features, reference["encoder_output"])


def assert_case_matches(model: MaskedAutoencoder, images: Tensor, name: str, case: dict[str, Any]) -> None:
    """Mask, prediction of all tokens, loss and gradient norm of one case."""
    model.normalize_targets = name.startswith("norm_pix_loss=True")
    ids, num_kept = ids_from_noise(reference_noise(len(images), model.shape.num_tokens)), case["len_keep"]
    assert ids[:, :num_kept].tolist() == case["ids_keep_order"]
    assert ids[:, num_kept:].sort(dim=1).values.tolist() == case["masked_indices"]
    with torch.no_grad():
        features = model.encode(patchify(images, model.shape.patch_size), ids[:, :num_kept])
        shuffled = model.decode(features, ids, all_tokens=True)
    where = ids.unsqueeze(-1).expand_as(shuffled)
    assert_matches(torch.empty_like(shuffled).scatter(1, where, shuffled), case["pred"])
    model.zero_grad()
    loss = model(images, ids, num_kept)
    loss.backward()
    assert abs(loss.item() - case["loss"]) <= 1e-5 * case["loss"]
    norms = [p.grad.double().norm() for p in model.parameters() if p.grad is not None]
    wanted = case["grad"]["global_grad_norm"]
    assert abs(torch.stack(norms).norm().item() - wanted) <= 1e-4 * wanted
