"""Files that appear together or not at all, and panels beside each other."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lmd_bench.errors import ConfigError

GREY = 0.5
"""What hidden pixels are shown as."""
_GAP_PX = 4


def side_by_side(panels: Sequence[Tensor]) -> Tensor:
    """(3, S, W) of panels (1, 3, S, S) with white between them."""
    gap = torch.ones(3, panels[0].shape[2], _GAP_PX)
    parts = [part for panel in panels for part in (gap, panel[0])][1:]
    return torch.cat(parts, dim=2)


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """(3, H, W) of rows (3, S, W) one below the other with white between them."""
    gap = torch.ones(3, _GAP_PX, rows[0].shape[2])
    return torch.cat([part for row in rows for part in (gap, row)][1:], dim=1)


def save_png(image: Tensor, file: Path) -> None:
    """Write (3, H, W) in [0, 1]."""
    Image.fromarray(to_bytes(image)).save(file)


def to_bytes(image: Tensor) -> NDArray[np.uint8]:
    """(3, H, W) in [0, 1] as (H, W, 3) uint8."""
    array: NDArray[np.uint8] = (image * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return array


def write_csv(file: Path, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(["" if value is None else value for value in row] for row in rows)


@contextmanager
def all_or_nothing(out: Path) -> Iterator[Path]:
    """A folder whose files are moved to `out` when the block has ended well, and are gone where it has not."""
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: a file, not a folder")
    existing = out
    while not existing.exists():
        existing = existing.parent
    partial = Path(tempfile.mkdtemp(prefix=".lmd-bench-", dir=existing))
    try:
        yield partial
        out.mkdir(parents=True, exist_ok=True)
        for file in sorted(partial.iterdir()):
            file.replace(out / file.name)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
