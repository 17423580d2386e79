"""Generated photographs-to-be: dead-leaves backgrounds, one object of ten classes each, and a caption.

Nothing is stored and nothing is random twice: scene `index` of seed `seed` is a pure function of both, on CPU and on
CUDA devices, and its geometry knows no pixels, so that another image size shows the same scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data._scene_canvas import BLUE, NOISE, NUM_CHANNELS, RED, SHADE, STRIPES, cos_sin
from lmd_bench.data._scene_layout import CLASSES, COLOURS, scene_captions, scene_layout
from lmd_bench.data._scene_layout import scene_labels as _scene_labels
from lmd_bench.data._scene_leaves import Ground, paint_background, scene_ground
from lmd_bench.data._scene_object import paint_objects
from lmd_bench.data._scene_random import scene_keys, uniform
from lmd_bench.data._scene_texture import pixel_centers, stripes, value_noise
from lmd_bench.errors import DataError

__all__ = ["CLASSES", "MIN_IMAGE_SIZE", "NUM_COLOURS", "Scenes", "num_scene_classes"]

MIN_IMAGE_SIZE = 16
NUM_COLOURS = len(COLOURS)
_STRIPE_STREAM = 4
# Pixels painted at once: small enough for a CPU's cache, large enough to keep a GPU busy.
_CHUNK_PIXELS = {"cpu": 1 << 17, "cuda": 1 << 24}


@dataclass(frozen=True)
class Scenes:
    """The scenes of one seed at one size.

    seed: any int; different seeds give unrelated scenes.
    image_size: height and width in pixels, at least 16.

    Indices run from 0 to 2^63 - 1. Disjoint ranges are disjoint draws: train on 0..N-1, hold out from 2^40 on.
    Raises DataError for an image size or an index out of range.
    """

    seed: int
    image_size: int

    def __post_init__(self) -> None:
        if self.image_size < MIN_IMAGE_SIZE:
            raise DataError(f"scenes: image_size {self.image_size} is too small; use {MIN_IMAGE_SIZE} or more")

    def render(self, indices: Tensor | Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Draws scenes `indices` (B,) on `device`: uint8 (B, 3, image_size, image_size), there.

        An image does not depend on the batch it is drawn in. CPU and CUDA agree to one level of 255.
        """
        wanted = _as_indices(indices).to(device)
        shape = (len(wanted), 3, self.image_size, self.image_size)
        images = torch.empty(shape, dtype=torch.uint8, device=wanted.device)
        pixels = _CHUNK_PIXELS.get(wanted.device.type, _CHUNK_PIXELS["cpu"])
        chunk = max(1, pixels // self.image_size**2)
        with torch.no_grad():
            for start in range(0, len(wanted), chunk):
                images[start : start + chunk] = self._render_chunk(wanted[start : start + chunk])
        return images

    def labels(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Class of each scene, an index into CLASSES: int64 (B,). Ten scenes 10k to 10k+9 hold each class once."""
        return _scene_labels(self.seed, _as_indices(indices))

    def colours(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Colour of each scene's object, a number below NUM_COLOURS: int64 (B,)."""
        return scene_layout(self.seed, _as_indices(indices)).colour

    def captions(self, indices: Tensor | Sequence[int]) -> list[str]:
        """What each scene shows: size, colour, class and place of the object, tone and kind of the background."""
        return scene_captions(scene_layout(self.seed, _as_indices(indices)))

    def _render_chunk(self, indices: Tensor) -> Tensor:
        keys = scene_keys(self.seed, indices)
        layout = scene_layout(self.seed, indices)
        ground = scene_ground(keys, layout)
        centers = pixel_centers(self.image_size, indices.device)
        canvas = torch.empty(len(keys), NUM_CHANNELS, self.image_size, self.image_size, device=indices.device)
        paint_background(canvas, keys, layout, ground, centers)
        paint_objects(canvas, keys, layout, ground, centers)
        return _develop(canvas, keys, ground, centers)


def num_scene_classes(labels: str) -> int:
    """How many classes there are under `DataConfig.labels`."""
    return len(CLASSES) if labels == "object" else NUM_COLOURS


def _as_indices(indices: Tensor | Sequence[int]) -> Tensor:
    tensor = torch.as_tensor(indices)
    if tensor.numel() == 0:
        tensor = tensor.long()
    if tensor.dim() != 1 or tensor.is_floating_point() or bool((tensor < 0).any()):
        raise DataError("scenes: indices must be a list of whole numbers from 0 to 2^63 - 1")
    return tensor.long()


def _develop(canvas: Tensor, keys: Tensor, ground: Ground, centers: Tensor) -> Tensor:
    """Textures and lights the surfaces: canvas (B, 6, S, S) -> uint8 images (B, 3, S, S)."""
    x, y = centers.view(1, 1, -1), centers.view(1, -1, 1)
    noise = value_noise(keys, len(centers))
    draws = uniform(keys, _STRIPE_STREAM, 2).unbind(1)
    cos, sin = cos_sin(draws[0])
    cycles = 6.0 + 8.0 * draws[1]
    phase = x * (cycles * cos)[:, None, None] + y * (cycles * sin)[:, None, None] + noise * 0.15
    texture = 1.0 + canvas[:, NOISE] * noise + canvas[:, STRIPES] * stripes(phase, cycles, len(centers))
    light = 1.0 + (x - 0.5) * ground.light_x[:, None, None] + (y - 0.5) * ground.light_y[:, None, None]
    brightness = (canvas[:, SHADE] * light * texture)[:, None]
    return (canvas[:, RED : BLUE + 1] * brightness * 255.0 + 0.5).clamp(0.0, 255.0).to(torch.uint8)
