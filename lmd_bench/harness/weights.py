"""What a finished cell leaves behind to be used: its trained weights, with all that is needed to build the method."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lmd_bench.config import ImportedConfig, RunConfig
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec, Method
from lmd_bench.nn.official import load_exactly
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, weights_digest
from lmd_bench.records import SavedWeights
from lmd_bench.registry import code_digest, load_method

WEIGHTS_FILE = "weights.safetensors"
_FORMAT = "lmd-bench method 1"
_RUN, _IMPORTED = "run", "imported"
"""Where weights come from: a run of this program, or an authors' checkpoint."""


def save_weights(method: Method, path: Path, config: RunConfig | ImportedConfig) -> SavedWeights:
    """Write the method's state but for its frozen projector, in one piece: a file is there complete or not at all.

    The metadata holds the cell's configuration (or what is known of imported weights), the data's number of classes,
    and a digest of the projector's weights, for `load_method_weights`. Numbers keep their format.
    """
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in own_state(method).items()}
    projector = _projector_config(method)
    metadata = {
        "format": _FORMAT,
        "origin": _RUN if isinstance(config, RunConfig) else _IMPORTED,
        "config": config.model_dump_json(),
        "num_classes": json.dumps(method.data.num_classes),
        "projector_digest": "" if projector is None else weights_digest(projector),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, metadata)
        temporary.chmod(mode)  # the library makes files that their owner alone may read
        with temporary.open("r+b") as file:
            os.fsync(file.fileno())
        digest = file_sha256(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return SavedWeights(file=path.name, sha256=digest, num_bytes=path.stat().st_size)


def load_method_weights(
    path: Path, added: Mapping[str, str] | None = None
) -> tuple[Method, RunConfig | ImportedConfig]:
    """The method of a finished cell, on the CPU in evaluation mode, and the cell's configuration.

    `path` is the cell's folder or the file itself; `added` maps names of a user's own methods to `file.py:Class`.
    Raises WeightsError for a file that is missing, damaged or of other origin, keys that do not fit (named), a method
    whose code has changed, or a projector that is not there or no longer the one of the run.
    """
    file = weights_path(path)
    stored = _read(file)
    method_class = load_method(stored.config.method, added or {})
    _require_code(file, stored.config, added or {})
    try:
        options = method_class.Config.model_validate(stored.config.options)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise WeightsError(
            f"{file}: options of another version of {stored.config.method}: {place}: {first['msg']}; "
            f"{_remedy(stored.config)}"
        ) from error
    data = DataSpec(stored.config.image_size, stored.num_classes)
    method_class.check(options, data)
    _require_projector(file, getattr(options, "projector", None), stored)
    method = method_class(options, data)
    kept = {name: value for name, value in method.state_dict().items() if name not in own_state(method)}
    foreign = [name for name in stored.tensors if name in kept]
    if foreign:
        raise WeightsError(f"{file}: holds weights of the frozen projector ({foreign[0]}), which has its own folder")
    try:
        load_exactly(method, {**kept, **stored.tensors})
    except WeightsError as error:
        raise WeightsError(f"{file}: {error}") from error
    return method.eval(), stored.config


def read_weights_config(path: Path) -> RunConfig | ImportedConfig:
    """What a weights file, or that of a cell's folder, says of itself. Raises WeightsError as `load_method_weights`."""
    return _read(weights_path(path)).config


def weights_path(path: Path) -> Path:
    """The weights file that a cell's folder or a file's own path means. Raises WeightsError where there is none."""
    file = path / WEIGHTS_FILE if path.is_dir() else path
    if not file.is_file():
        remedy = f"no {WEIGHTS_FILE} in this folder; give the folder of a finished cell, OUT/<suite>/<row>/seed-<n>"
        raise WeightsError(f"{path}: {remedy if path.is_dir() else 'no such file'}")
    return file


def expected_bytes(method_class: type[Method], options: Any, data: DataSpec) -> int | None:
    """Bytes that `save_weights` will write for a configuration; None for a method that cannot be built on meta."""
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a projector's weights have nowhere to go on this device, and need not
            method = method_class(options, data)
    except Exception:  # only an estimate: whatever a method does in its constructor
        return None
    return sum(value.numel() * value.element_size() for value in own_state(method).values())


# -- parts ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stored:
    """A weights file as read."""

    tensors: dict[str, Tensor]
    config: RunConfig | ImportedConfig
    num_classes: int | None
    projector_digest: str


def _read(file: Path) -> _Stored:
    metadata: dict[str, str] = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            metadata = opened.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise WeightsError(
                    f"{file}: not weights of a finished cell (format {metadata.get('format')!r}, wanted {_FORMAT!r}); "
                    "for an authors' checkpoint say --method, or import it with `lmd-bench checkpoint import`"
                )
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
        kind = ImportedConfig if metadata.get("origin") == _IMPORTED else RunConfig
        config = kind.model_validate_json(metadata["config"])
        return _Stored(tensors, config, json.loads(metadata["num_classes"]), metadata["projector_digest"])
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{file}: cannot be read as safetensors ({error}); run the cell, or import its checkpoint, again"
        ) from error
    except (KeyError, ValueError) as error:
        reason = f"{error.errors()[0]['msg']}" if isinstance(error, ValidationError) else str(error)
        remedy = _remedy(metadata.get("origin"))
        raise WeightsError(f"{file}: made by another version of lmd-bench ({reason}); {remedy}") from error


def _require_code(file: Path, config: RunConfig | ImportedConfig, added: Mapping[str, str]) -> None:
    if config.method in added and code_digest(added[config.method]) != config.code:
        raise WeightsError(
            f"{file}: {added[config.method]} has changed since these weights were trained or imported; "
            f"{_remedy(config)}"
        )


def _remedy(origin: RunConfig | ImportedConfig | str | None) -> str:
    """How to get weights anew, from where they come from."""
    if isinstance(origin, ImportedConfig):
        return f"import {origin.source} again (`lmd-bench checkpoint import`)"
    if origin == _IMPORTED:
        return "import the checkpoint again (`lmd-bench checkpoint import`)"
    return "run the cell again"


def _require_projector(file: Path, projector: ProjectorConfig | None, stored: _Stored) -> None:
    if projector is None:
        return
    now = weights_digest(projector)
    if now != stored.projector_digest:
        made = "imported for" if isinstance(stored.config, ImportedConfig) else "trained on"
        raise WeightsError(
            f"{file}: {made} latents of projector {projector.path or projector.kind} with digest "
            f"{stored.projector_digest}; the one there now has {now}: put the old one back, or {_remedy(stored.config)}"
        )


def own_state(method: Method) -> dict[str, Tensor]:
    """A method's state dict without what belongs to frozen projectors."""
    prefixes = tuple(f"{name}." for name, module in method.named_modules() if isinstance(module, LatentProjector))
    return {name: value for name, value in method.state_dict().items() if not (prefixes and name.startswith(prefixes))}


def _projector_config(method: Method) -> ProjectorConfig | None:
    found = getattr(getattr(method, "config", None), "projector", None)
    return found if isinstance(found, ProjectorConfig) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a whole file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
