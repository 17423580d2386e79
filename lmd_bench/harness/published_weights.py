"""Published weights that rows name among their options as "weights:NAME": there, to be downloaded, or missing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmd_bench.config import Json, Suite
from lmd_bench.errors import ConfigError, MissingWeightsError, WeightsError
from lmd_bench.pretrained import WeightsStore

WEIGHTS_PREFIX = "weights:"
"""An option's text that begins so names an entry of the manifest of published weights, and after a slash what lies in
its folder: weights:stable-diffusion-v1-4, weights:stable-diffusion-v1-4/vae."""


@dataclass
class ResolvedRows:
    """Which rows can run as far as their published weights go."""

    suite: Suite
    """As given, every row's `missing` set anew."""
    rows: list[str] = field(default_factory=list)
    """Of the rows asked for, those whose weights are there."""
    to_download: list[str] = field(default_factory=list)
    """Of the rows asked for, those whose weights have to be downloaded first, and can be."""
    options: dict[str, Json] = field(default_factory=dict)
    """Row of `rows` -> its options with paths in place of "weights:NAME"."""
    problems: list[str] = field(default_factory=list)
    """Why rows that were asked for cannot be run though they should."""


def resolve_weights(
    suite: Suite, rows: Sequence[str], weights: WeightsStore, *, named: bool, download: bool
) -> ResolvedRows:
    """Look for the published weights of every row that is built or asked for. Downloads nothing.

    A row of which nothing is there, and nothing can be had, is left out; its `missing` says why. That is a problem
    where the user `named` the rows, or where none of them is left. Weights that are there and wrong always are one.

    rows: those asked for. download: whether missing weights may be downloaded.
    """
    found = ResolvedRows(suite)
    missing: dict[str, str] = {}
    for row, settings in suite.methods.items():
        asked = row in rows
        if settings.listed_only is not None and not asked:
            continue
        try:
            paths = {
                name: weights.locate(name, download=download, check=asked) for name in _names(settings.options)
            }  # fmt: skip
        except MissingWeightsError as error:
            missing[row] = str(error)
        except WeightsError as error:
            if asked:  # of other rows it is told when they are
                found.problems.append(_refusal(row, error))
        else:
            there = {name: path for name, path in paths.items() if path is not None}
            if asked and len(there) == len(paths):
                found.options[row] = _with_paths(settings.options, there)
            elif asked:
                found.to_download.append(row)
    found.suite = suite.model_copy(update={"methods": {
        row: settings.model_copy(update={"missing": missing.get(row)}) for row, settings in suite.methods.items()
    }})  # fmt: skip
    found.rows = [row for row in rows if row in found.options]
    if named or not (found.rows or found.to_download):
        found.problems += [_refusal(row, missing[row]) for row in rows if row in missing]
    return found


def download_weights(row: str, options: Json, weights: WeightsStore) -> Json:
    """Download what the row's options name, and put paths in their place. ConfigError where it cannot be had."""
    try:
        paths = {name: weights.find(name, download=True) for name in _names(options)}
    except WeightsError as error:
        raise ConfigError(_refusal(row, error)) from error
    return {key: _with_paths(value, paths) for key, value in options.items()}


def download_note(row: str, options: Json, weights: WeightsStore) -> str:
    """What a run would have to download for a row, and how much."""
    entries = [weights.manifest.entry(name) for name in _names(options) if weights.locate(name, download=True) is None]
    listed = ", ".join(f"{entry.title} weights (about {entry.about_mib} MiB from {entry.origin})" for entry in entries)
    return f"{row}: a run downloads {listed} first; the row is checked and timed once they are there"


def _refusal(row: str, reason: object) -> str:
    return f"row {row} cannot be run: {reason}"


def _split(value: Any) -> tuple[str, str] | None:
    """The manifest's name and what is meant inside its folder; None for other values."""
    if not isinstance(value, str) or not value.startswith(WEIGHTS_PREFIX):
        return None
    name, _, inside = value.removeprefix(WEIGHTS_PREFIX).partition("/")
    return name, inside


def _names(value: Any) -> Iterator[str]:
    """Names of weights anywhere in a row's options."""
    if isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _names(inner)
    elif (found := _split(value)) is not None:
        yield found[0]


def _with_paths(value: Any, paths: Mapping[str, Path]) -> Any:
    if isinstance(value, dict):
        return {key: _with_paths(inner, paths) for key, inner in value.items()}
    if isinstance(value, list):
        return [_with_paths(inner, paths) for inner in value]
    found = _split(value)
    return value if found is None else str(paths[found[0]] / found[1])
