"""The contract between a method and the harness: what to learn, not how it is timed, optimised or reported."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from lmd_bench.projector.config import ProjectorConfig

if TYPE_CHECKING:
    from lmd_bench.nn.classifier import ImageClassifier, Pool


class MethodConfig(BaseModel):
    """Base of every method's options: immutable, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def sizes_text(self) -> str:
        """The network's sizes in words, with what an authors' checkpoint is silent on. Default: the class's name."""
        return type(self).__name__.removesuffix("Config")


@dataclass(frozen=True)
class DataSpec:
    """What a method may know of the data before it sees any."""

    image_size: int
    """Side of the square images, in pixels."""
    num_classes: int | None = None
    """Number of labels, None where the images have none."""


@dataclass(frozen=True)
class Batch:
    """One batch as the harness hands it over, already on the training device."""

    images: Tensor
    """(B, 3, S, S) float32 in [0, 1]; cropped and flipped as the recipe says, not normalised. Empty beside
    `prepared`."""
    labels: Tensor | None = None
    """(B,) int64, or None where the data has none."""
    extra: Mapping[str, Tensor] = field(default_factory=dict)
    """What the method's own `collate` made ahead of the step, by name."""
    prepared: Any | None = None
    """What `Method.prepare` would have returned, read from a cache; None where there is none."""


@dataclass(frozen=True)
class StepOutput:
    """What one training step gives back to the loop."""

    loss: Tensor
    """() the scalar to be minimised, attached to the graph."""
    scalars: Mapping[str, Tensor | float] = field(default_factory=dict)
    """Figures for the record: `mask_ratio` and `tokens` (encoder length) where the method has them. Tensors must be
    detached, () and may stay on the device; nothing here may force the host to wait."""


def inputs_of(method: Method, batch: Batch) -> Any:
    """What `training_step` gets: the batch as it was prepared ahead, or as the method prepares it now."""
    return method.prepare(batch) if batch.prepared is None else batch.prepared


