"""The kinds of projector that can be trained: how each is built, what regularises its latents, how it is read back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.nn.official import load_exactly
from lmd_bench.projector.codebook import kmeans, positions
from lmd_bench.projector.config import config_of_path, folder_of
from lmd_bench.projector.light import LightAutoencoder
from lmd_bench.projector.load import load_model
from lmd_bench.projector.losses import quantise
from lmd_bench.projector.train_config import LSPTrainOptions
from lmd_bench.seeding import derive_seed

_FIRST_LOGVAR = -6.0
_IMAGES_AT_ONCE = 64
_CONSTANT = 1e-6
_NO_ARCHITECTURE = ("sample_size", "scaling_factor", "shift_factor", "latents_mean", "latents_std", "force_upcast")
"""Values of config.json that no weight depends on."""


@dataclass(frozen=True)
class TrainingPass:
    """One batch through an autoencoder."""

    images: Tensor  # (B, 3, H, W), nominally in [-1, 1]
    latents: Tensor  # (B, d, h, w), as the projector gives them: before any quantisation, without noise
    regulariser: Tensor  # (): what is added to the reconstruction loss for the latents' sake, weighted
    indices: Tensor | None = None  # (B, h, w) int64: codes chosen, where there are any


class TrainableProjector(ABC):
    """An autoencoder in training: images in [-1, 1] to latents and back.

    model: the diffusers model that is saved in the end; it has 1 x 1 convolutions `quant_conv` and `post_quant_conv`
    on either side of its latents.
    """

    model_class: ClassVar[Any]
    also_from: ClassVar[tuple[type[TrainableProjector], ...]] = ()
    """Other kinds whose weights `start_from` can turn into this one's."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    @classmethod
    def build(cls, options: LSPTrainOptions) -> Self:
        """With fresh weights, drawn from the seed alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(options.seed)
            return cls(cls._model(options))

    def start_from(self, path: str) -> None:
        """Takes the weights of a trained projector of the same kind and sizes, a folder or `shipped:NAME`.

        Raises WeightsError for another kind, and naming the tensors that do not fit.
        """
        config = config_of_path(path)
        source = TRAINABLE.get(config.kind)
        if source is None or not (source is type(self) or source in self.also_from):
            raise WeightsError(
                f"init_from {path}: is of kind {config.kind!r}, which cannot be gone on from as this one"
            )
        trained = load_model(source.model_class, folder_of(path, "autoencoder"), torch.float32)
        self._require_same_network(path, dict(trained.config))
        state = trained.state_dict()
        try:
            load_exactly(self.model, state if source is type(self) else self._converted(state))
        except WeightsError as error:
            raise WeightsError(f"init_from {path}: {error}; give the options it was trained with") from None

    def _require_same_network(self, path: str, there: Mapping[str, Any]) -> None:
        """Much of a network leaves no trace in the shapes of its weights (norm groups, the wavelet)."""
        own = dict(self.model.config)
        names = [name for name in own if name in there and not name.startswith("_") and name not in _NO_ARCHITECTURE]
        told = [f"{n} {_plain(there[n])} (now {_plain(own[n])})" for n in names if _plain(there[n]) != _plain(own[n])]
        if told:
            raise WeightsError(
                f"init_from {path}: is another network: {', '.join(told)}; give the options it was trained with"
            )

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Weights of a kind in `also_from` as this kind's."""
        raise NotImplementedError

    @classmethod
    def reopen(cls, folder: Path) -> Self:
        """From a folder that `model.save_pretrained` wrote, as float32."""
        model = cls.model_class.from_pretrained(
            folder, local_files_only=True, low_cpu_mem_usage=False, use_safetensors=True, torch_dtype=torch.float32
        )
        return cls(model)

    @classmethod
    @abstractmethod
    def _model(cls, options: LSPTrainOptions) -> nn.Module:
        """The model, from torch's global generator."""

    @abstractmethod
    def forward(self, images: Tensor, options: LSPTrainOptions, step: int) -> TrainingPass:
        """A batch (B, 3, H, W) in [-1, 1] at a step, with gradients."""

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] -> latents (B, d, h, w), without noise or quantisation."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents as they are -> images (B, 3, H, W), nominally in [-1, 1]."""

    @property
    def last_layer(self) -> Tensor:
        """Weight of the decoder's last convolution."""
        weight: Tensor = self.model.decoder.conv_out.weight
        return weight

    @property
    def codebook(self) -> nn.Parameter | None:
        """(K, d), of kinds that have one."""
        return None

    def encode_all(self, images: Tensor) -> Tensor:
        """Latents of images (N, 3, H, W), float in [0, 1] or uint8, a few at a time and without gradients."""
        with torch.no_grad():
            return torch.cat([self.encode(_pixels(part)) for part in images.split(_IMAGES_AT_ONCE)])

    def decode_all(self, latents: Tensor) -> Tensor:
        """Images in [0, 1] of latents (N, d, h, w), a few at a time and without gradients."""
        with torch.no_grad():
            parts = [self.decode(part) for part in latents.split(_IMAGES_AT_ONCE)]
        return (torch.cat(parts).float() * 0.5 + 0.5).clamp(0.0, 1.0)

    def normalise(self, images: Tensor) -> None:
        """Gives the latents of images (N, 3, H, W), uint8 or in [0, 1], mean 0 and standard deviation 1 per channel.

        The shift and the scale go into the two 1 x 1 convolutions, so that reconstructions stay what they are.
        """
        latents = self.encode_all(images)
        self._rescale(latents.mean((0, 2, 3)), _usable(latents.std((0, 2, 3))))

    @torch.no_grad()
    def _rescale(self, mean: Tensor, std: Tensor) -> None:
        """Latents become (latents - mean) / std, both (d,)."""
        outer, inner, channels = self.model.quant_conv, self.model.post_quant_conv, len(mean)
        inner.bias += (inner.weight * mean.view(1, -1, 1, 1)).sum((1, 2, 3))
        inner.weight *= std.view(1, -1, 1, 1)
        outer.weight[:channels] /= std.view(-1, 1, 1, 1)
        outer.bias[:channels] = (outer.bias[:channels] - mean) / std


