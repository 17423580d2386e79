"""Dead-leaves backgrounds: occluding leaves with power-law sizes, after the model of Lee, Mumford, Huang, "Occlusion
models for natural images" (IJCV 2001): radii with density r^-3 within each tier, the nearest leaf hides the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data._scene_canvas import cos_sin, cover, hsv_to_rgb, whole_window, window_around
from lmd_bench.data._scene_layout import Layout
from lmd_bench.data._scene_random import uniform

_LEAF_STREAM, _GROUND_STREAM = 2, 1
_DRAWS = 12  # per leaf
# Leaves by size, in image widths. Scale invariance asks for far more small leaves than are painted (r^-3 gives 8 small
# to 1 medium); texture stands in for them.
_TIERS = ((0.18, 0.5), (0.07, 0.18), (0.025, 0.07))
_LARGE, _MEDIUM, _SMALL = range(3)
_FIRST, _ROUNDS = 8, 12  # large leaves that hide the canvas, then rounds of all tiers
_SKIRT = 1.26  # a leaf's contact shadow reaches this multiple of its own extent; 1.26^4 = 2.5
_SKIRT_LEVEL, _SKIRT_DEPTH = 2.5, 0.35

# By ground (leaves, pebbles, tiles, reeds): width over length from, to; squareness (see _paint_leaf), length of large
# leaves against the tier's, freedom of direction (1 = any), first and second hue band (from, span).
_ASPECT = ((0.35, 0.6), (0.65, 1.0), (0.6, 1.0), (0.1, 0.22))
_SQUARENESS = (0.0, 0.0, -2.7, -1.0)
_LARGE_STRETCH = (1.3, 1.0, 1.0, 2.2)
_TURN_SPAN = (1.0, 1.0, 0.12, 0.14)
_HUE_BANDS = (
    ((0.20, 0.16), (0.03, 0.08)),
    ((0.05, 0.08), (0.53, 0.10)),
    ((0.02, 0.07), (0.54, 0.12)),
    ((0.17, 0.13), (0.10, 0.05)),
)
_VALUE = ((0.14, 0.24), (0.46, 0.28))  # by tone: from, span


@dataclass(frozen=True)
class Ground:
    """A scene's palette and light, each (B,) float32."""

    hue: Tensor
    saturation: Tensor
    turn: Tensor  # main direction of leaves, in turns
    light_x: Tensor  # slope of the shade along the image's axes: where the light comes from and how strongly
    light_y: Tensor


def _pick(table: tuple[float, ...], choice: Tensor) -> Tensor:
    return torch.tensor(table, device=choice.device)[choice]


def scene_ground(keys: Tensor, layout: Layout) -> Ground:
    """Draws palette and light of the scenes with these keys."""
    draws = uniform(keys, _GROUND_STREAM, 6).unbind(1)
    band = torch.tensor(_HUE_BANDS, device=keys.device)[layout.ground, (draws[0] * 2).long()]
    light_cos, light_sin = cos_sin(draws[3])
    strength = 0.15 + 0.25 * draws[4]
    return Ground(
        hue=band[:, 0] + band[:, 1] * draws[1],
        saturation=0.12 + 0.33 * draws[2],
        turn=draws[5],
        light_x=light_cos * strength,
        light_y=light_sin * strength,
    )


def _tier_order() -> tuple[int, ...]:
    """Tiers from back to front. The same order in all scenes, so that a batch paints leaf after leaf."""
    half_round = (_SMALL, _MEDIUM, _SMALL, _SMALL, _MEDIUM, _SMALL)
    return (_LARGE,) * _FIRST + (*half_round, _LARGE, *half_round) * _ROUNDS


@dataclass(frozen=True)
class _Leaves:
    """All leaves of B scenes, each (K, B, 1, 1) float32 but `surface`: (K, B, 5, 1, 1)."""

    surface: Tensor
    x: Tensor
    y: Tensor
    u_x: Tensor  # leaf coordinates u = u_x dx + u_y dy and v likewise: both 1 at the leaf's edge
    u_y: Tensor
    v_x: Tensor
    v_y: Tensor
    squareness: Tensor
    sharpness: Tensor  # of the edge: a quarter of the half-width in pixels
    light_u: Tensor
    light_v: Tensor


def _radii(draws: Tensor) -> Tensor:
    """Half lengths (B, K) in image widths with density r^-3 inside each leaf's tier, by inverting the distribution."""
    tiers = torch.tensor(_TIERS, device=draws.device)[list(_tier_order())]
    largest, smallest = tiers[:, 0] ** -2, tiers[:, 1] ** -2
    return 1.0 / (smallest + (largest - smallest) * draws).sqrt()


