"""Methods with the weights of their authors' checkpoints: what may be said about one, and what became of its keys."""

from __future__ import annotations

import inspect
import re
import typing
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import yaml
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from lmd_bench.checkpoints.files import CheckpointFile, read_checkpoint
from lmd_bench.config import ImageSize, near
from lmd_bench.errors import BenchError, ConfigError, WeightsError
from lmd_bench.harness.weights import own_state
from lmd_bench.method import Method, MethodConfig
from lmd_bench.nn.official import first_problem
from lmd_bench.option_tree import option_names
from lmd_bench.projector.config import ProjectorConfig, config_of_path
from lmd_bench.registry import load_method

_TARGETS = "normalize_targets"
_STORED_TARGETS = "norm_pix_loss"
"""What the scripts that come of MAE's call the same."""
_MOST_GROUPS = 12
_OF_PROJECTOR = ("projector", "projector.kind", "projector.path")
"""What `--projector` says."""


@dataclass(frozen=True)
class OfficialRequest:
    """Which method a file is to become, and what the file cannot say itself."""

    path: Path
    method: str
    settings: tuple[str, ...] = ()
    """`option=value`, the method's own options or what its `from_official` takes beside them; dots lead into nested
    ones, values are YAML."""
    projector: str | None = None
    """A folder or `shipped:NAME`, for methods on latents."""
    ema: bool = False
    """Take the moving average of the weights: from among the tensors where the method knows how (an option `ema` of its
    `from_official`), else from a list of states (`read_checkpoint`)."""


@dataclass(frozen=True)
class OfficialMethod:
    """A method with an authors' weights, on the CPU in evaluation mode."""

    method: Method
    file: CheckpointFile
    left_out: tuple[str, ...]
    """Keys of the file whose tensors are no part of the method (`from_official` knows why)."""
    changed: tuple[str, ...]
    """Keys whose tensors `to_official` gives back with values that are nowhere in the file, number formats aside."""

    @property
    def num_parameters(self) -> int:
        """Of the method without its frozen projector."""
        return num_parameters(self.method)

    @property
    def left_out_text(self) -> str:
        """What was left out by name, numbers in names as N, with counts."""
        return _grouped(self.left_out)


def open_official_method(request: OfficialRequest, added: Mapping[str, str] | None = None) -> OfficialMethod:
    """The method of an authors' checkpoint.

    Whether targets were normalised leaves no trace in weights: for methods with such an option it is read off the
    arguments that MAE's script and its descendants store, else a setting must say it. Raises ConfigError for options
    that the method does not have or cannot take together, and for a method without an official layout; WeightsError
    for a file that cannot be read (`read_checkpoint`) or is another method's or size's, keys named.
    """
    method_class = load_method(request.method, added or {})
    if method_class.from_official.__func__ is Method.from_official.__func__:  # type: ignore[attr-defined]
        raise ConfigError(f"--method {request.method}: {method_class.__name__} has no official checkpoint layout")
    options = _options(method_class, request)
    file = read_checkpoint(request.path, ema=request.ema and "ema" not in options)
    if _TARGETS in method_class.Config.model_fields:
        options[_TARGETS] = _normalized_targets(file, options.get(_TARGETS))
    try:
        method = method_class.from_official(file.tensors, **options)
    except ValidationError as error:
        raise ConfigError(f"{request.path}, method {request.method}: {first_problem(error)}") from error
    except BenchError as error:
        raise type(error)(f"{request.path}: {error}") from error
    if method.projector_name == "none":
        raise ConfigError(f"method {request.method}: its weights hold no projector: name one with --projector")
    _require_image_size(request.path, method)
    left_out, changed = _account(file.tensors, _official(method))
    return OfficialMethod(method.eval(), file, left_out, changed)


def method_config(method: Method) -> MethodConfig:
    """The options a method was built with. Raises ConfigError where it keeps none under `config`."""
    config = getattr(method, "config", None)
    if not isinstance(config, MethodConfig):
        raise ConfigError(f"{type(method).__name__} keeps no MethodConfig as its attribute `config`")
    return config


def sizes_text(method: Method) -> str:
    """The network's sizes in words, among them the heads, on which an authors' checkpoint is silent."""
    config = getattr(method, "config", None)
    return config.sizes_text() if isinstance(config, MethodConfig) else type(method).__name__


def num_parameters(method: Method) -> int:
    """Parameters of a method without its frozen projector."""
    own = own_state(method)
    return sum(value.numel() for name, value in method.named_parameters() if name in own)


def _require_image_size(path: Path, method: Method) -> None:
    try:
        TypeAdapter(ImageSize).validate_python(method.data.image_size)
    except ValidationError as error:
        size = method.data.image_size
        raise WeightsError(f"{path}: weights for images of {size} px: {first_problem(error)}") from error


# -- what may be said -------------------------------------------------------------------------------------------------


