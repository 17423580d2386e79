"""Options within options: which models a nested option may be of, and the dotted names this gives. No torch."""

from __future__ import annotations

import types
import typing
from typing import Any

from pydantic import BaseModel


def models_within(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type may be: itself, or of a union all, in its order; empty for plain values."""
    if isinstance(annotation, type):
        return [annotation] if issubclass(annotation, BaseModel) else []
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [model for part in typing.get_args(annotation) for model in models_within(part)]
    return []


def option_names(annotation: Any, name: str = "") -> list[str]:
    """`name`, unless it is empty, and the dotted names of all options within a value of this type, each once."""
    names = [name] if name else []
    for model in models_within(annotation):
        for key, info in model.model_fields.items():
            names += option_names(info.annotation, f"{name}.{key}" if name else key)
    return list(dict.fromkeys(names))
