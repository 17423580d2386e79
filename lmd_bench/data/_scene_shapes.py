"""The ten foreground shapes as signed distances: negative inside, in units of the object's bounding radius.

Coordinates (u, v) are the object's own, v pointing down before rotation. Distances are exact near straight edges and
arcs and a bound elsewhere, which an anti-aliased edge of one pixel needs and no more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_HALF_SQRT3 = 3.0**0.5 / 2.0
_HALF_SQRT2 = 2.0**0.5 / 2.0
# Unit normals of a regular pentagon's five sides: (sin, -cos) of 72 degrees times k, the first side on top.
_PENTAGON = (
    (0.0, -1.0),
    (0.9510565163, -0.3090169944),
    (0.5877852523, 0.8090169944),
    (-0.5877852523, 0.8090169944),
    (-0.9510565163, -0.3090169944),
)
_COS_72 = 0.3090169944


def _circle(u: Tensor, v: Tensor, x: float, y: float, radius: float) -> Tensor:
    return ((u - x) * (u - x) + (v - y) * (v - y)).sqrt() - radius


def _box(u: Tensor, v: Tensor, half_width: float, half_height: float) -> Tensor:
    return torch.maximum(u.abs() - half_width, v.abs() - half_height)


def _disc(u: Tensor, v: Tensor) -> Tensor:
    return _circle(u, v, 0.0, 0.0, 0.85)


def _ring(u: Tensor, v: Tensor) -> Tensor:
    return _circle(u, v, 0.0, 0.0, 0.73).abs() - 0.24


def _square(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.72, 0.72)


def _triangle(u: Tensor, v: Tensor) -> Tensor:
    side = u.abs() * _HALF_SQRT3 - v * 0.5
    return torch.maximum(side, v) - 0.5


def _star(u: Tensor, v: Tensor) -> Tensor:
    """A pentagram: the points that lie within at least four of the five lines through its edges."""
    first = second = torch.full_like(u, -2.0)
    for x, y in _PENTAGON:
        distance = -(u * x + v * y) - _COS_72
        second = torch.maximum(second, torch.minimum(first, distance))
        first = torch.maximum(first, distance)
    return second


def _cross(u: Tensor, v: Tensor) -> Tensor:
    return torch.minimum(_box(u, v, 0.94, 0.27), _box(u, v, 0.27, 0.94))


def _crescent(u: Tensor, v: Tensor) -> Tensor:
    return torch.maximum(_circle(u, v, 0.0, 0.0, 0.95), -_circle(u, v, 0.5, 0.0, 0.76))


def _heart(u: Tensor, v: Tensor) -> Tensor:
    """A square on its corner, with half discs over its two upper sides."""
    half_side, low = 0.53, 0.16
    center = half_side * _HALF_SQRT2
    v = v - low
    diamond = (u.abs() + v.abs()) * _HALF_SQRT2 - half_side
    lobes = _circle(u.abs(), v, center, -center, half_side)
    return torch.minimum(diamond, lobes)


def _bar(u: Tensor, v: Tensor) -> Tensor:
    return _box(u, v, 0.96, 0.27)


def _hourglass(u: Tensor, v: Tensor) -> Tensor:
    """Two triangles that meet in a narrow waist."""
    waist = (u.abs() - v.abs() * 0.8 - 0.06) * 0.78
    return torch.maximum(waist, v.abs() - 0.76)


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "disc": _disc,
    "ring": _ring,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "cross": _cross,
    "crescent": _crescent,
    "heart": _heart,
    "bar": _bar,
    "hourglass": _hourglass,
}
