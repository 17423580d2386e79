"""Which fine-tunings can stand beside each other, as seeds of a row or as rows of a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from lmd_bench.harness.environment import machine_name
from lmd_bench.records import TUNED_ELSEWHERE, TUNED_ON_OTHERS, Finetune
from lmd_bench.report.load import Run

_WITHOUT_EFFECT: Final = {"recipe", "num_train", "num_val", "probes", "probe_images", "knn_neighbors", "batch_size_val"}
"""Settings that no accuracy or time of fine-tuning depends on, and those that are compared apart."""


def other_conditions(runs: Sequence[Run]) -> list[str]:
    """What accuracies and their times must share to be compared, and these runs do not."""
    return _differing([_conditions(run, tuned) for run in runs if (tuned := run.record.finetune) is not None])


def other_settings(runs: Sequence[Run]) -> list[str]:
    """All that seeds of one row must share, and these do not: `other_conditions`, and settings by their names."""
    return other_conditions(runs) + _differing([_settings(tuned) for run in runs if (tuned := run.record.finetune)])


def same_validation_images(runs: Sequence[Run]) -> bool:
    """Whether all were measured on the same images with the same labels."""
    return not set(other_conditions(runs)) - {"machine"}


def _conditions(run: Run, tuned: Finetune) -> dict[str, Any]:
    data: Mapping[str, Any] = run.record.config.get("data") or {}
    environment = run.record.environment
    return {
        "machine": _noted(tuned, TUNED_ELSEWHERE) or (machine_name(environment) if environment else "not recorded"),
        "images": _noted(tuned, TUNED_ON_OTHERS) or data.get("path") or data.get("name"),
        "labels": (tuned.num_classes, data.get("labels")),
        "validation images": tuned.num_val,
    }


def _noted(tuned: Finetune, begin: str) -> str | None:
    return next((note.removeprefix(begin) for note in tuned.notes if note.startswith(begin)), None)


def _settings(tuned: Finetune) -> dict[str, Any]:
    recipe: Mapping[str, Any] = tuned.settings.get("recipe") or {}
    return {
        "num_train": tuned.num_train,
        **{name: value for name, value in tuned.settings.items() if name not in _WITHOUT_EFFECT},
        **{name: value for name, value in recipe.items() if name != "source"},
    }


def _differing(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names under which not all hold the same; what one of them lacks differs."""
    names = dict.fromkeys(name for one in found for name in one)
    return [name for name in names if any(one.get(name) != found[0].get(name) for one in found)]
