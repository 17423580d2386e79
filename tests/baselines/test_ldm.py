"""LDM as a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from baselines.ldm import LDM, LDMConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import Batch, DataSpec
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.projector.open import open_projector
from lmd_bench.testing import check_method

SHIPPED = {"kind": "vq", "path": "shipped:scenes-vq-f8"}
SIZES: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (1,),
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "num_inference_steps": 4,
}
DATA = DataSpec(64)


def config(**changes: Any) -> LDMConfig:
    return LDMConfig.model_validate({"projector": SHIPPED, **SIZES, **changes})


class FourfoldProjector(LatentProjector):
    """A frozen convolution to 3 channels at factor 4, whose decoder notes whether it was told to quantise."""

    def __init__(self) -> None:
        super().__init__(name="fourfold", factor=4, latent_channels=3)
        self.to_latents = nn.Conv2d(3, 3, 12, stride=4, padding=4)
        self.to_images = nn.ConvTranspose2d(3, 3, 4, stride=4)
        self.quantized: list[bool] = []
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        out: Tensor = self.to_latents(images)
        return out

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        self.quantized.append(quantize)
        out: Tensor = self.to_images(latents)
        return out


def fourfold(**changes: Any) -> LDM:
    torch.manual_seed(0)
    return LDM(config(projector={"kind": "pixels"}, **changes), DataSpec(32), projector=FourfoldProjector()).eval()


def checkpoint(method: LDM) -> dict[str, Tensor]:
    """What the authors' training leaves behind of such a model, its moving average at twice the weights."""
    weights = method.to_official()
    averaged = {
        f"model_ema.{name.removeprefix('model.').replace('.', '')}": 2 * tensor for name, tensor in weights.items()
    }
    betas = torch.from_numpy(method.diffusion.betas).float()
    others = {"betas": betas, "alphas_cumprod_prev": betas, "sqrt_recipm1_alphas_cumprod": betas, "logvar": betas}
    counters = {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    return {**weights, **averaged, **others, **counters, "first_stage_model.encoder.conv_in.weight": torch.ones(1)}


# -- the contract -----------------------------------------------------------------------------------------------------


def test_ldm_keeps_the_contract() -> None:
    check_method(LDM, config(), DATA, learning_rate=1e-2)


def test_training_reads_latents_of_whole_images_or_of_a_cache() -> None:
    method = fourfold()
    images = torch.rand(2, 3, 32, 32)
    latents = method.prepare(Batch(images))
    assert torch.equal(latents, method.projector.encode(images))
    assert latents.shape[1:] == method.space_shape == (3, 8, 8)
    torch.manual_seed(1)
    fresh = method.training_step(latents, step=1, total_steps=2).loss
    torch.manual_seed(1)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(1000, (2,))
    output = method.predict(method.diffusion.q_sample(latents, noise, timesteps), timesteps)
    assert fresh.item() == pytest.approx((output - noise).square().mean().item(), rel=1e-6)
    assert method.cached_shape is None
    cached = config(projector={**SHIPPED, "cache": "auto"})
    assert LDM(cached, DATA).cached_shape == (4, 8, 8)
    assert LDM.latent_cache(cached) == cached.projector


def test_latents_are_quantised_before_they_are_decoded() -> None:
    method, images = fourfold(), torch.rand(1, 3, 32, 32)
    method.round_trip(images)
    method.sample(1)
    method.reconstruct(images, torch.eye(2).bool()[None])
    assert isinstance(method.projector, FourfoldProjector)
    assert method.projector.quantized == [True] * 3
    real = LDM(config(), DATA)
    photo = torch.rand(1, 3, 64, 64)
    expected = real.projector.decode(real.projector.encode(photo), quantize=True)
    round_trip = real.round_trip(photo)
    assert round_trip is not None
    assert torch.equal(round_trip, expected)
    assert real.projector_name == "scenes-vq-f8"


# -- the yardstick ----------------------------------------------------------------------------------------------------


def test_latents_that_touch_hidden_pixels_are_hidden_and_the_others_stand_at_the_end() -> None:
    method = fourfold()
    images = torch.rand(1, 3, 32, 32)
    hidden = torch.zeros(1, 1, 32, 32, dtype=torch.bool)
    hidden[..., 6:9, 13] = True
    known, positions = method.known_part(images, hidden)
    assert positions.nonzero()[:, 2:].tolist() == [[1, 3], [2, 3]]
    spoiled = images.masked_fill(hidden, float("nan"))
    assert torch.equal(method.known_part(spoiled, hidden)[0], known)


def test_a_reconstruction_takes_the_stated_passes_and_decodes_the_known_latents() -> None:
    method = fourfold(num_inference_steps=5)
    calls: list[int] = []
    method.unet.register_forward_hook(lambda *_: calls.append(1))
    images, mask = torch.rand(2, 3, 32, 32), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, 1, 2] = True
    torch.manual_seed(0)
    reconstruction = method.reconstruct(images, mask)
    assert len(calls) == method.num_function_evaluations == 5
    torch.testing.assert_close(reconstruction[1], method.decode(method.projector.encode(images))[1])
    assert not torch.allclose(reconstruction[0, :, 8:16, 16:24], images[0, :, 8:16, 16:24], atol=1e-3)


