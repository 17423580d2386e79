"""What the images that a method fills are measured with (Table 4). Imports no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from lmd_bench.config.base import Values

Evaluators = Literal["real", "scenes"]
"""`real`: Inception, CLIP and AlexNet as published. `scenes`: the small ones that ship, for generated scenes alone."""
ImageMetricName = Literal["fid", "kid", "precision_recall", "clip_score", "lpips", "psnr", "ssim"]


class ImageQualityConfig(Values):
    """Metrics over held-out images whose hidden part a method has filled, the visible part pasted back.

    Masks are the yardstick's (`evaluation.unit_px`, `evaluation.keep`), one for each image. The same images, captions
    and masks for every row of a suite.
    """

    num_images: int = Field(default=1000, ge=2)
    """Held-out images, the same for every row and column."""
    metrics: tuple[ImageMetricName, ...] = ("fid", "kid", "precision_recall", "clip_score", "lpips", "psnr", "ssim")
    evaluators: Evaluators = "real"
    clip_model: str = "ViT-L-14"
    """open_clip's name of the model behind CLIP-score; `scenes` has its own."""
    clip_pretrained: str = "openai"
    """open_clip's tag of its weights."""
    kid_subsets: int = Field(default=100, ge=1)
    kid_subset_size: int = Field(default=1000, ge=2)
    """Images in each of KID's subsets; lowered to the number of images where there are fewer."""
    neighborhood: int = Field(default=3, ge=1)
    """Neighbours that make a ball of precision and recall (Kynkäänniemi et al. 2019)."""
    batch_size: int = Field(default=32, ge=1)
    """Images at a time. Methods that draw begin to draw anew with each batch: their figures depend on it."""
    num_pictures: int = Field(default=8, ge=0)
    """Held-out images that the report shows filled by every row, side by side."""
    num_samples: int = Field(default=16, ge=0)
    """Images that the report shows generated from nothing, for rows that can; never measured."""
    download: bool = True
    """Whether the libraries may fetch missing weights; `--offline` forbids it for all suites."""
