"""LMD as a method."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.lmd.model import lmd_vit_base_patch4
from lmd_bench.method import Batch, DataSpec
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.testing import check_method

PIXELS = ProjectorConfig(kind="pixels")
TINY = {
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


class MeanProjector(LatentProjector):
    """A frozen convolution to 4 channels at factor 8 that sees a 24 px neighbourhood, as an autoencoder does."""

    def __init__(self) -> None:
        super().__init__(name="mean", factor=8, latent_channels=4)
        self.to_latents = nn.Conv2d(3, 4, 24, stride=8, padding=8)
        self.to_images = nn.ConvTranspose2d(4, 3, 8, stride=8)
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        out: Tensor = self.to_latents(images)
        return out

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        out: Tensor = self.to_images(latents)
        return out


def latent_lmd(**options: object) -> LMD:
    torch.manual_seed(0)
    config = LMDConfig(projector=PIXELS, **{"patch_size": 2, **TINY, **options})
    return LMD(config, DataSpec(64), projector=MeanProjector())


@pytest.mark.parametrize("schedule", ["uniform", "piecewise", "cosine", "constant"])
def test_lmd_in_pixel_space_keeps_the_contract(schedule: str) -> None:
    config = LMDConfig(projector=PIXELS, patch_size=8, mask_schedule=schedule, **TINY)
    check_method(LMD, config, DataSpec(32), overfit_steps=60, learning_rate=3e-3)


def test_lmd_on_latents_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(config: ProjectorConfig) -> LatentProjector:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return MeanProjector()

    monkeypatch.setattr("lmd_bench.lmd.method.open_projector", opened)
    check_method(LMD, LMDConfig(projector=PIXELS, patch_size=1, **TINY), DataSpec(32), overfit_share=0.8)


def test_each_step_masks_by_the_schedule() -> None:
    method = latent_lmd()
    latents = method.prepare(Batch(torch.rand(2, 3, 64, 64)))
    assert latents.shape == (2, 4, 8, 8)
    outputs = [method.training_step(latents, step=step, total_steps=60).scalars for step in (1, 30, 60)]
    assert [out["tokens"] for out in outputs] == [13, 5, 4]
    assert [method.num_tokens_at(step, 60) for step in (1, 30, 60)] == [13, 5, 4]
    assert outputs[0]["mask_ratio"] == method.mask_ratio_at(1, 60) == 0.15


def test_the_projector_is_frozen_and_left_out_of_the_optimizer() -> None:
    method = latent_lmd()
    method.train()
    assert not method.projector.training
    frozen = {id(parameter) for parameter in method.projector.parameters()}
    grouped = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert not frozen & grouped
    decayed = {id(p) for p in method.param_groups(0.05)[0]["params"]}
    assert id(method.model.cls_token) in decayed
    assert id(method.model.mask_token) in decayed
    assert id(method.model.blocks[0].norm1.weight) not in decayed


def test_reconstruction_sees_no_hidden_pixel_but_the_leaking_one_does() -> None:
    method = latent_lmd().eval()
    images, other = torch.rand(2, 2, 3, 64, 64)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = mask[1, 1:3, 1:3] = False
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    changed = torch.where(hidden, other, images)
    assert torch.equal(method.reconstruct(images, mask), method.reconstruct(changed, mask))
    leaking, leaking_changed = (method.reconstruct_leaking(x, mask) for x in (images, changed))
    assert leaking is not None
    assert leaking_changed is not None
    assert not torch.equal(leaking, leaking_changed)


def test_visible_latents_are_decoded_as_they_are() -> None:
    method = latent_lmd().eval()
    images = torch.rand(2, 3, 64, 64)
    nothing_hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    round_trip = method.round_trip(images)
    assert round_trip is not None
    assert torch.equal(method.reconstruct(images, nothing_hidden), round_trip)


def test_images_of_one_batch_may_hide_different_numbers_of_units() -> None:
    method = latent_lmd().eval()
    images = torch.rand(3, 3, 64, 64)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, 0], mask[1, :2], mask[2, 3, 3] = True, True, True
    whole = method.reconstruct(images, mask)
    single = torch.cat([method.reconstruct(images[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, single)


def test_tokens_too_large_for_the_units_are_an_error_of_the_data() -> None:
    method = latent_lmd(patch_size=4).eval()  # tokens of 32 px
    mask = torch.eye(4, dtype=torch.bool).flip(0).unsqueeze(0) | torch.eye(4, dtype=torch.bool)
    with pytest.raises(DataError, match="every token of image 0 touches a hidden unit"):
        method.reconstruct(torch.rand(1, 3, 64, 64), mask)


def test_pixel_space_has_no_ceiling_and_no_leak() -> None:
    method = LMD(LMDConfig(projector=PIXELS, patch_size=16, **TINY), DataSpec(32))
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 2, 2, dtype=torch.bool)
    assert method.projector_name is None
    assert method.round_trip(images) is None
    assert method.reconstruct_leaking(images, mask) is None
    assert latent_lmd().projector_name == "mean"


def test_normalised_targets_cannot_take_the_yardstick() -> None:
    method = latent_lmd(normalize_targets=True)
    assert LMD.yardstick_obstacle(method.config) == "normalised targets"
    assert LMD.yardstick_obstacle(latent_lmd().config) is None
    with pytest.raises(ConfigError, match="normalised targets"):
        method.reconstruct(torch.rand(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("ratios", [(0.5, 0.4, 0.75), (0.15, 0.8, 0.75), (0.8, 0.8, 0.1)])
def test_mask_ratios_out_of_order_are_refused(ratios: tuple[float, float, float]) -> None:
    names = ("mask_ratio_start", "mask_ratio_mid", "mask_ratio_end")
    with pytest.raises(ValidationError, match="mask ratios out of order"):
        LMDConfig(projector=PIXELS, **dict(zip(names, ratios, strict=True)))


@pytest.mark.parametrize(
    "option", [{"mask_ratio_end": 1.0}, {"mask_ratio_start": -0.1}, {"decoder_pos_sign": 2}, {"encoder_heads": 5}]
)
def test_values_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LMDConfig(projector=PIXELS, **option)


def test_a_patch_that_does_not_cut_the_map_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="patch_size: 5 does not cut images of 64 x 64; possible: 1, 2, 4, 8, 16, 32"):
        LMD.check(LMDConfig(projector=PIXELS, patch_size=5), DataSpec(64))


def test_the_published_model_has_its_parameters_shapes_and_flops() -> None:
    with torch.device("meta"):
        model = lmd_vit_base_patch4()
        assert sum(p.numel() for p in model.parameters()) == 110_817_856
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 110_753_856
        method = LMD(LMDConfig(projector=PIXELS), DataSpec(224), projector=MeanProjector())
        latents = torch.empty(4, 4, 28, 28)
        with FlopCounterMode(display=False) as counter:
            output = method.training_step(latents, step=100, total_steps=100)
            output.loss.backward()
    assert output.loss.shape == ()
    assert output.scalars["tokens"] == 12
    assert counter.get_total_flops() == pytest.approx(3 * lmd_forward_flops(4, 12), rel=0.01)


def lmd_forward_flops(batch: int, kept: int) -> float:
    """2 x multiply-adds of ViT-B/4 on 28 x 28 x 4 with a decoder of 512 x 8, by hand."""

    def block(tokens: int, width: int, queries: int | None = None) -> int:
        asking = tokens if queries is None else queries
        return 2 * (2 * tokens * width**2 + 10 * asking * width**2 + 2 * tokens * asking * width)

    hidden = 49 - kept
    encoder = 12 * block(kept + 1, 768) + 2 * kept * 64 * 768
    decoder = 7 * block(50, 512) + block(50, 512, hidden) + 2 * (kept + 1) * 768 * 512 + 2 * hidden * 512 * 64
    return batch * (encoder + decoder)


def official_state() -> dict[str, Tensor]:
    return latent_lmd().to_official()


def test_official_weights_come_back_bit_for_bit() -> None:
    state = official_state()
    method = LMD.from_official(state, encoder_heads=3, decoder_heads=2, projector=MeanProjector())
    assert method.data.image_size == 64
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_official_weights_load_without_a_projector_but_then_take_latents_only() -> None:
    method = LMD.from_official(official_state(), encoder_heads=3, decoder_heads=2)
    assert method.training_step(torch.randn(2, 4, 8, 8), step=1, total_steps=2).loss.isfinite()
    with pytest.raises(WeightsError, match="loaded without a projector"):
        method.prepare(Batch(torch.rand(1, 3, 64, 64)))


def test_official_weights_with_other_keys_are_refused_by_name() -> None:
    state = official_state()
    state["surplus"] = state.pop("decoder_blocks.1.attn.qkv.bias")
    with pytest.raises(WeightsError, match=r"1 missing: decoder_blocks.1.attn.qkv.bias; 1 unexpected: surplus"):
        LMD.from_official(state, encoder_heads=3, decoder_heads=2, projector=MeanProjector())