def test_a_leaking_reconstruction_knows_latents_of_the_whole_image() -> None:
    method = fourfold()
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    leaking = method.reconstruct_leaking(images, mask)
    assert leaking is not None
    whole = method.decode(method.projector.encode(images))
    torch.testing.assert_close(leaking[..., 8:, :], whole[..., 8:, :])
    assert not torch.allclose(method.reconstruct(images, mask)[..., 8:, :], whole[..., 8:, :], atol=1e-4)
    in_pixels = LDM(config(projector={"kind": "pixels"}), DataSpec(16))
    assert in_pixels.reconstruct_leaking(torch.rand(1, 3, 16, 16), mask) is None


# -- the sampler ------------------------------------------------------------------------------------------------------


def test_the_released_offset_shifts_every_timestep_and_ends_at_the_first_noise_level() -> None:
    released, repaired = fourfold().sampler, fourfold(ddim_offset=False).sampler
    assert released.timesteps == (1, 251, 501, 751)
    assert repaired.timesteps == (0, 250, 500, 750)
    assert released.alphas_before[0] == pytest.approx(0.9985)
    assert repaired.alphas_before[0] == 1.0
    assert fourfold(spacing="quadratic").sampler.timesteps == (1, 89, 356, 801)


@pytest.mark.parametrize("steps", [1000, 501, 333])
def test_a_number_of_steps_whose_offset_leaves_the_process_is_refused(steps: int) -> None:
    with pytest.raises(ValidationError, match=f"{steps} with ddim_offset ends beyond the last timestep 999; use a div"):
        config(num_inference_steps=steps)
    assert len(config(num_inference_steps=steps, ddim_offset=False).inference_timesteps()) >= steps


def test_a_process_too_short_for_the_quadratic_offset_is_refused() -> None:
    short = {"num_train_timesteps": 5, "num_inference_steps": 2, "spacing": "quadratic"}
    with pytest.raises(ValidationError, match="2 with ddim_offset ends beyond the last timestep 4; use ddim_offset: f"):
        config(**short)
    assert config(**short, ddim_offset=False).inference_timesteps() == [0, 4]


def test_given_heads_take_the_place_of_the_default_size_of_one() -> None:
    sizes = {"projector": {"kind": "pixels"}, "block_out_channels": (32, 64), "attention_levels": (1,)}
    heads = LDMConfig(**sizes, num_heads=4)
    assert (heads.attention_head_dim, heads.heads_at(64)) == (None, 4)
    assert LDMConfig.model_validate(heads.model_dump()) == heads
    assert LDMConfig(**sizes).heads_at(64) == 2
    with pytest.raises(ValidationError, match="not both: set the other to null"):
        LDMConfig(**sizes, num_heads=4, attention_head_dim=32)


def test_the_plan_tells_the_latent_map_and_the_true_number_of_steps() -> None:
    assert LDM.plan_text(config(), DATA) == "latents of 8 x 8 x 4"
    text = LDM.plan_text(config(num_inference_steps=30), DATA)
    assert text == "latents of 8 x 8 x 4; 31 reverse steps for num_inference_steps 30, as the authors count"


def test_latent_maps_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_out_channels: 2 levels need an encoded image's side divisible by 2"):
        LDM.check(config(), DataSpec(40))
    with pytest.raises(WeightsError, match="image_size 60 is not divisible by its factor 8"):
        LDM.check(config(), DataSpec(60))


# -- the authors' checkpoints -----------------------------------------------------------------------------------------