def _options(method_class: type[Method], request: OfficialRequest) -> dict[str, Any]:
    """Settings and the projector as keyword arguments of `from_official`, each checked for itself."""
    kinds = _kinds(method_class)
    _refuse_contradictions(request)
    values = _parsed(request.settings, kinds, method_class.__name__)
    if request.projector is not None:
        if "projector" not in method_class.Config.model_fields:
            raise ConfigError(
                f"--projector {request.projector}: {method_class.__name__} works on pixels, without a projector; leave "
                "it out"
            )
        values["projector"] = {**config_of_path(request.projector).model_dump(), **values.get("projector", {})}
    if request.ema and "ema" in kinds:
        values["ema"] = True
    return {name: _checked(name, value, kinds[name]) for name, value in values.items()}


def _refuse_contradictions(request: OfficialRequest) -> None:
    """Raise ConfigError where one setting is part of another, or says what an option of its own says.

    Of two for one name the later one counts, as in `lmd-bench run`.
    """
    names = [setting.partition("=")[0] for setting in request.settings]
    for place, name in enumerate(names):
        for other in names[:place]:
            whole, part = sorted((name, other), key=len)
            if part.startswith(f"{whole}."):
                raise ConfigError(f"--set {whole} and --set {part}: give the whole or its parts, not both")
    words = (("--projector", request.projector is not None, _OF_PROJECTOR), ("--ema", request.ema, ("ema",)))
    for word, given, same in words:
        for name in names:
            if given and name in same:
                raise ConfigError(f"{word} and --set {name}: give one of them")


def _checked(name: str, value: Any, kind: Any) -> Any:
    """A value as the type of its option. Nested options stay a mapping, for what is left out is read off the weights;
    only a projector stands alone."""
    if isinstance(value, dict) and kind is not ProjectorConfig:
        return value
    try:
        return TypeAdapter(kind).validate_python(value)
    except ValidationError as error:
        raise ConfigError(f"--set {name}: {first_problem(error)}") from error


def _kinds(method_class: type[Method]) -> dict[str, Any]:
    """Name -> type, bounds included, of everything that `from_official` takes beside the tensors.

    `image_size` (px) may be among the options that it passes on; where weights tell the size, the config refuses it.
    """
    kinds: dict[str, Any] = {}
    hints = typing.get_type_hints(method_class.from_official)
    for name, parameter in inspect.signature(method_class.from_official).parameters.items():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY:
            kinds[name] = hints.get(name, Any)
    for name, field in method_class.Config.model_fields.items():
        kinds[name] = Annotated[field.annotation, *field.metadata] if field.metadata else field.annotation
    kinds["image_size"] = ImageSize
    return kinds


def _parsed(settings: Sequence[str], kinds: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """`a.b=c` settings as nested values. Raises ConfigError for one that is malformed or of no option."""
    known = [name for top, kind in kinds.items() for name in option_names(kind, top)]
    values: dict[str, Any] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set {setting}: write it as option=value")
        if name not in known:
            raise ConfigError(f"--set {setting}: {owner} has no option {name!r}{near(name, known)}")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {setting}: the value is not valid YAML") from error
        *outer, last = name.split(".")
        inner = values
        for part in outer:
            inner = inner.setdefault(part, {})
        inner[last] = value
    return values


def _normalized_targets(file: CheckpointFile, given: bool | None) -> bool:
    stored = file.arguments.get(_STORED_TARGETS)
    if not isinstance(stored, bool):
        if given is None:
            raise ConfigError(
                f"{file.path}: the checkpoint does not say whether its targets were normalised (published "
                "commands pass --norm_pix_loss; MAE's mae_visualize_* files were trained on plain pixels): say "
                f"--set {_TARGETS}=true or false"
            )
        return given
    if given is not None and given != stored:
        raise ConfigError(
            f"--set {_TARGETS}={str(given).lower()}: {file.path} says that it was trained with {_STORED_TARGETS} "
            f"{stored}; leave the setting out"
        )
    return stored


# -- what became of the keys ------------------------------------------------------------------------------------------


def _official(method: Method) -> dict[str, Tensor] | None:
    """The weights back in the authors' layout; None for a method that cannot give them back."""
    return None if type(method).to_official is Method.to_official else method.to_official()


def _account(
    tensors: Mapping[str, Tensor], official: Mapping[str, Tensor] | None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Keys of a file that no weight of the method came from, and keys whose weight came from nowhere in the file.

    A weight comes from the key of its own name or, as a moving average does, from another of the same values.
    """
    if official is None:
        return (), ()
    used = {name for name, value in tensors.items() if name in official and _same(value, official[name])}
    rest = [name for name in tensors if name not in used]
    changed = []
    for name, value in official.items():
        if name not in used:
            found = next((key for key in rest if _same(tensors[key], value)), None)
            if found is not None:
                used.add(found)
            elif name in tensors:
                changed.append(name)
    return tuple(name for name in tensors if name not in used and name not in changed), tuple(changed)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().cpu().to(one.dtype))


def _grouped(names: Sequence[str]) -> str:
    for short in (lambda name: re.sub(r"\d+", "N", name), lambda name: name.partition(".")[0] + "..."):
        groups = Counter(map(short, names))
        if len(groups) <= _MOST_GROUPS:
            break
    single = {short(name): name for name in names}
    return ", ".join(f"{group} ({count})" if count > 1 else single[group] for group, count in groups.items())
