"""The folder that a training writes to: what may lie there before, and what is put there, in which order."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.projector.config import WEIGHTS_FILE, folder_of
from lmd_bench.projector.train_config import PLACE, LSPTrainOptions
from lmd_bench.projector.train_kinds import TrainableProjector
from lmd_bench.projector.training_split import SPLIT_FILE, TrainingSplit

STATE_FILE = "training-state.pt"
LOG_FILE = "training.csv"
README_FILE = "README.md"
_CONFIG_FILE = "config.json"
_OWN = (_CONFIG_FILE, WEIGHTS_FILE, SPLIT_FILE, LOG_FILE, README_FILE, STATE_FILE)
_UNFINISHED = ".unfinished"


def check_out(out: Path, options: LSPTrainOptions, *, force: bool) -> None:
    """Whether a training may write to `out`; touches nothing.

    It may where nothing lies, where the same training was interrupted, and with `force` where a projector lies. Raises
    ConfigError otherwise, and where nothing can be written; WeightsError for an `init_from` that is not there.
    """
    _require_writable(out)
    if options.init_from is not None and folder_of(options.init_from, "autoencoder").resolve() == out.resolve():
        raise _refuse(f"--init-from {options.init_from} is --out itself; choose another --out")
    if not out.is_dir():
        return
    names = {entry.name for entry in out.iterdir()}
    foreign = sorted(name for name in names if not _is_own(name))
    if foreign:
        more = f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""
        raise _refuse(f"{out} holds {foreign[0]}{more}, which no training wrote; choose a new or empty --out")
    if STATE_FILE in names or not names:
        return
    if not names & {WEIGHTS_FILE, SPLIT_FILE}:
        raise _refuse(f"{out} is not empty ({min(names)}) and no projector's folder; choose a new or empty --out")
    if not force and names & {WEIGHTS_FILE, _CONFIG_FILE}:
        raise _refuse(f"{out} holds a projector already; choose another --out, or have it replaced with --force")


def _is_own(name: str) -> bool:
    return name in _OWN or name.startswith(_UNFINISHED + "-") or name.removesuffix(_UNFINISHED) in _OWN


def _refuse(text: str) -> ConfigError:
    return ConfigError(f"{PLACE}: {text}")


def _require_writable(out: Path) -> None:
    existing = out.absolute()
    while not existing.exists() and not existing.is_symlink():
        existing = existing.parent
    if not existing.is_dir():
        raise _refuse(f"cannot write to {out} ({existing} is no folder); choose another --out")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise _refuse(f"cannot write to {out} (no permission); choose another --out")


def prepare(out: Path, split: TrainingSplit, *, going_on: bool) -> None:
    """Makes the folder, removes a checked one's earlier projector, and says what is trained on.

    From here to the end the folder is no projector: nothing would tell old weights from a new log. going_on: the log
    and the state stay.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refuse(f"cannot write to {out} ({error.strerror}); choose another --out") from None
    kept = {STATE_FILE, LOG_FILE} if going_on else set()
    for name in _OWN:  # config.json first, by which a folder is known for a model
        if name not in kept:
            (out / name).unlink(missing_ok=True)
    for left in [*out.glob(f"{_UNFINISHED}-*"), *out.glob(f"*{_UNFINISHED}")]:
        shutil.rmtree(left) if left.is_dir() else left.unlink()
    write_text(out / SPLIT_FILE, split.model_dump_json(indent=1, exclude_defaults=True) + "\n")


def write_model(out: Path, projector: TrainableProjector, *, half: bool) -> None:
    """Writes the model to `out` as diffusers does; the folder is known for a model once all is there.

    Raises TrainingError for weights that are not finite.
    """
    model = projector.model.to(memory_format=torch.contiguous_format)
    model = model.half() if half else model
    wrong = [name for name, tensor in model.state_dict().items() if not bool(tensor.isfinite().all())]
    if wrong:
        raise TrainingError(
            f"{PLACE}: {wrong[0]} and {len(wrong) - 1} more tensors are not finite; nothing is written to {out}; use a"
            " smaller --lr" + (" or --no-half" if half else "")
        )
    with tempfile.TemporaryDirectory(dir=out, prefix=_UNFINISHED + "-") as name:
        folder = Path(name)
        model.save_pretrained(folder, safe_serialization=True)
        for file in sorted(folder.iterdir(), key=lambda file: file.name == _CONFIG_FILE):
            file.chmod(0o644)  # safetensors writes for the owner alone, which an installed package must not
            os.replace(file, out / file.name)


def write_text(file: Path, text: str) -> None:
    """Writes a file in one piece."""
    unfinished = file.with_name(file.name + _UNFINISHED)
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, file)
