"""Trained encoders as classifiers; `lmd_bench.testing` tries their contract with every method too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from helpers.official import CASES, Case
from torch import Tensor, nn

from baselines.mae import MAE, MAEConfig
from lmd_bench.errors import ConfigError
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.method import DataSpec
from lmd_bench.nn.classifier import ImageClassifier
from lmd_bench.nn.drop_path import DropPath
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.registry import load_method

TINY = {
    "encoder_width": 48,
    "encoder_depth": 3,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
_UNET = {
    "block_out_channels": [16, 32],
    "attention_levels": [1],
    "attention_head_dim": 8,
    "layers_per_block": 2,
    "norm_num_groups": 8,
}
ENCODERS = {name: case for name, case in CASES.items() if not name.endswith(("ddpm", "ddim", "ldm"))}
ENCODERS["lmd-unet"] = replace(
    CASES["lmd"], options={"projector": {"kind": "pixels"}, "patch_size": 4, "network": "unet", "unet": _UNET}
)
CLASS_TOKENS = ("lmd", "mae", "simmim-vit", "um-mae")
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def make_mae() -> MAE:
    torch.manual_seed(0)
    return MAE(MAEConfig(patch_size=8, **TINY), DataSpec(32))


def randomize(module: nn.Module) -> None:
    """Trained-looking weights: norms, biases and a head that say something."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))


def images_of(case: Case, count: int = 2) -> Tensor:
    return torch.rand(count, 3, case.image_size, case.image_size)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


