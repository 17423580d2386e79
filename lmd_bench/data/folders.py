"""Folders of the user's own images: what is there, which images train and which are held out. No torch."""

from __future__ import annotations

import hashlib
import heapq
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from lmd_bench.config import DataConfig
from lmd_bench.data.class_sample import with_every_class
from lmd_bench.data.decode import EXTENSIONS
from lmd_bench.data.image_files import ImageFiles, ImageSet
from lmd_bench.data.lsun import ImageRecords, category_of, find_records
from lmd_bench.data.webdataset import ImageShards, find_shards
from lmd_bench.errors import DataError
from lmd_bench.seeding import derive_seed

CHECK_ALL_UP_TO = 5_000
"""Folders with at most this many images have every file decoded once before anything runs."""
CHECK_SAMPLE = 2_000
"""Larger folders: this many files, chosen by the seed, and all held-out ones."""
_NAMED = 5


@dataclass(frozen=True)
class FolderIndex:
    """What a scan found. Paths are names in `files`: relative to its root, with forward slashes."""

    files: ImageFiles
    layout: str
    """ "train and val", "class folders", "shards" or "flat"."""
    classes: tuple[str, ...] | None
    """Names of the class folders, sorted; None where images lie side by side without classes."""
    train: tuple[str, ...]
    """Training images in sorted order."""
    train_labels: tuple[int, ...] | None
    """Index into `classes` for each training image."""
    held_out: tuple[str, ...]
    """In the yardstick's order: its first n are the same images however many are held out."""
    validation: tuple[str, ...]
    """What accuracy can be measured on: all of val/ that is not known to be unusable, where there is none the held-out
    images."""
    validation_classes: tuple[str | None, ...]
    """Class folder of each of these, named as in training; None for an image that lies in none."""
    num_checked: int
    """Files that were decoded during the scan."""
    skipped: tuple[tuple[str, str], ...]
    """(path, reason) of the unusable files among those; they are left out."""
    captions_file: str | None = None
    """`data.captions`; None where the folder's own are looked for."""
    passed_over: tuple[str, ...] = ()
    """Shards of a test split beside those that are used."""

    @property
    def root(self) -> Path:
        """The folder that names are relative to."""
        return self.files.root

    @property
    def num_train(self) -> int:
        """Training images."""
        return len(self.train)

    @property
    def num_classes(self) -> int | None:
        """Class folders; None where images lie side by side without classes."""
        return None if self.classes is None else len(self.classes)

    @property
    def digest(self) -> str:
        """SHA-256 over the names of training and held-out images, 16 hex digits. Contents are not read."""
        text = "\0".join((*self.train, "", *self.held_out))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]

    def with_train(self, num_train: int, seed: int) -> FolderIndex:
        """The same with the first `num_train` training images of an order drawn from the seed."""
        if num_train >= self.num_train:
            return self
        chosen = set(_first_by_hash(self.train, num_train, "labelled", seed))
        kept = [number for number, name in enumerate(self.train) if name in chosen]
        labels = None if self.train_labels is None else tuple(self.train_labels[number] for number in kept)
        return replace(self, train=tuple(self.train[number] for number in kept), train_labels=labels)

    def labelled_sample(self, num_images: int, seed: int) -> tuple[list[str], list[int]]:
        """(names, labels) of at most `num_images` training images, in sorted order, every class among them.

        They are the first of an order drawn from the seed, as far as that shows every class. Raises DataError where
        images have no classes.
        """
        if self.train_labels is None:
            raise DataError(no_labels(f"--data {self.root}", self.files.why_no_classes()))
        keys = [(derive_seed("labelled", seed, name), name) for name in self.train]
        order = sorted(range(self.num_train), key=keys.__getitem__)
        chosen = with_every_class([self.train_labels[number] for number in order], num_images)
        kept = sorted(order[place] for place in chosen)
        return [self.train[number] for number in kept], [self.train_labels[number] for number in kept]

    def labelled_validation(self, num_images: int | None, seed: int) -> tuple[list[str], list[int]]:
        """(names, labels) of the images that accuracy is measured on.

        num_images: the first so many of an order drawn from the seed; None takes all. Raises DataError where there are
        fewer, where images have no classes, or for classes that no training image has.
        """
        place = f"--data {self.root}"
        if self.classes is None:
            raise DataError(no_labels(place, self.files.why_no_classes()))
        if num_images is not None and num_images > len(self.validation):
            raise DataError(
                f"{place}: {num_images} validation images are asked for, {len(self.validation)} are there; "
                "lower finetune.num_val"
            )
        class_of = dict(zip(self.validation, self.validation_classes, strict=True))
        number = {name: index for index, name in enumerate(self.classes)}
        strange = Counter(name or "no folder" for name in class_of.values() if name not in number)
        if strange:
            named = ", ".join(f"{name} ({count})" for name, count in strange.most_common(_NAMED))
            raise DataError(
                f"{place}: validation images in class folders that no training image lies in: {named}"
                f"{' and more' if len(strange) > _NAMED else ''}; name the folders of train/ and val/ alike"
            )
        names = list(self.validation)
        if num_images is not None:
            names = _first_by_hash(names, num_images, "held-out", seed)
        return names, [number[class_of[name] or ""] for name in names]

    @cached_property
    def held_out_captions(self) -> tuple[str, ...] | None:
        """The caption of each held-out image; None where there are none at all.

        Raises DataError for captions that cannot be used, and names held-out images that have none.
        """
        captions = self.files.captions(self.held_out, self.captions_file)
        return None if captions is None else tuple(captions)

    @cached_property
    def content_digest(self) -> str:
        """SHA-256 over names, sizes and contents of the training images, 16 hex digits.

        Files of up to 12 KiB are read whole, of larger ones the first, the middle and the last 4 KiB, so that a large
        folder is not read twice: an edit that leaves a file's size and all three pieces as they were stays unseen.
        Raises DataError for a file that cannot be read.
        """
        digest = hashlib.sha256()
        workers = min(8, os.cpu_count() or 1)
        with ThreadPoolExecutor(workers) as pool:
            for path, found in zip(self.train, pool.map(self._piece_digest, self.train), strict=True):
                digest.update(path.encode("utf-8", "surrogateescape") + b"\0" + found)
        return digest.hexdigest()[:16]

    def _piece_digest(self, path: str) -> bytes:
        try:
            size, excerpt = self.files.excerpt(path)
        except OSError as error:
            raise DataError(f"--data {self.root}: {path} cannot be read: {error.strerror}; look at the disk") from None
        return hashlib.sha256(str(size).encode() + excerpt).digest()

    def passed_over_note(self) -> str | None:
        """One line that counts and names the shards passed over; None where there are none."""
        if not self.passed_over:
            return None
        more = f" and {len(self.passed_over) - _NAMED} more" if len(self.passed_over) > _NAMED else ""
        named = ", ".join(self.passed_over[:_NAMED]) + more
        number = f"{len(self.passed_over)} shard{'s' if len(self.passed_over) > 1 else ''}"
        return f"--data {self.root}: {number} of a test split passed over: {named}"

    def warning(self) -> str | None:
        """One line that counts and names the files left out; None where there are none."""
        if not self.skipped:
            return None
        return (
            f"--data {self.root}: left out {len(self.skipped)} of {self.num_checked} images looked at: "
            f"{describe_faults(dict(self.skipped))}"
        )


