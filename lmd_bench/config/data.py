"""What is trained on, and what happens to an image before a method sees it. Imports no torch."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, field_validator, model_validator

from lmd_bench.config.base import ImageSize, Values

_RAND_AUGMENT_SECTION = re.compile(
    r"(m)\d+|(n)[1-9]\d*|(p)(?:0(?:\.\d+)?|1(?:\.0+)?)|(mstd)\d+(?:\.\d+)?|(mmax)[1-9]\d*|(inc)[01]|(t)(?:weights|3aw?)"
)


class DataConfig(Values):
    """Where images come from."""

    name: Literal["scenes", "folder"] = "scenes"
    path: str | None = None
    """Folder of images (ImageFolder layout, with or without train/ and val/, or flat), or LSUN's LMDB folder of a
    category, or the folder that holds them, or of WebDataset shards. Only for `folder`."""
    captions: str | None = None
    """CSV or JSONL file of captions, or None: `captions.csv`, `captions.jsonl` or `metadata.jsonl` in the folder, the
    shards' own captions, or a scene's."""
    labels: Literal["object", "colour"] = "object"
    """What the labels of scenes say: which of ten objects is shown, or in which of eight colours, which is learned
    within far fewer steps. A folder's labels are its class folders."""
    image_size: ImageSize = 64
    """Side of the square training images, px."""
    num_train: int | None = Field(default=None, ge=1)
    """Training images; None takes all of a folder. `scenes` needs a number: they are made once, before timing."""
    num_held_out: int = Field(default=64, ge=1)
    """Images kept away from training, for the yardstick. A folder without val/ gives up its own, a quarter at most."""
    seed: int = Field(default=0, ge=0)
    """Which scenes are drawn; which images of a folder are held out."""
    num_workers: int | None = Field(default=None, ge=0)
    """Decoding processes for a folder; None: one per core but one, at most 16. Scenes are held in memory."""

    @model_validator(mode="after")
    def _complete(self) -> DataConfig:
        if self.name == "scenes" and self.num_train is None:
            raise ValueError("scenes are generated, so data.num_train must say how many")
        if self.name == "scenes" and self.path is not None:
            raise ValueError("data.path is for data.name = folder")
        return self


class AugmentationConfig(Values):
    """What happens to a training image before a method sees it."""

    crop: Literal["auto", "none", "random_resized"] = "auto"
    """`random_resized`: torchvision's RandomResizedCrop; `none`: short side resized, centre crop; `auto`: `none` for
    scenes, `random_resized` for a folder."""
    scale: tuple[float, float] = (0.2, 1.0)
    """Range of the crop's area as a share of the image."""
    ratio: tuple[float, float] = (0.75, 4 / 3)
    """Range of the crop's width over height."""
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    flip: bool = True
    """Mirror left to right with probability 1/2."""
    rand_augment: str | None = None
    """timm's RandAugment by its string, such as rand-m9-mstd0.5-inc1, after crop and flip; None leaves it out.

    After `rand`, in any order: m9 magnitude, n2 operations an image, p0.5 probability of each, mstd0.5 deviation of the
    magnitude, mmax10 its largest value, inc1 operations that grow with it, tweights or t3a or t3aw another choice of
    operations."""

    @field_validator("rand_augment")
    @classmethod
    def _known_sections(cls, text: str | None) -> str | None:
        """timm passes over what it does not know."""
        if text is None:
            return None
        name, *sections = text.split("-")
        matches = [_RAND_AUGMENT_SECTION.fullmatch(section) for section in sections]
        kinds = {match.lastindex for match in matches if match is not None}
        if name != "rand" or len(kinds) < len(sections):
            raise ValueError(
                f"augmentation.rand_augment: {text!r} is not timm's form, rand with sections of m, n, p, mstd, mmax, "
                "inc or t, each once at most, such as rand-m9-mstd0.5-inc1"
            )
        return text

    @model_validator(mode="after")
    def _ordered(self) -> AugmentationConfig:
        for name in ("scale", "ratio"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ValueError(f"augmentation.{name} must be two numbers 0 < low <= high, got {low}, {high}")
        return self


def resolve_crop(augmentation: AugmentationConfig, data: DataConfig) -> AugmentationConfig:
    """`crop: auto` made explicit: scenes are drawn at their size, photographs get MAE's random crops."""
    if augmentation.crop != "auto":
        return augmentation
    return augmentation.model_copy(update={"crop": "none" if data.name == "scenes" else "random_resized"})
