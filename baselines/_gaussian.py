"""Gaussian diffusion in closed form, shared by the diffusion baselines: tables, posteriors, losses, samplers.

Sources: Ho et al. 2020 (arXiv 2006.11239, "DDPM"), Song et al. 2020 (2010.02502, "DDIM"), Nichol and Dhariwal 2021
(2102.09672, "iDDPM"). Timesteps count from 0 (least noise) to T - 1; a_t is the cumulative product of 1 - beta.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

Table = np.ndarray[Any, np.dtype[np.float64]]
ScheduleName = Literal["linear", "cosine", "scaled_linear"]
Precision = Literal["float64", "float32"]
FixedVariance = Literal["fixed_small", "fixed_large"]
Variance = Literal["fixed_small", "fixed_large", "learned"]

_LEAST_VARIANCE = 1e-20  # before a logarithm; steps between equal noise levels have none


# -- noise schedules --------------------------------------------------------------------------------------------------


def noise_schedule(name: ScheduleName, num_timesteps: int) -> Table:
    """Betas (T,) float64.

    "linear": 1e-4 to 0.02, scaled by 1000 / T (DDPM, iDDPM); "cosine": from a squared cosine of offset 0.008, at most
    0.999 (iDDPM, eq. 17); "scaled_linear": linear in sqrt(beta), 0.0015 to 0.0195 (latent diffusion's LSUN models).
    """
    if name == "cosine":
        levels = (np.arange(num_timesteps + 1) / num_timesteps + 0.008) / 1.008
        signal: Table = np.cos(levels * np.pi / 2) ** 2
        return np.minimum(1 - signal[1:] / signal[:-1], np.float64(0.999))
    if name == "linear":
        scale = 1000 / num_timesteps
        return np.linspace(1e-4 * scale, 0.02 * scale, num_timesteps, dtype=np.float64)
    roots: Table = np.linspace(0.0015**0.5, 0.0195**0.5, num_timesteps, dtype=np.float64)
    return np.square(roots)


def cumulative_signal(betas: Table, precision: Precision = "float64") -> Table:
    """a_t, (T,) float64. "float32" rounds betas first and every product after, as the DDIM repository does."""
    if precision == "float64":
        products: Table = np.multiply.accumulate(1 - betas)
        return products
    rounded: Table = (1 - torch.from_numpy(betas).float()).cumprod(dim=0).double().numpy()
    return rounded


def respaced_betas(alphas_cumprod: Table, timesteps: Sequence[int]) -> Table:
    """Betas of the process that visits only these ascending timesteps, with the same a_t there (iDDPM, eq. 19)."""
    kept = alphas_cumprod[list(timesteps)]
    betas: Table = 1 - kept / np.append(1.0, kept[:-1])
    return betas


# -- which timesteps a sampler visits, ascending ----------------------------------------------------------------------


def evenly_spaced(num_timesteps: int, counts: int | Sequence[int]) -> list[int]:
    """iDDPM's "N": `counts` timesteps from the first to the last inclusive, rounded to even.

    Several counts: the process is cut into as many sections of equal length, each with its own count. Raises
    ValueError where a section is shorter than its count.
    """
    counts = [counts] if isinstance(counts, int) else list(counts)
    length, longer = divmod(num_timesteps, len(counts))
    timesteps: list[int] = []
    start = 0
    for section, count in enumerate(counts):
        size = length + (section < longer)
        if not 1 <= count <= size:
            raise ValueError(f"{count} timesteps cannot be chosen from a section of {size}")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        # summed, not multiplied: the authors' rounding falls as it does at ties because they add the stride up
        timesteps += [start + round(offset) for offset in accumulate([0.0] + [stride] * (count - 1))]
        start += size
    return timesteps


def strided(num_timesteps: int, count: int) -> list[int]:
    """iDDPM's "ddimN": 0, s, 2s ... with the smallest integer stride that gives exactly `count` timesteps.

    Raises ValueError where no stride does.
    """
    for stride in range(1, num_timesteps + 1):
        timesteps = list(range(0, num_timesteps, stride))
        if len(timesteps) == count:
            return timesteps
    raise ValueError(f"no integer stride over {num_timesteps} timesteps gives exactly {count}")


def ddim_uniform(num_timesteps: int, count: int) -> list[int]:
    """The DDIM repository's "uniform": every (T // count)-th timestep from 0, which can be more than `count`."""
    return list(range(0, num_timesteps, num_timesteps // count))


def ddim_quadratic(num_timesteps: int, count: int) -> list[int]:
    """The DDIM repository's "quad": squares of `count` numbers from 0 to sqrt(0.8 T), cut to integers.

    Early ones can come twice: the step between them changes nothing and costs a pass of the network.
    """
    squares: Table = np.linspace(0, math.sqrt(0.8 * num_timesteps), count) ** 2
    return [int(square) for square in squares]


def ldm_uniform(num_timesteps: int, count: int) -> list[int]:
    """Latent diffusion's "uniform": the DDIM repository's shifted by one.

    Raises ValueError where that leaves the process, as it does for `count` = T.
    """
    return _shifted(ddim_uniform(num_timesteps, count), num_timesteps)


def ldm_quadratic(num_timesteps: int, count: int) -> list[int]:
    """Latent diffusion's "quad": the DDIM repository's shifted by one.

    Raises ValueError where that leaves the process, as it does where T is 5 or less.
    """
    return _shifted(ddim_quadratic(num_timesteps, count), num_timesteps)


def _shifted(timesteps: list[int], num_timesteps: int) -> list[int]:
    if timesteps[-1] + 1 >= num_timesteps:
        raise ValueError(f"{len(timesteps)} timesteps shifted by one leave a process of {num_timesteps}")
    return [timestep + 1 for timestep in timesteps]


# -- the process ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReverseTables:
    """Coefficients of q(x_{t-1} | x_t, x_0) and the variances a reverse step can have, each (T,) float64."""

    mean_of_clean: Table
    """Weight of x_0 in the posterior's mean (DDPM, eq. 7)."""
    mean_of_noisy: Table
    """Weight of x_t in it."""
    small_variance: Table
    """The posterior's variance, 0 at t = 0."""
    small_log_variance: Table
    """Its logarithm, that at t = 0 taken from t = 1."""
    large_variance: Table
    """Beta; at t = 0 the posterior's variance at t = 1."""
    large_log_variance: Table
    log_betas: Table


def reverse_tables(betas: Table, alphas_cumprod: Table) -> ReverseTables:
    """The tables of a process given by its betas and a_t, both (T,) float64, T at least 2 for clipped logarithms."""
    before, remaining = np.append(1.0, alphas_cumprod[:-1]), 1 - alphas_cumprod
    small = betas * (1 - before) / remaining
    large = np.append(small[1:2], betas[1:]) if len(betas) > 1 else betas
    return ReverseTables(
        mean_of_clean=betas * np.sqrt(before) / remaining,
        mean_of_noisy=(1 - before) * np.sqrt(1 - betas) / remaining,
        small_variance=small,
        small_log_variance=_log(np.append(small[1:2], small[1:]) if len(small) > 1 else small),
        large_variance=large,
        large_log_variance=_log(large),
        log_betas=_log(betas),
    )


class GaussianDiffusion(nn.Module):
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I) and what follows from it.

    Tables are made in float64 (numpy: `betas`, `alphas_cumprod`, `reverse`) and kept as float32 buffers, so that they
    move with the model and a training step copies nothing to the device. Nothing to save.
    Everywhere: images and noise (B, C, H, W), `timesteps` (B,) int64, tables looked up as (B, 1, 1, 1).
    """

    signal: Tensor
    noise_level: Tensor
    inverse_signal: Tensor
    noise_to_signal: Tensor
    mean_of_clean: Tensor
    mean_of_noisy: Tensor
    small_variance: Tensor
    small_log_variance: Tensor
    large_variance: Tensor
    large_log_variance: Tensor
    log_betas: Tensor

    def __init__(self, betas: Table, *, precision: Precision = "float64") -> None:
        """`betas` (T,) in (0, 1); `precision`: in which a_t is multiplied up, see `cumulative_signal`."""
        super().__init__()
        self.num_timesteps = len(betas)
        self.betas = betas if precision == "float64" else betas.astype(np.float32).astype(np.float64)
        self.alphas_cumprod = cumulative_signal(betas, precision)
        self.reverse = reverse = reverse_tables(self.betas, self.alphas_cumprod)
        tables = {
            "signal": np.sqrt(self.alphas_cumprod),
            "noise_level": np.sqrt(1 - self.alphas_cumprod),
            "inverse_signal": np.sqrt(1 / self.alphas_cumprod),
            "noise_to_signal": np.sqrt(1 / self.alphas_cumprod - 1),
            "mean_of_clean": reverse.mean_of_clean,
            "mean_of_noisy": reverse.mean_of_noisy,
            "small_variance": reverse.small_variance,
            "small_log_variance": reverse.small_log_variance,
            "large_variance": reverse.large_variance,
            "large_log_variance": reverse.large_log_variance,
            "log_betas": reverse.log_betas,
        }
        for name, table in tables.items():
            # empty + copy_: the buffer then lies on the device that modules are being made on (meta, for FLOPs)
            buffer = torch.empty(self.num_timesteps).copy_(torch.from_numpy(table))
            self.register_buffer(name, buffer, persistent=False)

    def q_sample(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t from x_0 and standard normal noise (DDPM, eq. 4)."""
        return torch.addcmul(_at(self.signal, timesteps) * clean, _at(self.noise_level, timesteps), noise)

    def predict_clean(self, x_t: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_0 from x_t and the noise in it (DDPM, eq. 15); not clipped."""
        return _at(self.inverse_signal, timesteps) * x_t - _at(self.noise_to_signal, timesteps) * noise

    def posterior(self, clean: Tensor, x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean (B, C, H, W), variance and clipped log variance (B, 1, 1, 1) of q(x_{t-1} | x_t, x_0) (DDPM, eq. 7).

        The variance at 0 is 0; the clipped logarithm there is that of the variance at 1.
        """
        mean = _at(self.mean_of_clean, timesteps) * clean + _at(self.mean_of_noisy, timesteps) * x_t
        return mean, _at(self.small_variance, timesteps), _at(self.small_log_variance, timesteps)

    def fixed_variance(self, kind: FixedVariance, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        """Variance and its logarithm (B, 1, 1, 1) of a reverse step that does not learn them.

        "fixed_small": the posterior's (its logarithm clipped); "fixed_large": beta, at 0 the posterior's at 1.
        """
        if kind == "fixed_small":
            return _at(self.small_variance, timesteps), _at(self.small_log_variance, timesteps)
        return _at(self.large_variance, timesteps), _at(self.large_log_variance, timesteps)

    def learned_log_variance(self, values: Tensor, timesteps: Tensor) -> Tensor:
        """Log variance of a reverse step between the posterior's (`values` = -1) and beta (1) (iDDPM, eq. 15)."""
        low, high = _at(self.small_log_variance, timesteps), _at(self.log_betas, timesteps)
        return low + (high - low) * (values + 1) / 2

    def variational_bound(
        self, clean: Tensor, x_t: Tensor, timesteps: Tensor, mean: Tensor, log_variance: Tensor
    ) -> Tensor:
        """The bound's term L_t of a reverse step N(`mean`, exp(`log_variance`)), (B,) in bits per dimension.

        The divergence from the true posterior; at t = 0 the negative log likelihood of 8-bit pixels in [-1, 1]
        (iDDPM, eq. 4 to 6). `log_variance` broadcasts to the images.
        """
        true_mean, _, true_log_variance = self.posterior(clean, x_t, timesteps)
        divergence = normal_kl(true_mean, true_log_variance, mean, log_variance)
        decoder = -discretized_gaussian_log_likelihood(clean, mean, 0.5 * log_variance)
        first = (timesteps == 0).view(-1, *[1] * (clean.ndim - 1))
        return torch.where(first, decoder, divergence).flatten(1).mean(dim=1) / math.log(2)


def normal_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(other_mean, exp(other_log_variance))) per element, nats."""
    gap = log_variance - other_log_variance
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    return 0.5 * (gap.exp() - 1 - gap + distance)


def discretized_gaussian_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log probability, nats per element, that a Gaussian falls in the bin of width 2/255 around `x` in [-1, 1].

    The two outermost bins reach to infinity (DDPM, eq. 13). The normal distribution function is Page's tanh
    approximation, with which the published bounds were computed (openai/improved-diffusion).
    """
    centered, inverse_scale = x - mean, torch.exp(-log_scale)
    above = _approximate_normal_cdf(inverse_scale * (centered + 1 / 255))
    below = _approximate_normal_cdf(inverse_scale * (centered - 1 / 255))
    inside = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return inside.clamp(min=1e-12).log()


def _approximate_normal_cdf(x: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


# -- importance sampling of timesteps ---------------------------------------------------------------------------------


class LossSecondMoment(nn.Module):
    """Timesteps drawn in proportion to the root mean square of their last losses (iDDPM, section 3.3).

    Uniform until every timestep has a full history; later mixed with a small uniform share. The histories are saved
    with the model, so that a resumed run draws what the unbroken one would. Nothing here waits for the device.
    """

    history: Tensor
    counts: Tensor

    def __init__(self, num_timesteps: int, *, history_length: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        self.num_timesteps, self.history_length, self.uniform_share = num_timesteps, history_length, uniform_share
        # one column more than the history: where losses go that later ones of the same batch push out
        self.register_buffer("history", torch.zeros(num_timesteps, history_length + 1))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """Of every timestep, (T,) float64, summing to 1."""
        losses = self.history[:, :-1].double()
        weights = losses.square().mean(dim=1).sqrt()
        uniform = 1 / self.num_timesteps
        mixed = (1 - self.uniform_share) * weights / weights.sum() + self.uniform_share * uniform
        warm = (self.counts >= self.history_length).all()
        return torch.where(warm, mixed, torch.full_like(mixed, uniform))

    def draw(self, num: int) -> tuple[Tensor, Tensor]:
        """Timesteps (num,) int64 and the float32 weights 1 / (T p_t) that keep the expected loss what it is.

        One uniform number per timestep from torch's global generator, looked up in the cumulated probabilities:
        torch.multinomial would wait for the device.
        """
        probabilities = self.probabilities()
        cumulated = probabilities.cumsum(dim=0)
        level = torch.rand(num, dtype=torch.float64, device=cumulated.device) * cumulated[-1]
        timesteps = torch.searchsorted(cumulated, level, right=True).clamp(max=self.num_timesteps - 1)
        return timesteps, (1 / (self.num_timesteps * probabilities[timesteps])).float()

    @torch.no_grad()
    def update(self, timesteps: Tensor, losses: Tensor) -> None:
        """Remember the unweighted `losses` (B,) at `timesteps` (B,), in the order of the batch."""
        same = timesteps.unsqueeze(1) == timesteps
        rank, later = same.tril(-1).sum(dim=1), same.triu(1).sum(dim=1)
        slot = (self.counts[timesteps] + rank) % self.history_length
        slot = slot.masked_fill(later >= self.history_length, self.history_length)
        self.history.view(-1).scatter_(0, timesteps * (self.history_length + 1) + slot, losses.detach().float())
        self.counts.scatter_add_(0, timesteps, torch.ones_like(timesteps))


# -- samplers ---------------------------------------------------------------------------------------------------------


class Sampler(ABC):
    """A walk down some timesteps of a trained process, from noise to x_0; all images of a batch at the same one.

    Step i goes from `timesteps[i]` to `timesteps[i - 1]`, and step 0 to x_0. All coefficients are Python floats made
    in float64, so that sampling neither looks up nor copies tables.
    """

    def __init__(self, alphas_cumprod: Table, timesteps: Sequence[int], *, last_alpha: float = 1.0) -> None:
        """`alphas_cumprod` (T,) of the trained process; `timesteps` ascending; `last_alpha`: a after step 0."""
        self.timesteps = tuple(timesteps)
        self.alphas = alphas_cumprod[list(timesteps)]
        self.alphas_before = np.append(last_alpha, self.alphas[:-1])

    def __len__(self) -> int:
        """Passes of the network in a whole walk."""
        return len(self.timesteps)

    def at_level(self, index: int, clean: Tensor, noise: Tensor) -> Tensor:
        """Clean images at the noise level from which step `index` starts."""
        alpha = float(self.alphas[index])
        return math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * noise

    @abstractmethod
    def adds_noise(self, index: int) -> bool:
        """Whether step `index` adds fresh noise."""

    @abstractmethod
    def step(self, index: int, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """x after step `index`, from x before it and the network's `output` for it at `timesteps[index]`.

        `output` (B, C, H, W) is the noise in x; what a network gives beyond the channels of x is the variance.
        `noise` is standard normal, of the shape of x, wherever `adds_noise`.
        """

    def predict_clean(self, index: int, x: Tensor, noise: Tensor, *, clip: bool) -> Tensor:
        """x_0 from x before step `index` and the noise in it, cut to [-1, 1] where `clip`."""
        alpha = float(self.alphas[index])
        clean = math.sqrt(1 / alpha) * x - math.sqrt(1 / alpha - 1) * noise
        return clean.clamp(-1, 1) if clip else clean


class AncestralSampler(Sampler):
    """DDPM's sampler: a draw from the reverse step's Gaussian, over the respaced process (iDDPM, section 4)."""

    def __init__(
        self, alphas_cumprod: Table, timesteps: Sequence[int], *, variance: Variance = "fixed_small", clip: bool = True
    ) -> None:
        """`variance`: the posterior's, beta, or between them as the network says (its output then has 2 C channels);
        `clip` cuts the estimate of x_0 to [-1, 1]."""
        super().__init__(alphas_cumprod, timesteps)
        self.variance, self.clip = variance, clip
        self.reverse = reverse_tables(respaced_betas(alphas_cumprod, self.timesteps), self.alphas)

    def adds_noise(self, index: int) -> bool:
        """Every step but the last, which is the mean."""
        return index > 0

    def step(self, index: int, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Sampler.step`."""
        predicted = output[:, : x.shape[1]]
        clean = self.predict_clean(index, x, predicted, clip=self.clip)
        mean = float(self.reverse.mean_of_clean[index]) * clean + float(self.reverse.mean_of_noisy[index]) * x
        if index == 0 or noise is None:
            return mean
        return mean + self._deviation(index, output[:, x.shape[1] :]) * noise

    def _deviation(self, index: int, values: Tensor) -> Tensor | float:
        low, high = float(self.reverse.small_log_variance[index]), float(self.reverse.log_betas[index])
        if self.variance == "learned":
            return torch.exp(0.5 * (low + (high - low) * (values + 1) / 2))
        return math.exp(0.5 * (low if self.variance == "fixed_small" else high))


class DDIMSampler(Sampler):
    """The generalized sampler of DDIM, deterministic at `eta` = 0 (DDIM, eq. 12 and 16)."""

    def __init__(
        self,
        alphas_cumprod: Table,
        timesteps: Sequence[int],
        *,
        eta: float = 0.0,
        clip: bool = False,
        last_alpha: float = 1.0,
    ) -> None:
        """`eta` scales the noise of a step, 1 being DDPM's; `clip` cuts the estimate of x_0 to [-1, 1] and takes the
        noise from what is left (iDDPM); `last_alpha` is alpha-bar[0] in latent diffusion, 1 elsewhere."""
        super().__init__(alphas_cumprod, timesteps, last_alpha=last_alpha)
        self.clip = clip
        ratio = (1 - self.alphas_before) / (1 - self.alphas)
        self.sigmas = eta * np.sqrt(ratio * (1 - self.alphas / self.alphas_before))

    def adds_noise(self, index: int) -> bool:
        """Where sigma is not 0: nowhere at `eta` = 0."""
        return bool(self.sigmas[index] > 0)

    def step(self, index: int, x: Tensor, output: Tensor, noise: Tensor | None = None) -> Tensor:
        """See `Sampler.step`."""
        predicted = output[:, : x.shape[1]]
        clean = self.predict_clean(index, x, predicted, clip=self.clip)
        if self.clip:
            alpha = float(self.alphas[index])
            predicted = (math.sqrt(1 / alpha) * x - clean) / math.sqrt(1 / alpha - 1)
        before, sigma = float(self.alphas_before[index]), float(self.sigmas[index])
        x = math.sqrt(before) * clean + math.sqrt(max(0.0, 1 - before - sigma**2)) * predicted
        return x if noise is None else x + sigma * noise


# -- helpers ----------------------------------------------------------------------------------------------------------


def _at(table: Tensor, timesteps: Tensor) -> Tensor:
    """Entries of a table (T,) as (B, 1, 1, 1)."""
    return table[timesteps].view(-1, 1, 1, 1)


def _log(table: Table) -> Table:
    return np.log(np.maximum(table, _LEAST_VARIANCE))