def no_labels(place: str, why: str) -> str:
    """What to say of images without labels."""
    return f"{place}: no labels: {why}"


def scan_folder(path: str | os.PathLike[str], data: DataConfig, *, trains: bool = True) -> FolderIndex:
    """Look through a folder of images, LSUN's LMDB folders (`lsun`) or shards (`webdataset`): find, check, split.

    Layouts: class folders (torchvision's ImageFolder), `train/` and `val/` with either inside, or flat. With `val/`
    the held-out images come from there, otherwise from the images themselves: as many as `data.num_held_out` says,
    but at most a quarter of them, or all of them where nothing `trains` on any. Which ones depends on `data.seed` and
    the names only. Up to CHECK_ALL_UP_TO images are all decoded once; of more, the held-out ones and a sample.
    Unusable files are left out. Raises DataError where the folder cannot be used, or where more than one file and
    more than 1 % of those looked at are unusable.
    """
    root, place = Path(path), f"--data {os.fspath(path)}"
    files, train, val, prefix, passed_over = _find_images_in(root, place)
    inspection = _Inspection(files, place)
    inspection.look_at(_sample(train + (val or []), data.seed))
    held_out = _choose_held_out(train if val is None else val, trains and val is None, data, inspection)
    inspection.require_few_faults()
    validation = held_out if val is None else [path for path in val if path not in inspection.faults]
    left = set(held_out) | inspection.faults.keys()
    train = _choose_train([p for p in train if p not in left], data, place) if trains else []
    classes = _classes(files, train, prefix) if trains else None
    return FolderIndex(
        files=files,
        layout=_layout_of(files, classes, has_val=val is not None),
        classes=classes,
        train=tuple(train),
        train_labels=_labels(files, train, prefix, classes),
        held_out=tuple(held_out),
        validation=tuple(validation),
        validation_classes=_validation_classes(
            files, validation, prefix if val is None else _val_prefix(prefix), classes
        ),
        num_checked=len(inspection.checked),
        skipped=tuple(sorted(inspection.faults.items())),
        captions_file=data.captions,
        passed_over=passed_over,
    )


