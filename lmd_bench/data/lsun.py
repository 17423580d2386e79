"""LSUN as it is distributed: an LMDB folder for each category and split, its values encoded images. No torch.

`bedroom_train_lmdb/` and `bedroom_val_lmdb/` hold `data.mdb`; keys are 40 hexadecimal digits, values JPEG or WebP files
(github.com/fyu/lsun). LSUN exported to image files needs none of this: it is a folder like any other.
"""

from __future__ import annotations

import errno
import importlib
import io
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeVar

from lmd_bench.data.image_files import ImageFiles, ImageSet, pieces
from lmd_bench.errors import DataError

_T = TypeVar("_T")

_DATA_FILE = "data.mdb"
_NAME = re.compile(r"(?P<category>.*?)_?(?P<split>train|val|test)(_lmdb)?")


@dataclass(frozen=True)
class ImageRecords(ImageFiles):
    """Images that are records of LMDB folders below `root`; names are "folder/key".

    A database is opened for every read (30 us against milliseconds of decoding), for an open one neither survives a
    fork nor can be opened a second time by the same process.
    """

    storage: ClassVar[str] = "lmdb"
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False, compare=False)

    def open(self, name: str) -> BinaryIO:
        """The encoded image of a record, "folder/key". Raises OSError where there is none, or it cannot be read."""
        return io.BytesIO(self._read(name, bytes))

    def excerpt(self, name: str) -> tuple[int, bytes]:
        """As for files, of the database's own pages: the rest of a large record is not read from the disk."""
        return self._read(name, _excerpt)

    def _read(self, name: str, use: Callable[[memoryview], _T]) -> _T:
        """What `use` makes of a record while it lies mapped; nothing of the map may outlive the call."""
        folder, _, key = name.partition("/")
        lmdb = _lmdb(str(self.root / folder))
        try:
            with self._lock, _opened(lmdb, self.root / folder) as database, database.begin(buffers=True) as transaction:
                value = transaction.get(key.encode("utf-8", "surrogateescape"))
                found = None if value is None else (use(value),)
        except lmdb.Error as error:
            raise OSError(errno.EIO, str(error)) from error
        if found is None:
            raise OSError(errno.ENOENT, "no such record", name)
        return found[0]

    def __reduce__(self) -> tuple[type[ImageRecords], tuple[Path]]:
        """For workers that are started anew: a lock cannot be sent."""
        return (ImageRecords, (self.root,))


def _excerpt(value: memoryview) -> tuple[int, bytes]:
    return len(value), b"".join(value[start:stop] for start, stop in pieces(len(value)))


def find_records(path: Path, place: str) -> ImageSet | None:
    """The images of an LMDB folder, or of all those in a folder; None where there is no LMDB.

    Of `X_train_lmdb` the held-out images come from `X_val_lmdb` beside it, if there is one; `test_lmdb` is passed over
    unless it is all there is. Several categories are classes. Raises DataError where the package `lmdb` is missing,
    or a database cannot be read or is empty.
    """
    root, chosen = path, ""
    if os.path.isfile(path / _DATA_FILE):
        whole = Path(os.path.abspath(path))
        root, chosen = whole.parent, whole.name
    names = _databases(root)
    if not names:
        return None
    splits = {name: _category_and_split(name) for name in names}
    if chosen:
        category, split = splits[chosen]
        with_it = (category, "val") if split == "train" else None
        splits = {name: own for name, own in splits.items() if name == chosen or own == with_it}
    train, val = _train_and_val(splits)
    files = ImageRecords(root)
    return ImageSet(
        files,
        _names(root, train, place),
        _names(root, val, place) if val else None,
        f"{train[0]}/" if len(train) == 1 else "",
    )


def _databases(root: Path) -> list[str]:
    try:
        with os.scandir(root) as entries:  # no look at what is no folder: a flat data set has a million files
            folders = [entry.name for entry in entries if entry.is_dir()]
        return sorted(name for name in folders if os.path.isfile(root / name / _DATA_FILE))
    except OSError:  # whoever looks for image files there says what is wrong with the folder
        return []


def category_of(folder: str) -> str:
    """ "bedroom" of "bedroom_val_lmdb"; of another name the name itself."""
    return _category_and_split(folder)[0]


def _category_and_split(name: str) -> tuple[str, str]:
    """("bedroom", "val") of "bedroom_val_lmdb"; a name that says nothing is training data."""
    match = _NAME.fullmatch(name)
    return (match["category"], match["split"]) if match else (name, "train")


def _train_and_val(splits: dict[str, tuple[str, str]]) -> tuple[list[str], list[str]]:
    """Folders to train on, and those of the same categories to hold images out of."""
    train = [name for name, (_, split) in splits.items() if split == "train"]
    if not train:
        only = [name for name, (_, split) in splits.items() if split == "val"]
        return only or list(splits), []
    categories = {splits[name][0] for name in train}
    return train, [name for name, (category, split) in splits.items() if split == "val" and category in categories]


def _names(root: Path, folders: list[str], place: str) -> list[str]:
    """ "folder/key" of every record, sorted. Values are not read."""
    found: list[str] = []
    for folder in folders:
        lmdb = _lmdb(place)
        try:
            with _opened(lmdb, root / folder) as database, database.begin() as transaction:
                keys = list(transaction.cursor().iternext(keys=True, values=False))
        except lmdb.Error as error:
            raise DataError(
                f"{place}: {folder} is no LMDB that can be read ({error}); download or unpack it again"
            ) from error
        if not keys:
            raise DataError(f"{place}: {folder} is an LMDB without records; download or unpack it again")
        found += [f"{folder}/{key.decode('utf-8', 'surrogateescape')}" for key in keys]
    return sorted(found)


def _opened(lmdb: Any, folder: Path) -> Any:
    """Read only and without a lock file, so that a folder without write permission will do."""
    return lmdb.open(os.fspath(folder), readonly=True, lock=False, readahead=False, create=False)


def _lmdb(place: str) -> Any:
    """The package, which only LSUN needs. Raises DataError where it is not installed."""
    try:
        return importlib.import_module("lmdb")
    except ImportError as error:
        raise DataError(f"{place}: an LMDB folder needs the package lmdb: pip install lmdb") from error
