"""Options that every masked autoencoder has."""

from __future__ import annotations

from pydantic import Field, model_validator

from lmd_bench.errors import ConfigError
from lmd_bench.method import MethodConfig
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoderShape


class AutoencoderConfig(MethodConfig):
    """Widths and depths; the defaults are ViT-B with MAE's decoder."""

    patch_size: int = Field(ge=1)
    """Side of a token on the map that is masked: px for pixels, latent positions for latents."""
    encoder_width: int = Field(default=768, ge=4)
    """Channels of the encoder's tokens, divisible by 4 (position table) and by its heads."""
    encoder_depth: int = Field(default=12, ge=1)
    """Blocks of the encoder."""
    encoder_heads: int = Field(default=12, ge=1)
    """Attention heads of the encoder; they divide its width."""
    decoder_width: int = Field(default=512, ge=4)
    """Channels of the decoder's tokens, divisible by 4 (position table) and by its heads."""
    decoder_depth: int = Field(default=8, ge=1)
    """Blocks of the decoder."""
    decoder_heads: int = Field(default=16, ge=1)
    """Attention heads of the decoder; they divide its width."""
    mlp_ratio: float = Field(default=4.0, gt=0)
    """Hidden width of the MLPs as a multiple of the width."""
    normalize_targets: bool = False
    """Predict patches normalised by their own mean and variance. Such targets cannot be turned back into pixels."""

    @model_validator(mode="after")
    def _divisible(self) -> AutoencoderConfig:
        for part in ("encoder", "decoder"):
            width, heads = getattr(self, f"{part}_width"), getattr(self, f"{part}_heads")
            if width % heads or width % 4:
                raise ValueError(
                    f"{part}_width must be divisible by 4 (position table) and by {part}_heads, got {width}, {heads}"
                )
        return self

    def shape(self, input_size: int, in_channels: int) -> MaskedAutoencoderShape:
        """The model's sizes for square maps of this side and number of channels."""
        sizes = self.model_dump(include=set(AutoencoderConfig.model_fields) - {"normalize_targets"})
        return MaskedAutoencoderShape(input_size=input_size, in_channels=in_channels, **sizes)

    def sizes_text(self) -> str:
        """The network's sizes in words."""
        parts = (
            f"{part} of width {getattr(self, f'{part}_width')}, {getattr(self, f'{part}_depth')} blocks and "
            f"{getattr(self, f'{part}_heads')} heads"
            for part in ("encoder", "decoder")
        )
        return ", ".join(parts)

    def check_patch(self, input_size: int, what: str) -> None:
        """Raise ConfigError unless the patch size cuts the map, at least in four. `what` names the map."""
        if input_size % self.patch_size or input_size < 2 * self.patch_size:
            wanted = [size for size in range(1, input_size // 2 + 1) if input_size % size == 0]
            raise ConfigError(
                f"patch_size: {self.patch_size} does not cut {what} of {input_size} x {input_size}; "
                f"possible: {', '.join(map(str, wanted))}"
            )


def sizes_of(shape: MaskedAutoencoderShape) -> dict[str, int | float]:
    """A model's sizes as options of an `AutoencoderConfig`."""
    names = set(AutoencoderConfig.model_fields) - {"normalize_targets"}
    return {name: getattr(shape, name) for name in sorted(names)}
