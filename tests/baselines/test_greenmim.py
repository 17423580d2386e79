"""GreenMIM as a method."""

from functools import partial
from typing import Any

import pytest
import timm
import torch
from pydantic import ValidationError
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from baselines.greenmim import GreenMIM, GreenMIMConfig, MaskedImages
from baselines.mae import MAE, MAEConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.harness.noise import noise_batch
from lmd_bench.method import Batch, DataSpec, inputs_of
from lmd_bench.testing import check_method

TINY: dict[str, Any] = {
    "patch_size": 2,
    "embed_dim": 16,
    "depths": (2, 2, 2),
    "num_heads": (1, 2, 4),
    "window_size": 4,
    "decoder_width": 32,
    "decoder_heads": 2,
}
DATA = DataSpec(64)


def tiny(**options: Any) -> GreenMIM:
    torch.manual_seed(0)
    return GreenMIM(GreenMIMConfig(**{**TINY, **options}), DATA)


@pytest.mark.parametrize("option", ["normalize_targets", "official_order"])
@pytest.mark.parametrize("value", [False, True])
def test_greenmim_keeps_the_contract(option: str, value: bool) -> None:
    config = GreenMIMConfig(**{**TINY, "depths": (2, 1, 1), option: value})
    check_method(GreenMIM, config, DATA, overfit_steps=40, overfit_share=0.8, learning_rate=3e-3)


@pytest.mark.parametrize(
    ("depths", "heads", "window", "patch_size"), [((1,), (2,), 8, 8), ((3, 1), (2, 2), 16, 2), ((1, 2), (4, 8), 8, 4)]
)
def test_the_encoder_can_have_any_number_of_stages(
    depths: tuple[int, ...], heads: tuple[int, ...], window: int, patch_size: int
) -> None:
    method = tiny(depths=depths, num_heads=heads, window_size=window, patch_size=patch_size)
    method.training_step(torch.rand(1, 3, 64, 64), step=1, total_steps=2).loss.backward()
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


# -- training ---------------------------------------------------------------------------------------------------------


def test_one_step_keeps_int_of_the_visible_share_for_the_whole_batch() -> None:
    method = tiny(mask_ratio=0.7)
    output = method.training_step(torch.rand(2, 3, 64, 64), step=1, total_steps=10)
    assert output.scalars == {"mask_ratio": 45 / 64, "tokens": 19.0 * 16}
    assert method.mask_ratio_at(1, 10) == 45 / 64
    assert method.num_tokens_at(1, 10) == 19 * 16


def test_the_step_runs_under_the_mask_that_the_data_worker_made() -> None:
    method, images = tiny(), torch.rand(2, 3, 64, 64)
    extra = method.collate([], torch.Generator().manual_seed(3))
    assert all(tensor.device.type == "cpu" for tensor in extra.values())
    inputs = inputs_of(method, Batch(images, extra=extra))
    assert isinstance(inputs, MaskedImages)
    assert len(inputs.mask.visible) == 16
    assert sorted([*inputs.mask.visible.tolist(), *inputs.mask.hidden.tolist()]) == list(range(64))
    losses = {method.training_step(inputs, step=1, total_steps=2).loss.item() for _ in range(2)}
    assert len(losses) == 1
    again = method.collate([], torch.Generator().manual_seed(3))
    assert all(torch.equal(again[name], tensor) for name, tensor in extra.items())
    other = method.collate([], torch.Generator().manual_seed(4))
    assert not torch.equal(other["visible"], extra["visible"])


def test_without_a_data_worker_the_mask_follows_the_global_generator() -> None:
    method, images = tiny(), torch.rand(2, 3, 64, 64)
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        losses.append(method.training_step(images, step=1, total_steps=2).loss.item())
    assert losses[0] == losses[1] != losses[2]


def test_the_repaired_decoder_lays_each_visible_unit_where_it_belongs() -> None:
    generator = torch.Generator
    repaired = tiny().collate([], generator().manual_seed(0))
    official = tiny(official_order=True).collate([], generator().manual_seed(0))
    assert torch.equal(repaired["visible"], official["visible"])
    assert torch.equal(repaired["places"], repaired["visible"])
    assert not torch.equal(official["places"], official["visible"])
    assert torch.equal(official["places"].sort().values, official["visible"])


