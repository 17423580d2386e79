"""Options within options: their names, and their use in `--set` and `show`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import BaseModel, Field

from lmd_bench.cli.planning import plan_suite
from lmd_bench.errors import ConfigError
from lmd_bench.option_tree import models_within, option_names
from lmd_bench.registry import load_method
from lmd_bench.texts import describe_options


class Round(BaseModel):
    kind: Literal["round"] = "round"
    radius: float = 1.5


class Square(BaseModel):
    kind: Literal["v1.5 square"] = "v1.5 square"
    side: int


class Shapes(BaseModel):
    shape: Annotated[Round | Square, Field(discriminator="kind")] = Round()
    maybe: Round | None = None
    always: Square
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = (1, 2)


def test_the_models_of_a_type_are_those_that_a_value_may_be() -> None:
    assert models_within(Round) == [Round]
    assert models_within(Annotated[Round | Square, "x"] | None) == [Round, Square]
    assert models_within(int | None) == []
    assert models_within(dict[str, Round]) == []


def test_names_of_all_kinds_are_known_each_once() -> None:
    assert option_names(Shapes) == [
        "shape", "shape.kind", "shape.radius", "shape.side", "maybe", "maybe.kind", "maybe.radius", "always",
        "always.kind", "always.side", "sizes",
    ]  # fmt: skip
    assert option_names(Round | None, "maybe") == ["maybe", "maybe.kind", "maybe.radius"]
    assert option_names(int, "steps") == ["steps"]


def test_options_are_described_kind_by_kind() -> None:
    assert describe_options(Shapes) == [
        "shape: kind round or kind v1.5 square = kind round",
        "shape.kind (kind round): Literal['round'] = 'round'",
        "shape.radius (kind round): float = 1.5",
        "shape.kind (kind v1.5 square): Literal['v1.5 square'] = 'v1.5 square'",
        "shape.side (kind v1.5 square): int required",
        "maybe: Round | None = None",
        "maybe.kind: Literal['round'] = 'round'",
        "maybe.radius: float = 1.5",
        "always.kind: Literal['v1.5 square'] = 'v1.5 square'",
        "always.side: int required",
        "sizes: tuple[int, ...] = (1, 2)",
    ]


def plan_backbone(setting: str, out: Path) -> dict[str, object]:
    plan, _ = plan_suite("demo", "simmim", {}, [f"methods.simmim.options.backbone.{setting}"], None, "cpu", out, False)
    backbone: dict[str, object] = plan.cells[0].config.options["backbone"]
    return backbone


def test_an_option_of_one_kind_that_a_suite_does_not_mention_can_be_set(tmp_path: Path) -> None:
    assert {"backbone.drop_path", "backbone.window_size", "backbone.layer_scale"} <= set(
        option_names(load_method("simmim", {}).Config)
    )
    backbone = plan_backbone("drop_path=0.1", tmp_path)
    assert (backbone["kind"], backbone["drop_path"], backbone["embed_dim"]) == ("swin", 0.1, 48)
    with pytest.raises(ConfigError, match=r"no key .*backbone\.drop_paht.*; did you mean .*backbone\.drop_path"):
        plan_backbone("drop_paht=0.1", tmp_path)
    with pytest.raises(ConfigError, match="layer_scale: "):
        plan_backbone("layer_scale=0.2", tmp_path)  # the other kind's
