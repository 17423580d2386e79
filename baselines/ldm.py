"""LDM, latent diffusion (Rombach et al. 2021, arXiv 2112.10752), as in github.com/CompVis/latent-diffusion."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._diffusion import DiffusionConfig, DiffusionMethod, steps_text
from baselines._gaussian import (
    DDIMSampler,
    GaussianDiffusion,
    ddim_quadratic,
    ddim_uniform,
    ldm_quadratic,
    ldm_uniform,
    noise_schedule,
)
from baselines._openai_layout import OpenAISizes, load_openai, sizes_from_openai, to_openai
from baselines._unet import build_unet
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec, MethodConfig
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask
from lmd_bench.nn.official import listed, reading_sizes
from lmd_bench.projector.base import LatentProjector, NetworkProjector
from lmd_bench.projector.config import ProjectorConfig, check_projector
from lmd_bench.projector.latent_method import LatentMethod, NoProjector
from lmd_bench.projector.open import open_projector

_PUBLISHED_SIZE_PX = 256
_PUBLISHED_FACTOR = 4
_PUBLISHED_TIMESTEPS = 1000


class LDMConfig(DiffusionConfig):
    """Options of LDM; the defaults are the LSUN bedrooms model on VQ-f4 latents of 64 x 64 x 3, 274,056,163 parameters.

    `projector.scale` is LDM's scale factor: 1 for VQ latents, the inverse of their deviation for KL's.
    """

    projector: ProjectorConfig
    """The frozen first stage. LDM's VQ latents lie before the codebook, and are quantised before they are decoded; of a
    KL's posterior the mode is taken, where the authors draw from it."""
    block_out_channels: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(224, 448, 672, 896), min_length=1)
    """Channels of each resolution, finest first; each further one halves the side of the latent map."""
    attention_levels: tuple[int, ...] = (1, 2, 3)
    attention_head_dim: int | None = Field(default=32, ge=1)
    """Channels per attention head, whatever the width; None, or left out beside `num_heads`: that says."""
    num_inference_steps: int = Field(default=200, ge=2)
    """Steps of the DDIM sampler when reconstructing or sampling. Where it does not divide T, the authors' spacing takes
    more."""
    noise_schedule: Literal["scaled_linear"] = "scaled_linear"
    """Square roots of the betas evenly spaced, from 0.0015 to 0.0195."""
    eta: float = Field(default=1.0, ge=0, le=1)
    """Noise of the sampler: 0 deterministic, 1 as DDPM's."""
    spacing: Literal["uniform", "quadratic"] = "uniform"
    """Which timesteps are visited: every (T // n)-th, or squares of evenly spaced numbers up to 0.8 T."""
    ddim_offset: bool = True
    """As released: every timestep of the sampler is one too high, and its last step ends at the noise of timestep 0.
    False: as in DDIM's paper, timesteps from 0, down to no noise."""

    @model_validator(mode="before")
    @classmethod
    def _given_heads_win(cls, values: Any) -> Any:
        """`num_heads` alone takes the place of the default `attention_head_dim`."""
        if isinstance(values, Mapping) and values.get("num_heads") is not None:
            return {"attention_head_dim": None, **values}
        return values

    @model_validator(mode="after")
    def _offset_fits(self) -> LDMConfig:
        try:
            self.inference_timesteps()
        except ValueError:
            steps, asked = self.num_train_timesteps, self.num_inference_steps
            fewer = f"a divisor of {steps} up to {steps // 2}, or " if self.spacing == "uniform" else ""
            raise ValueError(
                f"num_inference_steps: {asked} with ddim_offset ends beyond the last timestep {steps - 1}; use "
                f"{fewer}ddim_offset: false"
            ) from None
        return self

    def inference_timesteps(self) -> list[int]:
        """Timesteps that the sampler visits, ascending. Raises ValueError where the offset leads beyond the last."""
        choices = {
            ("uniform", True): ldm_uniform,
            ("uniform", False): ddim_uniform,
            ("quadratic", True): ldm_quadratic,
            ("quadratic", False): ddim_quadratic,
        }
        return choices[self.spacing, self.ddim_offset](self.num_train_timesteps, self.num_inference_steps)


