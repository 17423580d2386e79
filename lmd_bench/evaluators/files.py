"""Weights of the scenes evaluators on disk: half precision, with a manifest of hashes beside. No torch at import."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lmd_bench.errors import WeightsError

if TYPE_CHECKING:
    from torch import Tensor, nn

SHIPPED = Path(__file__).parent / "weights"
MANIFEST = "manifest.json"
CLASSIFIER_FILE = "classifier/model.safetensors"
CLIP_FOLDER = "clip"
CLIP_FILE = f"{CLIP_FOLDER}/open_clip_model.safetensors"
CLIP_CONFIG = f"{CLIP_FOLDER}/open_clip_config.json"
"""Where and as what open_clip looks for a model's config in a local folder."""
_MADE = "made"
_REMEDY = "reinstall lmd-bench, or train it again with `lmd-bench evaluators train`"


@dataclass(frozen=True)
class EvaluatorFile:
    """A weight file that is what its manifest says."""

    path: Path
    sha256: str
    """Hexadecimal."""


def checked_file(folder: Path, name: str) -> EvaluatorFile:
    """The file `name` of an evaluators' folder, its hash compared with the manifest's.

    Raises WeightsError for a file or manifest that is missing, damaged or another.
    """
    path = folder / name
    expected = _read_manifest(folder).get(name)
    if expected is None:
        raise WeightsError(f"{folder / MANIFEST}: says nothing about {name}; {_REMEDY}")
    try:
        found = hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror}); {_REMEDY}") from None
    if found != expected:
        raise WeightsError(f"{path}: SHA-256 {found[:16]}... is not {expected[:16]}... of its manifest; {_REMEDY}")
    return EvaluatorFile(path, found)


def save_half(model: nn.Module, folder: Path, name: str, metadata: Mapping[str, str]) -> None:
    """Writes a model's state in half precision with `metadata`, and its hash into the folder's manifest."""
    from safetensors.torch import save

    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    made = json.dumps(dict(metadata), sort_keys=True)  # one entry: safetensors writes several in random order
    path.write_bytes(save({key: _half(value) for key, value in model.state_dict().items()}, {_MADE: made}))
    note_files(folder, [name])


def prepare_folder(folder: Path) -> None:
    """Makes a folder for evaluators. Raises WeightsError where its manifest is damaged, OSError as the disk does."""
    folder.mkdir(parents=True, exist_ok=True)
    note_files(folder, [])


def note_files(folder: Path, names: list[str]) -> None:
    """Writes the SHA-256 of files of a folder into its manifest; what it says of other files stays."""
    known = _read_manifest(folder) if (folder / MANIFEST).exists() else {}
    known |= {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}
    (folder / MANIFEST).write_text(json.dumps(known, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_metadata(path: Path) -> dict[str, str]:
    """What a weight file says about how it was made."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        values = json.loads((file.metadata() or {}).get(_MADE, "{}"))
    return {str(name): str(value) for name, value in values.items()}


def _half(value: Tensor) -> Tensor:
    return (value.half() if value.is_floating_point() else value).cpu().contiguous()


def _read_manifest(folder: Path) -> dict[str, str]:
    try:
        read = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{folder / MANIFEST}: cannot be read ({error.strerror}); {_REMEDY}") from None
    except ValueError as error:
        raise WeightsError(f"{folder / MANIFEST}: not a manifest ({error}); {_REMEDY}") from None
    if not isinstance(read, dict) or not all(isinstance(value, str) for value in read.values()):
        raise WeightsError(f"{folder / MANIFEST}: not a manifest of file names and SHA-256; {_REMEDY}")
    return read
