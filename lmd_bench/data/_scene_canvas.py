"""The canvas scenes are painted on, back to front: per-pixel surface properties that are lit once at the end."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Surface channels: flat colour, strength of noise and of stripes, then the shade (1 = lit as a flat image is).
RED, GREEN, BLUE, NOISE, STRIPES, SHADE = range(6)
NUM_CHANNELS = 6


@dataclass(frozen=True)
class Window:
    """Where a patch lies on the canvas. `index` is None for the whole canvas, else (B, 1, h * w) flat pixel numbers."""

    x: Tensor  # pixel centers in image widths, broadcastable to (B, h, w)
    y: Tensor
    index: Tensor | None

    def read(self, canvas: Tensor) -> Tensor:
        """The patch (B, 6, h, w): the canvas itself where the window is the whole of it, else a copy."""
        if self.index is None:
            return canvas
        index = self.index.expand(-1, NUM_CHANNELS, -1)
        side = self.x.shape[2]
        return canvas.flatten(2).gather(2, index).view(len(canvas), NUM_CHANNELS, side, side)

    def write(self, canvas: Tensor, patch: Tensor) -> None:
        """Puts a patch back that `read` returned."""
        if self.index is not None:
            canvas.flatten(2).scatter_(2, self.index.expand(-1, NUM_CHANNELS, -1), patch.flatten(2))


def whole_window(centers: Tensor) -> Window:
    """The window that is the canvas; `centers` are the pixel centers along an axis, (S,)."""
    return Window(centers.view(1, 1, -1), centers.view(1, -1, 1), None)


def window_around(center_x: Tensor, center_y: Tensor, reach: float, centers: Tensor) -> Window:
    """A square window that holds all of the image within `reach` (image widths) of centers (B,) inside the image.

    At the image's border the window moves inward: nothing it must hold lies outside.
    """
    size = len(centers)
    side = 2 * (int(reach * size) + 1) + 1
    if side >= size:
        return whole_window(centers)
    steps = torch.arange(side, device=centers.device)
    columns = _first_pixel(center_x, side, size)[:, None] + steps
    rows = _first_pixel(center_y, side, size)[:, None] + steps
    index = (rows[:, :, None] * size + columns[:, None, :]).flatten(1)
    return Window(centers[columns][:, None, :], centers[rows][:, :, None], index[:, None, :])


def _first_pixel(center: Tensor, side: int, size: int) -> Tensor:
    return ((center * size).long() - side // 2).clamp(0, size - side)


def cover(patch: Tensor, surface: Tensor, shade: Tensor, alpha: Tensor) -> None:
    """Lays a surface over the patch in place.

    patch (B, 6, h, w); surface (B, 5, 1, 1) the channels before SHADE; shade and alpha (B, h, w), alpha 1 = opaque.
    """
    flat = patch[:, :SHADE]
    flat += (surface - flat) * alpha[:, None]
    under = patch[:, SHADE]
    under += (shade - under) * alpha


def hsv_to_rgb(hue: Tensor, saturation: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Hue in turns (any real), saturation and value in [0, 1] -> red, green, blue in [0, 1]."""

    def channel(offset: float) -> Tensor:
        k = hue * 6.0 + offset
        k = k - (k / 6.0).floor() * 6.0
        return value - value * saturation * torch.minimum(k, 4.0 - k).clamp(0.0, 1.0)

    return channel(5.0), channel(3.0), channel(1.0)


def cos_sin(turns: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of an angle in turns; worked out in float64 so that float32 results agree across devices."""
    angle = turns.double() * (2.0 * torch.pi)
    return angle.cos().float(), angle.sin().float()