def require_batch(place: str, num_train: int, batch_size: int) -> None:
    """Raise DataError where `num_train` images do not fill one batch."""
    if num_train < batch_size:
        raise DataError(
            f"{place}: {num_train} training images do not fill one batch of {batch_size}; "
            "use more images or lower the recipe's batch_size"
        )


def too_many_faults(num_faults: int, num_images: int) -> bool:
    """The tolerance for unusable files: one file, or one in a hundred where that is more."""
    return num_faults > max(1.0, 0.01 * num_images)


def describe_faults(faults: Mapping[str, str]) -> str:
    """The first few of {path: reason} in words: "a.jpg (truncated), b.png (...) and 3 more"."""
    named = [f"{path} ({reason})" for path, reason in sorted(faults.items())[:_NAMED]]
    more = len(faults) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")


# -- finding ----------------------------------------------------------------------------------------------------------


def _find_images_in(root: Path, place: str) -> ImageSet:
    return find_records(root, place) or find_shards(root, place) or _find_files(root, place)


def _find_files(root: Path, place: str) -> ImageSet:
    images = find_images(root, place)
    prefix, val_prefix = _layout(images)
    train = [p for p in images if p.startswith(prefix)]
    val = None if val_prefix is None else [p for p in images if p.startswith(val_prefix)]
    return ImageSet(ImageFiles(root), train, val, prefix)


def find_images(root: Path, place: str) -> list[str]:
    """Relative paths of all image files, sorted; hidden files and folders are passed over, links are followed."""
    if not root.exists():
        raise DataError(f"{place}: no such folder")
    if not root.is_dir():
        raise DataError(f"{place}: a file, not a folder; give the folder that holds the images")
    images: list[str] = []
    others: Counter[str] = Counter()
    for relative in _walk(root, place):
        extension = relative.rpartition("/")[2].rpartition(".")[2].lower() if "." in relative else ""
        if extension in EXTENSIONS:
            images.append(relative)
        else:
            others[f".{extension}" if extension else "no extension"] += 1
    if not images:
        raise DataError(f"{place}: {_what_else(others)}; {_REMEDY}")
    return sorted(images)


_REMEDY = f"put images ({', '.join(sorted(EXTENSIONS))}) there, flat or in one subfolder for each class"


def _what_else(others: Counter[str]) -> str:
    if not others:
        return "the folder is empty"
    kinds = ", ".join(f"{kind} ({count})" for kind, count in others.most_common(_NAMED))
    return f"no images among its {others.total()} files: {kinds}"


def _walk(root: Path, place: str) -> Iterator[str]:
    def refuse(error: OSError) -> None:
        raise DataError(f"{place}: {error.filename} cannot be read: {(error.strerror or str(error)).lower()}")

    entered: set[str] = set()  # real paths, so that a link to a parent does not lead round for ever
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=refuse):
        real = os.path.realpath(folder)
        if real in entered:
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        inside = Path(folder).relative_to(root)
        for name in files:
            if not name.startswith("."):
                yield (inside / name).as_posix()


# -- layout -----------------------------------------------------------------------------------------------------------


def _layout(images: Sequence[str]) -> tuple[str, str | None]:
    """(prefix of the training images, prefix of the held-out images or None)."""
    tops = {path.partition("/")[0] if "/" in path else "" for path in images}
    if {"train", "val"} <= tops:
        return "train/", "val/"
    return ("train/" if tops == {"train"} else ""), None


def _layout_of(files: ImageFiles, classes: tuple[str, ...] | None, *, has_val: bool) -> str:
    """How records and messages call a layout."""
    if has_val:
        return "train and val"
    if files.storage == ImageShards.storage:
        return "shards"
    return "flat" if classes is None else "class folders"


