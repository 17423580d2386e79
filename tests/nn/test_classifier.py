"""Trained encoders as classifiers."""

import pytest
import torch
from helpers.official import CASES

from baselines.mae import MAE, MAEConfig
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.method import DataSpec, Method
from lmd_bench.nn.patches import patchify
from lmd_bench.projector.config import ProjectorConfig

ENCODERS = ("lmd", "mae", "simmim", "greenmim", "um-mae")
TINY = {
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def make_mae() -> MAE:
    torch.manual_seed(0)
    return MAE(MAEConfig(patch_size=8, **TINY), DataSpec(32))


def test_features_are_the_encoders_tokens_before_its_last_norm() -> None:
    method = make_mae()
    images = torch.rand(2, 3, 32, 32)
    classifier = method.classifier(7)
    patches = patchify(method.pixels.normalize(images), 8)
    every = torch.arange(16).expand(2, -1)
    with torch.no_grad():
        encoded = method.model.encode(patches, every)[:, 1:]
        normed = method.model.norm(classifier.features(images))
    torch.testing.assert_close(normed, encoded, rtol=1e-5, atol=1e-5)
    assert classifier(images).shape == (2, 7)


def test_the_encoder_is_shared_and_the_decoder_left_out() -> None:
    method: Method = make_mae()
    own = {id(parameter) for parameter in method.parameters()}
    names = {name for name, parameter in method.classifier(7).named_parameters() if id(parameter) in own}
    assert "cls_token" in names
    assert "blocks.1.mlp.fc2.weight" in names
    assert not any("decoder" in name or "mask_token" in name for name in names)


def test_gradients_reach_every_trained_parameter_of_the_classifier() -> None:
    classifier = make_mae().classifier(5)
    torch.nn.init.normal_(classifier.head.weight)
    torch.nn.functional.cross_entropy(classifier(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
    without = [n for n, p in classifier.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []


def test_an_lmd_classifier_reads_latents_of_its_frozen_projector() -> None:
    config = LMDConfig(projector=ProjectorConfig(kind="vq", path="shipped:scenes-vq-f8"), patch_size=2, **TINY)
    method = LMD(config, DataSpec(64))
    classifier = method.classifier(6)
    assert classifier(torch.rand(2, 3, 64, 64)).shape == (2, 6)
    frozen = {id(parameter) for parameter in method.projector.parameters()}
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    assert not any(id(parameter) in frozen for parameter in trained)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method in ENCODERS])
def test_a_classifier_moves_as_a_whole_and_is_made_where_the_encoder_is(name: str) -> None:
    case = CASES[name]
    images = torch.empty(2, 3, case.image_size, case.image_size, device="meta")
    moved = case.build().classifier(5).to("meta")
    made = case.build().to("meta").classifier(5)
    for classifier in (moved, made):
        assert classifier(images).shape == (2, 5)
        held = [*classifier.parameters(), *classifier.buffers()]
        assert {tensor.device.type for tensor in held} == {"meta"}
