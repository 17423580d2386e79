"""The foreground object of a scene: one of ten shapes with a colour, texture, shading and a cast shadow."""

from __future__ import annotations

import torch
from torch import Tensor

from lmd_bench.data._scene_canvas import SHADE, cos_sin, cover, hsv_to_rgb
from lmd_bench.data._scene_layout import CLASSES, COLOURS, Layout
from lmd_bench.data._scene_leaves import Ground
from lmd_bench.data._scene_random import uniform
from lmd_bench.data._scene_shapes import SHAPES

_OBJECT_STREAM = 3
_VALUE = ((0.56, 0.24), (0.60, 0.24))  # by tone of the background: from, span
_SHADOW_DEPTH = 0.4


def _surface(draws: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Colour and texture strengths, (B, 5, 1, 1), from five draws (B,)."""
    hue, saturation = torch.tensor([row[1:] for row in COLOURS], device=layout.colour.device)[layout.colour].unbind(1)
    low, span = torch.tensor(_VALUE, device=layout.tone.device)[layout.tone].unbind(1)
    colour = hsv_to_rgb(hue + 0.03 * (draws[0] - 0.5), saturation * (0.75 + 0.25 * draws[1]), low + span * draws[2])
    return torch.stack((*colour, 0.1 + 0.25 * draws[3], (draws[4] - 0.5).clamp(min=0.0) * 0.4), dim=1)[..., None, None]


def _paint_class(canvas: Tensor, label: int, rows: Tensor, frame: tuple[Tensor, ...], surface: Tensor) -> None:
    """Paints the objects of one class on the canvas rows that hold it."""
    u, v, light_u, light_v, radius_px = (value[rows] for value in frame)
    shape = SHAPES[CLASSES[label]]
    patch = canvas[rows]
    # The shadow is the shape moved away from the light and blurred over a fifth of its radius.
    cast = shape(u + light_u * 0.5, v + light_v * 0.5)
    patch[:, SHADE] *= 1.0 - (0.6 - cast * 4.0).clamp(0.0, 1.0) * _SHADOW_DEPTH
    alpha = (0.5 - shape(u, v) * radius_px).clamp(0.0, 1.0)
    cover(patch, surface[rows], 1.0 + (u * light_u + v * light_v) * 1.2, alpha)
    canvas[rows] = patch


def paint_objects(canvas: Tensor, keys: Tensor, layout: Layout, ground: Ground, centers: Tensor) -> None:
    """Paints every scene's object on a canvas (B, 6, S, S)."""
    draws = uniform(keys, _OBJECT_STREAM, 6).unbind(1)
    cos, sin = cos_sin(draws[0])
    dx = (centers - layout.center_x[:, None])[:, None, :]
    dy = (centers - layout.center_y[:, None])[:, :, None]
    u_x, u_y = (cos / layout.radius)[:, None, None], (sin / layout.radius)[:, None, None]
    u, v = dx * u_x + dy * u_y, dy * u_x - dx * u_y
    light_u = (ground.light_x * cos + ground.light_y * sin)[:, None, None]
    light_v = (ground.light_y * cos - ground.light_x * sin)[:, None, None]
    frame = (u, v, light_u, light_v, (layout.radius * len(centers))[:, None, None])
    surface = _surface(draws[1:], layout)
    for label in range(len(CLASSES)):
        rows = (layout.label == label).nonzero().flatten()
        if len(rows):
            _paint_class(canvas, label, rows, frame, surface)