def test_decay_leaves_out_biases_norms_position_tables_and_the_mask_token() -> None:
    method = tiny()
    names = {id(parameter): name for name, parameter in method.named_parameters()}
    decayed, kept = ([names[id(p)] for p in group["params"]] for group in method.param_groups(0.05))
    assert [group["weight_decay"] for group in method.param_groups(0.05)] == [0.05, 0.0]
    assert all(name.endswith(".weight") and "norm" not in name for name in decayed)
    assert {"model.mask_token", "model.encoder.layers.0.blocks.0.attn.relative_position_bias_table"} <= set(kept)
    assert len(decayed) + len(kept) == len(names) - 1  # the decoder's fixed position table


def test_the_plan_names_units_and_mask() -> None:
    text = GreenMIM.plan_text(GreenMIMConfig(), DataSpec(224))
    assert text == "12 of 49 units of 32 px visible, the same ones throughout a batch"
    assert GreenMIM.token_px(GreenMIMConfig(), DataSpec(224)) == 32
    assert GreenMIMConfig(official_order=True).sizes_text() == (
        "swin with stages of widths [128, 256, 512, 1024], depths [2, 2, 18, 2], heads [4, 8, 16, 32] and windows of "
        "7, decoder of width 512, 1 blocks and 16 heads in the order of the release"
    )
    assert GreenMIMConfig().sizes_text().endswith("16 heads")


def test_the_published_model_computes_visible_tokens_only() -> None:
    with torch.device("meta"):
        method = GreenMIM(GreenMIMConfig(), DataSpec(224))
        loss = method.training_step(torch.empty(2, 3, 224, 224), step=1, total_steps=2).loss
    assert loss.is_meta
    batch = noise_batch(method, 2, torch.device("meta"))  # meta tensors: a step that asked for values would fail
    with FlopCounterMode(display=False) as counter:
        inputs = inputs_of(method, batch)
        method.training_step(inputs, step=1, total_steps=2).loss.backward()
    encoder = 2.0 * 768 * 48 * 128
    for stage, (width, depth) in enumerate(zip((128, 256, 512, 1024), (2, 2, 18, 2), strict=True)):
        kinds = [grouping.pairs.shape for grouping in inputs.mask.groupings[stage]]
        for block in range(depth):
            groups, size, _ = kinds[block % len(kinds)]
            encoder += (18 * (768 >> 2 * stage) + 6 * groups * size) * width**2 + 4 * groups * size**2 * width
        encoder += 2 * (192 >> 2 * stage) * 4 * width * 2 * width * (stage < 3)
    decoder = 2 * 12 * 1024 * 512 + (4 * 49 + 20 * 37) * 512**2 + 4 * 49 * 37 * 512 + 2 * 37 * 512 * 3072
    assert counter.get_total_flops() == pytest.approx(3 * 2 * (encoder + decoder), rel=0.01)


# -- the yardstick and the encoder -------------------------------------------------------------------------------------


def test_visible_units_come_back_as_they_were() -> None:
    method = tiny().eval()
    images, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 4, 4) > 0.25
    mask[:, 0, 0], mask[1] = False, False
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden], rtol=0, atol=1e-6)
    assert (reconstruction - images)[hidden].abs().mean() > 0.05