def _classes(files: ImageFiles, train: Sequence[str], prefix: str) -> tuple[str, ...] | None:
    found = {files.class_of(path, prefix) for path in train}
    return None if None in found else tuple(sorted((name for name in found if name is not None), key=files.class_order))


def _labels(
    files: ImageFiles, train: Sequence[str], prefix: str, classes: tuple[str, ...] | None
) -> tuple[int, ...] | None:
    if classes is None:
        return None
    number = {name: index for index, name in enumerate(classes)}
    return tuple(number[files.class_of(path, prefix) or ""] for path in train)


def _val_prefix(prefix: str) -> str:
    """What names in val/ begin with, given that of the training images; records of an LMDB have neither."""
    return "val/" if prefix == "train/" else ""


def _validation_classes(
    files: ImageFiles, paths: Sequence[str], prefix: str, classes: tuple[str, ...] | None
) -> tuple[str | None, ...]:
    """The class of each image; the folders of LSUN's splits are those of the same category in training."""
    folders = [files.class_of(path, prefix) for path in paths]
    if files.storage != ImageRecords.storage:
        return tuple(folders)
    in_training = {category_of(name): name for name in classes or ()}
    return tuple(None if name is None else in_training.get(category_of(name), name) for name in folders)


# -- choosing ---------------------------------------------------------------------------------------------------------


def _first_by_hash(paths: Sequence[str], count: int, purpose: str, seed: int) -> list[str]:
    """The `count` paths that come first in an order drawn from the seed and each path alone."""
    return heapq.nsmallest(count, paths, key=lambda path: (derive_seed(purpose, seed, path), path))


def _sample(paths: Sequence[str], seed: int) -> Sequence[str]:
    return paths if len(paths) <= CHECK_ALL_UP_TO else _first_by_hash(paths, CHECK_SAMPLE, "check", seed)


def _choose_held_out(paths: Sequence[str], from_train: bool, data: DataConfig, inspection: _Inspection) -> list[str]:
    """The held-out images, every one of them decoded once; unusable ones give way to the next."""
    while True:
        usable = [path for path in paths if path not in inspection.faults]
        allowed = len(usable) // 4 if from_train else len(usable)
        if data.num_held_out > allowed:
            inspection.require_few_faults()
        if allowed == 0:
            source = "a quarter of the images may be held out" if from_train else "none is usable"
            raise DataError(
                f"{inspection.place}: no image can be held out of {len(usable)} usable ones ({source}); add images"
            )
        chosen = _first_by_hash(usable, min(data.num_held_out, allowed), "held-out", data.seed)
        if not inspection.look_at(chosen):
            return chosen


def _choose_train(usable: Sequence[str], data: DataConfig, place: str) -> list[str]:
    if not usable:
        raise DataError(f"{place}: no usable training images; {_REMEDY}")
    if data.num_train is None:
        return list(usable)
    if data.num_train > len(usable):
        raise DataError(
            f"{place}: data.num_train asks for {data.num_train} images, {len(usable)} can be trained on; "
            "lower it, or leave it out to take all"
        )
    return sorted(_first_by_hash(usable, data.num_train, "train", data.seed))


# -- checking ---------------------------------------------------------------------------------------------------------


class _Inspection:
    """Decodes files once and remembers which are unusable."""

    def __init__(self, files: ImageFiles, place: str) -> None:
        self.place = place
        self.checked: set[str] = set()
        self.faults: dict[str, str] = {}
        self._files = files

    def look_at(self, paths: Sequence[str]) -> bool:
        """Decode those not seen before; True where a new fault was found."""
        new = [path for path in paths if path not in self.checked]
        workers = min(8, os.cpu_count() or 1)  # decoding releases the interpreter lock
        with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
            warnings.simplefilter("ignore")
            reasons = list(pool.map(self._files.fault, new))
        self.checked.update(new)
        found = {path: reason for path, reason in zip(new, reasons, strict=True) if reason is not None}
        self.faults.update(found)
        return bool(found)

    def require_few_faults(self) -> None:
        """Raise DataError where more files are unusable than can be passed over."""
        if too_many_faults(len(self.faults), len(self.checked)):
            raise DataError(
                f"{self.place}: {len(self.faults)} of {len(self.checked)} images looked at cannot be used "
                f"(more than 1 %): {describe_faults(self.faults)}; repair or remove them"
            )
