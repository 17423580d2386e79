"""LDM against what its authors' code computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines._gaussian import DDIMSampler
from baselines.ldm import LDM, LDMConfig
from lmd_bench.method import DataSpec
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_draw, reference_input

NAME = "ldm_unet_lsun_bedrooms_vq4"
MANIFEST = load_reference(f"{NAME}.manifest")
SCHEDULES = load_reference("ldm_schedules.reference")


@pytest.fixture(scope="module")
def official() -> dict[str, Tensor]:
    weights = filled_state_dict(MANIFEST)
    return {f"model.diffusion_model.{name}": tensor for name, tensor in weights.items()}


@pytest.fixture(scope="module")
def method(official: dict[str, Tensor]) -> LDM:
    return LDM.from_official(official).eval()


@pytest.mark.slow
def test_the_unet_of_lsun_bedrooms_equals_the_authors(method: LDM) -> None:
    expected = load_reference(f"{NAME}.strong.reference")
    timesteps = torch.tensor(expected["timesteps"])
    latents = reference_input(2, 3, 64, 64)
    noise = reference_draw(2, 3, 64, 64)
    with torch.no_grad():
        assert_matches(method.predict(latents, timesteps), expected["output"])
        x_t = method.diffusion.q_sample(latents, noise, timesteps)
        output = method.predict(x_t, timesteps)
    loss = method.loss(output, noise, clean=latents, x_t=x_t, timesteps=timesteps)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5)
    per_sample = (output - noise).square().flatten(1).mean(dim=1)
    assert per_sample.tolist() == pytest.approx(expected["loss_per_sample"], rel=1e-5)


@pytest.mark.slow
def test_the_published_model_has_its_size_and_its_checkpoint_comes_back_bit_for_bit(
    method: LDM, official: dict[str, Tensor]
) -> None:
    assert sum(p.numel() for p in method.unet.parameters()) == MANIFEST["params_total"] == 274_056_163
    config = method.config
    assert (config.block_out_channels, config.attention_levels) == ((224, 448, 672, 896), (1, 2, 3))
    assert (config.layers_per_block, config.num_train_timesteps, method.latent_shape) == (2, 1000, (3, 64, 64))
    returned = method.to_official()
    assert list(returned) == list(official)
    assert all(torch.equal(returned[name], tensor) for name, tensor in official.items())


def small(**options: Any) -> LDM:
    """A small U-Net under the process and the sampler of the published models."""
    sizes = {"block_out_channels": (32,), "attention_levels": (), "layers_per_block": 1}
    return LDM(LDMConfig.model_validate({"projector": {"kind": "pixels"}, **sizes, **options}), DataSpec(8))


def test_the_noise_schedule_is_the_authors() -> None:
    expected = SCHEDULES["linear_in_sqrt_0015_0195"]
    diffusion = small().diffusion
    assert diffusion.betas[expected["index"]] == pytest.approx(expected["betas"], rel=1e-12)
    assert diffusion.alphas_cumprod[expected["index"]] == pytest.approx(expected["alphas_cumprod"], rel=1e-11)


def test_the_samplers_timesteps_are_the_authors() -> None:
    expected = SCHEDULES["ddim_timesteps"]
    assert list(small().sampler.timesteps) == expected["('uniform', 200, 1000)"]
    assert list(small(num_inference_steps=50).sampler.timesteps) == expected["('uniform', 50, 1000)"]
    quadratic = small(num_inference_steps=50, spacing="quadratic")
    assert list(quadratic.sampler.timesteps) == expected["('quad', 50, 1000)"]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_the_samplers_coefficients_are_the_authors(eta: float) -> None:
    expected = SCHEDULES["ddim_params"][f"eta={eta}"]
    sampler, index = small(num_inference_steps=50, eta=eta).sampler, expected["index"]
    assert isinstance(sampler, DDIMSampler)
    assert sampler.alphas[index] == pytest.approx(expected["alphas"], rel=1e-11)
    assert sampler.alphas_before[index] == pytest.approx(expected["alphas_prev"], rel=1e-11)
    assert sampler.sigmas[index] == pytest.approx(expected["sigmas"], rel=1e-11)
