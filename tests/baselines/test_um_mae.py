"""UM-MAE as a method."""

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from baselines._um_mae_vit import UMViT, secondary_order
from baselines._uniform_sampling import draw_uniform, num_unreplaced, visible_first
from baselines.mae import MAE, MAEConfig
from baselines.um_mae import UMMAE, UMMAEConfig
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.nn.patches import patchify, unpatchify
from lmd_bench.testing import check_method

TINY: dict[str, Any] = {
    "patch_size": 8,
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
HEADS = {"encoder_heads": 3, "decoder_heads": 2}
PYRAMID: dict[str, Any] = {
    "patch_size": 8,
    "stage_widths": (16, 24, 32, 48),
    "stage_depths": (1, 1, 2, 1),
    "stage_heads": (1, 2, 2, 3),
    "stage_mlp_ratios": (2.0, 2.0, 2.0, 2.0),
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}
PYRAMIDS = pytest.mark.parametrize("backbone", ["pvt", "swin"])


def tiny(image_size: int = 64, **options: Any) -> UMMAE:
    torch.manual_seed(0)
    return UMMAE(UMMAEConfig(**{**TINY, **options}), DataSpec(image_size))


def tiny_pyramid(backbone: str, image_size: int = 64, **options: Any) -> UMMAE:
    torch.manual_seed(0)
    config: Any = {"backbone": backbone, **PYRAMID, **options}
    return UMMAE(UMMAEConfig(**config), DataSpec(image_size))


@pytest.mark.parametrize("options", [{}, {"normalize_targets": True}, {"regular": False, "pixel_stats": "half"}])
def test_the_vit_form_keeps_the_contract(options: dict[str, Any]) -> None:
    config = UMMAEConfig(**TINY, **options)
    check_method(UMMAE, config, DataSpec(32), overfit_steps=100, overfit_share=0.6, learning_rate=3e-3)


@PYRAMIDS
def test_a_pyramid_keeps_the_contract(backbone: Any) -> None:
    config = UMMAEConfig(backbone=backbone, **PYRAMID)
    image_size = 64  # at 32 px the last stage is one patch, and a bias between a patch and itself has no gradient
    check_method(UMMAE, config, DataSpec(image_size), overfit_steps=60, overfit_share=0.7, learning_rate=5e-3)


# -- training ---------------------------------------------------------------------------------------------------------


def test_one_step_encodes_a_quarter_of_the_tokens() -> None:
    method = tiny()
    output = method.training_step(torch.rand(2, 3, 64, 64), step=1, total_steps=10)
    assert output.scalars == {"mask_ratio": 0.75, "tokens": 16.0}
    assert method.num_tokens_at(1, 10) == 16
    assert tiny(56, regular=False).num_tokens_at(1, 10) == 49 - 36
    assert tiny(56, regular=False).mask_ratio_at(1, 10) == 36 / 49


@PYRAMIDS
def test_a_pyramid_computes_the_patches_of_the_visible_tokens(backbone: str) -> None:
    method = tiny_pyramid(backbone)
    output = method.training_step(torch.rand(1, 3, 64, 64), step=1, total_steps=10)
    assert output.scalars == {"mask_ratio": 0.75, "tokens": 16.0 * 16}
    assert method.num_tokens_at(1, 10) == 16 * 16


def test_replaced_and_hidden_patches_are_not_looked_at() -> None:
    method = tiny()
    model = method.model
    visible, noise = draw_uniform(2, 8, torch.device("cpu")), torch.rand(2, 16)
    ids = visible_first(visible)[:, :16].gather(1, secondary_order(noise))[:, : num_unreplaced(16, 0.25)]
    images = torch.randn(2, 3, 64, 64, requires_grad=True)
    model(images, visible, noise).square().sum().backward()
    assert images.grad is not None
    seen = patchify(images.grad, 8).abs().sum(dim=2) > 0
    assert seen.sum(dim=1).tolist() == [12, 12]
    assert bool(seen.gather(1, ids).all())


def test_the_loss_is_over_hidden_tokens_alone() -> None:
    method = tiny()
    visible, noise = draw_uniform(2, 8, torch.device("cpu")), torch.rand(2, 16)
    pixels = torch.randn(2, 3, 64, 64)
    everything = method.model(pixels, visible, noise, all_tokens=True)
    errors = [
        (everything[row, 16 + place] - patchify(pixels, 8)[row, token]).square().mean()
        for row in range(2)
        for place, token in enumerate((~visible[row]).nonzero().flatten().tolist())
    ]
    assert len(errors) == 2 * 48
    torch.testing.assert_close(method.loss(pixels, visible, noise), torch.stack(errors).mean())


def test_a_replaced_token_is_the_same_whatever_stands_there_but_for_its_position() -> None:
    model = tiny().model
    assert isinstance(model, UMViT)
    patches, ids = torch.randn(1, 64, 192), torch.arange(16).unsqueeze(0)
    moved = ids.clone()
    moved[0, 15] = 63
    same = model.encode(torch.randn(1, 64, 192).index_copy(1, ids[0, :12], patches[:, :12]), ids, num_replaced=4)
    torch.testing.assert_close(model.encode(patches, ids, num_replaced=4), same)
    assert not torch.allclose(model.encode(patches, moved, num_replaced=4), same, atol=1e-3)
    assert not torch.allclose(model.encode(patches, ids), same, atol=1e-3), "in the yardstick none is replaced"


def test_the_published_model_has_its_parameters_and_flops() -> None:
    with torch.device("meta"):
        method = UMMAE(UMMAEConfig(), DataSpec(224))
        assert sum(p.numel() for p in method.parameters()) == 92_994_304
        assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 92_742_144
        with FlopCounterMode(display=False) as counter:
            output = method.training_step(torch.empty(2, 3, 224, 224), step=1, total_steps=2)
            output.loss.backward()
    assert output.loss.shape == ()
    # 2 x multiply-adds of a forward pass, by hand; the backward pass costs twice that
    encoder = 12 * (24 * 50 * 768**2 + 4 * 50**2 * 768) + 2 * 36 * 768**2
    decoder = 24 * 197 * 512**2 + 4 * 197**2 * 512 + 2 * 50 * 768 * 512
    last = (4 * 197 + 20 * 147) * 512**2 + 4 * 197 * 147 * 512 + 2 * 147 * 512 * 768
    assert counter.get_total_flops() == pytest.approx(3 * 2 * (encoder + decoder + last), rel=0.01)


# -- the yardstick ----------------------------------------------------------------------------------------------------


def test_the_vit_takes_any_mask_and_gives_visible_patches_back() -> None:
    method = tiny().eval()
    images, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 4, 4) > 0.25
    mask[:, 0, 0] = False
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1).expand_as(images)
    assert method.mask_pattern is None
    assert method.own_masks(mask) is mask
    reconstruction = method.reconstruct(images, mask)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden], rtol=0, atol=1e-6)
    assert (reconstruction - images)[hidden].abs().mean() > 0.05


