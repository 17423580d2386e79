"""Where published weights lie on this machine, and whether they are the ones that are meant. Nothing is loaded here."""

from __future__ import annotations

import hashlib
import json
import os
import queue
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from lmd_bench.errors import MissingWeightsError, WeightsError
from lmd_bench.pretrained.manifest import Manifest, WeightsEntry, WeightsFile, read_manifest

FOLDER_VARIABLE = "LMD_BENCH_WEIGHTS"
"""Environment variable that names the folder of weights where `--weights` does not."""
REACH_S = 3.0
"""Seconds that a host has to answer before a download is given up: libraries would try for most of a minute."""
SMALL_BYTES = 256 * 2**20
"""Files up to this size are hashed by `status` without being asked."""

_WEIGHTS_SUFFIXES = (".safetensors", ".pth", ".pt")

WeightsState = Literal["found", "missing", "wrong"]


def reachable(url: str, timeout_s: float = REACH_S) -> bool:
    """Whether the host of a URL, or a proxy in front of it, takes a connection within `timeout_s`."""
    answers: queue.Queue[bool] = queue.Queue()

    def connect(address: tuple[str, int]) -> None:
        try:
            socket.create_connection(address, timeout=timeout_s).close()
            answers.put(True)
        except OSError:
            answers.put(False)

    # In threads of their own: looking up a name has no time limit, and a machine without a name server may take long.
    addresses = _addresses(url)
    for address in addresses:
        threading.Thread(target=connect, args=(address,), daemon=True).start()
    with suppress(queue.Empty):
        return any(answers.get(timeout=timeout_s) for _ in addresses)
    return False


def _addresses(url: str) -> list[tuple[str, int]]:
    """Hosts and ports of which one has to answer: the URL's own, or a proxy's where the environment names one.

    Both where only ALL_PROXY is set: the hub's client goes through it, torch.hub does not.
    """
    from urllib.request import getproxies, proxy_bypass

    own = urlsplit(url)
    proxies = {} if proxy_bypass(own.hostname or "") else getproxies()
    if (proxy := proxies.get(own.scheme)) is not None:
        return [_address(proxy)]
    return [_address(proxy) for proxy in (proxies.get("all"), url) if proxy]


