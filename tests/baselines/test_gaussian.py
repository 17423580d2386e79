"""The closed forms of Gaussian diffusion: properties that hold whatever the numbers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baselines._gaussian import (
    AncestralSampler,
    DDIMSampler,
    GaussianDiffusion,
    LossSecondMoment,
    cumulative_signal,
    ddim_quadratic,
    ddim_uniform,
    discretized_gaussian_log_likelihood,
    evenly_spaced,
    ldm_uniform,
    noise_schedule,
    normal_kl,
    respaced_betas,
    strided,
)

BETAS = noise_schedule("linear", 1000)
ALPHAS = cumulative_signal(BETAS)
PROCESS = GaussianDiffusion(BETAS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", ["linear", "cosine", "scaled_linear"])
@pytest.mark.parametrize("length", [100, 1000, 4000])
def test_every_schedule_destroys_the_signal_step_by_step(name: str, length: int) -> None:
    betas = noise_schedule(name, length)
    assert betas.dtype == np.float64
    assert betas.shape == (length,)
    assert (betas > 0).all()
    assert (betas < 1).all()
    alphas_cumprod = cumulative_signal(betas)
    assert (np.diff(alphas_cumprod) < 0).all()
    assert alphas_cumprod[0] > 0.99
    if name != "scaled_linear":  # made for T = 1000 only: its betas do not grow as T shrinks
        assert alphas_cumprod[-1] < 1e-3


def test_float32_products_stay_near_those_of_float64() -> None:
    rounded = cumulative_signal(BETAS, "float32")
    np.testing.assert_allclose(rounded, ALPHAS, rtol=2e-5)
    assert (rounded != ALPHAS).any()
    assert (rounded == rounded.astype(np.float32)).all()


@given(st.integers(2, 1000).flatmap(lambda length: st.tuples(st.just(length), st.integers(2, length))))
def test_even_spacing_gives_the_count_and_both_ends(case: tuple[int, int]) -> None:
    length, count = case
    timesteps = evenly_spaced(length, count)
    assert len(set(timesteps)) == count
    assert timesteps == sorted(timesteps)
    assert (timesteps[0], timesteps[-1]) == (0, length - 1)


def test_spacings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="11 timesteps cannot be chosen from a section of 10"):
        evenly_spaced(20, [5, 11])
    with pytest.raises(ValueError, match="no integer stride over 1000 timesteps gives exactly 300"):
        strided(1000, 300)
    with pytest.raises(ValueError, match="1000 timesteps shifted by one leave a process of 1000"):
        ldm_uniform(1000, 1000)


def test_the_ddim_repositorys_spacings_keep_their_quirks() -> None:
    assert len(ddim_uniform(1000, 30)) == 31
    assert ddim_quadratic(1000, 50)[:4] == [0, 0, 1, 2]


def test_all_timesteps_respaced_are_the_process_itself() -> None:
    np.testing.assert_allclose(respaced_betas(ALPHAS, range(1000)), BETAS, rtol=1e-9)


def test_the_clean_image_comes_back_from_its_noise() -> None:
    clean, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 10, 500, 900])
    x_t = PROCESS.q_sample(clean, noise, timesteps)
    torch.testing.assert_close(PROCESS.predict_clean(x_t, noise, timesteps), clean, rtol=0, atol=1e-4)


def test_the_posterior_is_bayes_rule() -> None:
    """The product of q(x_{t-1} | x_0) and q(x_t | x_{t-1}) over x_{t-1}, completed to a square by hand."""
    clean, x_t = torch.randn(2, 1, 1, 1, 1, dtype=torch.float64)
    for t in (1, 10, 500, 999):
        mean, variance, log_variance = PROCESS.posterior(clean, x_t, torch.tensor([t]))
        before, beta = ALPHAS[t - 1], BETAS[t]
        precision = 1 / (1 - before) + (1 - beta) / beta
        expected = (math.sqrt(before) * clean / (1 - before) + math.sqrt(1 - beta) * x_t / beta) / precision
        torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)
        assert variance.item() == pytest.approx(1 / precision, rel=1e-5)
        assert log_variance.item() == pytest.approx(-math.log(precision), rel=1e-5)


def test_learned_variances_reach_from_the_posteriors_to_beta() -> None:
    timesteps = torch.tensor([1, 500, 999])
    ends = [PROCESS.learned_log_variance(torch.full((3, 1, 1, 1), v), timesteps) for v in (-1.0, 1.0)]
    torch.testing.assert_close(ends[0], PROCESS.fixed_variance("fixed_small", timesteps)[1])
    torch.testing.assert_close(ends[1], PROCESS.fixed_variance("fixed_large", timesteps)[1])


def test_tables_made_on_the_meta_device_stay_there_and_keep_their_float64_twins() -> None:
    with torch.device("meta"):
        process = GaussianDiffusion(BETAS)
    assert process.signal.device.type == "meta"
    assert process.alphas_cumprod[500] == ALPHAS[500]
    assert not process.state_dict()


# -- the variational bound --------------------------------------------------------------------------------------------


def test_the_divergence_of_equal_gaussians_is_zero_and_else_as_integrated() -> None:
    mean, log_variance = torch.randn(2, 100)
    assert normal_kl(mean, log_variance, mean, log_variance).abs().max() == 0
    p, q = torch.distributions.Normal(0.3, 2.0), torch.distributions.Normal(-0.1, 0.7)
    ours = normal_kl(*(torch.tensor(v) for v in (0.3, 2 * math.log(2.0), -0.1, 2 * math.log(0.7))))
    torch.testing.assert_close(ours, torch.distributions.kl_divergence(p, q))


def test_the_probabilities_of_all_pixel_values_sum_to_one() -> None:
    values = (torch.arange(256) / 127.5 - 1).double()
    for mean, scale in ((0.0, 0.1), (0.9, 0.5), (-1.0, 0.01)):
        log_likelihood = discretized_gaussian_log_likelihood(
            values, torch.full_like(values, mean), torch.full_like(values, math.log(scale))
        )
        assert log_likelihood.exp().sum().item() == pytest.approx(1, abs=1e-6)


def test_the_bound_is_zero_at_the_true_posterior_and_a_likelihood_at_the_end() -> None:
    clean, noise = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4)
    timesteps = torch.tensor([0, 1, 700])
    x_t = PROCESS.q_sample(clean, noise, timesteps)
    mean, _, log_variance = PROCESS.posterior(clean, x_t, timesteps)
    bound = PROCESS.variational_bound(clean, x_t, timesteps, mean, log_variance)
    assert bound.shape == (3,)
    assert bound[1:].abs().max() < 1e-6
    decoder = discretized_gaussian_log_likelihood(clean[0], mean[0], 0.5 * log_variance[0])
    assert bound[0].item() == pytest.approx(-decoder.mean().item() / math.log(2), rel=1e-5)


# -- importance sampling ----------------------------------------------------------------------------------------------


def one_by_one(batches: list[tuple[Tensor, Tensor]], num_timesteps: int, length: int) -> list[list[float]]:
    """The last `length` losses of every timestep, kept the plain way."""
    histories: list[list[float]] = [[] for _ in range(num_timesteps)]
    for timesteps, losses in batches:
        for t, loss in zip(timesteps.tolist(), losses.tolist(), strict=True):
            histories[t] = [*histories[t], loss][-length:]
    return histories


def test_histories_hold_the_last_losses_in_batch_order_whatever_repeats() -> None:
    importance = LossSecondMoment(5, history_length=3)
    batches = [(torch.randint(5, (16,)), torch.rand(16)) for _ in range(6)]
    for timesteps, losses in batches:
        importance.update(timesteps, losses)
    for kept, expected in zip(importance.history[:, :-1].tolist(), one_by_one(batches, 5, 3), strict=True):
        assert sorted(kept) == pytest.approx(sorted(expected))


def test_timesteps_are_uniform_until_every_history_is_full() -> None:
    importance = LossSecondMoment(4, history_length=2)
    importance.update(torch.tensor([0, 0, 1, 1, 2, 2, 3]), torch.arange(7.0))
    assert importance.probabilities().tolist() == [0.25] * 4
    importance.update(torch.tensor([3]), torch.tensor([9.0]))
    assert importance.probabilities().tolist() != [0.25] * 4


def test_timesteps_are_drawn_as_often_as_their_losses_say_and_weighted_back() -> None:
    importance = LossSecondMoment(4, history_length=1)
    importance.update(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0]))
    timesteps, weights = importance.draw(20_000)
    shares = timesteps.bincount(minlength=4) / len(timesteps)
    torch.testing.assert_close(shares.double(), importance.probabilities(), rtol=0, atol=0.02)
    assert weights.mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(
        weights.double() * 4 * importance.probabilities()[timesteps], torch.ones(20_000).double()
    )


def test_importance_sampling_goes_on_from_a_saved_state() -> None:
    first, second = LossSecondMoment(4, history_length=1), LossSecondMoment(4, history_length=1)
    first.update(torch.arange(4), torch.rand(4))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.probabilities(), second.probabilities())


# -- samplers ---------------------------------------------------------------------------------------------------------


def exact_noise(clean: Tensor, x: Tensor, alpha: float) -> Tensor:
    return (x - math.sqrt(alpha) * clean) / math.sqrt(1 - alpha)


@pytest.mark.parametrize("kind", ["ancestral", "ddim", "ddim clipped"])
def test_a_network_that_knows_the_image_is_walked_back_to_it(kind: str) -> None:
    timesteps = evenly_spaced(1000, 20)
    sampler = (
        AncestralSampler(ALPHAS, timesteps)
        if kind == "ancestral"
        else DDIMSampler(ALPHAS, timesteps, eta=0.5, clip="clipped" in kind)
    )
    clean, x = torch.rand(2, 3, 4, 4) * 1.8 - 0.9, torch.randn(2, 3, 4, 4)
    for index in reversed(range(len(sampler))):
        output = exact_noise(clean, x, float(sampler.alphas[index]))
        x = sampler.step(index, x, output, torch.randn_like(x) if sampler.adds_noise(index) else None)
    torch.testing.assert_close(x, clean, rtol=0, atol=2e-3)


def test_ddim_with_eta_one_takes_the_ancestral_step() -> None:
    timesteps = evenly_spaced(1000, 20)
    ddim, ancestral = DDIMSampler(ALPHAS, timesteps, eta=1.0), AncestralSampler(ALPHAS, timesteps, clip=False)
    x, output, noise = torch.randn(3, 2, 3, 4, 4, dtype=torch.float64)
    for index in (1, 10, 19):
        torch.testing.assert_close(ddim.step(index, x, output, noise), ancestral.step(index, x, output, noise))


@pytest.mark.parametrize(("value", "variance"), [(-1.0, "fixed_small"), (1.0, "fixed_large")])
def test_a_learned_variance_at_its_ends_is_the_fixed_one(value: float, variance: str) -> None:
    timesteps = evenly_spaced(1000, 20)
    learned = AncestralSampler(ALPHAS, timesteps, variance="learned")
    fixed = AncestralSampler(ALPHAS, timesteps, variance=variance)
    x, output, noise = torch.randn(3, 2, 3, 4, 4)
    both = torch.cat([output, torch.full_like(output, value)], dim=1)
    for index in (2, 10, 19):
        torch.testing.assert_close(learned.step(index, x, both, noise), fixed.step(index, x, output, noise))


def test_a_step_between_equal_noise_levels_changes_nothing() -> None:
    sampler = DDIMSampler(ALPHAS, ddim_quadratic(1000, 50), eta=0.5)
    x, output = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    assert sampler.timesteps[:2] == (0, 0)
    torch.testing.assert_close(sampler.step(1, x, output), x)


def test_only_noisy_steps_ask_for_noise() -> None:
    timesteps = evenly_spaced(1000, 5)
    assert [AncestralSampler(ALPHAS, timesteps).adds_noise(i) for i in range(5)] == [False] + [True] * 4
    assert [DDIMSampler(ALPHAS, timesteps, eta=1.0).adds_noise(i) for i in range(5)] == [False] + [True] * 4
    assert not any(DDIMSampler(ALPHAS, timesteps).adds_noise(i) for i in range(5))
    offset = DDIMSampler(ALPHAS, timesteps, eta=1.0, last_alpha=float(ALPHAS[0]))
    assert not offset.adds_noise(0)