@PYRAMIDS
def test_a_pyramid_is_measured_under_uniform_masks_and_takes_no_others(backbone: str) -> None:
    method = tiny_pyramid(backbone).eval()
    assert method.mask_pattern == "one of every 2 x 2 tokens of 8 px"
    assert UMMAE.token_px(method.config, method.data) is None
    images, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 4, 4) > 0.25
    own = method.own_masks(mask)
    assert own.shape == (3, 8, 8)
    assert own.view(3, 4, 2, 4, 2).sum(dim=(2, 4)).unique().tolist() == [3]
    hidden = own.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).expand_as(images)
    reconstruction = method.reconstruct(images, own)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden], rtol=0, atol=1e-6)
    assert (reconstruction - images)[hidden].abs().mean() > 0.05
    with pytest.raises(DataError, match=rf"^mask: {backbone} takes masks that leave one of every 2 x 2 tokens of 8 px"):
        method.reconstruct(images, mask)


@PYRAMIDS
def test_a_pyramids_predictions_land_on_the_tokens_they_are_of(backbone: str) -> None:
    method = tiny_pyramid(backbone).eval()
    images, masks = torch.rand(2, 3, 64, 64), torch.zeros(2, 4, 4, dtype=torch.bool)
    own = method.own_masks(masks)
    pixels = method.pixels.normalize(images)
    with torch.no_grad():
        predicted = method.model(pixels, ~own.flatten(1), None)
    patches = patchify(method.pixels.normalize(method.reconstruct(images, own)), 8)
    for row in range(2):
        tokens = own[row].flatten().nonzero().flatten()
        assert len(tokens) == predicted.shape[1] == 48
        for token, values in zip(tokens, predicted[row], strict=True):
            inside = method.pixels.normalize(method.pixels.to_images(unpatchify(values[None, None], 8, 3)))
            torch.testing.assert_close(patches[row, token], patchify(inside, 8)[0, 0])


