"""aMUSEd, the open MUSE (Patil et al. 2024, arXiv 2401.01808; MUSE: arXiv 2301.00704), filling hidden parts of images.

Transformer, VQ model and the scheduler's rule are diffusers'; the loop over masked tokens is ours, as the pipelines
there are deprecated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import diffusers
import torch
from pydantic import Field
from torch import Tensor

from baselines._pipeline_folder import TEXT_ENCODER, PipelineFolder
from baselines._text_to_image import TextToImage, TextToImageConfig
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec, MethodConfig

_CROP = (0, 0)
_AESTHETIC_SCORE = 6
"""Of micro-conditioning: where the crop began, and how pretty a picture is asked for, in LAION's score."""
_SCHEDULER = "AmusedScheduler"


class MuseConfig(TextToImageConfig):
    """Options of aMUSEd; the defaults are those of its release for inpainting."""

    num_inference_steps: int = Field(default=12, ge=1)
    """Predictions over which the hidden tokens are settled."""
    guidance_scale: float = Field(default=10.0, ge=1)
    """Weight of the caption's logits against those of an empty one; 1 is without."""
    mask_schedule: Literal["linear", "cosine"] = "linear"
    """How the share of tokens still masked falls: straight, as the release inpaints, or as a cosine, as it paints from
    text alone."""
    temperature: tuple[float, float] = (2.0, 0.0)
    """Of the Gumbel noise in the choice of tokens that stay, from the first step to the last."""


class Muse(TextToImage):
    """A transformer that fills in masked VQ tokens under a caption, the surest of them first.

    Tokens are drawn where the images lie, so a seed gives other pictures on a GPU than on a CPU. Drawn on the CPU
    everywhere, a picture's 256 tokens among 8192 codes would take a core some 30 ms in every step.
    """

    Config: ClassVar[type[MethodConfig]] = MuseConfig
    config: MuseConfig
    models: ClassVar[dict[str, str]] = {
        "transformer": "UVit2DModel",
        "vqvae": "VQModel",
        TEXT_ENCODER: "CLIPTextModelWithProjection",
    }
    autoencoder = "vqvae"
    network = "transformer"

    def __init__(self, config: MuseConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.transformer = self.folder.load("transformer")
        self.vqvae = self.folder.load("vqvae")
        self.mask_token = self.folder.count("scheduler", "mask_token_id")

    @classmethod
    def check_models(cls, config: Any, folder: PipelineFolder) -> None:
        """One codebook for transformer and VQ model, a mask token beyond it, and text as wide as is read."""
        if folder.scheduler_class() != _SCHEDULER:
            raise WeightsError(f"{folder.path}/scheduler: a {folder.scheduler_class()}, {_SCHEDULER} is needed")
        codes, known = folder.count("vqvae", "num_vq_embeddings"), folder.count("transformer", "codebook_size")
        if codes != known:
            raise WeightsError(
                f"{folder.path}: the transformer paints with {known} tokens, the VQ model has {codes}: two models"
            )
        token, vocabulary = folder.count("scheduler", "mask_token_id"), folder.count("transformer", "vocab_size")
        if not codes <= token < vocabulary:
            raise WeightsError(
                f"{folder.path}/scheduler: mask_token_id {token} must lie beyond the {codes} codes and below the "
                f"transformer's {vocabulary}"
            )
        if not folder.config("vqvae").get("lookup_from_codebook"):
            raise WeightsError(f"{folder.path}/vqvae: does not decode from tokens (lookup_from_codebook); not aMUSEd's")
        wide, reads = folder.count(TEXT_ENCODER, "hidden_size"), folder.count("transformer", "encoder_hidden_size")
        if reads != wide:
            raise WeightsError(
                f"{folder.path}: the transformer reads text {reads} wide, the encoder's is {wide}: parts of two models"
            )

    @classmethod
    def halvings(cls, folder: PipelineFolder) -> int:
        """The transformer of 512 px halves its map once."""
        return 2 if folder.config("transformer").get("downsample") else 1

    @property
    def num_function_evaluations(self) -> int:
        """Passes of the transformer in one `reconstruct`; with a caption each is over a batch twice as large."""
        return self.config.num_inference_steps

    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """VQ tokens (B, n, n) int64."""
        # aMUSEd's VQ model reads [0, 1], not [-1, 1]; one at a time, for large maps
        latents = torch.cat([self.vqvae.encode(image).latents for image in images.split(1)])
        indices: Tensor = self.vqvae.quantize(latents)[2][2]
        return indices.view(len(images), *latents.shape[-2:])

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, N, N) in [0, 1] of tokens (B, n, n)."""
        width = self.vqvae.quantize.vq_embed_dim
        pictures = [
            self.vqvae.decode(tokens, force_not_quantize=True, shape=(1, *tokens.shape[-2:], width)).sample
            for tokens in latents.split(1)
        ]
        return torch.cat(pictures).clamp(0.0, 1.0)

    def paint(
        self, images: Tensor, hidden: Tensor, captions: Sequence[str] | None, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Predict all hidden tokens in every step, keep the surest ones, and mask the others again.

        The network sees the batch at once; what is drawn and kept is each image's own.
        """
        tokens = self.encode(images).masked_fill(hidden, self.mask_token)
        shares = hidden.float().mean(dim=(1, 2))
        scheduler = diffusers.AmusedScheduler(self.mask_token, self.config.mask_schedule)
        scheduler.set_timesteps(self.config.num_inference_steps, self.config.temperature, images.device)
        conditions = self._conditions(captions, len(images))
        for timestep in scheduler.timesteps:
            logits = self._logits(tokens, conditions, guided=captions is not None)
            settled = [
                scheduler.step(
                    logits[i : i + 1],
                    timestep,
                    tokens[i : i + 1],
                    starting_mask_ratio=shares[i],
                    generator=generator,
                    return_dict=False,
                )[0]
                for i, generator in enumerate(generators)
            ]
            tokens = torch.cat(settled)
        return self.decode(tokens)

    def _logits(self, tokens: Tensor, conditions: dict[str, Tensor], *, guided: bool) -> Tensor:
        """(B, K, n, n) float32; guided: those of empty captions plus `guidance_scale` times the step to the given."""
        if not guided:
            return self.transformer(tokens, **conditions).float()  # type: ignore[no-any-return]
        empty, given = self.transformer(torch.cat([tokens] * 2), **conditions).float().chunk(2)
        logits: Tensor = empty + self.config.guidance_scale * (given - empty)
        return logits

    def _conditions(self, captions: Sequence[str] | None, count: int) -> dict[str, Tensor]:
        """What the transformer reads beside tokens: of empty captions, then, where there are any, of the given ones."""
        empty = [""] * count
        texts = empty if captions is None else [*empty, *captions]
        found = self.text_encoder(self.token_ids(texts), output_hidden_states=True)
        states = found.hidden_states[-2]
        micro = torch.tensor([self.native_size, self.native_size, *_CROP, _AESTHETIC_SCORE], dtype=states.dtype)
        return {
            "encoder_hidden_states": states,
            "pooled_text_emb": found.text_embeds,
            "micro_conds": micro.to(states.device).expand(len(texts), -1),
        }
