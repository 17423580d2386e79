"""Authors' checkpoints into finished cells, and cells into authors' checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from safetensors.torch import save_file

from lmd_bench.checkpoints.official import (
    OfficialMethod,
    OfficialRequest,
    method_config,
    num_parameters,
    open_official_method,
)
from lmd_bench.config import ImportedConfig
from lmd_bench.errors import BenchError, ConfigError, WeightsError
from lmd_bench.harness.weights import (
    WEIGHTS_FILE,
    file_sha256,
    load_method_weights,
    own_state,
    save_weights,
    weights_path,
)
from lmd_bench.method import DataSpec, Method, MethodConfig
from lmd_bench.nn.official import load_exactly
from lmd_bench.registry import code_digest

_RECORD = "record.json"


@dataclass(frozen=True)
class Exported:
    """What `export_checkpoint` has written."""

    path: Path
    method: str
    num_tensors: int
    num_parameters: int


def import_checkpoint(
    request: OfficialRequest, out: Path, *, force: bool = False, added: Mapping[str, str] | None = None
) -> OfficialMethod:
    """Write an authors' checkpoint as the weights of a finished cell, in the folder `out`.

    `reconstruct`, `sample` and everything else that takes a cell's weights then reads it like one trained here.
    `force` replaces weights that were imported before. Raises, before anything is written, ConfigError for an `out`
    that is taken, and as `open_official_method` for the file.
    """
    _require_free(out, force)
    opened = open_official_method(request, added)
    config = method_config(opened.method)
    _require_same_when_built_again(opened.method, config)
    target = (added or {}).get(request.method)
    imported = ImportedConfig(
        method=request.method,
        code=None if target is None else code_digest(target),
        options=config.model_dump(mode="json"),
        image_size=opened.method.data.image_size,
        source=request.path.name,
        source_sha256=file_sha256(request.path),
        place=opened.file.place,
    )
    save_weights(opened.method, out / WEIGHTS_FILE, imported)
    return opened


def export_checkpoint(
    cell: Path, out: Path, *, force: bool = False, added: Mapping[str, str] | None = None
) -> Exported:
    """Write a finished cell's weights in the layout of the method's authors, as .safetensors.

    What was imported comes back bit for bit, but for keys that were left out. Raises, before anything is written,
    ConfigError for an `out` that is taken or no .safetensors, or a method without an official layout; WeightsError
    for a cell that cannot be read.
    """
    source = weights_path(cell)
    if out.suffix != ".safetensors":
        raise ConfigError(f"--out {out}: the file is written as .safetensors; give it that ending")
    if out.exists() and out.resolve() == source.resolve():
        raise ConfigError(f"--out {out}: is the cell's own file of weights; name another")
    if out.is_dir() or (out.exists() and not force):
        raise ConfigError(f"--out {out}: exists already; name another file" + ("" if out.is_dir() else ", or --force"))
    method, config = load_method_weights(source, added)
    if type(method).to_official is Method.to_official:
        raise ConfigError(f"{cell}: {type(method).__name__} has no official checkpoint layout")
    # tensors that share memory are refused by safetensors, and an authors' layout may name one twice
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in method.to_official().items()}
    temporary = out.with_name(f".{out.name}-{uuid4().hex[:8]}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(tensors, temporary, {"format": "pt"})
        temporary.chmod(mode)  # the library makes files that their owner alone may read
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(out, config.method, len(tensors), num_parameters(method))


def _require_free(out: Path, force: bool) -> None:
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out}: is a file; name a folder")
    if (out / _RECORD).exists():
        raise ConfigError(f"--out {out}: holds a run of its own ({_RECORD}); name another folder")
    if (out / WEIGHTS_FILE).exists() and not force:
        raise ConfigError(f"--out {out}: holds {WEIGHTS_FILE} already; name another folder, or --force")


def _require_same_when_built_again(method: Method, config: MethodConfig) -> None:
    """Raise WeightsError unless the options say all that is needed to build the method: they are what is kept."""
    method_class = type(method)
    spec = DataSpec(method.data.image_size, method.data.num_classes)
    try:
        options = method_class.Config.model_validate(config.model_dump(mode="json"))
        again = method_class(options, spec)
        kept = {name: value for name, value in again.state_dict().items() if name not in own_state(again)}
        load_exactly(again, {**kept, **own_state(method)})
    except (BenchError, ValueError) as error:
        raise WeightsError(f"{method_class.__name__} cannot be built again from its options: {error}") from error
