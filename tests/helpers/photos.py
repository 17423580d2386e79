"""Real photographs for tests and small runs: random crops of colour pictures that come with scikit-image.

Only pictures that its documentation calls public domain or CC0 are used. As a command:

    python tests/helpers/photos.py FOLDER --size 128 --crops 120
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "hubble_deep_field")


def make_photo_folder(path: Path, size: int = 64, crops: int = 16, seed: int = 0) -> Path:
    """Write `crops` square JPEGs of `size` px from each photograph into class folders under `path`.

    Crops are between `size` px and the photograph's shorter side wide, so that both detail and layout occur.
    """
    from skimage import data

    rng = np.random.default_rng(seed)
    for name in PHOTOS:
        folder = path / name
        folder.mkdir(parents=True, exist_ok=True)
        photo = Image.fromarray(getattr(data, name)()).convert("RGB")
        for number in range(crops):
            side = int(rng.integers(size, min(photo.size) + 1))
            left = int(rng.integers(0, photo.width - side + 1))
            top = int(rng.integers(0, photo.height - side + 1))
            crop = photo.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
            crop.save(folder / f"{name}-{number:04d}.jpg", quality=95)
    return path


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Crop scikit-image's photographs into class folders.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=128, help="side of the images, px")
    parser.add_argument("--crops", type=int, default=120, help="images from each photograph")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    make_photo_folder(arguments.folder, arguments.size, arguments.crops, arguments.seed)


if __name__ == "__main__":
    main()
