"""What text-to-image models share when they fill the hidden parts of images: folder, sizes, masks, captions."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._pipeline_folder import PipelineFolder
from lmd_bench.errors import ConfigError
from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask


class TextToImageConfig(MethodConfig):
    """Options of methods that come trained."""

    path: str = Field(min_length=1)
    """A local folder in diffusers' layout; a suite may say weights:NAME, which a run replaces by where it lies."""
    num_inference_steps: int = Field(ge=1)
    """Steps of the sampler."""
    guidance_scale: float = Field(ge=1)
    """Classifier-free guidance: weight of the caption's prediction against that of an empty one; 1 is without. Images
    without captions are filled without it."""
    native_size: int | None = Field(default=None, ge=8)
    """Side in pixels at which the model paints; None: the one it was trained at. Images of another size are resized to
    it and back (bicubic, antialiased)."""


class TextToImage(Method):
    """A pipeline in a local folder, with published weights, that is only evaluated.

    A picture depends on its own visible pixels, caption and seed; the seeds of a batch come from torch's global
    generator of the CPU, one for each image.
    """

    Config: ClassVar[type[MethodConfig]] = TextToImageConfig
    config: TextToImageConfig
    is_trained = False
    wants_captions = True
    models: ClassVar[dict[str, str]]
    """Subfolder -> class of the model."""
    autoencoder: ClassVar[str]
    """Subfolder of the autoencoder."""
    network: ClassVar[str]
    """Subfolder of the network that paints."""

    def __init__(self, config: TextToImageConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.config = config
        self.folder = self.folder_of(config)
        self.native_size = self.native_size_of(config)
        self.cells = self.native_size // self.folder.factor(self.autoencoder)
        """Positions of the latent map along a side."""
        self.text_encoder = self.folder.load_text_encoder()
        self.tokenizer = self.folder.load_tokenizer()

    # -- before anything is built -----------------------------------------------------------------------------------

    @classmethod
    def folder_of(cls, config: Any) -> PipelineFolder:
        """The folder that the options name."""
        return PipelineFolder(Path(config.path).expanduser(), cls.models)

    @classmethod
    def native_size_of(cls, config: Any) -> int:
        """Side in pixels at which the model paints."""
        folder = cls.folder_of(config)
        size: int = config.native_size or folder.count(cls.network, "sample_size") * folder.factor(cls.autoencoder)
        return size

    @classmethod
    def check(cls, config: Any, data: DataSpec) -> None:
        """Raise WeightsError or ConfigError where the folder is not such a pipeline; no weights are loaded."""
        folder = cls.folder_of(config)
        folder.check()
        cls.check_models(config, folder)
        folder.check_scheduler(config.num_inference_steps)
        multiple = folder.factor(cls.autoencoder) * cls.halvings(folder)
        size = cls.native_size_of(config)
        if size % multiple:
            raise ConfigError(f"native_size {size}: the model paints at multiples of {multiple} px")

    @classmethod
    @abstractmethod
    def check_models(cls, config: Any, folder: PipelineFolder) -> None:
        """Raise WeightsError or ConfigError where the parts are of another model or do not fit each other."""

    @classmethod
    @abstractmethod
    def halvings(cls, folder: PipelineFolder) -> int:
        """What the side of the latent map must be divisible by."""

    @classmethod
    def token_px(cls, config: Any, data: DataSpec) -> int | None:
        """Side in image pixels of a latent position; None where it is not a whole number."""
        cells = cls.native_size_of(config) // cls.folder_of(config).factor(cls.autoencoder)
        return data.image_size // cells if data.image_size % cells == 0 else None

    @classmethod
    def inputs_digest(cls, config: Any) -> str | None:
        """Digest of the folder's configurations and weights (`PipelineFolder.digest`)."""
        return cls.folder_of(config).digest()

    @classmethod
    def plan_text(cls, config: Any, data: DataSpec) -> str:
        """Where the weights lie, and at which size the model paints."""
        size = cls.native_size_of(config)
        resized = "" if size == data.image_size else f", images of {data.image_size} px are resized to it and back"
        return f"{cls.folder_of(config).path}: paints at {size} px{resized}; the yardstick has no captions"

    # -- never trained ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> Self:
        """Leaves everything in evaluation mode: nothing here is trained."""
        return super().train(False)

    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        """Raises TypeError: there is no training step."""
        raise TypeError(f"{type(self).__name__} comes trained: it has no training step")

    # -- filling ----------------------------------------------------------------------------------------------------

    @abstractmethod
    def encode(self, images: Tensor, generators: Sequence[torch.Generator] | None = None) -> Tensor:
        """Latents or tokens of images (B, 3, N, N) in [0, 1] of the native size; without generators, nothing drawn."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """The inverse of `encode`: (B, 3, N, N) in [0, 1]."""

    @abstractmethod
    def paint(
        self, images: Tensor, hidden: Tensor, captions: Sequence[str] | None, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Fill the `hidden` (B, n, n) bool positions of the latent map of images (B, 3, N, N), as (B, 3, N, N)."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """As `reconstruct_captioned` with an empty caption, whose guidance is none."""
        return self._fill(images, mask, None)

    def reconstruct_captioned(self, images: Tensor, mask: Tensor, captions: Sequence[str]) -> Tensor:
        """Fill the hidden parts as the captions say.

        Hidden pixels are given the mean colour of the visible ones before they are encoded, and every latent position
        that touches a hidden unit is painted anew.
        """
        if len(captions) != len(images):
            raise ConfigError(f"{len(captions)} captions for {len(images)} images: give one for each")
        return self._fill(images, mask, captions)

    @torch.no_grad()
    def _fill(self, images: Tensor, mask: Tensor, captions: Sequence[str] | None) -> Tensor:
        seeds = torch.randint(2**63 - 1, (len(images),)).tolist()
        generators = [torch.Generator(self.generator_device(images)).manual_seed(seed) for seed in seeds]
        known = fill_with_visible_mean(images, pixel_mask(mask, images.shape[-1]))
        painted = self.paint(
            _resized(known, self.native_size), hidden_cells(mask, self.cells), captions, generators
        ).float()
        return _resized(painted, images.shape[-1])

    def generator_device(self, images: Tensor) -> torch.device:
        """Where the images' generators live; default: where the images do, so that draws over a whole codebook are made
        there: pictures then differ between a CPU and a GPU."""
        return images.device

    @torch.no_grad()
    def round_trip(self, images: Tensor) -> Tensor:
        """Images through the autoencoder and back, resized on the way."""
        return _resized(self.decode(self.encode(_resized(images, self.native_size))).float(), images.shape[-1])

    def prepare(self, batch: Batch) -> Any:
        """What the autoencoder makes of the images."""
        return self.encode(_resized(batch.images, self.native_size))

    @property
    def projector_name(self) -> str:
        """The folder and its autoencoder."""
        return f"{self.folder.name}/{self.autoencoder}"

    # -- text -------------------------------------------------------------------------------------------------------

    def token_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions as ids (B, L), padded and cut to the encoder's length."""
        found = self.tokenizer(
            list(captions),
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        ids: Tensor = found.input_ids.to(self.text_encoder.device)
        return ids


def hidden_cells(mask: Tensor, cells: int) -> Tensor:
    """Positions (B, cells, cells) bool of a map over the image that touch a hidden unit of `mask` (B, g, g) bool.

    Sides need not divide each other: position i covers i / cells to (i + 1) / cells of a side.
    """
    units = mask.shape[-1]
    first = torch.arange(cells, device=mask.device).unsqueeze(1)
    second = torch.arange(units, device=mask.device).unsqueeze(0)
    touches = ((first * units < (second + 1) * cells) & (second * cells < (first + 1) * units)).float()
    return touches @ mask.float() @ touches.T > 0


def _resized(images: Tensor, size: int) -> Tensor:
    """Images (B, 3, S, S) in [0, 1] at another size, in [0, 1]; as they are where the size is theirs."""
    if images.shape[-1] == size:
        return images
    resized = F.interpolate(images, size=(size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0.0, 1.0)
