"""Schedules, posteriors, spacings and importance sampling against the authors' code, and diffusers' schedulers."""

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from baselines._gaussian import (
    DDIMSampler,
    GaussianDiffusion,
    LossSecondMoment,
    cumulative_signal,
    evenly_spaced,
    ldm_quadratic,
    ldm_uniform,
    noise_schedule,
    respaced_betas,
    reverse_tables,
    strided,
)
from tests.parity.fill import load_reference

IDDPM = load_reference("iddpm_schedules.reference")
LDM = load_reference("ldm_schedules.reference")
SPACINGS = {
    "1000,'50'": (1000, 50),
    "1000,'25'": (1000, 25),
    "1000,'100'": (1000, 100),
    "1000,'10,15,25'": (1000, [10, 15, 25]),
    "300,[10, 15, 20]": (300, [10, 15, 20]),
}


def assert_equal_in_float64(actual: np.ndarray, expected: list[float]) -> None:
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("name", ["linear_T1000", "linear_T4000", "cosine_T1000", "cosine_T4000"])
def test_the_schedules_equal_those_of_improved_diffusion(name: str) -> None:
    schedule, length = name.split("_T")
    betas = noise_schedule(schedule, int(length))
    assert len(betas) == int(length)
    assert_equal_in_float64(betas[IDDPM[name]["index"]], IDDPM[name]["betas"])
    assert_equal_in_float64(cumulative_signal(betas)[IDDPM[name]["index"]], IDDPM[name]["alphas_cumprod"])


def test_the_scaled_linear_schedule_equals_that_of_latent_diffusion() -> None:
    expected = LDM["linear_in_sqrt_0015_0195"]
    betas = noise_schedule("scaled_linear", 1000)
    assert_equal_in_float64(betas[expected["index"]], expected["betas"])
    assert_equal_in_float64(cumulative_signal(betas)[expected["index"]], expected["alphas_cumprod"])


def test_the_posterior_equals_that_of_improved_diffusion() -> None:
    expected, where = IDDPM["posterior_linear_T1000"], IDDPM["linear_T1000"]["index"]
    betas = noise_schedule("linear", 1000)
    tables = reverse_tables(betas, cumulative_signal(betas))
    assert_equal_in_float64(tables.small_variance[where], expected["posterior_variance"])
    assert_equal_in_float64(tables.small_log_variance[where], expected["posterior_log_variance_clipped"])
    assert_equal_in_float64(tables.mean_of_clean[where], expected["posterior_mean_coef1"])
    assert_equal_in_float64(tables.mean_of_noisy[where], expected["posterior_mean_coef2"])


@pytest.mark.parametrize("name", IDDPM["space_timesteps"])
def test_the_spacings_equal_those_of_improved_diffusion(name: str) -> None:
    if "ddim" in name:
        timesteps = strided(1000, int(name.split("ddim")[1].rstrip("'")))
    else:
        timesteps = evenly_spaced(*SPACINGS[name])
    assert timesteps == IDDPM["space_timesteps"][name]


def test_the_respaced_process_equals_that_of_improved_diffusion() -> None:
    expected = IDDPM["spaced_ddim50_betas"]
    alphas_cumprod = cumulative_signal(noise_schedule("linear", 1000))
    betas = respaced_betas(alphas_cumprod, strided(1000, 50))
    assert_equal_in_float64(betas[expected["index"]], expected["betas"])
    np.testing.assert_allclose(cumulative_signal(betas)[expected["index"]], expected["alphas_cumprod"], rtol=1e-11)


def test_importance_sampling_equals_that_of_improved_diffusion() -> None:
    expected = IDDPM["loss_second_moment"]
    importance = LossSecondMoment(4)
    # the reference states weights: uniform ones are 1 there, and probabilities once every history is full
    np.testing.assert_allclose(importance.probabilities() * 4, expected["before_warm"])
    for k in range(10):
        importance.update(torch.arange(4), torch.tensor([1.0 + k, 2.0, 0.5 * k, 3.0]))
    np.testing.assert_allclose(importance.probabilities(), expected["after_10_each"], rtol=1e-12)
    importance.update(torch.tensor([0]), torch.tensor([100.0]))
    np.testing.assert_allclose(importance.probabilities(), expected["after_extra_0_100"], rtol=1e-12)


@pytest.mark.parametrize("count", [50, 200])
def test_uniform_timesteps_equal_those_of_latent_diffusion(count: int) -> None:
    assert ldm_uniform(1000, count) == LDM["ddim_timesteps"][f"('uniform', {count}, 1000)"]


def test_quadratic_timesteps_equal_those_of_latent_diffusion() -> None:
    assert ldm_quadratic(1000, 50) == LDM["ddim_timesteps"]["('quad', 50, 1000)"]


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_sampling_tables_equal_those_of_latent_diffusion(eta: float) -> None:
    expected = LDM["ddim_params"][f"eta={eta}"]
    alphas_cumprod = cumulative_signal(noise_schedule("scaled_linear", 1000))
    sampler = DDIMSampler(alphas_cumprod, ldm_uniform(1000, 50), eta=eta, last_alpha=alphas_cumprod[0])
    where = expected["index"]
    # latent diffusion keeps float32 tables
    np.testing.assert_allclose(sampler.sigmas[where], expected["sigmas"], rtol=1e-6)
    np.testing.assert_allclose(sampler.alphas[where], expected["alphas"], rtol=1e-6)
    np.testing.assert_allclose(sampler.alphas_before[where], expected["alphas_prev"], rtol=1e-6)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("cosine", "squaredcos_cap_v2"), ("scaled_linear", "scaled_linear")]
)
def test_the_tables_equal_diffusers(ours: str, theirs: str) -> None:
    ends = {"beta_start": 0.0015, "beta_end": 0.0195} if ours == "scaled_linear" else {}
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule=theirs, **ends)
    betas = noise_schedule(ours, 1000)
    # diffusers makes them in float32
    np.testing.assert_allclose(betas, scheduler.betas, rtol=1e-4)
    np.testing.assert_allclose(cumulative_signal(betas), scheduler.alphas_cumprod, rtol=1e-4)


def test_the_float32_products_equal_diffusers_ddim_scheduler() -> None:
    scheduler = DDIMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    ours = cumulative_signal(noise_schedule("linear", 1000), "float32").astype(np.float32)
    np.testing.assert_allclose(ours, scheduler.alphas_cumprod.numpy(), rtol=1e-6)


def test_the_forward_process_equals_diffusers_add_noise() -> None:
    scheduler = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    clean, noise = torch.randn(2, 8, 3, 16, 16)
    timesteps = torch.tensor([0, 1, 10, 100, 500, 900, 998, 999])
    ours = GaussianDiffusion(noise_schedule("linear", 1000)).q_sample(clean, noise, timesteps)
    torch.testing.assert_close(ours, scheduler.add_noise(clean, noise, timesteps))
