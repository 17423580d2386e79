"""A small suite, and one whole run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.commands import lmd_bench

SMALL = """
name: small
title: "Small: ten rows in seconds"
data: {name: scenes, image_size: 32, num_train: 32, num_held_out: 8}
steps: 6
untimed_steps: 2
log_every_steps: 4
recipes:
  equal: &equal {batch_size: 4, lr_warmup_steps: 2, lr: {base: 1.0e-3, per_images: null}}
  adan: {<<: *equal, optimizer: {name: adan, betas: [0.98, 0.92, 0.90]}, clip_grad_norm: 10.0}
methods:
  lmd-us:
    label: LMD-US
    method: lmd
    recipe: equal
    options: &lmd
      projector: {kind: vq, path: "shipped:scenes-vq-f8"}
      patch_size: 2
      encoder_width: 32
      encoder_depth: 1
      encoder_heads: 2
      decoder_width: 32
      decoder_depth: 1
      decoder_heads: 2
      mask_schedule: uniform
  lmd-ps: {label: LMD-PS, method: lmd, recipe: equal, options: {<<: *lmd, mask_schedule: piecewise}}
  lmd-cs: {label: LMD-CS, method: lmd, recipe: equal, options: &cosine {<<: *lmd, mask_schedule: cosine}}
  lmd-cs-adan: {label: LMD-CS (Adan), method: lmd, recipe: adan, base: lmd-cs, options: *cosine}
  mae:
    label: MAE
    method: mae
    recipe: equal
    options:
      patch_size: 8
      encoder_width: 32
      encoder_depth: 1
      encoder_heads: 2
      decoder_width: 32
      decoder_depth: 1
      decoder_heads: 2
  ddpm:
    label: DDPM
    method: ddpm
    recipe: equal
    options: &unet
      block_out_channels: [8, 8]
      attention_levels: [1]
      layers_per_block: 1
      norm_num_groups: 4
      num_train_timesteps: 40
      num_inference_steps: 2
  simmim:
    label: SimMIM
    method: simmim
    recipe: equal
    options:
      backbone: {kind: swin, patch_size: 2, embed_dim: 16, depths: [1, 1, 1], num_heads: [1, 2, 4], window_size: 4}
      mask_unit_px: 8
  greenmim:
    label: GreenMIM
    method: greenmim
    recipe: equal
    options:
      patch_size: 2
      embed_dim: 16
      depths: [1, 1, 1]
      num_heads: [1, 2, 4]
      window_size: 4
      decoder_width: 32
      decoder_heads: 2
  iddpm: {label: iDDPM, method: iddpm, recipe: equal, options: {<<: *unet, learn_sigma: true, loss: hybrid}}
  ldm:
    label: LDM
    method: ldm
    recipe: equal
    options: {<<: *unet, projector: {kind: vq, path: "shipped:scenes-vq-f8"}, attention_head_dim: 8}
  later: {label: Later, method: mae, recipe: equal, listed_only: "left to another suite"}
evaluation: {num_checks: 2, num_images: 4, unit_px: 16}
estimator: {half_life_steps: 2, num_resamples: 100}
tables: [table1, table3, table5]
reference: mae
"""


@pytest.fixture(scope="session")
def suite_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "small.yaml"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="session")
def finished(suite_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """OUT of one whole small run of all its rows. Nothing may change it: copy it."""
    out = tmp_path_factory.mktemp("out")
    done = lmd_bench("run", "--suite", suite_file, "--out", out, "--device", "cpu")
    assert done.code == 0, done.out + done.err
    return out
