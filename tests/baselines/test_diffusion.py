"""What diffusion methods share, on a network that knows the answer."""

from typing import Any

import pytest
import torch
from torch import Tensor

from baselines._diffusion import DiffusionConfig, DiffusionMethod
from baselines._gaussian import AncestralSampler, DDIMSampler, GaussianDiffusion, evenly_spaced, noise_schedule
from baselines.ddim import DDIM
from baselines.ddpm import DDPM
from baselines.iddpm import IDDPM
from baselines.ldm import LDM
from lmd_bench.method import DataSpec

CONFIG = DiffusionConfig(num_inference_steps=8)


class Oracle(DiffusionMethod):
    """Predicts the noise in images that are all of one grey."""

    def __init__(self, config: DiffusionConfig, data: DataSpec, *, deterministic: bool, grey: float = 0.25) -> None:
        super().__init__(config, data)
        self.diffusion = GaussianDiffusion(noise_schedule("linear", config.num_train_timesteps))
        timesteps = evenly_spaced(config.num_train_timesteps, config.num_inference_steps)
        make: Any = DDIMSampler if deterministic else AncestralSampler
        self.sampler = make(self.diffusion.alphas_cumprod, timesteps)
        self.grey = grey
        self.seen: list[tuple[Tensor, Tensor]] = []

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        self.seen.append((x_t, timesteps))
        clean = torch.full_like(x_t, self.grey * 2 - 1)
        signal, noise = (
            table[timesteps].view(-1, 1, 1, 1) for table in (self.diffusion.signal, self.diffusion.noise_level)
        )
        return (x_t - signal * clean) / noise


@pytest.fixture(params=[False, True], ids=["ancestral", "ddim"])
def oracle(request: pytest.FixtureRequest) -> Oracle:
    torch.manual_seed(0)
    return Oracle(CONFIG, DataSpec(32), deterministic=request.param)


def test_samples_are_what_the_network_knows(oracle: Oracle) -> None:
    samples = oracle.sample(3)
    assert samples.shape == (3, 3, 32, 32)
    torch.testing.assert_close(samples, torch.full_like(samples, 0.25), rtol=0, atol=1e-3)


def test_reconstruction_keeps_visible_pixels_and_fills_hidden_ones(oracle: Oracle) -> None:
    images, mask = torch.rand(2, 3, 32, 32), torch.rand(2, 4, 4) > 0.25
    hidden = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1).expand_as(images)
    result = oracle.reconstruct(images, mask)
    torch.testing.assert_close(result[~hidden], images[~hidden])
    torch.testing.assert_close(result[hidden], torch.full_like(result[hidden], 0.25), rtol=0, atol=1e-3)
    assert len(oracle.seen) == oracle.num_function_evaluations == 8


def test_the_network_sees_the_known_part_at_the_noise_level_of_the_step(oracle: Oracle) -> None:
    images = torch.full((1, 3, 32, 32), 0.75)
    mask = torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    oracle.reconstruct(images, mask)
    assert [timesteps.tolist() for _, timesteps in oracle.seen] == [[t] for t in reversed(evenly_spaced(1000, 8))]
    for x_t, timesteps in oracle.seen:
        known = x_t[0, :, 8:, 8:]
        assert known.mean().item() == pytest.approx(0.5 * oracle.diffusion.signal[timesteps].item(), abs=0.15)
        assert known.std().item() == pytest.approx(oracle.diffusion.noise_level[timesteps].item(), rel=0.1)


def test_not_a_number_in_a_hidden_pixel_does_not_spread(oracle: Oracle) -> None:
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 4, 4, dtype=torch.bool)
    mask[0, 0, 0] = True
    images[0, :, 2, 2] = float("nan")
    assert oracle.reconstruct(images, mask).isfinite().all()


def test_a_training_step_draws_the_noise_first_and_the_timesteps_second(oracle: Oracle) -> None:
    images = torch.rand(4, 3, 32, 32)
    torch.manual_seed(1)
    oracle.training_step(images, step=1, total_steps=2)
    x_t, timesteps = oracle.seen[-1]
    torch.manual_seed(1)
    noise = torch.randn(4, 3, 32, 32)
    assert torch.equal(timesteps, torch.randint(1000, (4,)))
    torch.testing.assert_close(x_t, oracle.diffusion.q_sample(images * 2 - 1, noise, timesteps))


def test_the_loss_is_the_squared_error_and_weights_are_those_of_its_images(oracle: Oracle) -> None:
    output, noise = torch.randn(2, 3, 3, 32, 32)
    parts = {"clean": noise, "x_t": noise, "timesteps": torch.zeros(3, dtype=torch.int64)}
    errors, weights = (output - noise).square().mean(dim=(1, 2, 3)), torch.tensor([0.5, 1.0, 4.0])
    torch.testing.assert_close(oracle.loss(output, noise, **parts), errors.mean())
    torch.testing.assert_close(oracle.loss(output, noise, weights=weights, **parts), (errors * weights).mean())


@pytest.mark.parametrize("method_class", [DDPM, DDIM, IDDPM, LDM])
def test_weight_decay_reaches_every_trained_weight_as_in_the_authors_code(method_class: type[DiffusionMethod]) -> None:
    sizes: dict[str, Any] = {"block_out_channels": (16, 32), "attention_levels": (), "norm_num_groups": 8}
    if method_class is LDM:
        sizes |= {"projector": {"kind": "vq", "path": "shipped:scenes-vq-f8"}, "attention_head_dim": 8}
    method = method_class(method_class.Config.model_validate(sizes), DataSpec(16))
    (group,) = method.param_groups(0.01)
    assert group["weight_decay"] == 0.01
    assert {id(parameter) for parameter in group["params"]} == {id(parameter) for parameter in method.unet.parameters()}