class Method(nn.Module, ABC):
    """One approach under test.

    A subclass takes `(config, data)` and nothing else. It draws random numbers from torch's global generators only,
    which the harness reseeds from (seed, purpose, step) at the start of every step, so that a run can be repeated.
    """

    Config: ClassVar[type[MethodConfig]]
    """The options a suite may set for this method."""
    is_trained: ClassVar[bool] = True
    """False for methods that come with published weights and take no training step here: they are evaluated only."""
    wants_captions: ClassVar[bool] = False
    """True for methods that fill what a caption says: a suite does not measure their image quality on images without
    captions."""
    progressive_orders: ClassVar[tuple[str, ...]] = ()
    """Orders in which `reconstruct_progressively` unveils tokens; empty where a method has no levels to walk."""

    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__()
        self.data = data

    # -- before anything is built ---------------------------------------------------------------------------------

    @classmethod
    def check(cls, config: Any, data: DataSpec) -> None:
        """Raise a BenchError for options that cannot work with this data. Cheap: no model, no weights are loaded."""
        return

    @classmethod
    def yardstick_obstacle(cls, config: Any) -> str | None:
        """Why this configuration cannot reconstruct pixels ("normalised targets"), or None where it can."""
        return None

    @classmethod
    def token_px(cls, config: Any, data: DataSpec) -> int | None:
        """Side in pixels of the area a token stands for, None for methods without tokens.

        A token that touches a hidden mask unit is hidden, so tokens must be small enough for the yardstick's units.
        """
        return None

    @classmethod
    def mask_unit_px(cls, config: Any, data: DataSpec) -> int | None:
        """Side in pixels of what the method's own training masks hide as a whole; default: a token.

        Random masks for a method without a run of its own, such as an authors' checkpoint, are of such units.
        """
        return cls.token_px(config, data)

    @classmethod
    def compile_obstacle(cls, config: Any) -> str | None:
        """Why `--compile` cannot be used with this configuration ("shapes change with every mask"), None: it can."""
        return None

    @classmethod
    def inputs_digest(cls, config: Any) -> str | None:
        """Digest of what lies in files that the options name, such as frozen weights; None where they name none.

        It is part of a run's identity: another content under the same name is another experiment.
        """
        return None

    @classmethod
    def plan_text(cls, config: Any, data: DataSpec) -> str | None:
        """A sentence for the plan on what these options come to with this data, None where there is nothing to say."""
        return None

    # -- training -------------------------------------------------------------------------------------------------

    def collate(self, samples: list[tuple[Tensor, int | None]], generator: torch.Generator) -> Mapping[str, Tensor]:
        """Work that can be done by a data worker ahead of the step; its tensors arrive as `Batch.extra`.

        `samples` are (uint8 image (3, S, S), label) pairs; default: nothing.
        """
        return {}

    def prepare(self, batch: Batch) -> Any:
        """Frozen work on a batch, timed as the phase "projector". Default: the images as they are."""
        return batch.images

    @classmethod
    def latent_cache(cls, config: Any) -> ProjectorConfig | None:
        """The projector whose latents this row reads from a cache (`projector.cache`), None where it reads images."""
        return None

    @property
    def cached_shape(self) -> tuple[int, ...] | None:
        """Shape of what such a row reads for one image, (C, h, w) float32; None where it reads images."""
        return None

    @abstractmethod
    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        """One forward pass with loss. `inputs` is what `prepare` returned; `step` counts 1 to `total_steps`."""

    def mask_ratio_at(self, step: int, total_steps: int) -> float | None:
        """The mask ratio of a step, None for methods that do not mask."""
        return None

    def num_tokens_at(self, step: int, total_steps: int) -> int | None:
        """Length of the encoder's input at a step where it varies or is meaningful, else None."""
        return None

    def compiled_modules(self) -> list[nn.Module]:
        """What `--compile` compiles. Default: every child module that is trained, so not a frozen projector."""
        return [child for child in self.children() if any(p.requires_grad for p in child.parameters())]

    def is_decayed(self, name: str, parameter: Tensor) -> bool:
        """Whether weight decay acts on a trainable parameter. Default: not on 1-D tensors and biases (timm)."""
        return parameter.ndim > 1 and not name.endswith(".bias")

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Optimizer groups over the trainable parameters: those that `is_decayed` names, and the others."""
        decayed: list[Tensor] = []
        kept: list[Tensor] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (decayed if self.is_decayed(name, parameter) else kept).append(parameter)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": kept, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    # -- the yardstick --------------------------------------------------------------------------------------------

    @property
    def mask_pattern(self) -> str | None:
        """The masks, in words, of a method that cannot take the yardstick's: it is then shown as "own mask", not
        ranked. None where it takes any mask."""
        return None

    def own_masks(self, masks: Tensor) -> Tensor:
        """The masks under which this method is measured, given the yardstick's (N, g, g) bool.

        They are the yardstick's own unless `mask_pattern` says otherwise: then (N, h, h) over square units of another
        size, the same at every call with N masks.
        """
        return masks

    @abstractmethod
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Fill the hidden parts of images: the yardstick that all methods share.

        `images` (B, 3, S, S) float32 in [0, 1]; `mask` (B, g, g) bool over square units, True = hidden. Returns
        (B, 3, S, S) in [0, 1]. No hidden pixel, nor a statistic of one, may influence the result.
        """

    def reconstruct_captioned(self, images: Tensor, mask: Tensor, captions: Sequence[str]) -> Tensor:
        """As `reconstruct`, with a caption for each image at hand. Default: captions are not looked at."""
        return self.reconstruct(images, mask)

    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor | None:
        """As `reconstruct`, but letting a projector see the whole image first; None where there is no such leak."""
        return None

    def round_trip(self, images: Tensor) -> Tensor | None:
        """Images through the projector and back, the ceiling of what `reconstruct` can reach; None in pixel space."""
        return None

    def reconstruct_progressively(
        self, images: Tensor, mask: Tensor, *, levels: int | None, order: str, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        """As `reconstruct`, but hidden tokens are unveiled over several predictions.

        `levels` is their number (1: one shot, None: every level of the method's mask schedule), `order` one of
        `progressive_orders`. `seeds` has a number for each image: what becomes of an image depends on it, not on
        the rest of the batch. Returns the images and the forward passes of the network they took.
        """
        raise TypeError(f"{type(self).__name__} reconstructs in one way only")

    @property
    def projector_name(self) -> str | None:
        """Name of the frozen projector in use, None in pixel space."""
        return None

    @property
    def num_function_evaluations(self) -> int:
        """Forward passes of the trained network in one `reconstruct` call."""
        return 1

    # -- capabilities a method may have ------------------------------------------------------------------------------

    def sample(self, num_images: int) -> Tensor:
        """Generate (num_images, 3, S, S) images in [0, 1]. Only generative methods override this."""
        raise TypeError(f"{type(self).__name__} does not generate images")

    @classmethod
    def classifier_obstacle(cls, config: Any, pool: Pool = "mean") -> str | None:
        """Why this configuration makes no classifier of this pooling ("no encoder to fine-tune"), None where it does.

        Default: whether the method has a `classifier` at all.
        """
        return "no encoder to fine-tune" if cls.classifier is Method.classifier else None

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """A module (B, 3, S, S) -> (B, num_classes) that shares the encoder, for fine-tuning (MAT) and probes.

        `pool` says what the head reads, `drop_path` at which rate the last block drops its branches in training mode;
        the method's own forward pass is not touched by either. Everything the classifier needs is its own submodule,
        parameter or buffer, so that `.to(device)` moves it as a whole; what is new is made on the device of the
        encoder's weights. A frozen projector in it asks for no gradients, so an optimizer takes the parameters that do.
        Raises ConfigError where there is a `classifier_obstacle`.
        """
        raise TypeError(f"{type(self).__name__} has no encoder to fine-tune")

    @classmethod
    def from_official(cls, state_dict: Mapping[str, Tensor], **options: Any) -> Method:
        """Build the method from the authors' checkpoint layout; every key is used or named in the error."""
        raise TypeError(f"{cls.__name__} has no official checkpoint layout")

    def to_official(self) -> dict[str, Tensor]:
        """The weights in the authors' layout; `from_official` of them is this model bit for bit."""
        raise TypeError(f"{type(self).__name__} has no official checkpoint layout")