def _address(url: str) -> tuple[str, int]:
    """Host and port; a proxy may be named without a scheme, which is then http."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    usual = {"http": 80, "https": 443}.get(parts.scheme, 1080)  # else a SOCKS proxy
    return parts.hostname or "", parts.port or usual


def offline_by_environment() -> bool:
    """Whether the Hugging Face libraries are told to stay offline; this project then does so too."""
    value = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return value.upper() in {"1", "ON", "YES", "TRUE"}


def _say_nothing(text: str) -> None:
    pass


@dataclass(frozen=True)
class WeightsStatus:
    """What `doctor` says of one entry."""

    name: str
    entry: WeightsEntry
    state: WeightsState
    path: Path | None
    """Where it was found, right or wrong."""
    detail: str
    """Of found ones, what is known of their content; of others, what is wrong and what to do."""


@dataclass(frozen=True, eq=False)
class WeightsStore:
    """Finds the manifest's weights: in a folder of the user's, then where the libraries keep their downloads.

    The folder holds single files under their own names and folders under the entry's name (`FOLDER_VARIABLE` names it
    where `folder` is None). A file whose size or hash is not the manifest's is an error wherever it lies, never used
    and never passed over. Raises WeightsError for a folder that does not exist.
    """

    folder: Path | None = None
    offline: bool = False
    """Never download, whatever a suite allows; the environment's HF_HUB_OFFLINE says the same."""
    manifest: Manifest = field(default_factory=read_manifest)
    hash_cache: Path | None = None
    """File that remembers hashes by path, size and time of change; None: one in the user's cache folder."""
    can_reach: Callable[[str], bool] = reachable
    """Whether a URL's host answers; a test's own here."""
    on_download: Callable[[str], None] = _say_nothing
    """Told, in a line for the user, what is about to be downloaded."""
    _answers: dict[str, bool] = field(default_factory=dict)
    _hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        folder, place = self.folder, f"--weights {self.folder}"
        if folder is None and (named := os.environ.get(FOLDER_VARIABLE)):
            folder, place = Path(named).expanduser(), f"{FOLDER_VARIABLE}={named}"
            object.__setattr__(self, "folder", folder)
        if folder is not None and not folder.is_dir():
            raise WeightsError(f"{place}: {'not a folder' if folder.exists() else 'no such folder'}")

    # -- for the rest of the project --------------------------------------------------------------------------------

    def find(self, name: str, *, download: bool = False) -> Path:
        """The file, or the folder, of an entry; its content is checked.

        `download` lets a library fetch what is not there, unless the store is offline. Raises, in one line:
        MissingWeightsError where nothing is there and nothing came; WeightsError for an unknown name, an incomplete
        folder, a wrong size or hash.
        """
        found = self.locate(name, download=download)
        if found is not None:
            return found
        entry = self.manifest.entry(name)
        found = self._download(name, entry)
        self._check_files(entry, found)
        return found

    def locate(self, name: str, *, download: bool = False, check: bool = True) -> Path | None:
        """What `find` would give, or None where it would download it. Downloads nothing; raises as `find` does.

        check: False looks only whether something is there, not whether its size and hash are right.
        """
        entry = self.manifest.entry(name)
        found = self._locate(name, entry)
        if found is not None:
            if check:
                self._check_files(entry, found)
            return found
        if not download or self.is_offline:
            raise MissingWeightsError(f"no {entry.title} weights: {_remedy(name, entry)}")
        self._require_reachable(name, entry)
        return None

    def obstacle(self, name: str, *, download: bool = False) -> str | None:
        """Why there are no such weights, as words for a table's cell; None where there are. Downloads nothing.

        With `download` missing weights are no obstacle where their host answers. Raises WeightsError for weights that
        are there and wrong.
        """
        try:
            self.locate(name, download=download)
        except MissingWeightsError as error:
            return str(error)
        return None

    def sha256_of(self, name: str) -> str:
        """SHA-256 of an entry's file; of a folder's, over the names and hashes of the files it must have."""
        entry = self.manifest.entry(name)
        files = _files(entry, self.find(name))
        if not entry.is_folder:
            return self._sha256(files[0][1])
        listed = "".join(f"{file.name} {self._sha256(path)}\n" for file, path in files)
        return hashlib.sha256(listed.encode()).hexdigest()

    def status(self, *, hash_all: bool = False) -> list[WeightsStatus]:
        """Every entry: found, missing or wrong. Large files are hashed only where that was done before, or asked."""
        return [self._status(name, entry, hash_all) for name, entry in self.manifest.weights.items()]

    @property
    def is_offline(self) -> bool:
        return self.offline or offline_by_environment()

    # -- finding ----------------------------------------------------------------------------------------------------

    def _locate(self, name: str, entry: WeightsEntry) -> Path | None:
        """Where an entry lies, unchecked; None where nothing of it does. WeightsError for a part of a folder."""
        for place in self._places(name, entry):
            if entry.is_folder and place.is_dir():
                _require_complete(entry, place)
                return place
            if not entry.is_folder and place.is_file():
                return place
        return None

    def _places(self, name: str, entry: WeightsEntry) -> Iterator[Path]:
        if self.folder is not None:
            yield self.folder / (name if entry.is_folder else entry.files[0].name)
            if not entry.is_folder:
                yield self.folder / name / (entry.hub_file or entry.files[0].name)
        if entry.hub is None:
            yield _torch_hub() / entry.files[0].name
        else:
            yield from _hub_snapshots(entry)

    # -- downloading ------------------------------------------------------------------------------------------------

    def _require_reachable(self, name: str, entry: WeightsEntry) -> None:
        url = _endpoint() if entry.hub is not None else entry.origin
        host = urlsplit(url).hostname or url
        if host not in self._answers:
            self._answers[host] = self.can_reach(url)
        if not self._answers[host]:
            raise MissingWeightsError(f"no {entry.title} weights: {host} cannot be reached; {_remedy(name, entry)}")

    def _download(self, name: str, entry: WeightsEntry) -> Path:
        """Fetch with the library that other software uses too, into its usual place."""
        self.on_download(f"downloading {entry.title} weights, about {entry.about_mib} MiB, from {entry.origin}")
        place = _hub_cache() if entry.hub is not None else _torch_hub()
        try:
            place.mkdir(parents=True, exist_ok=True)
            free_mib = shutil.disk_usage(place).free // 2**20
            if free_mib < entry.about_mib:
                raise OSError(f"about {entry.about_mib} MiB to download, {free_mib} MiB free in {place}")
            return _from_hub(entry) if entry.hub is not None else _from_url(entry, place)
        except Exception as error:  # torch.hub and the hub's client raise errors of several HTTP libraries
            reason = " ".join(str(error).split())[:200]
            raise MissingWeightsError(
                f"no {entry.title} weights: {entry.origin} cannot be fetched ({reason}); {_remedy(name, entry)}"
            ) from None

    # -- checking ---------------------------------------------------------------------------------------------------

    def _check_files(self, entry: WeightsEntry, found: Path) -> None:
        for file, path in _files(entry, found):
            self._check(entry, file, path)

    def _check(self, entry: WeightsEntry, file: WeightsFile, path: Path) -> None:
        """Raise WeightsError where a file's size or hash is not the manifest's."""
        size = path.stat().st_size
        if file.size is not None and size != file.size:
            raise WeightsError(
                f"{path}: not {entry.title}: {size} bytes, expected {file.size}; it may be cut off: download it again"
            )
        if file.known_hash and not (found := self._sha256(path)).startswith(file.known_hash):
            raise WeightsError(
                f"{path}: wrong hash: expected {file.known_hash}, found {found}; download it again from {entry.origin}"
            )

    def _sha256(self, path: Path) -> str:
        """SHA-256 of a file, computed once for each path, size and time of change."""
        key = _identity(path)
        if key not in self._hashes:
            self._hashes.update(_read_hashes(self._cache_file))
        if key not in self._hashes:
            self._hashes[key] = _digest(path)
            _write_hash(self._cache_file, key, self._hashes[key])
        return self._hashes[key]

    @property
    def _cache_file(self) -> Path:
        root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        return self.hash_cache or Path(root) / "lmd-bench" / "weights-hashes.json"

    def _status(self, name: str, entry: WeightsEntry, hash_all: bool) -> WeightsStatus:
        found = None
        try:
            found = self._locate(name, entry)
            if found is None:
                return WeightsStatus(name, entry, "missing", None, f"put {_what(name, entry)} into --weights DIR")
            files = [pair for pair in _files(entry, found) if pair[0].name.endswith(_WEIGHTS_SUFFIXES)]
            details = [self._content(entry, file, path, hash_all) for file, path in files]
        except WeightsError as error:
            return WeightsStatus(name, entry, "wrong", found, str(error))
        return WeightsStatus(name, entry, "found", found, "; ".join(details))

    def _content(self, entry: WeightsEntry, file: WeightsFile, path: Path, hash_all: bool) -> str:
        """What is known of a found file's content. Raises WeightsError for a wrong one."""
        known = _identity(path) in {**_read_hashes(self._cache_file), **self._hashes}
        place = f"{file.name}: " if entry.is_folder else ""
        if not (hash_all or known or path.stat().st_size <= SMALL_BYTES):
            self._check(entry, file.model_copy(update={"sha256": None, "sha256_prefix": None}), path)
            return f"{place}hash not looked at (doctor --hash does)"
        self._check(entry, file, path)
        if file.sha256:
            return f"{place}hash right"
        if file.sha256_prefix:
            return f"{place}hash begins as it should ({file.sha256_prefix})"
        return f"{place}hash not known here, yours is {self._sha256(path)}"


