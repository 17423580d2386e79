"""What a scene shows: the few named facts that its label, its caption and its pixels share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lmd_bench.data._scene_random import mix, scene_keys, uniform

CLASSES = ("disc", "ring", "square", "triangle", "star", "cross", "crescent", "heart", "bar", "hourglass")
GROUNDS = ("leaves", "pebbles", "tiles", "reeds")
TONES = ("dark", "bright")
# Word, hue (turns), saturation of the object's colour.
COLOURS = (
    ("red", 0.99, 0.85),
    ("orange", 0.075, 0.9),
    ("yellow", 0.15, 0.85),
    ("green", 0.34, 0.8),
    ("turquoise", 0.48, 0.75),
    ("blue", 0.61, 0.8),
    ("purple", 0.76, 0.7),
    ("pink", 0.91, 0.5),
)
MIN_RADIUS, MAX_RADIUS = 0.17, 0.34  # of the object's bounding circle, in image widths

_LAYOUT_STREAM, _LABEL_SALT = 0, 0x5EED
_UNITS = (1, 3, 7, 9)  # invertible modulo the number of classes


@dataclass(frozen=True)
class Layout:
    """The named facts of B scenes, each (B,): integers int64, the others float32. Lengths in image widths."""

    label: Tensor  # index into CLASSES
    ground: Tensor  # index into GROUNDS
    tone: Tensor  # index into TONES
    colour: Tensor  # index into COLOURS
    radius: Tensor  # of the object's bounding circle
    center_x: Tensor  # of that circle, from the left edge
    center_y: Tensor  # likewise, from the top edge


def scene_labels(seed: int, indices: Tensor) -> Tensor:
    """Class of each scene, int64 (B,): every ten consecutive indices from a multiple of ten hold each class once.

    The order within a block of ten is an affine map modulo ten, drawn from the block's own key.
    """
    block_keys = scene_keys(seed ^ _LABEL_SALT, torch.div(indices, len(CLASSES), rounding_mode="floor"))
    draws = mix(block_keys)
    units = torch.tensor(_UNITS, device=indices.device)[(draws >> 8) & 3]
    offset = (draws >> 16) & 0xFFFF
    return (units * (indices % len(CLASSES)) + offset) % len(CLASSES)


def scene_layout(seed: int, indices: Tensor) -> Layout:
    """Draws the layout of scenes `indices` (int64, (B,), not negative) on the device that holds them."""
    draws = uniform(scene_keys(seed, indices), _LAYOUT_STREAM, 6).unbind(1)
    radius = MIN_RADIUS + (MAX_RADIUS - MIN_RADIUS) * draws[3]
    free = 1.0 - 2.0 * radius  # the bounding circle stays inside the image
    return Layout(
        label=scene_labels(seed, indices),
        ground=(draws[0] * len(GROUNDS)).long(),
        tone=(draws[1] * len(TONES)).long(),
        colour=(draws[2] * len(COLOURS)).long(),
        radius=radius,
        center_x=radius + free * draws[4],
        center_y=radius + free * draws[5],
    )


def _position_word(x: float, y: float) -> str:
    column = "left" if x < 0.42 else "right" if x > 0.58 else ""
    row = "upper" if y < 0.42 else "lower" if y > 0.58 else ""
    if row and column:
        return f"at the {row} {column}"
    if row:
        return "at the top" if row == "upper" else "at the bottom"
    return f"on the {column}" if column else "in the middle"


def _size_word(radius: float) -> str:
    return "small" if radius < 0.22 else "large" if radius > 0.29 else "medium-sized"


def scene_captions(layout: Layout) -> list[str]:
    """One English sentence fragment for each scene, every word of it read off the layout."""
    captions = []
    for row in range(len(layout.label)):
        shape, colour = CLASSES[int(layout.label[row])], COLOURS[int(layout.colour[row])][0]
        tone, ground = TONES[int(layout.tone[row])], GROUNDS[int(layout.ground[row])]
        position = _position_word(float(layout.center_x[row]), float(layout.center_y[row]))
        noun = f"a {_size_word(float(layout.radius[row]))} {colour} {shape}"
        captions.append(f"{noun} {position} on a {tone} background of {ground}")
    return captions