def _surfaces(draws: tuple[Tensor, ...], ground: Ground, tone: Tensor) -> Tensor:
    """Colour and texture strengths, (B, K, 5), from four draws (B, K)."""
    low, span = torch.tensor(_VALUE, device=tone.device)[tone].unbind(1)
    hue = ground.hue[:, None] + 0.07 * (draws[0] - 0.5)
    saturation = ground.saturation[:, None] * (0.6 + 0.8 * draws[1])
    value = low[:, None] + span[:, None] * draws[2]
    noise = 0.22 + 0.38 * draws[3]
    striped = (
        draws[1] * 16.0 - (draws[1] * 16.0).floor()
    ) * 0.5 - 0.25  # low bits of a draw: half the leaves are plain
    return torch.stack((*hsv_to_rgb(hue, saturation, value), noise, striped.clamp(min=0.0)), dim=2)


def _draw_leaves(keys: Tensor, layout: Layout, ground: Ground, size: int) -> _Leaves:
    order = _tier_order()
    draws = uniform(keys, _LEAF_STREAM, len(order) * _DRAWS).view(len(keys), len(order), _DRAWS).unbind(2)
    is_large = torch.tensor(order, device=keys.device) == _LARGE
    stretch = torch.where(is_large, _pick(_LARGE_STRETCH, layout.ground)[:, None], 1.0)
    length = _radii(draws[0]) * stretch
    aspect_low, aspect_high = torch.tensor(_ASPECT, device=keys.device)[layout.ground, :, None].unbind(1)
    width = length * (aspect_low + (aspect_high - aspect_low) * draws[1])
    cos, sin = cos_sin(ground.turn[:, None] + _pick(_TURN_SPAN, layout.ground)[:, None] * (draws[2] - 0.5))
    light_x, light_y = ground.light_x[:, None], ground.light_y[:, None]
    squareness = _pick(_SQUARENESS, layout.ground)[:, None].expand_as(length)
    leaf_first = [
        draws[3], draws[4], cos / length, sin / length, -sin / width, cos / width, squareness,
        width * (size * 0.25), light_x * cos + light_y * sin, light_y * cos - light_x * sin,
    ]  # fmt: skip
    columns = [column.t().contiguous()[:, :, None, None] for column in leaf_first]
    surface = _surfaces(draws[5:9], ground, layout.tone).permute(1, 0, 2).contiguous()
    return _Leaves(surface[..., None, None], *columns)


def _paint_leaf(canvas: Tensor, leaves: _Leaves, number: int, reach: float | None, centers: Tensor) -> None:
    """Paints leaf `number` of every scene: its contact shadow, then its domed surface.

    The outline is u^4 + v^4 + (2 + squareness) u^2 v^2 = 1: an ellipse at squareness 0, near a rectangle at -2.7. The
    left side grows as the fourth power of the distance, whence the quarter in `sharpness`.
    """
    x, y = leaves.x[number], leaves.y[number]
    window = whole_window(centers) if reach is None else window_around(x.flatten(), y.flatten(), reach, centers)
    dx, dy = window.x - x, window.y - y
    patch = window.read(canvas)
    u = dx * leaves.u_x[number] + dy * leaves.u_y[number]
    v = dx * leaves.v_x[number] + dy * leaves.v_y[number]
    u2, v2 = u * u, v * v
    level = u2 + v2
    level *= level
    level += u2.mul_(v2).mul_(leaves.squareness[number])
    shadow = level * (_SKIRT_DEPTH / (_SKIRT_LEVEL - 1.0)) + (1.0 - _SKIRT_DEPTH * _SKIRT_LEVEL / (_SKIRT_LEVEL - 1.0))
    patch[:, -1] *= shadow.clamp_(1.0 - _SKIRT_DEPTH, 1.0)
    sharpness = leaves.sharpness[number]
    alpha = level.mul_(-sharpness).add_(sharpness + 0.5).clamp_(0.0, 1.0)
    shade = u.mul_(leaves.light_u[number]).add_(v.mul_(leaves.light_v[number])).add_(1.0)
    cover(patch, leaves.surface[number], shade, alpha)
    window.write(canvas, patch)


def _paint_soil(canvas: Tensor, ground: Ground, tone: Tensor) -> None:
    """Fills the canvas with the plain surface that shows where no leaf lies: the palette's own hue, in half shade."""
    low, span = torch.tensor(_VALUE, device=tone.device)[tone].unbind(1)
    colour = hsv_to_rgb(ground.hue, ground.saturation, low + 0.3 * span)
    constants = (torch.full_like(low, value) for value in (0.6, 0.0, 0.7))  # noise, stripes, shade
    canvas.copy_(torch.stack((*colour, *constants), dim=1)[:, :, None, None].expand_as(canvas))


def paint_background(canvas: Tensor, keys: Tensor, layout: Layout, ground: Ground, centers: Tensor) -> None:
    """Fills a canvas (B, 6, S, S) with soil and the leaves of B scenes, back to front."""
    _paint_soil(canvas, ground, layout.tone)
    leaves = _draw_leaves(keys, layout, ground, len(centers))
    for number, tier in enumerate(_tier_order()):
        reach = None if tier == _LARGE else _TIERS[tier][1] * _SKIRT
        _paint_leaf(canvas, leaves, number, reach, centers)
