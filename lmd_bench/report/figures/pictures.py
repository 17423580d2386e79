"""Pictures side by side: what every method makes of the same images, what it generates, and the paper's figure 6."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from lmd_bench.records import PICTURES, RECONSTRUCTIONS
from lmd_bench.report.figures.sheet import WIDTH_INCHES, Figure, Sheet
from lmd_bench.report.image_quality import has_own_masks

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from numpy.typing import NDArray

_LABEL_INCHES: Final = 1.5
_GAP_INCHES: Final = 0.06
_MOST_TILE_INCHES: Final = 0.95
_MOST_DOTS_PER_PIXEL: Final = 3
_LINE_POINTS: Final = 1.5
_DPI: Final = 105  # a dot for each of the page's pixels: pictures in more would make pages of many megabytes
_OWN_MASK: Final = "own mask"


class Strip(NamedTuple):
    """A picture of square tiles side by side, and the words beside it."""

    row: str
    seed: int
    kind: str
    label: str
    path: Path
    pixels: NDArray[np.uint8]
    """(H, W, 3)."""
    tile_px: int
    """Side of a tile."""


@dataclass(frozen=True)
class _CellPictures:
    """Where one row's pictures lie: those of its first finished seed that has any."""

    row: str
    seed: int
    folder: Path
    own_mask: bool
    image_size: int | None


def draw_reconstructions(sheet: Sheet) -> None:
    """The same held-out images, masked alike and filled by every row."""
    strips = _reconstruction_strips(sheet)
    if not strips:
        return
    own = any(_OWN_MASK in strip.label for strip in strips)
    _draw_strips(
        sheet,
        strips,
        "reconstructions",
        "Reconstructions side by side",
        "The same held-out images under the same masks (grey is hidden); every row fills the hidden part, the visible "
        "pixels are pasted back. One seed a row, the first."
        + (" Rows with masks of their own are shown with what they were given." if own else ""),
    )


def draw_samples(sheet: Sheet) -> None:
    """Images that generative rows made from nothing."""
    found = [_strip(sheet, cell, "samples", sheet.labels[cell.row]) for cell in _cells(sheet, "samples")]
    strips = [strip for strip in found if strip is not None]
    if strips:
        _draw_strips(
            sheet,
            strips,
            "samples",
            "Samples",
            "Images that each row generates from noise or from masks alone, not chosen. One seed a row, the first.",
        )


def _cells(sheet: Sheet, kind: str) -> list[_CellPictures]:
    """Each row's first finished seed with a picture of this kind."""
    cells = []
    for row in sheet.labels:
        for run in sheet.results.finished(row):
            folder = (sheet.results.folder / run.path).parent / PICTURES
            if (folder / f"{kind}.png").is_file():
                own, size = has_own_masks(sheet.rows[row]), run.record.config.get("image_size")
                cells.append(_CellPictures(row, run.record.seed, folder, own, size))
                break
    return cells


def _reconstruction_strips(sheet: Sheet) -> list[Strip]:
    """Original and mask once, of the first row under the common masks; then every row, others marked."""
    cells = _cells(sheet, "filled")
    common = [cell for cell in cells if not cell.own_mask]
    first = (common or cells)[:1]
    strips = [_strip(sheet, cell, kind, kind.capitalize()) for cell in first for kind in ("original", "masked")]
    original = strips[0] if strips else None
    for cell in cells:
        name = sheet.labels[cell.row]
        if cell.own_mask and cell not in first:
            strips.append(_strip(sheet, cell, "masked", f"{name}: {_OWN_MASK}"))
        strips.append(_strip(sheet, cell, "filled", name + _of_other_images(sheet, cell, original)))
    return [strip for strip in strips if strip is not None]


def _of_other_images(sheet: Sheet, cell: _CellPictures, original: Strip | None) -> str:
    """Says so where a row's images are not those at the top; images of another size cannot be told apart here."""
    import numpy as np

    own = _strip(sheet, cell, "original", "")
    if own is None or original is None or own.pixels.shape[0] != original.pixels.shape[0]:
        return ""
    return "" if np.array_equal(own.pixels, original.pixels) else " (other images)"


