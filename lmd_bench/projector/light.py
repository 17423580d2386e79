"""A light autoencoder of our own: a fixed invertible transform, a nearly linear encoder, a heavy decoder.

After the idea of WaLLoC (Jacobellis and Yadwadkar, "Learned Compression for Compressed Learning", arXiv 2412.09405): a
frozen projector's encoder runs in every training step of a method and its decoder in none, so the work goes to the
decoder. All of this is written for continuous latents: there is no entropy bottleneck and no noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final, Literal

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.errors import ConfigError
from lmd_bench.projector.base import NetworkProjector

Transform = Literal["wavelet", "space_to_depth"]
Wavelet = Literal["haar", "cdf53", "cdf97"]

_RGB = 3
_BANDS_OF_A_LEVEL = 4
# Lifting steps, odd samples first, and the gain of the low band; the high band's is its reciprocal. Cohen, Daubechies,
# Feauveau, "Biorthogonal bases of compactly supported wavelets" (1992); factored by Daubechies and Sweldens,
# "Factoring wavelet transforms into lifting steps" (1998), sec. 7.
_LIFTING: Final[dict[str, tuple[tuple[float, ...], float]]] = {
    "cdf53": ((-0.5, 0.25), math.sqrt(2.0)),
    "cdf97": ((-1.586134342059924, -0.052980118572961, 0.882911075530934, 0.443506852043971), 1.149604398860241),
}


class LightAutoencoder(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers has no types
    """Images (B, 3, H, W) in [-1, 1] <-> latents (B, latent_channels, H/factor, W/factor).

    The encoder: an invertible transform of the image into 3 factor^2 bands at latent resolution, and a convolution of
    them straight to the latents, beside one narrow branch with a single nonlinearity. The decoder: a linear guess at
    the bands plus what residual blocks add to it, at latent resolution and up, then the inverse transform.

    factor: pixels to a latent position along each axis, a power of two from 2 on.
    transform: `wavelet`, a packet transform (every band is split again at every level), or `space_to_depth`.
    wavelet: `haar` (orthonormal, looks at no neighbour), or the biorthogonal `cdf53` and `cdf97`, which do.
    encoder_kernel: 3 looks at the 8 neighbouring positions; 1, without a wavelet that looks around, encodes every
        position from its own pixels alone: encoding only the visible ones is then the same and nothing leaks.
    encoder_hidden: channels of the branch with the nonlinearity; 0 leaves the encoder linear.
    decoder_widths, decoder_blocks: channels and residual blocks per level, the first at latent resolution, each
        further one at twice the resolution of the one before; at most log2(factor) + 1 levels.
    sample_size: images it was trained on, px; a note only.

    `quant_conv` and `post_quant_conv`, 1 x 1 on either side of the latents, bear the names they have in diffusers'
    autoencoders, so that shifting and scaling the latents is the same for all of them. Raises ConfigError for values
    that do not go together.
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        factor: int = 8,
        latent_channels: int = 4,
        transform: Transform = "wavelet",
        wavelet: Wavelet = "haar",
        encoder_kernel: int = 3,
        encoder_hidden: int = 64,
        decoder_widths: Sequence[int] = (96, 64, 32),
        decoder_blocks: Sequence[int] = (3, 2, 2),
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        num_levels = _checked_levels(factor, decoder_widths, decoder_blocks)
        _check_choices(latent_channels, transform, wavelet, encoder_kernel, encoder_hidden)
        bands = _RGB * factor**2
        self.encoder = _Encoder(
            _Bands(transform, wavelet, num_levels), bands, latent_channels, encoder_kernel, encoder_hidden
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)
        inner_levels = len(decoder_widths) - 1
        self.decoder = _Decoder(
            _Bands(transform, wavelet, inner_levels),
            _Bands(transform, wavelet, num_levels - inner_levels),
            latent_channels,
            bands,
            decoder_widths,
            decoder_blocks,
        )
        for outer in (self.quant_conv, self.post_quant_conv):
            nn.init.dirac_(outer.weight)
            _zero_bias(outer)

    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, latent_channels, H/factor, W/factor)."""
        latents: Tensor = self.quant_conv(self.encoder(images))
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, latent_channels, h, w) -> images (B, 3, h * factor, w * factor), in [-1, 1] but not clamped."""
        images: Tensor = self.decoder(self.post_quant_conv(latents))
        return images

    def forward(self, images: Tensor) -> Tensor:
        """Images encoded and decoded."""
        return self.decode(self.encode(images))

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last learned layer, whose gradients balance an adversarial loss."""
        weight: Tensor = self.decoder.out.weight
        return weight

    @property
    def sees_neighbours(self) -> bool:
        """Whether a latent depends on pixels outside its own factor x factor square."""
        return bool(self.encoder.bands.looks_around or self.config.encoder_kernel > 1)


class LightProjector(NetworkProjector):
    """LightAutoencoder on images in [-1, 1]; latents as its encoder gives them, times `scale`."""

    model_class = LightAutoencoder
    model: LightAutoencoder
    folded: Tensor | None

    def __init__(self, model: LightAutoencoder, *, name: str, scale: float = 1.0) -> None:
        config = model.config
        super().__init__(
            model, name=name, factor=config["factor"], latent_channels=config["latent_channels"], scale=scale
        )
        self.register_buffer("folded", model.encoder.folded_weight(), persistent=False)

    def _to_latents(self, pixels: Tensor) -> Tensor:
        if self.folded is None:
            return self.model.encode(pixels)
        project = self.model.encoder.project
        squares = functional.pixel_unshuffle(pixels, self.factor).contiguous(memory_format=torch.channels_last)
        projected = functional.conv2d(squares, self.folded, project.bias, padding=project.padding)
        latents: Tensor = self.model.quant_conv(self.model.encoder.finish(projected))
        return latents

    def _to_pixels(self, latents: Tensor) -> Tensor:
        return self.model.decode(latents)


def _checked_levels(factor: int, widths: Sequence[int], blocks: Sequence[int]) -> int:
    """log2 of the factor."""
    levels = max(int(factor).bit_length() - 1, 0)
    if factor < 2 or 2**levels != factor:
        raise ConfigError(f"light projector: factor {factor} must be a power of two from 2 on")
    if not 1 <= len(widths) <= levels + 1 or len(widths) != len(blocks):
        raise ConfigError(
            f"light projector: decoder_widths {tuple(widths)} and decoder_blocks {tuple(blocks)} need one number per"
            f" level each, at most {levels + 1} for factor {factor}"
        )
    if min(widths) < 1 or min(blocks) < 0:
        raise ConfigError(f"light projector: decoder_widths must be 1 or more, decoder_blocks 0 or more; got {widths}")
    return levels


def _check_choices(latent_channels: int, transform: str, wavelet: str, kernel: int, hidden: int) -> None:
    if transform not in ("wavelet", "space_to_depth"):
        raise ConfigError(f"light projector: transform {transform!r} must be wavelet or space_to_depth")
    if wavelet not in ("haar", *_LIFTING):
        raise ConfigError(f"light projector: wavelet {wavelet!r} must be haar, {' or '.join(_LIFTING)}")
    if kernel not in (1, 3):
        raise ConfigError(f"light projector: encoder_kernel {kernel} must be 1 or 3")
    if latent_channels < 1 or hidden < 0:
        raise ConfigError(
            f"light projector: latent_channels {latent_channels} must be 1 or more, encoder_hidden {hidden} 0 or more"
        )


# -- the networks -----------------------------------------------------------------------------------------------------


class _Encoder(nn.Module):
    """Bands -> latents by one convolution, plus a narrow branch with one nonlinearity."""

    def __init__(self, bands: _Bands, num_bands: int, latent_channels: int, kernel: int, hidden: int) -> None:
        super().__init__()
        self.bands = bands
        # One convolution for both: it reads the bands once, and they are by far the widest thing here.
        self.project = nn.Conv2d(num_bands, latent_channels + hidden, kernel, padding=kernel // 2)
        self.mix = nn.Conv2d(hidden, latent_channels, 1) if hidden else None
        self.split = (latent_channels, hidden)

    def forward(self, images: Tensor) -> Tensor:
        return self.finish(self.project(self.bands.split(images)))

    def finish(self, projected: Tensor) -> Tensor:
        """From the convolution's output, both branches beside each other, to the latents."""
        linear, hidden = projected.split(self.split, dim=1)
        if self.mix is None:
            return torch.as_tensor(linear)
        latents: Tensor = linear + self.mix(functional.silu(hidden))
        return latents

    @torch.no_grad()
    def folded_weight(self) -> Tensor | None:
        """Weight of `project` for `pixel_unshuffle` in place of the bands; None where these look at neighbours."""
        if self.bands.looks_around:
            return None
        weight = self.project.weight
        # Row i: the bands of a square whose i-th number is 1. In float64, since the result may be kept in bf16.
        unit = torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)[..., None, None]
        matrix = self.bands.split(functional.pixel_shuffle(unit, 2**self.bands.levels))[..., 0, 0]
        return torch.einsum("obhw,ib->oihw", weight.double(), matrix).to(
            weight.dtype, memory_format=torch.channels_last
        )