# -- places ---------------------------------------------------------------------------------------------------------


def _torch_hub() -> Path:
    """Where torch.hub keeps downloads: torchvision, timm and torch-fidelity fetch through it."""
    import torch

    return Path(torch.hub.get_dir()) / "checkpoints"


def _hub_cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _endpoint() -> str:
    from huggingface_hub import constants

    return str(constants.ENDPOINT)


def _hub_snapshots(entry: WeightsEntry) -> Iterator[Path]:
    """What the Hugging Face cache holds of an entry: snapshots of its revision and of what `main` names.

    A snapshot is left out where files are missing: other programs fetch parts of repositories.
    """
    assert entry.hub is not None
    folder = _hub_cache() / f"models--{entry.hub.replace('/', '--')}"
    revisions = [entry.revision] if entry.revision is not None else []
    with suppress(OSError):
        revisions.append((folder / "refs" / "main").read_text(encoding="utf-8").strip())
    for revision in revisions:
        snapshot = folder / "snapshots" / revision
        if not entry.is_folder:
            yield snapshot / (entry.hub_file or entry.files[0].name)
        elif all((snapshot / file.name).is_file() for file in entry.files):
            yield snapshot


def _what(name: str, entry: WeightsEntry) -> str:
    """What a user has to put into the folder of weights."""
    return f"the folder {name}" if entry.is_folder else entry.files[0].name


