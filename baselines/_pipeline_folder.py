"""A text-to-image pipeline in a local folder of diffusers' layout: what must be there, and how its parts are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.projector.load import load_model

TEXT_ENCODER = "text_encoder"
_DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"
_TRANSFORMERS_FILE = "model.safetensors"
_PIECE = 4096


@dataclass(frozen=True)
class PipelineFolder:
    """One pipeline's folder.

    path: the folder.
    models: subfolder -> class of the model that must lie there.
    """

    path: Path
    models: dict[str, str]

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.resolve().name

    def check(self) -> None:
        """Raise WeightsError where a file is missing or of another class, ConfigError where transformers is."""
        if importlib.util.find_spec("transformers") is None:
            raise ConfigError("the text encoder needs transformers: pip install 'lmd-bench[sd]'")
        if not self.path.is_dir():
            state = "a file, not a folder" if self.path.exists() else "no such folder"
            parts = ", ".join([*self.models, "tokenizer", "scheduler"])
            raise WeightsError(f"path {self.path}: {state}; give a pipeline's folder in diffusers' layout ({parts})")
        if (self.path / "text_encoder_2").exists():
            raise WeightsError(f"path {self.path}: Stable Diffusion XL (two text encoders); give a v1 folder")
        for part, wanted in self.models.items():
            self._check_class(part, wanted)
            self._weight_files(part)
        self.scheduler_class()
        self._tokenizer_files()

    def config(self, part: str) -> dict[str, Any]:
        """The values of a part's config.json (scheduler: scheduler_config.json)."""
        file = self._config_file(part)
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise WeightsError(f"path {self.path}: {part}/{file.name} is missing; copy the whole pipeline") from None
        except (OSError, ValueError) as error:
            raise WeightsError(f"{file}: cannot be read as JSON ({error}); copy the file again") from None
        if not isinstance(values, dict):
            raise WeightsError(f"{file}: not a model's configuration; copy the file again")
        return values

    def count(self, part: str, key: str) -> int:
        """A whole number of at least 1 from a part's configuration. Raises WeightsError for anything else."""
        value = self.config(part).get(key)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise WeightsError(f"{self._config_file(part)}: {key} is {value!r}, a whole number of at least 1 is needed")
        return value

    def factor(self, part: str) -> int:
        """Pixels to a latent position, along each axis, of an autoencoder whose every resolution but one halves."""
        widths = self.config(part).get("block_out_channels")
        if not isinstance(widths, list) or not widths:
            raise WeightsError(f"{self.path / part}/config.json: block_out_channels is {widths!r}, a list is needed")
        return int(2 ** (len(widths) - 1))

    def check_scheduler(self, num_inference_steps: int) -> None:
        """Raise WeightsError where the scheduler cannot be built from its file, ConfigError for more steps than it can
        take."""
        file, name = self._config_file("scheduler"), self.scheduler_class()
        try:
            scheduler = self.load_scheduler()
            known = scheduler.config.get("num_train_timesteps")
            fits = known is None or num_inference_steps <= known
            if fits:
                scheduler.set_timesteps(num_inference_steps)  # an offset may lead beyond the last timestep
                fits = known is None or float(scheduler.timesteps.max()) <= known - 1
        except Exception as error:  # each scheduler finds fault with its values in its own way
            reason = (str(error).strip().splitlines() or [""])[0]
            raise WeightsError(
                f"{file}: no {name} for {num_inference_steps} steps can be made of it ({type(error).__name__}: "
                f"{reason}); copy the file again"
            ) from error
        if not fits:
            raise ConfigError(
                f"num_inference_steps {num_inference_steps}: too many for {name} with its {known} timesteps; lower it"
            )

    def scheduler_class(self) -> str:
        """Class name of the scheduler."""
        return str(self.config("scheduler").get("_class_name"))

    def digest(self) -> str:
        """What the pipeline computes depends on, as 16 hex digits of a SHA-256.

        Files of up to 12 KiB count whole, of larger ones size and the first, middle and last 4 KiB: gigabytes are not
        read for every run.
        """
        digest = hashlib.sha256()
        for file in self._files():
            digest.update(f"\0{file.relative_to(self.path).as_posix()}\0{file.stat().st_size}\0".encode())
            digest.update(_excerpt(file))
        return digest.hexdigest()[:16]

    # -- loading ----------------------------------------------------------------------------------------------------

    def load(self, part: str) -> Any:
        """A diffusers model in float32, frozen, in evaluation mode."""
        import diffusers

        model: Any = load_model(getattr(diffusers, self.models[part]), self.path / part, what=part)
        return model.requires_grad_(False).eval()

    def load_scheduler(self) -> Any:
        """The scheduler, with the folder's own values."""
        import diffusers

        return getattr(diffusers, self.scheduler_class()).from_config(self.config("scheduler"))

    def load_text_encoder(self) -> Any:
        """The CLIP text encoder in float32, frozen, in evaluation mode. Raises WeightsError for weights that misfit."""
        import transformers

        folder = self.path / TEXT_ENCODER
        model_class = getattr(transformers, self.models[TEXT_ENCODER])
        try:
            with _quiet_transformers():
                model, info = model_class.from_pretrained(
                    folder, local_files_only=True, use_safetensors=True, dtype=torch.float32, output_loading_info=True
                )
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WeightsError(f"{TEXT_ENCODER} {folder}: cannot be loaded ({reason}); copy it again") from error
        wrong = sorted([*info["missing_keys"], *info["unexpected_keys"]])
        if wrong:
            raise WeightsError(
                f"{TEXT_ENCODER} {folder}: weights and config.json are of different models ({len(wrong)} keys differ, "
                f"first {wrong[0]}); copy both again"
            )
        return model.requires_grad_(False).eval()

    def load_tokenizer(self) -> Any:
        """CLIP's tokenizer."""
        import transformers

        folder = self.path / "tokenizer"
        try:
            with _quiet_transformers():
                return transformers.CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError, TypeError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WeightsError(f"tokenizer {folder}: cannot be loaded ({reason}); copy it again") from error

    # -- files ------------------------------------------------------------------------------------------------------

    def _config_file(self, part: str) -> Path:
        return self.path / part / ("scheduler_config.json" if part == "scheduler" else "config.json")

    def _check_class(self, part: str, wanted: str) -> None:
        values = self.config(part)
        architectures = values.get("architectures") or [None]
        found = architectures[0] if part == TEXT_ENCODER else values.get("_class_name")
        if found != wanted:
            raise WeightsError(f"{self.path / part}/config.json: a {found}, {wanted} is needed; give another pipeline")

    def _weight_files(self, part: str) -> list[Path]:
        """The safetensors file, or the index of several and these. Raises WeightsError with what lies there instead."""
        folder = self.path / part
        name = _TRANSFORMERS_FILE if part == TEXT_ENCODER else _DIFFUSERS_FILE
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            return [index, *self._shards(index)]
        others = sorted(file.name for file in folder.glob("*") if file.suffix in (".bin", ".safetensors", ".ckpt"))
        remedy = "copy the whole pipeline"
        if any(other.endswith(".bin") for other in others):
            remedy = "weights are read from safetensors only: save the pipeline again with safe_serialization=True"
        elif others:
            remedy = f"{others[0]} is another variant: copy the full-precision file"
        raise WeightsError(f"path {self.path}: {part}/{name} is missing; {remedy}")

    def _shards(self, index: Path) -> list[Path]:
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(f"{index}: no index of weight files ({error}); copy it again") from None
        for name in names:
            if not (index.parent / name).is_file():
                raise WeightsError(f"{index}: {name}, which it names, is missing; copy it too")
        return [index.parent / name for name in names]

    def _tokenizer_files(self) -> list[Path]:
        folder = self.path / "tokenizer"
        if not (folder / "tokenizer.json").is_file():
            for name in ("vocab.json", "merges.txt"):
                if not (folder / name).is_file():
                    raise WeightsError(f"path {self.path}: tokenizer/{name} is missing; copy the whole pipeline")
        return sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt"))

    def _files(self) -> Iterator[Path]:
        """All files that what is painted depends on, in a fixed order."""
        for part in sorted(self.models):
            yield self.path / part / "config.json"
            yield from self._weight_files(part)
        yield self.path / "scheduler" / "scheduler_config.json"
        yield from self._tokenizer_files()


def _excerpt(file: Path) -> bytes:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= 3 * _PIECE:
            return stream.read()
        pieces = []
        for start in (0, (size - _PIECE) // 2, size - _PIECE):
            stream.seek(start)
            pieces.append(stream.read(_PIECE))
    return b"".join(pieces)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Neither remarks nor a progress bar while a model is loaded; what they would say of keys is raised here."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
