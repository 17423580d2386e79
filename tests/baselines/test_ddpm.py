"""DDPM as a method."""

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from baselines.ddpm import DDPM, DDPMConfig
from lmd_bench.errors import ConfigError
from lmd_bench.method import DataSpec
from lmd_bench.testing import check_method

SMALL = {"block_out_channels": (16, 32), "attention_levels": (1,), "layers_per_block": 1, "norm_num_groups": 8}
TINY = DDPMConfig(**SMALL, num_inference_steps=4)


def test_ddpm_keeps_the_contract() -> None:
    check_method(DDPM, TINY, DataSpec(16), learning_rate=1e-2)


def test_alphas_equal_the_published_linear_schedule() -> None:
    """Values that the original code computed: alpha-bar at t = 0, 1, 500, 999 (openai/improved-diffusion)."""
    signal = DDPM(TINY, DataSpec(16)).diffusion.signal.double() ** 2
    expected = torch.tensor([0.9999, 0.99978009, 0.07779666, 4.0358e-5], dtype=torch.float64)
    torch.testing.assert_close(signal[[0, 1, 500, 999]], expected, rtol=2e-5, atol=0)


def test_reconstruction_keeps_the_visible_pixels_and_takes_the_stated_passes() -> None:
    torch.manual_seed(0)
    method = DDPM(TINY, DataSpec(16)).eval()
    calls = []
    method.unet.register_forward_hook(lambda *_: calls.append(1))
    images, mask = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 4) > 0.25
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden])
    assert len(calls) == method.num_function_evaluations == 4


def test_samples_are_images() -> None:
    torch.manual_seed(0)
    samples = DDPM(TINY, DataSpec(16)).eval().sample(3)
    assert samples.shape == (3, 3, 16, 16)
    assert samples.min() >= 0
    assert samples.max() <= 1
    assert samples.std() > 0.01


def test_a_full_walk_and_either_variance_are_options() -> None:
    sampler = DDPM(DDPMConfig(**SMALL, num_inference_steps=1000, variance="fixed_large"), DataSpec(16)).sampler
    assert sampler.timesteps == tuple(range(1000))
    assert sampler.variance == "fixed_large"


def test_a_checkpoint_of_the_port_comes_back_bit_for_bit() -> None:
    torch.manual_seed(0)
    method = DDPM(TINY, DataSpec(16))
    official = method.to_official()
    again = DDPM.from_official(official, norm_num_groups=8, num_inference_steps=4, image_size=16)
    assert again.config == TINY
    assert list(again.to_official()) == list(official)
    assert all(torch.equal(tensor, again.to_official()[key]) for key, tensor in official.items())


def test_the_published_model_has_its_parameters_shapes_and_flops() -> None:
    with torch.device("meta"):
        method = DDPM(DDPMConfig(), DataSpec(256))
        assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 113_673_219
        with FlopCounterMode(display=False) as forward:
            loss = method.training_step(torch.empty(1, 3, 256, 256), step=1, total_steps=2).loss
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    assert loss.shape == ()
    assert 400e9 < forward.get_total_flops() < 600e9
    assert backward.get_total_flops() == pytest.approx(2 * forward.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"attention_levels": (6,)}, r"attention_levels must be in 0\.\.5, got \[6\]"),
        ({"block_out_channels": (32, 40), "attention_levels": ()}, "40 is not divisible by norm_num_groups"),
        ({"num_inference_steps": 2000}, "num_inference_steps must be at most num_train_timesteps 1000"),
        ({"attention_head_dim": 24}, "512 is not divisible by attention_head_dim"),
    ],
)
def test_options_that_cannot_work_are_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DDPMConfig(**option)


def test_images_that_cannot_be_halved_often_enough_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 levels need an image size divisible by 32, got 80"):
        DDPM.check(DDPMConfig(), DataSpec(80))