# -- what the head reads ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pool", "global_pool"), [("mean", "avg"), ("cls", "token")])
def test_the_mae_classifier_is_timms_vit_of_that_pooling(pool: Any, global_pool: str) -> None:
    method = make_mae()
    classifier = method.classifier(7, pool=pool)
    randomize(classifier)
    vit = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=7, global_pool=global_pool
    ).eval()
    norm = "fc_norm" if pool == "mean" else "norm"
    vit.load_state_dict(
        {key.replace("fc_norm", norm): value for key, value in classifier.state_dict().items() if "to_map" not in key}
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(classifier(images), vit(method.pixels.normalize(images)), rtol=1e-4, atol=1e-4)


def test_a_class_token_is_read_through_the_encoders_own_norm_and_a_mean_through_a_new_one() -> None:
    method = make_mae()
    assert method.classifier(7, pool="cls").fc_norm is method.model.norm
    own = {id(parameter) for parameter in method.parameters()}
    assert not own & {id(parameter) for parameter in method.classifier(7).fc_norm.parameters()}


@every_encoder
def test_logits_are_the_heads_of_one_vector_an_image(name: str) -> None:
    case = ENCODERS[name]
    torch.manual_seed(1)
    classifier, images = case.build().classifier(5), images_of(case, 3)
    classifier.eval()
    with torch.no_grad():
        pooled = classifier.pooled(images)
        assert pooled.shape == (3, classifier.num_features)
        assert torch.equal(classifier(images), classifier.head(classifier.fc_norm(pooled)))
        torch.testing.assert_close(classifier.pooled(images[1:2]), pooled[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", sorted(ENCODERS.keys() - set(CLASS_TOKENS)))
def test_encoders_without_a_class_token_refuse_to_pool_it(name: str) -> None:
    case = ENCODERS[name]
    method = case.build()
    config = type(method).Config.model_validate(case.options)
    assert type(method).classifier_obstacle(config) is None
    assert type(method).classifier_obstacle(config, "cls") == "its encoder has no class token: use pool mean"
    with pytest.raises(ConfigError, match="classifier: its encoder has no class token: use pool mean"):
        method.classifier(5, pool="cls")


@pytest.mark.parametrize("name", CLASS_TOKENS)
def test_encoders_with_a_class_token_take_both_poolings(name: str) -> None:
    case = ENCODERS[name]
    method, images = case.build(), images_of(case)
    assert type(method).classifier_obstacle(type(method).Config.model_validate(case.options), "cls") is None
    vectors = [method.classifier(5, pool=pool).eval().pooled(images) for pool in ("mean", "cls")]
    assert vectors[0].shape == vectors[1].shape
    assert not torch.allclose(*vectors)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "iddpm", "ldm"])
def test_methods_without_an_encoder_say_so_before_they_are_built(name: str) -> None:
    case = CASES[name]
    method_class = load_method(case.method, {})
    assert (
        method_class.classifier_obstacle(method_class.Config.model_validate(case.options)) == "no encoder to fine-tune"
    )
    with pytest.raises(TypeError, match="has no encoder to fine-tune"):
        case.build().classifier(5)


# -- what is shared ---------------------------------------------------------------------------------------------------


@every_encoder
def test_a_classifier_holds_the_encoder_and_nothing_that_it_does_not_use(name: str) -> None:
    """Each trained parameter gets a gradient, none that only pre-training needs is there; no other changes."""
    case = ENCODERS[name]
    method = case.build()
    classifier = method.classifier(5).train()
    nn.init.normal_(classifier.head.weight)
    held = {id(parameter) for parameter in classifier.parameters()}
    before = {key: value.clone() for key, value in method.state_dict().items()}
    optimizer = torch.optim.SGD(trained(classifier).values(), lr=0.1)
    nn.functional.cross_entropy(classifier(images_of(case, 4)), torch.arange(4)).backward()
    assert [key for key, parameter in trained(classifier).items() if parameter.grad is None] == []
    optimizer.step()
    changed = {key for key, value in method.state_dict().items() if not torch.equal(value, before[key])}
    assert changed
    shared = {key for key, parameter in method.named_parameters() if id(parameter) in held and parameter.requires_grad}
    assert changed <= shared
    assert not any("decoder" in key or "mask_token" in key for key in shared)


@pytest.mark.parametrize("name", ["lmd", "mae", "um-mae", "um-mae-pvt"])
def test_fixed_positions_are_trained_in_a_copy_that_pre_training_does_not_see(name: str) -> None:
    """As in MAE's and UM-MAE's fine-tuning; each position has a row of its own, so each has a gradient."""
    case = ENCODERS[name]
    torch.manual_seed(3)
    method = case.build()
    classifier = method.classifier(5, drop_path=0.0).train()
    nn.init.normal_(classifier.head.weight)
    [table] = [parameter for key, parameter in trained(classifier).items() if key == "pos_embed"]
    assert torch.equal(table, method.model.pos_embed)
    assert (classifier.layer_of("pos_embed"), classifier.is_decayed("pos_embed", table)) == (0, False)
    nn.functional.cross_entropy(classifier(images_of(case, 4)), torch.arange(4)).backward()
    assert table.grad is not None
    assert (table.grad.abs().sum(dim=-1) > 0).all()
    fixed = method.model.pos_embed.clone()
    with torch.no_grad():
        table.add_(1.0)
    assert torch.equal(method.model.pos_embed, fixed)
    assert not method.model.pos_embed.requires_grad


@every_encoder
def test_a_classifier_moves_as_a_whole_and_is_made_where_the_encoder_is(name: str) -> None:
    case = ENCODERS[name]
    images = torch.empty(2, 3, case.image_size, case.image_size, device="meta")
    moved = case.build().classifier(5, drop_path=0.1).to("meta")
    made = case.build().to("meta").classifier(5, drop_path=0.1)
    for classifier in (moved, made):
        assert classifier.train()(images).shape == (2, 5)
        held = [*classifier.parameters(), *classifier.buffers()]
        assert {tensor.device.type for tensor in held} == {"meta"}


def test_an_lmd_classifier_reads_latents_of_its_frozen_projector() -> None:
    config = LMDConfig(projector=ProjectorConfig(kind="vq", path="shipped:scenes-vq-f8"), patch_size=2, **TINY)
    method = LMD(config, DataSpec(64))
    classifier = method.classifier(6)
    assert classifier(torch.rand(2, 3, 64, 64)).shape == (2, 6)
    frozen = {id(parameter) for parameter in method.projector.parameters()}
    assert not any(id(parameter) in frozen for parameter in trained(classifier).values())
    names = [name for name, parameter in classifier.named_parameters() if id(parameter) in frozen]
    with pytest.raises(ValueError, match="is frozen and of no layer"):
        classifier.layer_of(names[0])


# -- layers and weight decay ------------------------------------------------------------------------------------------


@every_encoder
def test_layers_cover_every_trained_parameter_and_rise_with_depth(name: str) -> None:
    classifier = ENCODERS[name].build().classifier(5)
    layers = {key: classifier.layer_of(key) for key in trained(classifier)}
    assert set(layers.values()) == set(range(classifier.num_layers + 1))
    blocks = [layer for key, layer in layers.items() if key.startswith(("blocks.", "layers.", "down_blocks."))]
    assert blocks == sorted(blocks)
    assert layers["head.weight"] == layers["head.bias"] == classifier.num_layers


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("mae", {"cls_token": 0, "patch_embed.proj.weight": 0, "blocks.0.norm1.bias": 1, "fc_norm.weight": 2}),
        # SimMIM's optimizer.py: the shared table is the head's
        ("simmim-vit", {"blocks.1.gamma_1": 2, "rel_pos_bias.relative_position_bias_table": 3, "head.bias": 3}),
        # stages of 2, 1 and 1 blocks: a merging is of the layer of the block before it
        (
            "simmim",
            {
                "patch_embed.norm.weight": 0,
                "layers.0.blocks.1.mlp.fc1.weight": 2,
                "layers.0.downsample.reduction.weight": 2,
                "layers.1.blocks.0.norm1.weight": 3,
                "layers.1.downsample.norm.weight": 3,
                "layers.2.blocks.0.norm1.weight": 4,
                "norm.weight": 5,
            },
        ),
        ("greenmim", {"layers.0.downsample.norm.bias": 2, "layers.2.blocks.0.attn.qkv.bias": 4, "norm.bias": 5}),
        # here a merging is of the block behind it
        ("um-mae-pvt", {"blocks.0.attn.q.bias": 1, "blocks.1.downsample.proj.weight": 2, "head.weight": 6}),
        ("lmd-unet", {"conv_in.weight": 0, "time_embedding.linear_1.bias": 0, "mid_block.resnets.0.norm1.bias": 3}),
    ],
)
def test_layers_are_those_of_the_published_rules(name: str, wanted: dict[str, int]) -> None:
    classifier = ENCODERS[name].build().classifier(5)
    names = trained(classifier)
    assert {key: classifier.layer_of(key) for key in wanted if key in names} == wanted