def test_normalised_targets_cannot_take_the_yardstick() -> None:
    method = tiny(normalize_targets=True)
    assert UMMAE.yardstick_obstacle(method.config) == "normalised targets"
    with pytest.raises(ConfigError, match="normalised targets"):
        method.reconstruct(torch.rand(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_the_classifier_shares_the_encoder() -> None:
    method = tiny()
    classifier = method.classifier(5)
    assert classifier(torch.rand(2, 3, 64, 64)).shape == (2, 5)
    shared = {id(p) for p in method.parameters()} & {id(p) for p in classifier.parameters()}
    assert len(shared) == 3 + 2 * 12, "class token, patch embedding, blocks; positions are a copy"


@PYRAMIDS
def test_a_pyramids_classifier_shares_its_encoder(backbone: str) -> None:
    method = tiny_pyramid(backbone)
    classifier = method.classifier(5)
    classifier(torch.rand(2, 3, 64, 64)).square().sum().backward()
    reached = {name for name, p in method.named_parameters() if p.grad is not None}
    assert any(name.startswith("model.blocks.4.") for name in reached)
    assert not any("decoder" in name for name in reached)


# -- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 0.6}, r"mask_ratio must be 0.75, one visible token of every 2 x 2, got 0.6"),
        ({"official_order": True}, r"official_order is an option of pvt and swin; leave it out with backbone vit"),
        ({"stage_depths": (1, 1, 1, 1)}, r"stage_depths is an option of pvt and swin; leave it out"),
        ({"backbone": "pvt", "encoder_width": 384}, r"encoder_width is an option of the vit; leave it out with back"),
        ({"backbone": "pvt", "bias_hidden": 64}, r"bias_hidden is an option of swin; leave it out with backbone pvt"),
        ({"backbone": "swin", "regular": False}, r"regular is an option of the vit: a pyramid's compact map needs one"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UMMAEConfig(**options)


def test_options_survive_being_written_out_whole() -> None:
    for config in (UMMAEConfig(**TINY), UMMAEConfig(backbone="swin"), UMMAEConfig(backbone="pvt", official_order=True)):
        assert UMMAEConfig(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("image_size", "options", "message"),
    [
        (100, {"patch_size": 16}, r"^patch_size: 16 does not cut images of 100 x 100; possible: 1, 2, 4, 5"),
        (56, {}, r"^patch_size: tokens of 8 px are 7 x 7 on images of 56 px, and uniform masks need an even number"),
        (48, {"backbone": "pvt"}, r"^image_size: 48 px are not a multiple of 32, 4 tokens of 8 px"),
        (96, {"backbone": "swin"}, r"^image_size: 96 px give swin compact maps of"),
        (72, {"backbone": "pvt", "patch_size": 18}, r"^patch_size: a pyramid's tokens are 4 x 4 patches, got 18 px"),
        (32, {"secondary_ratio": 0.9}, r"^secondary_ratio: a mask ratio of 0.9 leaves none of 4 tokens visible"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(image_size: int, options: dict[str, Any], message: str) -> None:
    sizes = TINY if "backbone" not in options else PYRAMID
    with pytest.raises(ConfigError, match=message):
        UMMAE.check(UMMAEConfig(**{**sizes, **options}), DataSpec(image_size))


def test_free_masks_may_have_an_odd_number_of_tokens() -> None:
    UMMAE.check(UMMAEConfig(**{**TINY, "regular": False}), DataSpec(56))


# -- the authors' checkpoints -----------------------------------------------------------------------------------------


def test_official_weights_come_back_bit_for_bit() -> None:
    state = tiny().to_official()
    assert next(iter(state)) == "vis_mask_token"
    method = UMMAE.from_official(state, **HEADS)
    assert (method.config.backbone, method.data.image_size, method.config.decoder_depth) == ("vit", 64, 2)
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@PYRAMIDS
@pytest.mark.parametrize("official_order", [False, True])
def test_a_pyramids_weights_come_back_bit_for_bit(backbone: str, official_order: bool) -> None:
    made = tiny_pyramid(backbone, official_order=official_order)
    state = made.to_official()
    # the authors' were trained in the release's order: what is not, has to say so
    options: dict[str, Any] = {} if official_order else {"official_order": False}
    method = UMMAE.from_official(state, stage_heads=(1, 2, 2, 3), decoder_heads=2, **options)
    assert method.config == made.config
    assert ("in the order of the release" in method.config.sizes_text()) == official_order
    assert method.data.image_size == 64
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_the_published_pyramids_have_their_parameters() -> None:
    with torch.device("meta"):
        for backbone, total, trainable in (("pvt", 28_915_776, 28_522_560), ("swin", 35_905_418, 35_774_346)):
            method = UMMAE(UMMAEConfig(backbone=backbone), DataSpec(256))  # type: ignore[arg-type]
            assert sum(p.numel() for p in method.parameters()) == total
            assert sum(p.numel() for p in method.parameters() if p.requires_grad) == trainable


def test_sizes_in_words_name_the_heads() -> None:
    assert UMMAEConfig().sizes_text().startswith("encoder of width 768, 12 blocks and 12 heads, decoder of width 512")
    assert UMMAEConfig(backbone="pvt").sizes_text() == (
        "pvt with stages of widths [64, 128, 320, 512], depths [3, 4, 6, 3], heads [1, 2, 5, 8], decoder of width 512, "
        "2 blocks and 16 heads"
    )


def without(state: dict[str, Tensor], key: str) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if name != key}


def encoder_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if "decoder" not in name and "mask_token" not in name}


def test_checkpoints_that_do_not_fit_are_refused_in_one_line() -> None:
    state = tiny().to_official()
    mae = MAE(MAEConfig(**TINY), DataSpec(64)).to_official()
    pyramid = tiny_pyramid("pvt").to_official()
    wrong: list[tuple[dict[str, Tensor], dict[str, Any], str]] = [
        (mae, HEADS, r"^checkpoint: no key vis_mask_token: not a pre-training checkpoint of UM-MAE"),
        (without(pyramid, "blocks.0.norm1.weight"), {}, r"^checkpoint: blocks.0.norm1.weight is missing"),
        (without(state, "cls_token"), HEADS, r"^checkpoint: none of the keys cls_token, "),
        (state, {}, r"^checkpoint: no published encoder has the width 48"),
        (encoder_of(state), HEADS, r"^checkpoint: an encoder alone \(as for fine-tuning\)"),
        (encoder_of(pyramid), HEADS, r"^checkpoint: an encoder alone \(as for fine-tuning\)"),
        (state, {**HEADS, "secondary_ratio": 0.99}, r"^checkpoint: secondary_ratio: a mask ratio of 0.99 leaves none"),
        (state, {**HEADS, "stage_depths": (1, 1, 1, 1)}, r"^checkpoint: stage_depths is an option of pvt and swin"),
        (state, {**HEADS, "backbone": "swin"}, r"^checkpoint: its keys are those of vit, not of swin$"),
        (without(state, "norm.bias"), HEADS, r"1 missing: norm.bias$"),
        ({**state, "head.weight": torch.zeros(1)}, HEADS, r"1 unexpected: head.weight$"),
        ({**state, "norm.bias": torch.zeros(3)}, HEADS, r"1 of another shape: norm.bias \(3,\) instead of \(48,\)$"),
        ({**state, "patch_embed.proj.weight": torch.zeros(2)}, HEADS, r"not a tensor of 4 dimensions"),
    ]
    for checkpoint, options, message in wrong:
        with pytest.raises(WeightsError, match=message):
            UMMAE.from_official(checkpoint, **options)
