"""Methods by name, from Python entry points or from a user's own file. Listing them imports none of them."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lmd_bench.config import near
from lmd_bench.errors import BenchError, ConfigError

if TYPE_CHECKING:
    from lmd_bench.method import Method

GROUP = "lmd_bench.methods"


def installed_methods() -> dict[str, str]:
    """Name -> "module:Class" of every installed method, ours and other people's alike."""
    return {point.name: point.value for point in sorted(importlib.metadata.entry_points(group=GROUP))}


def method_name(target: str) -> str:
    """The name of an added class: `MyMethod` in `my_file.py:MyMethod` becomes "my-method"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", target.rpartition(":")[2]).lower().replace("_", "-")


def check_added(target: str) -> None:
    """Raise ConfigError unless `target` reads `file.py:Class`, the file is there and the name is free."""
    path, separator, name = target.rpartition(":")
    if not separator or not name.isidentifier() or not path.endswith(".py"):
        raise ConfigError(f"--add {target}: write it as file.py:ClassName")
    if not Path(path).is_file():
        raise ConfigError(f"--add {target}: no file {path}")
    if method_name(target) in installed_methods():
        raise ConfigError(f"--add {target}: a method {method_name(target)!r} is installed; give the class another name")


def code_digest(target: str) -> str:
    """SHA-256 of an added method's file, 16 hex digits: a changed file is another experiment."""
    return hashlib.sha256(Path(target.rpartition(":")[0]).read_bytes()).hexdigest()[:16]


def load_method(name: str, added: Mapping[str, str]) -> type[Method]:
    """The class behind a method's name. `added` maps names to `file.py:Class`.

    Raises ConfigError for an unknown name, a file or module that fails to import, or a class that is no Method.
    """
    if name in added:
        return _checked(name, added[name], _from_file(added[name]))
    points = {point.name: point for point in importlib.metadata.entry_points(group=GROUP)}
    if name not in points:
        raise ConfigError(f"no method {name!r} is installed{near(name, points)}")
    try:
        return _checked(name, points[name].value, points[name].load())
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"method {name!r} ({points[name].value}) cannot be imported: {error}") from error


def _from_file(target: str) -> object:
    path, _, name = target.rpartition(":")
    module_name = f"lmd_bench_added_{Path(path).stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"--add {target}: {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except BenchError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is the user's to see, in one line
        raise ConfigError(f"--add {target}: importing {path} failed: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        classes = [key for key, value in vars(module).items() if isinstance(value, type)]
        raise ConfigError(f"--add {target}: {path} has no class {name}{near(name, classes)}")
    return getattr(module, name)


def _checked(name: str, target: str, loaded: object) -> type[Method]:
    from lmd_bench.method import Method, MethodConfig

    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise ConfigError(f"method {name!r} ({target}) is not a subclass of lmd_bench.method.Method")
    config = getattr(loaded, "Config", None)
    if not (isinstance(config, type) and issubclass(config, MethodConfig)):
        raise ConfigError(f"method {name!r} ({target}) needs a class attribute Config, a MethodConfig")
    return loaded
