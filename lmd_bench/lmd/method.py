"""LMD as a method of the benchmark: frozen projector, masked latent model, growing mask ratio."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, cast

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch import Tensor

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.lmd.classifier import MaskedUNetClassifier
from lmd_bench.lmd.mask_schedule import (
    MaskSchedule,
    check_leaves_tokens,
    mask_levels,
    mask_ratio,
    num_kept,
    read_schedule,
    schedule_range,
)
from lmd_bench.lmd.model import (
    SUBTRACTED,
    VARIANT_DEPTHS,
    MaskedModel,
    Variant,
    check_initial_weights,
    file_digest,
    load_initial_weights,
    run_behind,
)
from lmd_bench.lmd.pixel_loss import left_out_of_the_graph, parameters_outside_blocks, pixel_loss
from lmd_bench.lmd.sampling import UNVEIL_ORDERS, Unveiling, UnveilOrder, unveil
from lmd_bench.lmd.unet import MaskedUNet, MaskedUNetShape, UNetConfig
from lmd_bench.method import Batch, DataSpec, MethodConfig, StepOutput
from lmd_bench.nn.classifier import (
    ImageClassifier,
    MaskedAutoencoderClassifier,
    Pool,
    class_token_obstacle,
    require,
)
from lmd_bench.nn.config import AutoencoderConfig, sizes_of
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask, random_ids, token_mask
from lmd_bench.nn.official import load_exactly, reading_sizes, shape_of_checkpoint
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, check_projector, weights_digest
from lmd_bench.projector.latent_method import LatentMethod, NoProjector
from lmd_bench.projector.open import open_projector


class LMDConfig(AutoencoderConfig):
    """Options of LMD; the sizes default to ViT-B with a decoder of 512 x 8 (the "discriminant" shape).

    `variant` fills in the depths that are not given; a depth that is given wins.
    """

    projector: ProjectorConfig
    """The frozen latent space projector. `kind: pixels` with `patch_size: 16` is the ablation without one."""
    patch_size: int = Field(default=4, ge=1)
    """Side of a token, in latent positions."""
    variant: Variant = "discriminant"
    """The paper's two shapes: 12 encoder and 8 decoder blocks, or `generative` with 8 and 12. The decoder's width
    stays 512 unless `decoder_width` says otherwise; the paper's example of a wider one is 1024."""
    network: Literal["vit", "unet"] = "vit"
    """`unet` is the ablation without MAE: a U-Net of sizes `unet` in place of the ViT, whose sizes are passed by."""
    unet: UNetConfig = UNetConfig()
    mask_schedule: Annotated[MaskSchedule, BeforeValidator(read_schedule)] = "cosine"
    """How the mask ratio grows; `constant` (at `mask_ratio_end`) is the ablation without a scheduler. Or a list of
    (progress, ratio) points from progress 0 to 1 with straight lines between, or a function of the progress as
    `module:function` or `file.py:function`, which is sampled at once: its points stand in the record in its place."""
    mask_ratio_start: float = Field(default=0.15, ge=0, lt=1)
    mask_ratio_mid: float = Field(default=0.40, ge=0, lt=1)
    """Plateau of the piecewise schedule; the others pass it by."""
    mask_ratio_end: float = Field(default=0.75, ge=0, lt=1)
    decoder_pos_sign: int = SUBTRACTED
    """-1 subtracts the decoder's position table (paper and code), +1 adds it as MAE does."""
    reconstruct_levels: int | None = Field(default=1, ge=1)
    """Predictions in which a reconstruction is unveiled: 1 is one shot, null every level of the mask schedule."""
    sample_levels: int | None = Field(default=None, ge=1)
    """The same for images sampled from nothing."""
    unveil_order: UnveilOrder = "random"
    """Which tokens come first where there are several levels (`lmd_bench.lmd.sampling`)."""
    init_weights: str | None = None
    """Start from a finished run's weights.safetensors in place of random weights."""
    init_weights_digest: str | None = None
    """SHA-256 of that file, 16 hex digits; filled in, so that another file is another experiment."""
    pixel_loss: float = Field(default=0.0, ge=0)
    """Weight of the decoded image's squared error beside the loss on latents (paper sec. 4.4); 0: off, as published
    for pre-training."""
    pixel_loss_start: float = Field(default=0.0, ge=0, lt=1)
    """Share of the run after which the pixel loss sets in; until then all weights train on latents alone."""
    pixel_loss_trains: Literal["blocks", "all"] = "blocks"
    """What trains while there is a pixel loss: the ViT's blocks only (paper), or everything but the projector."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, values: Any) -> Any:
        """The variant's depths, and the digest of the initial weights."""
        if not isinstance(values, dict):
            return values
        variant = values.get("variant", "discriminant")
        depths = VARIANT_DEPTHS.get(variant, {}) if isinstance(variant, str) else {}
        filled = {**depths, **values}
        if isinstance(path := filled.get("init_weights"), str) and filled.get("init_weights_digest") is None:
            try:
                filled["init_weights_digest"] = file_digest(path)
            except WeightsError as error:
                raise ValueError(str(error)) from error
        return filled

    @model_validator(mode="after")
    def _ordered(self) -> LMDConfig:
        start, mid, end = self.mask_ratio_start, self.mask_ratio_mid, self.mask_ratio_end
        if not start <= mid <= end:
            raise ValueError(
                f"mask ratios out of order: mask_ratio_start <= mask_ratio_mid <= mask_ratio_end, "
                f"got {start}, {mid}, {end}"
            )
        if self.decoder_pos_sign not in (-1, 1):
            raise ValueError(f"decoder_pos_sign must be -1 or 1, got {self.decoder_pos_sign}")
        return self

    @model_validator(mode="after")
    def _points_stand_alone(self) -> LMDConfig:
        if not isinstance(self.mask_schedule, str):
            for name in ("mask_ratio_start", "mask_ratio_mid", "mask_ratio_end"):
                if getattr(self, name) != LMDConfig.model_fields[name].default:
                    raise ValueError(f"{name} belongs to the named schedules; a schedule of points has its own ratios")
        return self

    @model_validator(mode="after")
    def _pixel_loss_fits(self) -> LMDConfig:
        if not self.pixel_loss:
            return self
        if self.normalize_targets:
            raise ValueError("pixel_loss needs plain targets: normalised ones cannot be decoded (normalize_targets)")
        if self.projector.cache is not None:
            raise ValueError("pixel_loss compares with the images, which cached latents leave out (projector.cache)")
        if self.network == "unet" and self.pixel_loss_trains == "blocks":
            raise ValueError("pixel_loss_trains: a U-Net has no ViT blocks to train alone; say all")
        return self

    def mask_range(self) -> tuple[float, float]:
        """The schedule's smallest and largest mask ratio."""
        return schedule_range(self.mask_schedule, start=self.mask_ratio_start, end=self.mask_ratio_end)


