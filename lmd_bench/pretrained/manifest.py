"""The list of published weights, as validated values. Imports no torch."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

from pydantic import Field, ValidationError, model_validator

from lmd_bench.config.base import Values, near
from lmd_bench.errors import WeightsError

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class WeightsFile(Values):
    """One file of an entry, and how its content is known."""

    name: str
    """Of the file, or its path inside the folder."""
    size: int | None = Field(default=None, ge=1)
    """Bytes; None where not known."""
    sha256: Sha256 | None = None
    """Of the whole file; None where no source for it was found."""
    sha256_prefix: str | None = Field(default=None, pattern=r"^[0-9a-f]{8,63}$")
    """Its first digits, where they alone are known."""
    hash_source: str | None = None
    """Where size and hash come from, in words."""

    @property
    def known_hash(self) -> str:
        """What the hash must begin with; empty where nothing is known."""
        return self.sha256 or self.sha256_prefix or ""


class WeightsEntry(Values):
    """Weights under one name: a single file, or a folder in which several must lie."""

    title: str
    """How messages name them: AlexNet, Inception, ..."""
    what: str
    used_for: str
    """The columns and rows that need them."""
    licence: str
    files: tuple[WeightsFile, ...] = Field(min_length=1)
    is_folder: bool = False
    url: str | None = None
    """Of a single file."""
    hub: str | None = None
    """Repository of the Hugging Face hub; the file or the folder's files lie there under the same names."""
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")
    """Commit of that repository whose files are meant; None: what `main` names."""
    hub_file: str | None = None
    """Name of a single file in that repository where it differs."""
    open_clip_model: str | None = None
    """open_clip's name of the architecture that the file fits."""
    about_mib: int = Field(default=0, ge=0)
    """Of all files, roughly."""
    note: str = ""

    @model_validator(mode="after")
    def _one_origin(self) -> WeightsEntry:
        if (self.url is None) == (self.hub is None):
            raise ValueError("give either url or hub")
        if self.revision is not None and self.hub is None:
            raise ValueError("a revision is of a hub repository")
        if self.is_folder and self.url is not None:
            raise ValueError("a folder comes from a hub repository, not from a url")
        if not self.is_folder and len(self.files) != 1:
            raise ValueError("an entry that is no folder has one file")
        return self

    @property
    def origin(self) -> str:
        """Where they are published."""
        return self.url or f"https://huggingface.co/{self.hub}"


class Manifest(Values):
    """All entries by name."""

    weights: dict[str, WeightsEntry]

    def entry(self, name: str) -> WeightsEntry:
        """The entry of that name; WeightsError where there is none."""
        if name not in self.weights:
            raise WeightsError(f"no weights are named {name!r}{near(name, self.weights)}")
        return self.weights[name]


def read_manifest(path: Path | None = None) -> Manifest:
    """The manifest in a YAML file; None: the one that ships. WeightsError for one that cannot be used."""
    import yaml

    file = resources.files("lmd_bench") / "pretrained" / "manifest.yaml" if path is None else path
    try:
        return Manifest.model_validate({"weights": yaml.safe_load(file.read_text(encoding="utf-8"))})
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise WeightsError(f"{file}: not a readable manifest ({' '.join(str(error).split())})") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise WeightsError(f"{file}: {place}: {first['msg']}") from error