def _strip(sheet: Sheet, cell: _CellPictures, kind: str, label: str) -> Strip | None:
    """A picture as it lies on disk; None where it is not there or, noted as a problem, cannot be read."""
    import numpy as np
    from PIL import Image

    path = cell.folder / f"{kind}.png"
    if not path.is_file():
        return None
    relative = path.relative_to(sheet.results.folder)
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError) as error:  # what Pillow raises for damaged PNG files
        reason = " ".join(str(error).split()).replace(str(path), "the file")
        problem = f"{relative}: not a readable picture ({reason}); left out"
        if problem not in sheet.results.problems:
            sheet.results.problems.append(problem)
        return None
    return Strip(cell.row, cell.seed, kind, label, relative, pixels, cell.image_size or int(pixels.shape[0]))


def _draw_strips(sheet: Sheet, strips: Sequence[Strip], stem: str, title: str, caption: str) -> None:
    """All strips below each other, as wide as the figure has room for, their labels on the left."""
    from matplotlib.figure import Figure as Canvas

    room = WIDTH_INCHES - _LABEL_INCHES
    most = max(strip.pixels.shape[1] / strip.pixels.shape[0] for strip in strips)
    if stem == "samples":
        sizes = [_fitted(strip, room) for strip in strips]
    else:  # tiles of all sizes are drawn alike: the same image stands in one column
        height = min(_MOST_TILE_INCHES, room / most)
        sizes = [(height * strip.pixels.shape[1] / strip.pixels.shape[0], height) for strip in strips]
    total = sum(height for _, height in sizes) + _GAP_INCHES * (len(strips) + 1)
    canvas = Canvas(figsize=(WIDTH_INCHES, total))
    top = total - _GAP_INCHES
    for strip, (width, height) in zip(strips, sizes, strict=True):
        place = (_LABEL_INCHES / WIDTH_INCHES, (top - height) / total, width / WIDTH_INCHES, height / total)
        axes = canvas.add_axes(place)
        axes.imshow(strip.pixels, aspect="auto")
        axes.set_axis_off()
        _part_tiles(axes, strip)
        canvas.text(
            (_LABEL_INCHES - 0.1) / WIDTH_INCHES, (top - height / 2) / total, textwrap.fill(strip.label, 20),
            ha="right", va="center", fontsize=9,
        )  # fmt: skip
        top -= height + _GAP_INCHES
    names = ["row", "seed", "kind", "label", "file", "tile_px", "height_px", "width_px"]
    table = [
        (one.row, one.seed, one.kind, one.label, one.path.as_posix(), one.tile_px, *one.pixels.shape[:2])
        for one in strips
    ]
    sheet.save(canvas, stem, title, caption, names, table, dpi=_DPI)


def _part_tiles(axes: Axes, strip: Strip) -> None:
    """White lines between tiles."""
    height, width = strip.pixels.shape[:2]
    for x in range(strip.tile_px, width, strip.tile_px):
        axes.axvline(x - 0.5, color="white", linewidth=_LINE_POINTS)
    for y in range(strip.tile_px, height, strip.tile_px):
        axes.axhline(y - 0.5, color="white", linewidth=_LINE_POINTS)


def _fitted(strip: Strip, room: float) -> tuple[float, float]:
    """Width and height in inches: all the room there is, but pixels no larger than three dots."""
    height, width = strip.pixels.shape[:2]
    inches = min(room, width * _MOST_DOTS_PER_PIXEL / _DPI)
    return inches, inches * height / width


def take_over_figure6(sheet: Sheet, row: str) -> None:
    """Figure 6 of the paper for a row's first run for which `lmd-bench reconstruct --figure6` has drawn it.

    A picture drawn from other weights than the record's is left out.
    """
    for run in sheet.results.finished(row):
        source = (sheet.results.folder / run.path).parent / RECONSTRUCTIONS
        drawn, numbers = source / "figure6.png", source / "figure6.csv"
        weights = run.record.weights
        if weights is None or not drawn.is_file() or not numbers.is_file():
            continue
        text = numbers.read_text(encoding="utf-8")
        if weights.sha256 not in text:
            continue
        stem, title = f"figure6-{row}", f"Masks along the schedule: {sheet.labels[row]}"
        png, data = sheet.folder / f"{stem}.png", sheet.folder / f"{stem}.csv"
        shutil.copyfile(drawn, png)
        comments = "".join(f"# {' '.join(line.split())}\n" for line in (title, *sheet.provenance))
        data.write_text(comments + text, encoding="utf-8")
        caption = (
            f"The trained weights of seed {run.record.seed}: what the network sees of an image at 0 to 100 % of "
            "the training (grey is hidden) and beside it what it makes of that."
        )
        sheet.figures.append(Figure(stem, title, caption, png, data))
        return
