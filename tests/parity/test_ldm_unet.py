"""The U-Net of latent diffusion's LSUN bedrooms against the authors' code (CompVis/latent-diffusion)."""

import pytest
import torch
from diffusers import UNet2DModel

from baselines._gaussian import GaussianDiffusion, noise_schedule
from baselines._openai_layout import load_openai, sizes_from_openai, to_openai
from baselines._unet import UNetOptions, build_unet
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_draw, reference_input

pytestmark = pytest.mark.slow

MANIFEST = load_reference("ldm_unet_lsun_bedrooms_vq4.manifest")
REFERENCE = load_reference("ldm_unet_lsun_bedrooms_vq4.strong.reference")
SIZES = UNetOptions(
    block_out_channels=(224, 448, 672, 896), attention_levels=(1, 2, 3), attention_head_dim=32, layers_per_block=2
)
TIMESTEPS = torch.tensor(REFERENCE["timesteps"])


@pytest.fixture(scope="module")
def unet() -> UNet2DModel:
    model = build_unet(SIZES, image_size=64, flavour="openai").eval()
    load_openai(model, filled_state_dict(MANIFEST))
    return model


def test_keys_sizes_and_counts_equal_the_authors_and_come_back_bit_for_bit(unet: UNet2DModel) -> None:
    official, own = filled_state_dict(MANIFEST), to_openai(unet)
    assert list(own) == list(official)
    assert all(torch.equal(own[key], tensor) for key, tensor in official.items())
    assert sum(p.numel() for p in unet.parameters()) == MANIFEST["params_total"] == 274_056_163
    sizes = sizes_from_openai(official)
    assert (sizes.block_out_channels, sizes.attention_levels) == (SIZES.block_out_channels, SIZES.attention_levels)
    assert (sizes.layers_per_block, sizes.scale_shift) == (2, False)


@torch.no_grad()
def test_output_and_loss_equal_the_authors(unet: UNet2DModel) -> None:
    latents = reference_input(2, 3, 64, 64)
    assert_matches(unet(latents, TIMESTEPS, return_dict=False)[0], REFERENCE["output"])
    noise = reference_draw(*latents.shape)
    x_t = GaussianDiffusion(noise_schedule("scaled_linear", 1000)).q_sample(latents, noise, TIMESTEPS)
    losses = (unet(x_t, TIMESTEPS, return_dict=False)[0] - noise).square().flatten(1).mean(dim=1)
    assert losses.tolist() == pytest.approx(REFERENCE["loss_per_sample"], rel=1e-5)
    assert losses.mean().item() == pytest.approx(REFERENCE["loss"], rel=1e-5)