class _Decoder(nn.Module):
    """Latents -> a linear guess at the bands, corrected by residual blocks on the way up -> images."""

    def __init__(
        self,
        inner: _Bands,
        outer: _Bands,
        latent_channels: int,
        num_bands: int,
        widths: Sequence[int],
        blocks: Sequence[int],
    ) -> None:
        super().__init__()
        self.inner, self.outer = inner, outer
        self.guess = nn.Conv2d(latent_channels, num_bands, 3, padding=1)
        self.enter = nn.Conv2d(latent_channels, widths[0], 3, padding=1)
        stages: list[nn.Module] = []
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if level:
                stages.append(_Up(widths[level - 1], width))
            stages += [_Block(width) for _ in range(count)]
        self.stages = nn.Sequential(*stages)
        self.out = nn.Conv2d(widths[-1], num_bands // _BANDS_OF_A_LEVEL ** (len(widths) - 1), 3, padding=1)

    def forward(self, latents: Tensor) -> Tensor:
        correction = self.out(_normalised(self.stages(self.enter(latents))))
        return self.outer.join(self.inner.join(self.guess(latents)) + correction)


class _Up(nn.Module):
    """Twice the resolution: each position's channels are dealt out to four."""

    def __init__(self, width: int, next_width: int) -> None:
        super().__init__()
        self.expand = nn.Conv2d(width, next_width * 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.pixel_shuffle(self.expand(x), 2)


class _Block(nn.Module):
    """Pre-normalised residual block of two 3 x 3 convolutions; the identity when training starts."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)
        _zero_bias(self.second)

    def forward(self, x: Tensor) -> Tensor:
        change: Tensor = self.second(functional.silu(self.first(_normalised(x))))
        return x + change


def _zero_bias(layer: nn.Conv2d) -> None:
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def _normalised(x: Tensor) -> Tensor:
    """Every position's channels at a root mean square of 1.

    Per position, not over the map as GroupNorm: crops and whole images, visible parts and wholes are then alike.
    """
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-6)


# -- the fixed transforms ---------------------------------------------------------------------------------------------


class _Bands(nn.Module):
    """An invertible transform of `levels` halvings: (B, C, H, W) <-> (B, C 4^levels, H/2^levels, W/2^levels)."""

    def __init__(self, transform: str, wavelet: str, levels: int) -> None:
        super().__init__()
        self.kind = wavelet if transform == "wavelet" else transform
        self.levels = levels

    @property
    def looks_around(self) -> bool:
        """Whether a band depends on pixels outside its own 2^levels square."""
        return self.kind in _LIFTING

    def split(self, x: Tensor) -> Tensor:
        """Analysis. The wavelets' coarsest bands come first."""
        if self.kind == "space_to_depth":
            return functional.pixel_unshuffle(x, 2**self.levels)
        for _ in range(self.levels):
            x = torch.cat([half for part in _halve(x, -1, self.kind) for half in _halve(part, -2, self.kind)], dim=1)
        return x

    def join(self, x: Tensor) -> Tensor:
        """Synthesis: the inverse of `split`."""
        if self.kind == "space_to_depth":
            return functional.pixel_shuffle(x, 2**self.levels)
        for _ in range(self.levels):
            parts = x.chunk(_BANDS_OF_A_LEVEL, dim=1)
            sides = [_unite(parts[i], parts[i + 1], -2, self.kind) for i in (0, 2)]
            x = _unite(sides[0], sides[1], -1, self.kind)
        return x


def _halve(x: Tensor, axis: int, wavelet: str) -> tuple[Tensor, Tensor]:
    """Low and high band along an axis (-1 or -2), each of half its length."""
    pairs = x.unflatten(axis, (-1, 2))
    even, odd = pairs.select(_pair_axis(axis), 0), pairs.select(_pair_axis(axis), 1)
    if wavelet == "haar":
        return (even + odd) * math.sqrt(0.5), (even - odd) * math.sqrt(0.5)
    steps, gain = _LIFTING[wavelet]
    for index, step in enumerate(steps):
        if index % 2 == 0:
            odd = odd + step * (even + _after(even, axis))
        else:
            even = even + step * (odd + _before(odd, axis))
    return even * gain, odd / gain


def _unite(low: Tensor, high: Tensor, axis: int, wavelet: str) -> Tensor:
    """The inverse of `_halve`: the same steps, taken back in reverse."""
    if wavelet == "haar":
        even, odd = (low + high) * math.sqrt(0.5), (low - high) * math.sqrt(0.5)
    else:
        steps, gain = _LIFTING[wavelet]
        even, odd = low / gain, high * gain
        for index, step in reversed(list(enumerate(steps))):
            if index % 2 == 0:
                odd = odd - step * (even + _after(even, axis))
            else:
                even = even - step * (odd + _before(odd, axis))
    return torch.stack((even, odd), dim=_pair_axis(axis)).flatten(*((-2, -1) if axis == -1 else (-3, -2)))


def _pair_axis(axis: int) -> int:
    """Where the two members of a pair lie once `axis` is cut into pairs: right behind it."""
    return -1 if axis == -1 else -2


def _after(x: Tensor, axis: int) -> Tensor:
    """Each value's successor along an axis; the last is its own, as in a signal mirrored at its end."""
    length = x.shape[axis]
    return torch.cat((x.narrow(axis, 1, length - 1), x.narrow(axis, length - 1, 1)), dim=axis)


def _before(x: Tensor, axis: int) -> Tensor:
    """Each value's predecessor along an axis; the first is its own."""
    return torch.cat((x.narrow(axis, 0, 1), x.narrow(axis, 0, x.shape[axis] - 1)), dim=axis)