def _remedy(name: str, entry: WeightsEntry) -> str:
    return f"put {_what(name, entry)} into --weights DIR (lmd-bench doctor lists all)"


def _files(entry: WeightsEntry, place: Path) -> list[tuple[WeightsFile, Path]]:
    """An entry's files and where each lies, given where the entry was found."""
    return [(file, place / file.name if entry.is_folder else place) for file in entry.files]


def _require_complete(entry: WeightsEntry, folder: Path) -> None:
    """Raise WeightsError naming the first file that a folder lacks."""
    for file in entry.files:
        path = folder / file.name
        if path.is_file():
            continue
        other = path.with_suffix(".bin") if path.suffix == ".safetensors" else None
        others = {"model.bin": "pytorch_model.bin"}
        other = other and other.with_name(others.get(other.name, other.name))
        if other is not None and other.is_file():
            found = other.relative_to(folder)
            raise WeightsError(f"{folder}: holds {found} in place of {file.name}; only safetensors are read")
        raise WeightsError(f"{folder}: {file.name} is missing; the folder must hold what {entry.origin} holds")


# -- downloads ------------------------------------------------------------------------------------------------------


def _from_url(entry: WeightsEntry, place: Path) -> Path:
    import torch

    assert entry.url is not None
    target = place / entry.files[0].name
    torch.hub.download_url_to_file(
        entry.url, str(target), hash_prefix=entry.files[0].known_hash or None, progress=False
    )
    return target


def _from_hub(entry: WeightsEntry) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    assert entry.hub is not None
    if entry.is_folder:
        names = [file.name for file in entry.files]
        return Path(snapshot_download(entry.hub, revision=entry.revision, allow_patterns=names))
    return Path(hf_hub_download(entry.hub, entry.hub_file or entry.files[0].name, revision=entry.revision))


# -- hashes ---------------------------------------------------------------------------------------------------------


def _identity(path: Path) -> str:
    facts = path.stat()
    return f"{path.resolve()} {facts.st_size} {facts.st_mtime_ns}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_hashes(path: Path) -> dict[str, str]:
    """Remembered hashes; none where the file is missing or damaged, for they can be computed again."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError):
        return {}
    return {str(key): str(value) for key, value in values.items()} if isinstance(values, dict) else {}


def _write_hash(path: Path, key: str, digest: str) -> None:
    """Remember a hash, if the place can be written; the next process computes it again otherwise."""
    place, _, _ = key.rpartition(" ")
    own = place.rpartition(" ")[0]
    kept = {k: v for k, v in _read_hashes(path).items() if k.rpartition(" ")[0].rpartition(" ")[0] != own}
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**kept, key: digest}, indent=1), encoding="utf-8")
        temporary.replace(path)
    except OSError:
        return
