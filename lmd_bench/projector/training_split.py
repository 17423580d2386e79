"""What a projector was trained on and what was held out, as it stands in its folder. Imports no torch.

Held-out images of a folder are the first ones of an order that `data.seed` and their names decide, so that two splits
of one seed hold the same images back, as far as the shorter one goes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lmd_bench.errors import ConfigError, WeightsError

if TYPE_CHECKING:
    from lmd_bench.data.folders import FolderIndex

SPLIT_FILE = "training-data.json"
_VAL_LAYOUT = "train and val"


class TrainingSplit(BaseModel):
    """`training-data.json` of a projector's folder."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal[1] = 1
    data: str
    """`scenes`, or the folder's absolute path."""
    digest: str
    """Of what was trained on: names, sizes and contents of a folder's images, or scenes as they are drawn."""
    data_seed: int
    num_train: int
    num_held_out: int
    layout: str | None = None
    """Of a folder: class folders, flat, shards, or train and val, whose held-out images are val's."""
    names_digest: str | None = None
    """Of a folder: of the names of all its images, by which a copy of it is known."""
    held_out: tuple[str, ...] = ()
    """Of a folder without val: names of the images that were not trained on."""


def split_of_folder(index: FolderIndex, data_seed: int) -> TrainingSplit:
    """The split of a scanned folder, all of whose training images are used. Reads the images (`content_digest`)."""
    return TrainingSplit(
        data=str(index.root.resolve()),
        digest=index.content_digest,
        data_seed=data_seed,
        num_train=index.num_train,
        num_held_out=len(index.held_out),
        layout=index.layout,
        names_digest=_names_digest(index),
        held_out=() if index.layout == _VAL_LAYOUT else index.held_out,
    )


def _names_digest(index: FolderIndex) -> str:
    text = "\0".join(sorted((*index.train, *index.held_out)))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def read_split(folder: Path) -> TrainingSplit | None:
    """The split in a projector's folder; None where there is none. Raises WeightsError for a damaged one."""
    file = folder / SPLIT_FILE
    try:
        return TrainingSplit.model_validate_json(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}" if first else str(error)
        raise WeightsError(f"projector {folder}: {SPLIT_FILE} cannot be read ({why}); train it again") from None


def seen_in_training(folder: Path, index: FolderIndex) -> str | None:
    """Which of a scan's held-out images the projector in `folder` may have been trained on; None where none is known.

    Only a folder that its split tells of, by path or by the names of its images, can be judged. Scenes never overlap:
    held-out ones have indices of their own.
    """
    split = read_split(folder)
    if split is None or split.data == "scenes" or index.layout == split.layout == _VAL_LAYOUT:
        return None
    if split.data != str(index.root.resolve()) and split.names_digest != _names_digest(index):
        return None
    seen = set(index.held_out) - set(split.held_out)
    if not seen:
        return None
    return (
        f"projector {folder.name or folder}: may have been trained on {len(seen)} of the {len(index.held_out)} images"
        f" of {index.root} that are held out here; its own training held out {split.num_held_out} with data seed"
        f" {split.data_seed}"
    )


def require_unseen(folder: Path, index: FolderIndex) -> None:
    """Raise ConfigError where held-out images may have been trained on, naming a split that was not."""
    seen = seen_in_training(folder, index)
    if seen is not None:
        split = read_split(folder)
        assert split is not None
        raise ConfigError(f"{seen}; use --images {split.num_held_out} --data-seed {split.data_seed}, or other images")