def _usable(std: Tensor) -> Tensor:
    """Standard deviations to divide by: 1 in place of those of channels that are constant."""
    return torch.where(std > _CONSTANT, std, torch.ones_like(std))


def _plain(value: Any) -> Any:
    """A value of config.json, which knows no tuples."""
    return list(value) if isinstance(value, tuple) else value


def _pixels(images: Tensor) -> Tensor:
    values = images if images.is_floating_point() else images.float() / 255.0
    return (values * 2.0 - 1.0).contiguous(memory_format=torch.channels_last)


def _network_values(options: LSPTrainOptions) -> dict[str, Any]:
    """What diffusers' AutoencoderKL and VQModel have in common."""
    blocks = len(options.block_out_channels)
    return {
        "down_block_types": ("DownEncoderBlock2D",) * blocks,
        "up_block_types": ("UpDecoderBlock2D",) * blocks,
        "block_out_channels": options.block_out_channels,
        "layers_per_block": options.layers_per_block,
        "latent_channels": options.latent_channels,
        "norm_num_groups": options.norm_num_groups,
        "sample_size": options.image_size,
        "scaling_factor": 1.0,  # latents leave the encoder at unit scale, see `normalise`
        "mid_block_add_attention": options.mid_attention,
    }


class KLTrainable(TrainableProjector):
    """diffusers' AutoencoderKL: latents are the mode of a Gaussian held towards the standard normal one."""

    model_class = AutoencoderKL

    @classmethod
    def _model(cls, options: LSPTrainOptions) -> nn.Module:
        model: Any = AutoencoderKL(**_network_values(options))
        # At a log-variance of 0 the posterior's noise drowns the first latents and training stands still for long.
        nn.init.constant_(model.quant_conv.bias[options.latent_channels :], _FIRST_LOGVAR)
        checked: nn.Module = model
        return checked

    def forward(self, images: Tensor, options: LSPTrainOptions, step: int) -> TrainingPass:
        posterior = self.model.encode(images).latent_dist
        generator = torch.Generator().manual_seed(derive_seed("projector-posterior", options.seed, step))
        noise = torch.randn(posterior.mean.shape, generator=generator).to(images.device)
        rebuilt = self.model.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        return TrainingPass(rebuilt, posterior.mean.detach(), options.kl_weight * kl)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(images).latent_dist.mode()
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.model.decode(latents).sample
        return images

    @torch.no_grad()
    def _rescale(self, mean: Tensor, std: Tensor) -> None:
        super()._rescale(mean, std)
        self.model.quant_conv.bias[len(mean) :] -= 2.0 * std.log()  # the posterior's log-variance moves along


