"""MAE as a method."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from baselines.mae import MAE, MAEConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.testing import check_method

TINY = {
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


@pytest.mark.parametrize("normalize", [False, True])
def test_mae_keeps_the_contract(normalize: bool) -> None:
    config = MAEConfig(patch_size=8, normalize_targets=normalize, **TINY)
    check_method(MAE, config, DataSpec(32), overfit_steps=100, overfit_share=0.6, learning_rate=3e-3)


def test_visible_patches_come_back_as_they_were() -> None:
    torch.manual_seed(0)
    method = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64)).eval()
    images, mask = torch.rand(3, 3, 64, 64), torch.rand(3, 4, 4) > 0.25
    mask[:, 0, 0] = False
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden], rtol=0, atol=1e-6)
    assert (reconstruction - images)[hidden].abs().mean() > 0.05


def test_one_step_keeps_int_of_the_visible_share() -> None:
    method = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64))
    output = method.training_step(torch.rand(2, 3, 64, 64), step=1, total_steps=10)
    assert output.scalars == {"mask_ratio": 0.75, "tokens": 16.0}
    assert method.num_tokens_at(1, 10) == 16


def test_a_patch_that_does_not_cut_the_images_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"patch_size: 16 does not cut images of 100 x 100; possible: 1, 2, 4, 5"):
        MAE.check(MAEConfig(), DataSpec(100))


def test_a_mask_ratio_that_leaves_no_patch_is_refused() -> None:
    MAE.check(MAEConfig(patch_size=8, mask_ratio=0.98), DataSpec(64))
    with pytest.raises(ConfigError, match=r"^mask_ratio: a mask ratio of 0.99 leaves none of 64 tokens visible"):
        MAE.check(MAEConfig(patch_size=8, mask_ratio=0.99), DataSpec(64))


def test_normalised_targets_cannot_take_the_yardstick() -> None:
    config = MAEConfig(patch_size=8, normalize_targets=True, **TINY)
    assert MAE.yardstick_obstacle(config) == "normalised targets"
    with pytest.raises(ConfigError, match="normalised targets"):
        MAE(config, DataSpec(32)).reconstruct(torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool))


def test_the_published_model_has_its_parameters_shapes_and_flops() -> None:
    with torch.device("meta"):
        method = MAE(MAEConfig(), DataSpec(224))
        assert sum(p.numel() for p in method.parameters()) == 111_907_840
        assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 111_655_680
        with FlopCounterMode(display=False) as counter:
            output = method.training_step(torch.empty(2, 3, 224, 224), step=1, total_steps=2)
            output.loss.backward()
    assert output.loss.shape == ()
    # 2 x multiply-adds of a forward pass, by hand; the backward pass costs twice that
    encoder = 12 * (24 * 50 * 768**2 + 4 * 50**2 * 768) + 2 * 49 * 768**2
    decoder = 7 * (24 * 197 * 512**2 + 4 * 197**2 * 512) + 2 * 50 * 768 * 512
    last = (4 * 197 + 20 * 147) * 512**2 + 4 * 197 * 147 * 512 + 2 * 147 * 512 * 768
    assert counter.get_total_flops() == pytest.approx(3 * 2 * (encoder + decoder + last), rel=0.01)


def test_official_weights_come_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    state = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64)).to_official()
    method = MAE.from_official(state, encoder_heads=3, decoder_heads=2)
    assert method.data.image_size == 64
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


@pytest.mark.parametrize(
    ("size", "num_tokens", "width", "depth", "patch_dim"),
    [("base", 196, 768, 12, 768), ("large", 196, 1024, 24, 768), ("huge", 256, 1280, 32, 588)],
)
def test_the_published_sizes_have_the_parameters_of_their_layers(
    size: str, num_tokens: int, width: int, depth: int, patch_dim: int
) -> None:
    with torch.device("meta"):
        method = MAE(MAEConfig(size=size), DataSpec(224))

    def block(d: int) -> int:
        return 12 * d**2 + 13 * d  # qkv, proj, two MLP matrices; their biases and two norms

    encoder = patch_dim * width + width + width + (1 + num_tokens) * width + depth * block(width) + 2 * width
    decoder = width * 512 + 512 + 512 + (1 + num_tokens) * 512 + 8 * block(512) + 2 * 512 + 513 * patch_dim
    assert sum(p.numel() for p in method.parameters()) == encoder + decoder
    assert {"base": 111_907_840}.get(size, encoder + decoder) == encoder + decoder


@pytest.mark.parametrize(("size", "heads"), [("large", 16), ("huge", 16)])
def test_larger_official_checkpoints_are_recognised_by_their_widths(size: str, heads: int) -> None:
    with torch.device("meta"):
        state = MAE(MAEConfig(size=size), DataSpec(224)).to_official()
        method = MAE.from_official(state)
    assert (method.config.encoder_heads, method.config.patch_size) == (heads, 14 if size == "huge" else 16)
    assert method.data.image_size == 224
    assert {key: value.shape for key, value in method.to_official().items()} == {k: v.shape for k, v in state.items()}


def test_sizes_that_are_given_win_over_the_published_ones() -> None:
    config = MAEConfig(size="large", encoder_depth=3)
    assert (config.encoder_width, config.encoder_depth, config.encoder_heads) == (1024, 3, 16)
    assert MAEConfig(**config.model_dump()) == config
    assert MAEConfig(size=None).model_dump() == {**MAEConfig().model_dump(), "size": None}
    with pytest.raises(ValidationError, match="size"):
        MAEConfig(size="giant")


def test_an_imported_encoder_is_named_by_its_sizes() -> None:
    with torch.device("meta"):
        large = MAE(MAEConfig(size="large"), DataSpec(224)).to_official()
        assert MAE.from_official(large).config.size == "large"
        assert MAE.from_official(large, size="large").config.size == "large"
        assert MAE.from_official(large, encoder_heads=8).config.size is None
        with pytest.raises(
            WeightsError,
            match=r"^checkpoint: size: its encoder is not huge, but 1024 wide with 24 blocks and 16 heads on patches "
            r"of 16 px; leave size out$",
        ):
            MAE.from_official(large, size="huge")
    tiny = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64)).to_official()
    assert MAE.from_official(tiny, encoder_heads=3, decoder_heads=2).config.size is None
    assert MAE.from_official(tiny, encoder_heads=3, decoder_heads=2, size=None).config.size is None


def test_an_encoder_alone_is_no_checkpoint_of_pre_training() -> None:
    state = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64)).to_official()
    encoder = {key: value for key, value in state.items() if "decoder" not in key and key != "mask_token"}
    with pytest.raises(
        WeightsError,
        match=r"^checkpoint: an encoder alone \(as for fine-tuning\); take the pre-training checkpoint with its deco",
    ):
        MAE.from_official(encoder)


def test_sizes_of_a_file_that_make_no_model_are_refused_as_weights() -> None:
    state = MAE(MAEConfig(patch_size=8, **TINY), DataSpec(64)).to_official()
    heads = {"encoder_heads": 3, "decoder_heads": 2}
    with pytest.raises(WeightsError, match=r"^checkpoint: mask_ratio: a mask ratio of 0.999 leaves none of 64 tokens"):
        MAE.from_official(state, mask_ratio=0.999, **heads)
    with pytest.raises(WeightsError, match=r"^checkpoint: encoder_width must be divisible by 4"):
        MAE.from_official(state, encoder_width=50, **heads)
