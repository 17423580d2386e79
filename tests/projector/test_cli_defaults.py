"""The command line repeats the training's defaults; they must not drift apart."""

from __future__ import annotations

import inspect
from dataclasses import fields

from lmd_bench.cli import projector_train
from lmd_bench.projector.train import KLTrainOptions


def test_the_commands_defaults_are_the_trainings() -> None:
    parameters = inspect.signature(projector_train).parameters
    for field in fields(KLTrainOptions):
        default = field.default
        wanted = ",".join(map(str, default)) if isinstance(default, tuple) else default
        assert parameters[field.name].default == wanted, field.name