def restored(state_dict: dict[str, Tensor], **options: Any) -> LDM:
    own = {name: SIZES[name] for name in ("attention_head_dim", "norm_num_groups", "num_inference_steps")}
    return LDM.from_official(state_dict, **{"projector": FourfoldProjector(), "image_size": 32, **own, **options})


def test_a_checkpoint_becomes_the_same_model_and_back() -> None:
    method = fourfold()
    official = checkpoint(method)
    again = restored(official)
    assert again.config.block_out_channels == (16, 32)
    assert again.config.attention_levels == (1,)
    returned = again.to_official()
    assert [name for name in official if name in returned] == list(returned)
    assert all(torch.equal(official[name], tensor) for name, tensor in returned.items())
    x, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3, 500])
    assert torch.equal(again.eval().predict(x, timesteps), method.predict(x, timesteps))


def test_the_moving_average_can_be_taken_in_place_of_the_weights() -> None:
    official = checkpoint(fourfold())
    averaged = restored(official, ema=True).to_official()
    assert all(torch.equal(2 * official[name], tensor) for name, tensor in averaged.items())
    del official["model_ema.diffusion_modeltime_embed0bias"]
    with pytest.raises(WeightsError, match=r"no moving average of 1 weights: model_ema\.diffusion_modeltime"):
        restored(official, ema=True)


def test_without_a_projector_the_checkpoint_trains_on_latents_alone() -> None:
    method = restored(checkpoint(fourfold()), projector=None)
    assert (method.projector_name, method.latent_shape) == ("none", (3, 8, 8))
    assert method.training_step(torch.randn(2, 3, 8, 8), step=1, total_steps=1).loss.isfinite()
    with pytest.raises(WeightsError, match="without a projector"):
        method.prepare(Batch(torch.rand(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"cond_stage_model.embedding.weight": torch.ones(1)},
            "no unconditional latent diffusion: 1 unexpected: c",
        ),
        ({"model.diffusion_model.label_emb.weight": torch.ones(1)}, "a class-conditional model"),
        ({"model.diffusion_model.out.2.bias": torch.ones(5)}, r"out\.2\.bias \(5,\) instead of \(3,\)"),
        ({"betas": torch.linspace(1e-4, 0.02, 1000)}, "betas are 0.0001 to 0.02 over 1000 steps; the noise schedule"),
        ({"betas": torch.linspace(1e-4, 0.02, 50)}, "betas are 0.0001 to 0.02 over 50 steps; the noise schedule"),
        ({"betas": torch.tensor([0.0015])}, r"betas \(1,\) are no noise schedule"),
        ({"betas": torch.tensor(0.0015)}, r"betas \(\) are no noise schedule"),
        ({"scale_factor": torch.tensor(0.18)}, r"scale_factor \[0.18.*projector fourfold has scale 1; set"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused_in_words(change: dict[str, Tensor], words: str) -> None:
    with pytest.raises(WeightsError, match=words):
        restored({**checkpoint(fourfold()), **change}, num_inference_steps=2)


def test_other_layouts_and_projectors_are_refused() -> None:
    method = fourfold()
    bare = {name.removeprefix("model.diffusion_model."): tensor for name, tensor in method.to_official().items()}
    with pytest.raises(
        WeightsError, match=r"model\.diffusion_model\.input_blocks\.0\.0\.weight is missing; expected l"
    ):
        restored(bare)
    with pytest.raises(WeightsError, match="a U-Net on latents of 3 channels, projector scenes-vq-f8 has 4"):
        restored(checkpoint(method), projector=ProjectorConfig.model_validate(SHIPPED), image_size=64)


def test_a_scale_is_not_dropped_without_a_projector() -> None:
    official = checkpoint(fourfold())
    restored({**official, "scale_factor": torch.tensor(1.0)}, projector=None)
    with pytest.raises(WeightsError, match=r"scale_factor \[0.5\]: its latents are .*; give the first stage"):
        restored({**official, "scale_factor": torch.tensor(0.5)}, projector=None)


def test_the_checkpoints_scale_must_be_the_projectors() -> None:
    projector = ProjectorConfig.model_validate({**SHIPPED, "scale": 0.5})
    official = checkpoint(LDM(config(projector=projector.model_dump()), DATA))
    official["scale_factor"] = torch.tensor(0.5)
    restored(official, projector=projector, image_size=64)
    with pytest.raises(WeightsError, match=r"scale_factor \[0.5\], projector scenes-vq-f8 has scale 1; set"):
        restored(official, projector=open_projector(ProjectorConfig.model_validate(SHIPPED)), image_size=64)
