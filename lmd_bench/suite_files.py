"""Suites as files: reading them with what they extend, changing single values, keeping them beside their records.

Imports no torch.
"""

from __future__ import annotations

import difflib
import fnmatch
import json
import typing
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from lmd_bench.config import Json, Suite, near
from lmd_bench.errors import ConfigError


def shipped_suites() -> list[str]:
    """Names of the suites inside the package, in a fixed order."""
    folder = resources.files("lmd_bench") / "suites"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def read_suite_values(name_or_path: str, _seen: tuple[str, ...] = ()) -> Json:
    """The raw values of a suite, with the suite it `extends` merged beneath them.

    Mappings merge key by key; a null takes a key away; everything else replaces. A path in `extends` is relative to
    the file that says so.
    """
    if name_or_path in _seen:
        raise ConfigError(f"suite {name_or_path!r} extends itself: {' -> '.join([*_seen, name_or_path])}")
    place, text = _suite_text(name_or_path)
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        where = getattr(error, "problem_mark", None)
        line = f", line {where.line + 1}" if where is not None else ""
        raise ConfigError(f"{place}{line}: not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{place}: a suite is a mapping of keys to values, this file holds {type(values).__name__}")
    parent = values.pop("extends", None)
    if parent is None:
        return values
    if not isinstance(parent, str):
        raise ConfigError(f"{place}: extends: name one suite, got {parent!r}")
    if parent.endswith((".yaml", ".yml")):
        parent = str(Path(name_or_path).parent / parent)
    return merge(read_suite_values(parent, (*_seen, name_or_path)), values)


def _suite_text(name_or_path: str) -> tuple[str, str]:
    if name_or_path.endswith((".yaml", ".yml")):
        path = Path(name_or_path)
        if not path.is_file():
            raise ConfigError(f"suite {name_or_path}: no such file")
        try:
            return name_or_path, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"suite {name_or_path}: cannot be read as UTF-8 text: {error}") from error
    names = shipped_suites()
    if name_or_path not in names:
        raise ConfigError(f"no suite {name_or_path!r}{near(name_or_path, names)} (or give a path ending in .yaml)")
    return f"suite {name_or_path}", (resources.files("lmd_bench") / "suites" / f"{name_or_path}.yaml").read_text()


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> Json:
    """`over` laid on `base`: mappings merge, null removes, everything else replaces."""
    merged = dict(base)
    for key, value in over.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(merged.get(key), Mapping):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def parse_suite(values: Mapping[str, Any], place: str) -> Suite:
    """Validate raw values; every problem is listed with its dotted name."""
    try:
        return Suite.model_validate(values)
    except ValidationError as error:
        raise ConfigError(describe_validation(error, Suite, place)) from error


def load_suite(name_or_path: str) -> Suite:
    """A shipped suite by name, or one of the user's own by path."""
    return parse_suite(read_suite_values(name_or_path), f"suite {name_or_path}")


def describe_validation(error: ValidationError, model: type[BaseModel], place: str) -> str:
    """A pydantic error as lines of `place: dotted.key: what is wrong; what would be right`."""
    lines = []
    for problem in error.errors():
        location = [str(part) for part in problem["loc"]]
        dotted = ".".join(location)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, location[:-1])
            message = f"unknown key{near(location[-1], known)}"
        else:
            message = problem["msg"].removeprefix("Value error, ")
            if problem["type"] not in ("missing", "value_error"):
                message += f", got {problem['input']!r}"
        lines.append(f"{place}: {dotted}: {message}" if dotted else f"{place}: {message}")
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], location: Sequence[str]) -> list[str]:
    """Names of the fields of the nested model that `location` leads to."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel) and part in current.model_fields:
            current = current.model_fields[part].annotation
        else:  # a key of a mapping or an index of a list
            arguments = [a for a in typing.get_args(current) if a is not Ellipsis]
            current = arguments[-1] if arguments else None
        models = [a for a in (current, *typing.get_args(current)) if isinstance(a, type) and issubclass(a, BaseModel)]
        if typing.get_origin(current) not in (dict, tuple, list) and models:
            current = models[0]
    if isinstance(current, type) and issubclass(current, BaseModel):
        return list(current.model_fields)
    return []


# -- changing values from the command line ----------------------------------------------------------------------------


def apply_settings(values: Json, settings: Sequence[str], option_names: Mapping[str, Sequence[str]]) -> Json:
    """`a.b=c` settings laid on raw suite values. The key must exist; `*` matches within one part.

    `option_names` gives, per row, the options its method knows, as dotted names: they may be set although the
    suite does not mention them.
    """
    changed = typing.cast(Json, json.loads(json.dumps(values)))
    known = _known_keys(parse_suite(changed, "suite"), option_names)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator or not key:
            raise ConfigError(f"--set {setting}: write it as dotted.key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not valid YAML") from error
        targets = [name for name in known if _matches(name, key)]
        if not targets:
            raise ConfigError(f"--set {setting}: no key {key!r}{_near_key(key, known)}")
        for target in targets:
            _assign(changed, target.split("."), value)
    return changed


def _known_keys(suite: Suite, option_names: Mapping[str, Sequence[str]]) -> list[str]:
    keys: list[str] = []

    def walk(prefix: str, value: Any) -> None:
        keys.append(prefix)
        if isinstance(value, dict):
            for name, inner in value.items():
                walk(f"{prefix}.{name}" if prefix else name, inner)

    for name, value in suite.model_dump(mode="json").items():
        walk(name, value)
    for row, names in option_names.items():
        keys.extend(f"methods.{row}.options.{name}" for name in names)
    return list(dict.fromkeys(keys))


def _matches(name: str, pattern: str) -> bool:
    names, patterns = name.split("."), pattern.split(".")
    return len(names) == len(patterns) and all(map(fnmatch.fnmatchcase, names, patterns))


def _near_key(key: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "; `lmd-bench show SUITE` lists all keys"


def _assign(values: Json, parts: list[str], value: Any) -> None:
    for part in parts[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            inner = {}
            values[part] = inner
        values = inner
    values[parts[-1]] = value


# -- the suite beside its records -------------------------------------------------------------------------------------

SUITE_FILE = "suite.yaml"


def save_suite(folder: Path, suite: Suite, *, keep: bool = False) -> None:
    """Write the resolved suite into its folder of records; `keep` leaves one that is there."""
    path = folder / SUITE_FILE
    if keep and path.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(yaml.safe_dump(suite.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
    temporary.replace(path)


def find_suites(folder: Path) -> list[tuple[Path, Suite]]:
    """(folder, suite) for OUT/<suite>, or for every suite in an OUT. Raises ConfigError where there is none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: no such folder; give the --out of a run, or OUT/<suite>")
    places = [folder] if (folder / SUITE_FILE).exists() else sorted(p.parent for p in folder.glob(f"*/{SUITE_FILE}"))
    if not places:
        raise ConfigError(f"{folder}: holds no records of lmd-bench ({SUITE_FILE} is missing)")
    return [(place, load_suite(str(place / SUITE_FILE))) for place in places]
