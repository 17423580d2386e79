"""SimMIM as a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from baselines.simmim import SimMIM, SimMIMConfig, SimMIMModel, UnitMasks, from_cells, to_cells
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import token_mask
from lmd_bench.testing import check_method

SWIN = {
    "kind": "swin",
    "patch_size": 4,
    "window_size": 4,
    "embed_dim": 24,
    "depths": (2, 2),
    "num_heads": (2, 4),
    "mlp_ratio": 2.0,
}
VIT = {"kind": "vit", "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "layer_scale": 1.0}
TINY = {
    "swin": SimMIMConfig(backbone=SWIN, mask_unit_px=8),
    "one window": SimMIMConfig(backbone={**SWIN, "window_size": 32}, mask_unit_px=16, mask_ratio=0.5),
    "units within a token": SimMIMConfig(
        backbone={**SWIN, "depths": (1, 1, 2), "num_heads": (1, 2, 2)}, mask_unit_px=4
    ),
    "vit": SimMIMConfig(backbone=VIT, mask_unit_px=8),
}
DATA = DataSpec(32)


@pytest.mark.parametrize("name", TINY)
def test_simmim_keeps_the_contract(name: str) -> None:
    check_method(SimMIM, TINY[name], DATA, batch_size=3, overfit_steps=40, overfit_share=0.85, learning_rate=3e-3)


@pytest.mark.parametrize("name", TINY)
def test_the_loss_is_the_mean_error_over_hidden_pixels(name: str) -> None:
    torch.manual_seed(0)
    config = TINY[name]
    model, masks = SimMIMModel(config.backbone, 32).eval(), UnitMasks(config, 32)
    images, ids = torch.randn(3, 3, 32, 32), masks.draw(3, torch.device("cpu"))
    hidden_pixels = masks.hidden_pixels(ids, 32)
    assert hidden_pixels.sum().item() == 3 * masks.num_hidden * config.mask_unit_px**2
    hidden = masks.hidden_patches(ids)
    assert torch.equal(hidden, token_mask(hidden_pixels, config.backbone.patch_size))
    predicted = from_cells(model(images, hidden), model.stride)
    wanted = (predicted - images).abs()[hidden_pixels.expand_as(images)].mean()
    torch.testing.assert_close(model.loss(images, masks, ids), wanted)


def test_cells_and_a_pixel_shuffle_undo_each_other() -> None:
    images = torch.rand(2, 3, 12, 12)
    cells = to_cells(images, 4)
    assert torch.equal(from_cells(cells, 4), images)
    assert torch.equal(torch.pixel_shuffle(cells.transpose(1, 2).unflatten(2, (3, 3)), 4), images)


def test_masks_hide_other_units_for_every_sample_and_are_drawn_anew() -> None:
    torch.manual_seed(0)
    masks = UnitMasks(TINY["swin"], 32)
    first, second = (masks.unit_mask(masks.draw(6, torch.device("cpu"))) for _ in range(2))
    assert first.sum(dim=1).tolist() == [10] * 6  # 0.6 of 16, rounded up
    assert len({tuple(row) for row in [*first.tolist(), *second.tolist()]}) > 6


def test_figures_of_a_step() -> None:
    method = SimMIM(TINY["swin"], DATA)
    output = method.training_step(torch.rand(2, 3, 32, 32), step=1, total_steps=10)
    assert output.scalars == {"mask_ratio": 10 / 16, "tokens": 64.0}
    assert method.mask_ratio_at(1, 10) == 10 / 16
    assert method.num_tokens_at(1, 10) == 64
    assert (SimMIM.token_px(method.config, DATA), SimMIM.mask_unit_px(method.config, DATA)) == (4, 8)


@pytest.mark.parametrize("name", ["swin", "vit"])
@pytest.mark.parametrize("grid", [4, 16])
def test_visible_patches_come_back_as_they_were(name: str, grid: int) -> None:
    torch.manual_seed(0)
    method = SimMIM(TINY[name], DATA).eval()
    images, mask = torch.rand(3, 3, 32, 32), torch.rand(3, grid, grid) > 0.9
    mask[0, -1, -1], mask[1, :2] = True, True  # samples hide different numbers of units
    mask[:, : grid // 4, : grid // 4] = False
    patch = method.config.backbone.patch_size
    unit = mask.repeat_interleave(32 // grid, 1).repeat_interleave(32 // grid, 2).unsqueeze(1)
    hidden = token_mask(unit, patch).view(3, 1, 32 // patch, 32 // patch)
    pixels = hidden.repeat_interleave(patch, 2).repeat_interleave(patch, 3).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    assert torch.equal(reconstruction[~pixels], images[~pixels])
    assert (reconstruction - images)[pixels].abs().mean() > 0.05


def test_an_image_without_a_visible_patch_is_refused() -> None:
    method = SimMIM(TINY["vit"], DATA)
    with pytest.raises(DataError, match="every token of image 0 touches a hidden unit"):
        method.reconstruct(torch.rand(1, 3, 32, 32), torch.ones(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize(
    ("name", "exempt"),
    [("swin", {"mask_token", "relative_position_bias_table"}), ("vit", {"cls_token"})],
)
def test_weight_decay_spares_what_the_authors_spare(name: str, exempt: set[str]) -> None:
    method = SimMIM(TINY[name], DATA)
    decayed, kept = method.param_groups(0.05)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(parameter): key for key, parameter in method.named_parameters()}
    spared = {names[id(parameter)].rpartition(".")[2] for parameter in kept["params"] if parameter.ndim > 1}
    assert spared == exempt
    assert all(parameter.ndim > 1 for parameter in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


def test_a_vit_starts_as_in_the_release() -> None:
    torch.manual_seed(0)
    config = SimMIMConfig(backbone={"kind": "vit", "depth": 3, "embed_dim": 192, "num_heads": 3})
    encoder = SimMIM(config, DataSpec(64)).model.encoder
    spread = 0.02 * 0.5396  # deviation of a normal distribution that is cut at one deviation
    for weight in (encoder.patch_embed.proj.weight, encoder.blocks[2].mlp.fc1.weight, encoder.mask_token):
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(spread, rel=0.15)
    for number, block in enumerate(encoder.blocks, start=1):
        for weight in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert weight.std().item() == pytest.approx(spread / (2 * number) ** 0.5, rel=0.05)
        assert block.gamma_1.unique().tolist() == pytest.approx([0.1])
    assert [block.drop_path.rate for block in encoder.blocks] == pytest.approx([0.0, 0.05, 0.1])
    assert not encoder.rel_pos_bias.relative_position_bias_table.any()


@pytest.mark.parametrize("name", ["swin", "vit"])
def test_the_classifier_shares_the_encoder(name: str) -> None:
    torch.manual_seed(0)
    method = SimMIM(TINY[name], DATA)
    classifier = method.classifier(5)
    images = torch.rand(2, 3, 32, 32)
    logits = classifier(images)
    assert logits.shape == (2, 5)
    logits.square().sum().backward()
    reached = {key for key, parameter in method.model.named_parameters() if parameter.grad is not None}
    left_out = {"encoder.mask_token", "decoder.0.weight", "decoder.0.bias"}
    left_out |= {"encoder.norm.weight", "encoder.norm.bias"} if name == "vit" else set()
    assert set(dict(method.model.named_parameters())) - reached == left_out
    # with nothing hidden, the encoder's own last norm gives the same features
    method.eval(), classifier.eval()
    nothing = torch.zeros(2, method.model.encoder.num_tokens, dtype=torch.bool)
    features = method.model.encoder(method.pixels.normalize(images), nothing)
    torch.testing.assert_close(method.model.encoder.norm(classifier.features(images)), features)
    if name == "swin":  # read through that norm, the ViT through one of its own
        torch.testing.assert_close(classifier.pooled(images), features.mean(dim=1))


def test_the_plan_says_what_the_ratio_comes_to() -> None:
    assert SimMIM.plan_text(SimMIMConfig(), DataSpec(192)) == "masks hide 22 of 36 units of 32 px (61.1%)"


@pytest.mark.parametrize("name", TINY)
def test_official_weights_come_back_bit_for_bit(name: str) -> None:
    torch.manual_seed(0)
    config = TINY[name]
    state = SimMIM(config, DATA).to_official()
    method = SimMIM.from_official(
        state, mask_unit_px=config.mask_unit_px, backbone={"layer_scale": 1.0} if name == "vit" else {}
    )
    read, given = method.config.backbone.model_dump(), config.backbone.model_dump()
    assert read | {"window_size": 16} == given | {"window_size": 16}
    assert method.data.image_size == 32
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("swin", "encoder.layers.0.blocks.1.attn.relative_position_index"),
        ("swin", "encoder.layers.0.blocks.1.attn_mask"),
        ("vit", "encoder.rel_pos_bias.relative_position_index"),
    ],
)
def test_tables_of_other_windows_are_refused_before_anything_is_loaded(name: str, key: str) -> None:
    state = SimMIM(TINY[name], DATA).to_official()
    state[key] = state[key].roll(1, dims=0)
    with pytest.raises(WeightsError, match=rf"^checkpoint: {key} is not that of windows of its size"):
        SimMIM.from_official(state, mask_unit_px=8)


def test_sizes_of_a_file_that_make_no_model_are_refused_as_weights() -> None:
    state = SimMIM(TINY["swin"], DATA).to_official()
    for options, message in (
        ({"mask_unit_px": 5}, r"^checkpoint: mask_unit_px: 5 does not cut images of 32 px"),
        ({"backbone": {"num_heads": (5, 4)}}, r"^checkpoint: backbone.swin: num_heads: 5 heads do not divide"),
        ({"mask_ratio": 2.0}, r"^checkpoint: mask_ratio: Input should be less than 1"),
    ):
        with pytest.raises(WeightsError, match=message):
            SimMIM.from_official(state, **{"mask_unit_px": 8, **options})


def test_sizes_in_words_name_the_heads() -> None:
    assert SimMIMConfig().sizes_text() == (
        "swin with stages of widths [128, 256, 512, 1024], depths [2, 2, 18, 2], heads [4, 8, 16, 32] and windows of "
        "6, a linear head"
    )
    vit = SimMIMConfig(backbone={"kind": "vit"})
    assert vit.sizes_text() == "vit of width 768, 12 blocks and 12 heads, a linear head"


def test_a_swin_that_does_not_tell_the_size_of_its_images_is_refused() -> None:
    config = SimMIMConfig(backbone={**SWIN, "depths": (1, 1)}, mask_unit_px=8)
    with pytest.raises(WeightsError, match="nothing tells the size of its images"):
        SimMIM.from_official(SimMIM(config, DATA).to_official(), mask_unit_px=8)


def test_given_sizes_win_over_those_that_are_read() -> None:
    state = SimMIM(TINY["swin"], DATA).to_official()
    backbone = TINY["swin"].backbone.model_copy(update={"drop_path": 0.1})
    assert SimMIM.from_official(state, mask_unit_px=8, backbone=backbone).config.backbone.drop_path == 0.1
    with pytest.raises(WeightsError, match=r"of another shape: .*mlp.fc1.weight"):
        SimMIM.from_official(state, mask_unit_px=8, backbone={"mlp_ratio": 4.0})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("encoder.norm.bias"), "1 missing: encoder.norm.bias"),
        (lambda state: state.update({"head.bias": torch.zeros(3)}), "1 unexpected: head.bias"),
        (lambda state: state.update({"decoder.0.bias": torch.zeros(3)}), r"decoder.0.bias \(3,\) instead of \(192,\)"),
        (lambda state: state.pop("encoder.patch_embed.proj.weight"), "encoder.patch_embed.proj.weight is missing"),
        (lambda state: state.clear(), "no key encoder.mask_token: not a pre-training checkpoint of SimMIM"),
        (lambda state: [state.pop(key) for key in list(state) if "decoder" in key], "an encoder alone .as for fine-tu"),
        (
            lambda state: [state.pop(key) for key in list(state) if "layers" in key],
            r"no keys encoder\.layers\.N\.\*",
        ),
    ],
)
def test_other_checkpoints_are_refused(change: Any, message: str) -> None:
    state = SimMIM(TINY["swin"], DATA).to_official()
    change(state)
    with pytest.raises(WeightsError, match=message):
        SimMIM.from_official(state, mask_unit_px=8)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({"mask_unit_px": 48}, 64, r"mask_unit_px: 48 does not cut images of 64 px .*; possible: 8, 16, 32"),
        ({"mask_unit_px": 4}, 64, r"mask_unit_px: 4 does not cut images of 64 px .* whole patches of 8 px"),
        (
            {"mask_unit_px": 32, "mask_ratio": 0.8},
            64,
            r"mask_ratio: 0.8 hides all of 4 units of 32 px; give at most 0.75",
        ),
        ({}, 100, r"backbone.patch_size: 8 does not cut images of 100 x 100; possible: 1, 2, 4, 5"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SimMIM(SimMIMConfig(backbone=VIT, **options), DataSpec(size))


def test_an_unknown_backbone_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"swin.*vit"):
        SimMIMConfig(backbone={"kind": "pvt"})
    with pytest.raises(ValidationError, match="embed_dim must be divisible by num_heads, got 768, 5"):
        SimMIMConfig(backbone={"kind": "vit", "num_heads": 5})


def test_the_published_models_have_their_parameters_and_flops() -> None:
    hidden, units = 22, 36
    stages = sum(
        blocks * tokens * (12 * width**2 + 2 * 36 * width)
        for blocks, tokens, width in ((2, 2304, 128), (2, 576, 256), (18, 144, 512), (2, 36, 1024))
    )
    merges = sum(tokens * 4 * width * 2 * width for tokens, width in ((576, 128), (144, 256), (36, 512)))
    # the last MLP and the head run on hidden tokens alone
    ends = 2304 * 48 * 128 + hidden * 3072 * 1024 - (units - hidden) * 8 * 1024**2
    with torch.device("meta"):
        method = SimMIM(SimMIMConfig(), DataSpec(192))
        assert sum(p.numel() for p in method.parameters()) == 89_874_104
        with FlopCounterMode(display=False) as counter:
            method.training_step(torch.empty(2, 3, 192, 192), step=1, total_steps=2)
        assert counter.get_total_flops() == pytest.approx(2 * 2 * (stages + merges + ends), rel=1e-3)
        vit = SimMIM(SimMIMConfig(backbone={"kind": "vit"}), DataSpec(224))
        assert sum(p.numel() for p in vit.parameters()) == 86_256_720