class LMD(LatentMethod):
    """Masked autoencoder on the latents of a frozen projector, its mask ratio rising over training."""

    Config: ClassVar[type[MethodConfig]] = LMDConfig
    progressive_orders: ClassVar[tuple[str, ...]] = UNVEIL_ORDERS
    config: LMDConfig

    def __init__(self, config: LMDConfig, data: DataSpec, *, projector: LatentProjector | None = None) -> None:
        """Open the configured projector, or take the one that is given, and build the model."""
        super().__init__(config, data)
        self.config = config
        opened = open_projector(config.projector) if projector is None else projector
        self.model = _network(config, _latent_size(config, data.image_size, opened.factor), opened.latent_channels)
        self.projector = opened
        self._lacks_initial_weights = not _load_initial_weights(self.model, config)
        if config.pixel_loss and not config.pixel_loss_start:
            for parameter in self._left_alone():
                parameter.requires_grad_(False)

    @classmethod
    def check(cls, config: LMDConfig, data: DataSpec) -> None:
        """Raise ConfigError unless projector, patch, image size and schedule fit; WeightsError for unfit weights."""
        info = check_projector(config.projector, data.image_size)
        latent_size = _latent_size(config, data.image_size, info.factor)
        field = "mask_ratio_end" if isinstance(config.mask_schedule, str) else "mask_schedule"
        check_leaves_tokens((latent_size // config.patch_size) ** 2, config.mask_range()[1], field)
        if config.init_weights is not None and _initial_weights_are_there(config):
            with torch.device("meta"):
                check_initial_weights(_network(config, latent_size, info.latent_channels), config.init_weights)
            _check_trained_alike(config, config.init_weights)

    @classmethod
    def plan_text(cls, config: LMDConfig, data: DataSpec) -> str:
        """Tokens and mask levels in a few words, such as "49 tokens, 29 mask levels (41 to 12 visible)"."""
        latent_size = data.image_size // check_projector(config.projector, data.image_size).factor
        num_tokens = (latent_size // config.patch_size) ** 2
        levels = mask_levels(num_tokens, *config.mask_range())
        return f"{num_tokens} tokens, {len(levels) - 1} mask levels ({levels[0]} to {levels[-1]} visible)"

    @classmethod
    def token_px(cls, config: LMDConfig, data: DataSpec) -> int:
        """A latent patch stands for patch_size x factor pixels."""
        return config.patch_size * check_projector(config.projector, data.image_size).factor

    @classmethod
    def yardstick_obstacle(cls, config: LMDConfig) -> str | None:
        """A latent predicted up to its patch's own mean and variance cannot be decoded."""
        return "normalised targets" if config.normalize_targets else None

    # -- training -------------------------------------------------------------------------------------------------

    def prepare(self, batch: Batch) -> Tensor | tuple[Tensor, Tensor]:
        """Latents (B, C, S/f, S/f) of the whole images, as published: masking comes after.

        With a pixel loss, (latents, images).
        """
        latents = self.projector.encode(batch.images)
        return (latents, batch.images) if self.config.pixel_loss else latents

    def training_step(self, inputs: Tensor | tuple[Tensor, Tensor], *, step: int, total_steps: int) -> StepOutput:
        """Loss on latents under a fresh random mask of this step's ratio, the same for the whole batch.

        From `pixel_loss_start` on, the decoded image's error times `pixel_loss` is added. Raises WeightsError where
        the weights to start from were not there.
        """
        if self._lacks_initial_weights:
            raise WeightsError(f"init_weights: {self.config.init_weights} is gone, or another file than it was")
        latents, images = inputs if isinstance(inputs, tuple) else (inputs, None)
        ratio = self.mask_ratio_at(step, total_steps)
        kept = num_kept(self.model.shape.num_tokens, ratio)
        ids = random_ids(len(latents), self.model.shape.num_tokens, latents.device)
        tokens = float(self.num_tokens_at(step, total_steps))
        scalars: dict[str, Tensor | float] = {"mask_ratio": ratio, "tokens": tokens}
        if images is None or (step - 1) / total_steps < self.config.pixel_loss_start:
            return StepOutput(self.model(latents, ids, kept), scalars)
        with left_out_of_the_graph(self._left_alone()):
            latent_loss, completed = self.model(latents, ids, kept, completed=True)
        image_loss = pixel_loss(self.projector, completed, images)
        parts = {"latent_loss": latent_loss.detach(), "pixel_loss": image_loss.detach()}
        return StepOutput(latent_loss + self.config.pixel_loss * image_loss, {**scalars, **parts})

    def _left_alone(self) -> list[torch.nn.Parameter]:
        """What does not train while there is a pixel loss."""
        if self.config.pixel_loss_trains == "all":
            return []
        assert isinstance(self.model, MaskedAutoencoder)  # held by LMDConfig
        return parameters_outside_blocks(self.model)

    def mask_ratio_at(self, step: int, total_steps: int) -> float:
        """The scheduler's ratio at a step."""
        config = self.config
        return mask_ratio(
            config.mask_schedule,
            step,
            total_steps,
            start=config.mask_ratio_start,
            mid=config.mask_ratio_mid,
            end=config.mask_ratio_end,
        )

    def num_tokens_at(self, step: int, total_steps: int) -> int:
        """Visible tokens, the class token not counted; all tokens for a U-Net, which computes every position."""
        num_tokens = self.model.shape.num_tokens
        if self.config.network == "unet":
            return num_tokens
        return num_kept(num_tokens, self.mask_ratio_at(step, total_steps))

    # -- the yardstick --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        """Predict every token that touches a hidden unit from latents of images without their hidden pixels.

        A latent sees its neighbours through the projector, so hidden pixels are overwritten by the mean colour of
        the visible ones before encoding.
        """
        hidden = pixel_mask(mask, self.data.image_size)
        return self._complete(fill_with_visible_mean(images, hidden), hidden)

    @torch.no_grad()
    def reconstruct_leaking(self, images: Tensor, mask: Tensor) -> Tensor | None:
        """The same with latents of the whole images; None in pixel space, where nothing leaks."""
        if self.projector_name is None:
            return None
        return self._complete(images, pixel_mask(mask, self.data.image_size))

    @torch.no_grad()
    def reconstruct_progressively(
        self, images: Tensor, mask: Tensor, *, levels: int | None, order: str, seeds: Sequence[int]
    ) -> tuple[Tensor, int]:
        """As `reconstruct`, unveiled over `levels` predictions in `order` ("random" or "confidence")."""
        hidden = pixel_mask(mask, self.data.image_size)
        tokens = self._hidden_tokens(hidden)
        unveiling = self._unveiling(levels, cast(UnveilOrder, order))
        latents = self.projector.encode(fill_with_visible_mean(images, hidden))
        counts = set((~tokens).sum(dim=1).tolist())
        filled = unveil(self.model.complete, latents, tokens, unveiling, seeds)
        return self.projector.decode(filled), max(unveiling.num_function_evaluations(count) for count in counts)

    @torch.no_grad()
    def sample(self, num_images: int) -> Tensor:
        """Images (num_images, 3, S, S) in [0, 1] unveiled from nothing, in `sample_levels` predictions.

        The model predicts means, so what sets samples apart is the order of unveiling alone, seeded from torch's
        global generator: expect little variety.
        """
        self._refuse_normalized()
        shape, device = self.model.shape, next(self.model.parameters()).device
        latents = torch.zeros(num_images, shape.in_channels, shape.input_size, shape.input_size, device=device)
        hidden = torch.ones(num_images, shape.num_tokens, dtype=torch.bool, device=device)
        unveiling = self._unveiling(self.config.sample_levels, self.config.unveil_order)
        return self.projector.decode(unveil(self.model.complete, latents, hidden, unveiling, _seeds(num_images)))

    def _complete(self, images: Tensor, hidden_pixels: Tensor) -> Tensor:
        tokens = self._hidden_tokens(hidden_pixels)
        unveiling = self._unveiling(self.config.reconstruct_levels, self.config.unveil_order)
        seeds = None if unveiling.levels == 1 else _seeds(len(images))
        return self.projector.decode(
            unveil(self.model.complete, self.projector.encode(images), tokens, unveiling, seeds)
        )

    def _hidden_tokens(self, hidden_pixels: Tensor) -> Tensor:
        self._refuse_normalized()
        return token_mask(hidden_pixels, self.data.image_size // self.model.shape.grid_size)

    def _unveiling(self, levels: int | None, order: UnveilOrder) -> Unveiling:
        return Unveiling.of_ratios(self.model.shape.num_tokens, *self.config.mask_range(), levels, order)

    def _refuse_normalized(self) -> None:
        if self.config.normalize_targets:
            raise ConfigError("normalize_targets: a model of normalised targets cannot reconstruct pixels")

    @classmethod
    def classifier_obstacle(cls, config: LMDConfig, pool: Pool = "mean") -> str | None:
        """A U-Net has no class token; the ViT has one."""
        return None if config.network == "vit" else class_token_obstacle(pool)

    def classifier(self, num_classes: int, *, pool: Pool = "mean", drop_path: float = 0.0) -> ImageClassifier:
        """The encoder, which it shares, on latents of the frozen projector, with a fresh head; of the ablation's U-Net
        the way down and the middle."""
        require(self.classifier_obstacle(self.config, pool))
        if isinstance(self.model, MaskedUNet):
            return MaskedUNetClassifier(self.model, self.projector, num_classes, drop_path)
        return MaskedAutoencoderClassifier(self.model, self.projector, num_classes, pool, drop_path)

    @property
    def num_function_evaluations(self) -> int:
        """Predictions in one `reconstruct` call, for a map masked at the schedule's highest ratio."""
        unveiling = self._unveiling(self.config.reconstruct_levels, self.config.unveil_order)
        return unveiling.num_function_evaluations(unveiling.fewest_visible)

    # -- the authors' checkpoints ------------------------------------------------------------------------------------

    @classmethod
    def from_official(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        projector: LatentProjector | ProjectorConfig | None = None,
        image_size: int | None = None,
        **options: Any,
    ) -> LMD:
        """LMD with the weights of the authors' pre-training checkpoint (its "model" entry).

        Sizes are read off the tensors; `options` are those of `LMDConfig`, of which `encoder_heads` and
        `decoder_heads` cannot be read off: left out, they are those of the published models of these widths, and
        other widths raise WeightsError. The checkpoint holds no projector: give one, or the
        configuration of one. Without either the method takes latents of a factor 8, and encoding images raises
        WeightsError. `image_size` defaults to the latents' side times the projector's factor. Raises WeightsError
        naming keys that do not fit.
        """
        shape = shape_of_checkpoint(state_dict, **{name: options.get(name) for name in _HEADS})
        named = projector if isinstance(projector, ProjectorConfig) else ProjectorConfig(kind="pixels")
        with reading_sizes():
            config = LMDConfig(projector=named, **{**sizes_of(shape), **options})
        if config.network != "vit":
            raise ConfigError(f"network: the authors' checkpoints hold a ViT; leave out network {config.network!r}")
        if isinstance(projector, ProjectorConfig):
            projector = open_projector(projector)
        opened = projector or NoProjector(shape.in_channels, factor=8)
        with reading_sizes():
            method = cls(config, DataSpec(image_size or shape.input_size * opened.factor), projector=opened)
        load_exactly(method.model, state_dict)
        return method

    def to_official(self) -> dict[str, Tensor]:
        """The masked model's weights in the authors' layout; `from_official` of them is this model bit for bit."""
        return dict(self.model.state_dict())


_HEADS = ("encoder_heads", "decoder_heads")


def _seeds(count: int) -> list[int]:
    """One seed an image from torch's global generator."""
    seeds: list[int] = torch.randint(2**62, (count,)).tolist()
    return seeds


def _network(config: LMDConfig, latent_size: int, latent_channels: int) -> MaskedModel:
    """The network that is trained, with fresh weights."""
    if config.network == "unet":
        shape = MaskedUNetShape(latent_size, config.patch_size, latent_channels)
        return MaskedUNet(shape, config.unet, normalize_targets=config.normalize_targets)
    return MaskedAutoencoder(
        config.shape(latent_size, latent_channels),
        decoder_pos_sign=config.decoder_pos_sign,
        normalize_targets=config.normalize_targets,
    )


def _initial_weights_are_there(config: LMDConfig) -> bool:
    try:
        return config.init_weights is not None and file_digest(config.init_weights) == config.init_weights_digest
    except WeightsError:
        return False


def _check_trained_alike(config: LMDConfig, path: str) -> None:
    """Raise WeightsError unless the run that left these weights learned the same: same latents, targets, positions."""
    options, digest = run_behind(path)
    now = weights_digest(config.projector)
    if digest != now:
        then = options.get("projector", {})
        raise WeightsError(
            f"init_weights: {path} was trained on latents of projector {then.get('path') or then.get('kind')} with "
            f"digest {digest}; projector {config.projector.path or config.projector.kind} of this row has {now}: use "
            "the same weights at the same scale and precision"
        )
    for name in ("normalize_targets", *(("decoder_pos_sign",) if config.network == "vit" else ())):
        before, wanted = options.get(name), getattr(config, name)
        if before != wanted:
            raise WeightsError(
                f"init_weights: {path} was trained with {name} {before}, this row has {wanted}: set {name} to {before}"
            )


def _load_initial_weights(network: MaskedModel, config: LMDConfig) -> bool:
    """Whether `network` has the weights that it is to start from, or needs none.

    A method is also built to be given the weights of its own finished run; that works without the file from which
    the run started, so its absence is an error of training alone.
    """
    if config.init_weights is None:
        return True
    if not _initial_weights_are_there(config):
        return False
    load_initial_weights(network, config.init_weights)
    return True


def _latent_size(config: LMDConfig, image_size: int, factor: int) -> int:
    """Side of the latent map. Raises ConfigError where the projector or the patch do not cut it evenly."""
    if image_size % factor:
        raise ConfigError(
            f"image_size: {image_size} px is not divisible by {factor}, the projector's down-scaling factor"
        )
    config.check_patch(image_size // factor, "latents" if factor > 1 else "images")
    if config.network == "unet":
        config.unet.check_map(image_size // factor)
    return image_size // factor