@every_encoder
def test_positions_tokens_and_one_dimensional_parameters_are_not_decayed(name: str) -> None:
    classifier = ENCODERS[name].build().classifier(5)
    spared = {key for key, parameter in trained(classifier).items() if not classifier.is_decayed(key, parameter)}
    for key, parameter in trained(classifier).items():
        special = key.endswith(("cls_token", "pos_embed", "relative_position_bias_table"))
        assert (key in spared) == (special or parameter.ndim == 1), key
    assert "head.weight" not in spared


# -- stochastic depth -------------------------------------------------------------------------------------------------


@every_encoder
def test_rates_rise_over_the_blocks_and_the_last_ones_is_the_given(name: str) -> None:
    classifier = ENCODERS[name].build().classifier(5, drop_path=0.3)
    rates = [module.rate for key, module in classifier.named_modules() if key.startswith("drop_paths.")
             and isinstance(module, DropPath)]  # fmt: skip
    assert rates[0] == 0
    assert rates == pytest.approx(torch.linspace(0, 0.3, len(rates)).tolist())


@every_encoder
def test_branches_are_dropped_in_training_mode_only(name: str) -> None:
    case = ENCODERS[name]
    if name in ("lmd", "mae", "um-mae"):  # of a single block, whose rate is 0
        case = replace(case, options={**case.options, "encoder_depth": 2})
    torch.manual_seed(0)
    classifier, images = case.build().classifier(5, drop_path=0.9), images_of(case, 8)
    plain = case.build().classifier(5).train()
    with torch.no_grad():
        whole = plain.pooled(images)
        assert torch.equal(classifier.eval().pooled(images), whole)
        dropped = classifier.train().pooled(images)
    assert dropped.isfinite().all()
    assert not torch.allclose(dropped, whole)


def test_pre_training_keeps_its_own_stochastic_depth() -> None:
    """SimMIM's ViT pre-trains with a rate of its own, which no classifier replaces."""
    case = ENCODERS["simmim-vit"]
    method, images = case.build().train(), images_of(case, 6)
    encoder = method.model.encoder

    def loss() -> Tensor:
        torch.manual_seed(2)
        return method.training_step(images, step=1, total_steps=10).loss

    before = loss()
    method.classifier(5, drop_path=0.9)
    assert torch.equal(loss(), before)
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0.0, 0.1])


def test_stochastic_depth_needs_no_single_precision() -> None:
    classifier = make_mae().classifier(5, drop_path=0.5).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = classifier(torch.rand(4, 3, 32, 32))
    logits.float().square().sum().backward()
    assert all(parameter.grad is not None for parameter in trained(classifier).values())


# -- the U-Net of the ablation ----------------------------------------------------------------------------------------


def test_the_unets_features_are_those_of_its_own_way_down() -> None:
    method = ENCODERS["lmd-unet"].build()
    images, seen = torch.rand(2, 3, 32, 32), []
    hook = method.model.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output))
    with torch.no_grad():
        nothing_hidden = torch.zeros(2, method.model.shape.num_tokens, dtype=torch.bool)
        method.model.complete(method.projector.encode(images), nothing_hidden)
        hook.remove()
        classifier = method.classifier(5)
        assert isinstance(classifier, ImageClassifier)
        assert torch.equal(classifier.features(images), seen[0].flatten(2).transpose(1, 2))
    assert classifier.num_layers == 4