class LDM(LatentMethod, DiffusionMethod):
    """A U-Net that predicts the noise in latents of a frozen autoencoder."""

    Config: ClassVar[type[MethodConfig]] = LDMConfig
    config: LDMConfig

    def __init__(self, config: LDMConfig, data: DataSpec, *, projector: LatentProjector | None = None) -> None:
        """Open the configured projector, or take the one that is given, and build the model."""
        super().__init__(config, data)
        opened = open_projector(config.projector) if projector is None else projector
        side, channels = _latent_side(config, data.image_size, opened.factor), opened.latent_channels
        self.unet = build_unet(config, image_size=side, in_channels=channels, out_channels=channels, flavour="openai")
        self.projector = opened
        self.diffusion = GaussianDiffusion(noise_schedule(config.noise_schedule, config.num_train_timesteps))
        alphas = self.diffusion.alphas_cumprod
        self.sampler = DDIMSampler(
            alphas,
            config.inference_timesteps(),
            eta=config.eta,
            last_alpha=float(alphas[0]) if config.ddim_offset else 1.0,
        )

    @classmethod
    def check(cls, config: LDMConfig, data: DataSpec) -> None:
        """Raise ConfigError unless the latent map can be halved as often as there are levels; WeightsError for a
        projector that cannot be used."""
        _latent_side(config, data.image_size, check_projector(config.projector, data.image_size).factor)

    @classmethod
    def plan_text(cls, config: LDMConfig, data: DataSpec) -> str:
        """The latent map, and the true number of reverse steps where it is not the one asked for."""
        info = check_projector(config.projector, data.image_size)
        side = data.image_size // info.factor
        latents = f"latents of {side} x {side} x {info.latent_channels}"
        steps = steps_text(len(config.inference_timesteps()), config.num_inference_steps)
        return latents if steps is None else f"{latents}; {steps}"

    # -- the latent space -----------------------------------------------------------------------------------------

    def clean_inputs(self, inputs: Tensor) -> Tensor:
        """Latents (B, C, h, w) as `prepare` or a cache gave them."""
        return inputs

    def to_space(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] to latents (B, C, h, w)."""
        return self.projector.encode(images)

    def to_images(self, x: Tensor) -> Tensor:
        """Latents decoded."""
        return self.decode(x)

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1]; VQ latents are quantised first, as LDM's first stage does."""
        return self.projector.decode(latents, quantize=True)

    @property
    def space_shape(self) -> tuple[int, int, int]:
        """That of the latents."""
        return self.latent_shape

    def known_part(self, images: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of images whose `hidden` (B, 1, S, S) pixels hold the mean colour of the visible ones, and which
        latent positions (B, 1, h, w) stand for any hidden pixel.

        A latent sees its neighbours through the projector, so known ones know the filling near hidden parts.
        """
        return self.projector.encode(fill_with_visible_mean(images, hidden)), self._hidden_positions(hidden)

    def _hidden_positions(self, hidden: Tensor) -> Tensor:
        return F.max_pool2d(hidden.float(), self.projector.factor).bool()

    @torch.no_grad()
    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor | None:
        """As `reconstruct`, with latents of the whole images known; None in pixel space, where nothing leaks."""
        if self.projector_name is None:
            return None
        hidden = self._hidden_positions(pixel_mask(mask, self.data.image_size))
        return self.complete(self.projector.encode(images), hidden)

    # -- the authors' checkpoints ---------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        projector: LatentProjector | ProjectorConfig | None = None,
        image_size: int | None = None,
        ema: bool = False,
        **options: Any,
    ) -> LDM:
        """LDM with the weights of an authors' checkpoint (its "state_dict" entry).

        Channels, attention, depth and T are read off the tensors; `options` are those of `LDMConfig`, and win.
        `ema` takes the moving average of the weights, which the authors sample with. The checkpoint's own first stage
        is left out: give it as a projector, imported by `lmd-bench lsp import`, or the configuration of one. Without
        either the method takes latents of a factor 4, and encoding images raises WeightsError. `image_size` (px)
        leaves no trace in the weights: 256, that of all published models of this kind, unless it is given.

        Left out by name: `first_stage_model.*`; the moving average, or where `ema` takes it the weights themselves;
        tables of the noise schedule, after `betas` was compared with this method's, and of the loss's weights;
        `scale_factor`, after comparison with the projector's scale. Raises WeightsError for any other key that is not
        the U-Net's, for keys of it that do not fit, and where one of the comparisons fails.
        """
        weights = _unet_weights(state_dict, ema=ema)
        sizes = sizes_from_openai(weights)
        _require_plain(sizes)
        named = projector if isinstance(projector, ProjectorConfig) else ProjectorConfig(kind="pixels")
        own = {"projector": named, "num_train_timesteps": _num_timesteps(state_dict), **_options(sizes)}
        _require_schedule(state_dict, {**own, **options}["num_train_timesteps"])
        with reading_sizes():
            config = LDMConfig(**{**own, **options})
        if isinstance(projector, ProjectorConfig):
            projector = open_projector(projector)
        opened = projector or NoProjector(sizes.in_channels, factor=_PUBLISHED_FACTOR)
        _require_fitting_latents(opened, sizes, state_dict)
        with reading_sizes():
            method = cls(config, DataSpec(image_size or _PUBLISHED_SIZE_PX), projector=opened)
        load_openai(method.unet, weights)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The U-Net's weights in the authors' layout; `from_official` of them is this model bit for bit.

        What `from_official` leaves out is not given back: first stage, moving average, schedule and `scale_factor`.
        """
        return {f"{_UNET}{name}": tensor for name, tensor in to_openai(self.unet).items()}


def _latent_side(config: LDMConfig, image_size: int, factor: int) -> int:
    side = image_size // factor
    config.check_side(side, "encoded image's side")
    return side


# -- what lies in a checkpoint ----------------------------------------------------------------------------------------

_UNET = "model.diffusion_model."
_EMA = "model_ema."
_LEFT_OUT = (
    r"first_stage_model\..+",
    r"model_ema\..+",
    r"betas|lvlb_weights|logvar|posterior_\w+",
    r"((sqrt|log|sqrt_recip|sqrt_recipm1)_)?(one_minus_)?alphas_cumprod(_prev)?",
    r"scale_factor",
)
"""What a checkpoint holds beside the U-Net: its autoencoder, which is the projector here and imported apart; the moving
average, read only on demand; tables that follow from the schedule; the latents' scale, an option of the projector."""


def _unet_weights(state_dict: Mapping[str, Tensor], *, ema: bool) -> dict[str, Tensor]:
    """The U-Net's tensors under its own names, every other key accounted for."""
    names = [key.removeprefix(_UNET) for key in state_dict if key.startswith(_UNET)]
    if not names:
        raise WeightsError(
            f"checkpoint: {_UNET}input_blocks.0.0.weight is missing; expected latent-diffusion's layout: give the "
            'mapping of tensors itself, its "state_dict" entry'
        )
    allowed = re.compile("|".join((re.escape(_UNET) + ".+", *_LEFT_OUT)))
    others = [key for key in state_dict if not allowed.fullmatch(key)]
    if others:
        raise WeightsError(
            f"checkpoint is no unconditional latent diffusion: {len(others)} unexpected: {listed(others)}"
        )
    if not ema:
        return {name: state_dict[_UNET + name] for name in names}
    averaged = {name: _EMA + f"diffusion_model.{name}".replace(".", "") for name in names}
    missing = [key for key in averaged.values() if key not in state_dict]
    if missing:
        raise WeightsError(f"checkpoint: no moving average of {len(missing)} weights: {listed(missing)}; leave out ema")
    return {name: state_dict[key] for name, key in averaged.items()}


def _options(sizes: OpenAISizes) -> dict[str, Any]:
    return {
        "block_out_channels": sizes.block_out_channels,
        "attention_levels": sizes.attention_levels,
        "layers_per_block": sizes.layers_per_block,
    }


def _require_plain(sizes: OpenAISizes) -> None:
    if sizes.scale_shift or sizes.in_channels != sizes.out_channels:
        kind = "a time embedding that scales" if sizes.scale_shift else "a learned variance or a condition"
        raise WeightsError(
            f"checkpoint: a U-Net with {kind} ({sizes.in_channels} channels in, {sizes.out_channels} out); LDM's "
            "unconditional models have none"
        )


def _require_fitting_latents(projector: LatentProjector, sizes: OpenAISizes, state_dict: Mapping[str, Tensor]) -> None:
    if projector.latent_channels != sizes.in_channels:
        raise WeightsError(
            f"checkpoint: a U-Net on latents of {sizes.in_channels} channels, projector {projector.name} has "
            f"{projector.latent_channels}; give the first stage it was trained with"
        )
    scale = state_dict.get("scale_factor")
    if scale is None:
        return
    own = projector.scale if isinstance(projector, NetworkProjector) else 1.0
    if scale.numel() == 1 and abs(float(scale) - own) <= 1e-3 * own:
        return
    found = f"checkpoint: scale_factor {scale.flatten()[:1].tolist()}"
    if isinstance(projector, NoProjector):
        raise WeightsError(f"{found}: its latents are its first stage's times that; give the first stage as projector")
    raise WeightsError(
        f"{found}, projector {projector.name} has scale {own:g}; set projector.scale to the checkpoint's"
    )


def _num_timesteps(state_dict: Mapping[str, Tensor]) -> int:
    betas = state_dict.get("betas")
    if betas is None:
        return _PUBLISHED_TIMESTEPS
    if betas.ndim != 1 or len(betas) < 2:
        raise WeightsError(f"checkpoint: betas {tuple(betas.shape)} are no noise schedule; expected (T,), T from 2")
    return len(betas)


def _require_schedule(state_dict: Mapping[str, Tensor], num_timesteps: int) -> None:
    betas = state_dict.get("betas")
    if betas is None:
        return
    own = torch.from_numpy(noise_schedule("scaled_linear", num_timesteps))
    if betas.shape != own.shape or not torch.allclose(betas.double(), own, rtol=1e-5, atol=0.0):
        raise WeightsError(
            f"checkpoint: betas are {betas[0]:g} to {betas[-1]:g} over {len(betas)} steps; the noise schedule here is "
            f"0.0015 to 0.0195 over {num_timesteps} steps, linear in their root"
        )
