"""Trajectories of the samplers against the authors' code and diffusers' schedulers, with a toy network."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor

from baselines._gaussian import (
    AncestralSampler,
    DDIMSampler,
    Sampler,
    cumulative_signal,
    ddim_quadratic,
    ddim_uniform,
    evenly_spaced,
    noise_schedule,
    strided,
)
from tests.parity.fill import assert_matches, load_reference, reference_draw, reference_input

REFERENCE: dict[str, Any] = load_reference("samplers.reference")["runs"]
BETAS = noise_schedule("linear", 1000)
SPACINGS: dict[str, Callable[[int, int], list[int]]] = {"uniform": ddim_uniform, "quad": ddim_quadratic}


def toy_network(x: Tensor, timestep: int) -> Tensor:
    return 0.5 * x + 0.1 * math.sin(timestep)


def walk(sampler: Sampler) -> tuple[Tensor, Tensor]:
    """The end of a walk from the reference's start, and the last estimate of the clean image."""
    x = reference_input(2, 3, 4, 4)
    clean, noise = x, reference_draw(2, 3, 4, 4)
    for index in reversed(range(len(sampler))):
        output = toy_network(x, sampler.timesteps[index])
        clean = sampler.predict_clean(index, x, output, clip=False)
        x = sampler.step(index, x, output, noise if sampler.adds_noise(index) else None)
    return x, clean


@pytest.mark.parametrize("name", [name for name in REFERENCE if name.startswith("generalized")])
def test_the_generalized_sampler_equals_the_ddim_repository(name: str) -> None:
    expected = REFERENCE[name]
    spacing, eta = name.removeprefix("generalized ").split("eta=")
    kind = spacing.strip("0123456789 ").split("_")[0]
    count = 30 if "30" in spacing else 50
    timesteps = SPACINGS[kind](1000, count)
    assert timesteps[:4] == expected["first_timesteps"]
    assert timesteps[-3:] == expected["last_timesteps"]
    assert len(timesteps) == expected["n"]
    final, clean = walk(DDIMSampler(cumulative_signal(BETAS, "float32"), timesteps, eta=float(eta)))
    assert_matches(final, expected["final"])
    assert_matches(clean, expected["final_x0"])


def test_the_noisy_sampler_equals_the_ddim_repository() -> None:
    sampler = AncestralSampler(cumulative_signal(BETAS, "float32"), ddim_uniform(1000, 50), variance="fixed_large")
    assert_matches(walk(sampler)[0], REFERENCE["ddpm_noisy uniform50"]["final"])


@pytest.mark.parametrize("name", [name for name in REFERENCE if name.startswith("iddpm ddim_sample_loop")])
def test_the_ddim_sampler_equals_improved_diffusion(name: str) -> None:
    _, _, spacing, eta, clip = name.split()
    timesteps = strided(1000, 50) if spacing == "ddim50" else evenly_spaced(1000, 50)
    sampler = DDIMSampler(
        cumulative_signal(BETAS), timesteps, eta=float(eta.removeprefix("eta=")), clip=clip == "clip=True"
    )
    assert_matches(walk(sampler)[0], REFERENCE[name]["final"])


@pytest.mark.parametrize("spacing", ["ddim50", "50"])
def test_the_ancestral_sampler_equals_improved_diffusion(spacing: str) -> None:
    timesteps = strided(1000, 50) if spacing == "ddim50" else evenly_spaced(1000, 50)
    expected = REFERENCE[f"iddpm p_sample_loop {spacing} fixed_small clip=True"]["final"]
    assert_matches(walk(AncestralSampler(cumulative_signal(BETAS), timesteps))[0], expected)


def test_every_reference_run_is_compared() -> None:
    families = ("generalized", "ddpm_noisy uniform50", "iddpm ddim_sample_loop", "iddpm p_sample_loop")
    assert all(name.startswith(families) for name in REFERENCE)
    assert len(REFERENCE) == 9 + 1 + 8 + 2


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("count", [50, 1000])
def test_ancestral_steps_equal_diffusers(variance: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = reference_draw(2, 3, 4, 4)
    scheduler = DDPMScheduler(beta_schedule="linear", variance_type=variance)
    scheduler.set_timesteps(count)
    sampler = AncestralSampler(cumulative_signal(BETAS), strided(1000, count), variance=variance)
    assert list(reversed(sampler.timesteps)) == scheduler.timesteps.tolist()
    monkeypatch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", lambda *_, **__: draw)
    x = reference_input(2, 3, 4, 4)
    for index in (count - 1, count // 2, 1, 0):
        output = toy_network(x, sampler.timesteps[index])
        theirs = scheduler.step(output, sampler.timesteps[index], x, return_dict=False)[0]
        torch.testing.assert_close(sampler.step(index, x, output, draw), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_generalized_steps_equal_diffusers(eta: float) -> None:
    draw = reference_draw(2, 3, 4, 4)
    scheduler = DDIMScheduler(beta_schedule="linear", clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    sampler = DDIMSampler(cumulative_signal(BETAS, "float32"), ddim_uniform(1000, 50), eta=eta)
    assert list(reversed(sampler.timesteps)) == scheduler.timesteps.tolist()
    x = reference_input(2, 3, 4, 4)
    for index in (49, 25, 1, 0):
        timestep = sampler.timesteps[index]
        output = toy_network(x, timestep)
        noise = draw if sampler.adds_noise(index) else None
        theirs = scheduler.step(output, timestep, x, eta=eta, variance_noise=noise, return_dict=False)[0]
        torch.testing.assert_close(sampler.step(index, x, output, noise), theirs, rtol=1e-4, atol=1e-5)