def test_images_under_one_mask_go_together_and_others_get_their_own() -> None:
    method = tiny().eval()
    images, mask = torch.rand(4, 3, 64, 64), torch.ones(4, 4, 4, dtype=torch.bool)
    mask[[0, 2], 1, 1], mask[1, 3, :], mask[3, 0, 2] = False, False, False
    together = method.reconstruct(images, mask)
    alone = torch.cat([method.reconstruct(images[[i]], mask[[i]]) for i in range(4)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_normalised_targets_cannot_take_the_yardstick() -> None:
    method = tiny(normalize_targets=True)
    assert GreenMIM.yardstick_obstacle(method.config) == "normalised targets"
    with pytest.raises(ConfigError, match="normalised targets"):
        method.reconstruct(torch.rand(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_the_classifiers_encoder_is_timms_swin() -> None:
    method = tiny(depths=(2, 2, 3), num_heads=(2, 4, 4))
    with torch.no_grad():
        for parameter in method.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    swin = timm.models.SwinTransformer(
        img_size=64,
        patch_size=2,
        window_size=4,
        embed_dim=16,
        depths=(2, 2, 3),
        num_heads=(2, 4, 4),
        num_classes=0,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    ).eval()
    weights = method.model.encoder.state_dict()
    for stage in (1, 0):  # timm merges at the start of a stage, the authors at the end of the one before
        for part in ("reduction.weight", "norm.weight", "norm.bias"):
            weights[f"layers.{stage + 1}.downsample.{part}"] = weights.pop(f"layers.{stage}.downsample.{part}")
    swin.load_state_dict(weights)
    classifier, images = method.classifier(5), torch.rand(2, 3, 64, 64)
    assert classifier(images).shape == (2, 5)
    features = method.model.encoder.norm(classifier.features(images))
    wanted = swin.forward_features(method.pixels.normalize(images)).flatten(1, 2)
    torch.testing.assert_close(features, wanted, rtol=1e-5, atol=1e-5)
    pooled = swin(method.pixels.normalize(images))  # without a head: what timm's own head would read
    torch.testing.assert_close(classifier.pooled(images), pooled, rtol=1e-5, atol=1e-5)


def test_the_classifier_trains_the_methods_own_encoder_and_can_be_saved() -> None:
    method = tiny()
    classifier = method.classifier(5)
    nn.init.normal_(classifier.head.weight)
    classifier(torch.rand(2, 3, 64, 64)).square().sum().backward()
    assert all(p.grad is not None for p in method.model.encoder.parameters())
    assert not [key for key in classifier.state_dict() if "pairs" in key]


# -- the authors' layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [4, 32])
def test_official_weights_come_back_bit_for_bit(window: int) -> None:
    state = tiny(window_size=window, decoder_depth=2, mlp_ratio=2.0).to_official()
    assert state["encoder.layers.1.blocks.0.attn.relative_position_index"].shape == (min(window, 16) ** 2,) * 2
    method = GreenMIM.from_official(state, decoder_heads=2)
    assert method.data.image_size == 64
    assert (method.config.depths, method.config.num_heads) == ((2, 2, 2), (1, 2, 4))
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(("embed_dim", "heads", "millions"), [(128, (4, 8, 16, 32), 92), (192, (6, 12, 24, 48), 201)])
def test_the_published_sizes_with_windows_of_14_are_recognised(
    embed_dim: int, heads: tuple[int, ...], millions: int
) -> None:
    config = GreenMIMConfig(embed_dim=embed_dim, num_heads=heads, window_size=14)
    with torch.device("meta"):
        state = {
            key: value for key, value in GreenMIM(config, DataSpec(224)).to_official().items() if "index" not in key
        }
        method = GreenMIM.from_official(state)
    assert method.config == config.model_copy(update={"official_order": True})
    assert method.data.image_size == 224
    assert round(sum(p.numel() for p in method.parameters()) / 1e6) == millions


def test_another_methods_checkpoint_is_refused() -> None:
    mae = MAE(MAEConfig(patch_size=8, encoder_width=48, encoder_depth=1, decoder_width=32), DATA).to_official()
    with pytest.raises(WeightsError, match=r"^checkpoint: encoder.patch_embed.proj.weight is missing; expected Green"):
        GreenMIM.from_official(mae)


def test_keys_and_sizes_that_do_not_fit_are_named() -> None:
    state = tiny().to_official()
    del state["encoder.norm.bias"]
    state["head.weight"] = torch.zeros(1)
    state["decoder_embed.weight"] = torch.zeros(3, 5)
    with pytest.raises(
        WeightsError,
        match=r"1 missing: encoder.norm.bias; 1 unexpected: head.weight; "
        r"1 of another shape: decoder_embed.weight \(3, 5\) instead of \(32, 64\)",
    ):
        GreenMIM.from_official(state, decoder_heads=2)
    with pytest.raises(WeightsError, match=r"of another shape: encoder.layers.0.blocks.0.attn.relative_position_bias"):
        GreenMIM.from_official(tiny().to_official(), decoder_heads=2, window_size=8)
    encoder = {key: value for key, value in tiny().to_official().items() if key.startswith("encoder.")}
    for state in (encoder, {key.removeprefix("encoder."): value for key, value in encoder.items()}):
        with pytest.raises(WeightsError, match=r"^checkpoint: an encoder alone \(as for fine-tuning\)"):
            GreenMIM.from_official(state)


def test_heads_of_the_decoder_are_those_of_the_published_width_or_asked_for() -> None:
    state = tiny().to_official()
    with pytest.raises(WeightsError, match=r"no published decoder has the width 32.*: 512 \(16\); give decoder_heads"):
        GreenMIM.from_official(state)
    with pytest.raises(WeightsError, match="decoder_heads: 5 heads do not divide the decoder's width 32"):
        GreenMIM.from_official(state, decoder_heads=5)


def test_imported_weights_go_on_in_the_order_they_were_trained_in_unless_told_otherwise() -> None:
    state = tiny().to_official()
    assert GreenMIM.from_official(state, decoder_heads=2).config.official_order
    assert not GreenMIM.from_official(state, decoder_heads=2, official_order=False).config.official_order


def test_sizes_of_a_file_that_make_no_model_are_refused_as_weights() -> None:
    with pytest.raises(WeightsError, match=r"^checkpoint: window_size: 5 does not cut the 32 x 32 tokens of stage 1"):
        GreenMIM.from_official(tiny().to_official(), decoder_heads=2, window_size=5)
    with pytest.raises(WeightsError, match=r"^checkpoint: num_heads: 7 heads do not divide the width 16"):
        GreenMIM.from_official(tiny().to_official(), decoder_heads=2, num_heads=(7, 2, 4))


def test_other_constants_than_those_of_its_windows_are_refused() -> None:
    state = tiny().to_official()
    key = "encoder.layers.0.blocks.1.attn.relative_position_index"
    state[key] = state[key].T.clone()
    with pytest.raises(WeightsError, match=rf"checkpoint: {key} is not that of windows of its size"):
        GreenMIM.from_official(state, decoder_heads=2)


def test_a_table_that_is_no_square_is_refused() -> None:
    state = tiny().to_official()
    state["decoder_pos_embed"] = state["decoder_pos_embed"][:, :50]
    with pytest.raises(WeightsError, match=r"checkpoint: 50 tokens of decoder_pos_embed are no square number"):
        GreenMIM.from_official(state)


# -- bad options ------------------------------------------------------------------------------------------------------


def test_images_that_units_do_not_cut_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^patch_size: with 4 stages a patch of 4 px makes masked units of 32 px, which do not cut images of "
        r"200 x 200 .*wanted: image_size a multiple of 32, at least 64$",
    ):
        GreenMIM.check(GreenMIMConfig(), DataSpec(200))
    with pytest.raises(ConfigError, match=r"at least 64"):
        GreenMIM.check(GreenMIMConfig(), DataSpec(32))


def test_windows_that_do_not_cut_a_stage_are_refused() -> None:
    with pytest.raises(
        ConfigError,
        match=r"^window_size: 7 does not cut the 64 x 64 tokens of stage 1; possible: 2, 4, 8, 16, 32, 64 or more$",
    ):
        GreenMIM.check(GreenMIMConfig(), DataSpec(256))


def test_a_mask_ratio_that_leaves_no_unit_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^mask_ratio: a mask ratio of 0.99 leaves none of 49 tokens visible"):
        GreenMIM.check(GreenMIMConfig(mask_ratio=0.99), DataSpec(224))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (2, 2)}, r"depths and num_heads need one positive number for each stage"),
        ({"num_heads": (4, 8, 16, 0)}, r"depths and num_heads need one positive number for each stage"),
        ({"num_heads": (4, 8, 16, 48)}, r"num_heads: 48 heads do not divide the width 1024"),
        ({"decoder_heads": 7}, r"decoder_width must be divisible by 4 .* got 512, 7"),
        ({"window_size": 1}, r"greater than or equal to 2"),
        ({"windows": 7}, r"Extra inputs are not permitted"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GreenMIMConfig(**options)
