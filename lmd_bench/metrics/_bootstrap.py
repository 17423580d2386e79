"""Replicate runs drawn from one run: a trend, autocorrelated residuals, and resamples of both.

The series is modelled as y_t = (X c)_t + r_t with r_t = rho r_{t-1} + e_t. Three things here go beyond resampling
blocks of r_t itself, because blocks alone missed the coverage wanted of them (tests/metrics/test_coverage.py):

- Blocks of T^(1/3) steps (5 at T = 150) break a correlation of 0.8, which spans 10-30 steps. So rho is estimated,
  blocks of the whitened e_t are resampled, and r_t is built up again from them ("prewhitened" block
  bootstrap); the blocks keep what an AR(1) leaves over.
- rho and the amount of smoothing are estimated by restricted likelihood (REML; Patterson & Thompson 1971) on a
  grid, which does not mistake slow noise for trend as badly as least squares or cross-validation. In a short run
  they are still uncertain, so each group of resamples draws its own pair from the likelihood.
- The fitted trend carries some of the noise. Resamples around one fixed trend agree too well about counts
  such as the number of loss decreases; so each group also draws its trend, see `trend_spread`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Array = NDArray[np.float64]

_RHO_GRID = np.tanh(np.arange(-0.45, 1.86, 0.05))
"""Autocorrelations tried, -0.42 to 0.95; even steps of atanh(rho), finest where the variance reacts most."""
_SMOOTHING_GRID = 10.0 ** np.arange(-4.0, 7.5, 0.75)
"""Penalties tried, in units of residual variance over squared second difference of the spline coefficients."""
_MAX_TOKEN_KNOTS = 40


def spline_design(num_steps: int) -> tuple[Array, Array]:
    """Cubic B-splines (T, K) and their second-difference penalty (K, K) for a curve over steps 1..T.

    Knots lie evenly in sqrt(step): a loss bends most at the start. P-splines of Eilers & Marx (1996).
    """
    from scipy.interpolate import BSpline

    num_basis = max(6, int(2 * math.log2(num_steps)))
    position = np.sqrt(np.arange(1, num_steps + 1) / num_steps)
    inner = np.linspace(position[0], position[-1], num_basis - 2)
    knots = np.r_[[inner[0]] * 3, inner, [inner[-1]] * 3]
    difference = np.diff(np.eye(num_basis), 2, axis=0)
    return BSpline.design_matrix(position, knots, 3).toarray(), difference.T @ difference


def token_design(tokens: NDArray[np.float64] | None, num_steps: int) -> Array:
    """Design (T, K) of a mean duration per token count; without `tokens` (T,) one common mean.

    One indicator column per count; where the counts are too many to have a mean of their own (over 40, or under 12
    steps each) the mean is a straight line between evenly spaced ranks of count.
    """
    if tokens is None:
        return np.ones((num_steps, 1))
    counts = np.unique(tokens)
    limit = max(1, min(_MAX_TOKEN_KNOTS, num_steps // 12))
    if limit == 1:
        return np.ones((num_steps, 1))
    if counts.size > limit:
        counts = counts[np.round(np.linspace(0, counts.size - 1, limit)).astype(int)]
    return np.stack([np.interp(tokens, counts, row) for row in np.eye(counts.size)], axis=1)


@dataclass(frozen=True)
class TrendFit:
    """A series (T,) fitted on the grid of (rho, smoothing) pairs: coefficients (P, K), variances and weights (P,)."""

    series: Array
    coefficients: Array
    variances: Array
    weights: Array


class AutoregressiveTrend:
    """The model above for one design; fits any number of series of that length.

    `design` (T, K); `penalty` (K, K) positive semi-definite with a null space of dimension 2, or None for a
    plain regression.
    """

    def __init__(self, design: Array, penalty: Array | None = None) -> None:
        self.design = design
        self.num_steps, self.num_basis = design.shape
        rho = _RHO_GRID[:, None, None]
        inner, lagged, ends = _gram(design, design)
        whitened = inner * (1 + rho**2) - rho * lagged - rho**2 * ends
        smoothing = _SMOOTHING_GRID if penalty is not None else np.ones(1)
        rank = self.num_basis - 2 if penalty is not None else 0
        if penalty is None:
            penalty = np.zeros_like(inner)
        precision = whitened[:, None] + smoothing[None, :, None, None] * penalty
        # A trace of ridge keeps unused basis functions solvable; far below the resolution of any series.
        scale = np.trace(inner) / self.num_basis
        precision = precision + 1e-10 * scale * np.eye(self.num_basis)
        self._covariance = np.linalg.inv(precision)
        self._precision_root = np.linalg.cholesky(precision)
        self._log_det = np.linalg.slogdet(precision)[1] - rank * np.log(smoothing) - np.log1p(-(_RHO_GRID**2))[:, None]
        self._dof = self.num_steps - (self.num_basis - rank)

    def fit(self, series: Array) -> TrendFit:
        """REML over the grid. `series` (T,) finite."""
        rho = _RHO_GRID[:, None]
        inner, lagged, ends = _gram(self.design, series[:, None])
        projected = (inner * (1 + rho**2).T - rho.T * lagged - (rho**2).T * ends).T
        square, lag, end = (float(g[0, 0]) for g in _gram(series[:, None], series[:, None]))
        total = square * (1 + _RHO_GRID**2) - _RHO_GRID * lag - _RHO_GRID**2 * end
        coefficients = np.matmul(self._covariance, projected[:, None, :, None])[..., 0]
        rss = total[:, None] - np.einsum("rlk,rk->rl", coefficients, projected)
        # A noiseless series leaves rss at rounding error, of either sign.
        rss = np.maximum(rss, 1e-14 * max(square, 1e-300))
        log_likelihood = -0.5 * (self._log_det + self._dof * np.log(rss))
        # One factor 1 - rho^2 makes it flat in rho on a grid even in atanh(rho); the other leans away from a random
        # walk, whose resamples a short run can neither confirm nor rule out.
        log_prior = 2 * np.log1p(-(_RHO_GRID**2))[:, None]
        weights = np.exp(log_likelihood + log_prior - (log_likelihood + log_prior).max())
        return TrendFit(
            series,
            coefficients.reshape(-1, self.num_basis),
            (rss / self._dof).ravel(),
            (weights / weights.sum()).ravel(),
        )

    def resample(self, fit: TrendFit, num_resamples: int, rng: np.random.Generator, *, trend_spread: float) -> Array:
        """Replicate series (num_resamples, T).

        `trend_spread` scales the trend's posterior deviation when a trend is drawn: 0 fixes it, 1 draws it in
        full, which counts the slow part of the noise twice (once in the trend, once in the residuals).
        """
        return np.concatenate(list(self._groups(fit, num_resamples, rng, trend_spread)))

    def _groups(
        self, fit: TrendFit, num_resamples: int, rng: np.random.Generator, trend_spread: float
    ) -> Iterator[Array]:
        sizes = _group_sizes(num_resamples)
        roots = self._precision_root.reshape(-1, self.num_basis, self.num_basis)
        for size, pair in zip(sizes, rng.choice(fit.weights.size, len(sizes), p=fit.weights), strict=True):
            rho = float(_RHO_GRID[pair // (fit.weights.size // _RHO_GRID.size)])
            trend = self.design @ fit.coefficients[pair]
            variance = float(fit.variances[pair]) * self._dof / rng.chisquare(self._dof)
            noise = _resampled_residuals(fit.series - trend, rho, variance, size, rng)
            if trend_spread:
                shift = np.linalg.solve(roots[pair].T, rng.standard_normal(self.num_basis))
                trend = trend + trend_spread * math.sqrt(variance) * (self.design @ shift)
            yield trend + noise


def _gram(a: Array, b: Array) -> tuple[Array, Array, Array]:
    """a'b, the sum of its two lag-one forms, and its first and last rows' share: what AR(1) whitening needs."""
    return (
        a.T @ b,
        a[1:].T @ b[:-1] + a[:-1].T @ b[1:],
        np.outer(a[0], b[0]) + np.outer(a[-1], b[-1]),
    )


def _group_sizes(num_resamples: int) -> list[int]:
    num_groups = max(1, min(50, num_resamples // 8))
    return [len(part) for part in np.array_split(np.arange(num_resamples), num_groups)]


def _resampled_residuals(
    residuals: Array, rho: float, variance: float, num_resamples: int, rng: np.random.Generator
) -> Array:
    """Residuals (B, T) rebuilt from blocks of the whitened ones, which are scaled to `variance`."""
    from scipy.signal import lfilter

    num_steps = residuals.size
    innovations = residuals[1:] - rho * residuals[:-1]
    innovations = innovations - innovations.mean()
    power = float(np.mean(innovations**2))
    innovations = innovations * math.sqrt(variance / power) if power > 0 else innovations
    block = max(1, round(num_steps ** (1 / 3)))
    starts = rng.integers(0, num_steps - 1, (num_resamples, -(-num_steps // block)))
    circular = np.concatenate([innovations, innovations[: block - 1]])  # every step is in equally many blocks
    blocks = np.lib.stride_tricks.sliding_window_view(circular, block)[starts]
    drawn = blocks.reshape(num_resamples, -1)[:, :num_steps]
    drawn[:, 0] /= math.sqrt(1 - rho**2)  # start from the stationary distribution
    result: Array = lfilter([1.0], [1.0, -rho], drawn, axis=-1)
    return result