class VQTrainable(TrainableProjector):
    """diffusers' VQModel, trained through `losses.quantise` (LMD eq. 2 to 4)."""

    model_class = VQModel
    also_from = (KLTrainable,)

    @classmethod
    def _model(cls, options: LSPTrainOptions) -> nn.Module:
        values = _network_values(options) | {"num_vq_embeddings": options.num_codes}
        model: nn.Module = VQModel(**values)  # its codebook starts uniform in +-1/K, as released
        return model

    def _converted(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A KL autoencoder's weights without its log-variance: its latents' mean is what this model encodes to.

        The last 3 x 3 and the 1 x 1 convolution of its encoder, both linear, become one; the codebook is this model's.
        """
        mean = state["quant_conv.weight"].chunk(2)[0].flatten(1)
        outer = {
            "encoder.conv_out.weight": torch.tensordot(mean, state["encoder.conv_out.weight"], dims=1),
            "encoder.conv_out.bias": mean @ state["encoder.conv_out.bias"] + state["quant_conv.bias"].chunk(2)[0],
            "quant_conv.weight": torch.eye(len(mean))[:, :, None, None],
            "quant_conv.bias": torch.zeros(len(mean)),
            "quantize.embedding.weight": self.codebook.detach(),
        }
        return {**state, **outer}

    @property
    def codebook(self) -> nn.Parameter:
        codes: nn.Parameter = self.model.quantize.embedding.weight
        return codes

    def forward(self, images: Tensor, options: LSPTrainOptions, step: int) -> TrainingPass:
        latents = self.encode(images)
        if not quantises(options, step):
            return TrainingPass(self.decode(noisy(latents, options, step)), latents.detach(), latents.new_zeros(()))
        quantised = quantise(latents, self.codebook, beta=options.beta, legacy=options.legacy_beta)
        # LMD decodes what its masked model returns, which nobody quantises (eq. 1): with a share below 1 the decoder
        # learns both. Codebook and commitment terms are taken over all images either way.
        number = num_quantised(options, step)
        mixed = torch.cat((quantised.latents[:number], noisy(latents, options, step)[number:]))
        loss = options.codebook_weight * quantised.loss
        return TrainingPass(self.decode(mixed), latents.detach(), loss, quantised.indices)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(images).latents
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.model.decode(latents, force_not_quantize=True).sample
        return images

    @torch.no_grad()
    def quantised(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (N, d, h, w) replaced by their nearest codes, and which, (N, h, w)."""
        parts = [quantise(part, self.codebook) for part in latents.split(_IMAGES_AT_ONCE)]
        return torch.cat([part.latents for part in parts]), torch.cat([part.indices for part in parts])

    @torch.no_grad()
    def spread_codebook(self, images: Tensor, seed: int) -> None:
        """Puts the codebook onto the centres that k-means finds among the latents of images (N, 3, H, W)."""
        generator = torch.Generator().manual_seed(derive_seed("projector-codebook", seed))
        self.codebook.copy_(kmeans(positions(self.encode_all(images)), len(self.codebook), generator))

    def normalise(self, images: Tensor) -> None:
        """Gives latents mean 0 per channel and a mean square of 1 over all channels; the codebook moves along.

        One scale for all channels, where other kinds have one each: then distances keep their order and every position
        keeps its code.
        """
        latents = self.encode_all(images)
        mean = latents.mean((0, 2, 3))
        std = latents.var((0, 2, 3)).mean().sqrt().expand_as(mean)
        self._rescale(mean, _usable(std))

    @torch.no_grad()
    def _rescale(self, mean: Tensor, std: Tensor) -> None:
        super()._rescale(mean, std)
        self.codebook.copy_((self.codebook - mean) / std)


class LightTrainable(TrainableProjector):
    """Our LightAutoencoder: neither noise nor codebook; on request the latents' mean square is held down."""

    model_class = LightAutoencoder

    @classmethod
    def _model(cls, options: LSPTrainOptions) -> nn.Module:
        model: nn.Module = LightAutoencoder(
            factor=options.light_factor,
            latent_channels=options.latent_channels,
            transform=options.light_transform,
            wavelet=options.light_wavelet,
            encoder_kernel=options.light_encoder_kernel,
            encoder_hidden=options.light_encoder_hidden,
            decoder_widths=options.light_decoder_widths,
            decoder_blocks=options.light_decoder_blocks,
            sample_size=options.image_size,
        )
        return model

    def forward(self, images: Tensor, options: LSPTrainOptions, step: int) -> TrainingPass:
        latents = self.encode(images)
        loss = options.latent_weight * latents.square().mean()
        return TrainingPass(self.decode(noisy(latents, options, step)), latents.detach(), loss)

    def encode(self, images: Tensor) -> Tensor:
        latents: Tensor = self.model.encode(images)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        images: Tensor = self.model.decode(latents)
        return images

    @property
    def last_layer(self) -> Tensor:
        weight: Tensor = self.model.last_layer
        return weight


TRAINABLE: Mapping[str, type[TrainableProjector]] = {"vq": VQTrainable, "kl": KLTrainable, "light": LightTrainable}


def noisy(latents: Tensor, options: LSPTrainOptions, step: int) -> Tensor:
    """Latents (B, d, h, w) plus Gaussian noise of `latent_noise` times each channel's standard deviation.

    Without noise an autoencoder brings its latent channels into use one after another, over thousands of steps; and a
    decoder that has only seen exact latents makes the worst of predicted ones. The spread is the batch's own, outside
    the graph: growing latents would not drown the noise.
    """
    if options.latent_noise == 0:
        return latents
    generator = torch.Generator().manual_seed(derive_seed("projector-noise", options.seed, step))
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    spread = latents.detach().std((0, 2, 3), keepdim=True)
    return latents + options.latent_noise * spread * noise


def quantises(options: LSPTrainOptions, step: int) -> bool:
    """Whether the codebook is in use at a step."""
    if options.kind != "vq":
        return False
    return options.codebook_init == "uniform" or step >= options.codebook_init_step


def num_quantised(options: LSPTrainOptions, step: int) -> int:
    """Images of a step's batch that are decoded from quantised latents; their share over many steps is exact."""
    per_step = options.quantised_share * options.batch_size
    return int(per_step * (step + 1)) - int(per_step * step)
