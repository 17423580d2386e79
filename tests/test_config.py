"""Suites as values: what is refused, and in which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmd_bench.config import RunConfig, Suite
from lmd_bench.errors import ConfigError
from lmd_bench.suite_files import (
    apply_settings,
    find_suites,
    load_suite,
    merge,
    parse_suite,
    read_suite_values,
    save_suite,
    shipped_suites,
)


def demo(**changes: Any) -> dict[str, Any]:
    return merge(read_suite_values("demo"), changes)


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_suite(values, "suite demo")
    return str(caught.value)


@pytest.mark.parametrize("name", shipped_suites())
def test_every_shipped_suite_is_valid_and_says_where_its_recipes_come_from(name: str) -> None:
    suite = load_suite(name)
    assert suite.name == name
    assert all(recipe.source for recipe in suite.recipes.values())
    assert suite.reference in suite.methods


MASKED = {"MAE", "SimMIM", "GreenMIM", "UM-MAE", "LMD-PS", "LMD-CS"}
GENERATIVE = {"DDPM", "iDDPM", "DDIM", "LDM"}
ABLATIONS = {"w/o LSP", "w/o MAE", "w/o MDS"}
TEXT_TO_IMAGE = {"SD-v1.4", "Muse-base"}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("in1k", MASKED),
        ("lsun-bedrooms", GENERATIVE | {"LMD"}),
        ("ablation", ABLATIONS | {"LMD"}),
        ("cc", TEXT_TO_IMAGE | {"LMD-CS"}),
        ("demo", MASKED | GENERATIVE | ABLATIONS | TEXT_TO_IMAGE),
    ],
)
def test_suites_have_every_row_of_their_tables_and_run_all_but_the_demos_largest(
    name: str, published: set[str]
) -> None:
    rows = load_suite(name).methods.values()
    assert {row.published for row in rows if row.published is not None} == published
    listed_only = {row.published for row in rows if row.listed_only is not None}
    assert listed_only == (TEXT_TO_IMAGE if name == "demo" else set())


def test_unknown_keys_are_refused_with_a_near_match_at_any_depth() -> None:
    values = demo(stepps=3)
    values["recipes"]["equal"]["lr"]["bse"] = 1.0
    values["methods"]["mae"]["recipee"] = "equal"
    message = refusal(values)
    assert "suite demo: stepps: unknown key; did you mean 'steps'?" in message
    assert "suite demo: recipes.equal.lr.bse: unknown key; did you mean 'base'?" in message
    assert "suite demo: methods.mae.recipee: unknown key; did you mean 'recipe'?" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": "many"}, "steps: Input should be a valid integer, unable to parse string as an integer, got 'many'"),
        ({"steps": None}, "give either steps or epochs"),
        ({"epochs": 2}, "give either steps or epochs"),
        ({"seeds": [1, 1]}, r"seeds must differ, got [1, 1]"),
        ({"reference": "mea"}, "reference: no row 'mea'; did you mean 'mae'?"),
        ({"data": {"num_train": None}}, "data.num_train must say how many"),
        ({"data": {"name": "imagenet"}}, "data.name: Input should be 'scenes' or 'folder', got 'imagenet'"),
        ({"methods": {"mae": {"recipe": "equl"}}}, "methods.mae.recipe: no recipe 'equl'; did you mean 'equal'?"),
        ({"methods": {"ddpm": {"base": "mea"}}}, "methods.ddpm.base: no row 'mea'; did you mean 'mae'?"),
        ({"methods": {"mae": {"base": "mae"}}}, "methods.mae.base: a row is not a change of itself"),
        ({"evaluation": {"targets": [{"fraction": 0.5, "of": "x"}]}}, "evaluation.targets.0.of: no row 'x'"),
        ({"recipes": {"equal": {"optimizer": {"name": "adan"}}}}, "optimizer adan needs 3 betas in [0, 1)"),
        ({"recipes": {"equal": {"lr_warmup_epochs": 1}}}, "give one of lr_warmup_steps, lr_warmup_epochs"),
        ({"recipes": {"equal": {"augmentation": {"scale": [1, 0.2]}}}}, "augmentation.scale must be two numbers"),
        (
            {"recipes": {"equal": {"lr": {"schedule": "multistep"}}}},
            "lr.milestones belong to schedule multistep, got []",
        ),
        ({"recipes": {"equal": {"lr": {"milestones": [0.5]}}}}, "belong to schedule multistep, got [0.5] for cosine"),
        (
            {"recipes": {"equal": {"lr": {"schedule": "multistep", "milestones": [0.9, 0.5]}}}},
            "lr.milestones must ascend between 0 and 1, got [0.9, 0.5]",
        ),
        (
            {"recipes": {"equal": {"lr": {"warmup_start": 1e-6}, "lr_warmup_steps": None}}},
            "lr.warmup_start needs a warm-up",
        ),
        ({"recipes": {"equal": {"ema_warmup": True}}}, "ema_warmup needs the average's ema_decay"),
        ({"precision": "fp8"}, "precision: Input should be 'fp32' or 'bf16', got 'fp8'"),
    ],
)
def test_values_that_cannot_be_used_are_refused_by_name(changes: dict[str, Any], words: str) -> None:
    assert words in refusal(demo(**changes))


def test_an_unknown_suite_and_a_missing_file_are_named() -> None:
    with pytest.raises(ConfigError, match="no suite 'dmeo'; did you mean 'demo'"):
        read_suite_values("dmeo")
    with pytest.raises(ConfigError, match=r"suite no\.yaml: no such file"):
        read_suite_values("no.yaml")


def test_a_users_suite_may_extend_a_shipped_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: demo\nname: mine\nsteps: 7\nmethods: {ddpm: null, mae: {options: {mask_ratio: 0.5}}}\n")
    suite = load_suite(str(path))
    assert (suite.name, suite.steps) == ("mine", 7)
    assert "ddpm" not in suite.methods
    assert suite.methods["mae"].options["mask_ratio"] == 0.5
    assert suite.methods["mae"].options["patch_size"] == 8


def test_what_a_suite_extends_is_looked_for_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.yaml").write_text("extends: demo\nname: base\nsteps: 9\n")
    (tmp_path / "mine.yaml").write_text("extends: base.yaml\nname: mine\n")
    monkeypatch.chdir("/")
    assert load_suite(str(tmp_path / "mine.yaml")).steps == 9


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [1\n", "not valid YAML"),
        ("- 1\n", "a suite is a mapping"),
        ("extends: 3\n", "extends: name one suite"),
    ],
)
def test_a_file_that_is_no_suite_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        load_suite(str(path))


def test_a_suite_that_extends_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "loop.yaml"
    path.write_text("extends: loop.yaml\n")
    with pytest.raises(ConfigError, match="extends itself"):
        load_suite(str(path))


def changed(*settings: str) -> Suite:
    options = {"mae": ["mask_ratio", "mlp_ratio"], "lmd-cs": ["projector.scale"]}
    return parse_suite(apply_settings(read_suite_values("demo"), settings, options), "--set")


def test_set_changes_values_and_options_the_suite_does_not_mention() -> None:
    suite = changed("steps=7", "methods.mae.options.mlp_ratio=2", "methods.lmd-*.options.patch_size=4", "seeds=[1, 2]")
    assert suite.steps == 7
    assert suite.seeds == (1, 2)
    assert suite.methods["mae"].options["mlp_ratio"] == 2
    assert {row.options["patch_size"] for name, row in suite.methods.items() if name.startswith("lmd")} == {4}


def test_values_that_depend_on_each_other_can_be_set_together() -> None:
    assert changed("steps=null", "epochs=2").epochs == 2
    adan = ("name=adan", "betas=[0.9, 0.9, 0.9]", "implementation=loop")
    assert changed(*(f"recipes.equal.optimizer.{value}" for value in adan)).recipes["equal"].optimizer.name == "adan"


def test_set_reaches_nested_options() -> None:
    assert changed("methods.lmd-cs.options.projector.scale=2.5").methods["lmd-cs"].options["projector"]["scale"] == 2.5


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("data.image_sise=3", "no key 'data.image_sise'; did you mean 'data.image_size'"),
        ("methods.mae.options.mask_ration=0.5", "did you mean 'methods.mae.options.mask_ratio'"),
        ("steps", "write it as dotted.key=value"),
        ("steps=[1", "not valid YAML"),
        ("steps=many", "unable to parse string as an integer, got 'many'"),
    ],
)
def test_set_on_a_wrong_key_or_with_a_wrong_value_is_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        changed(setting)
    assert words in str(caught.value)


def test_the_suite_beside_its_records_reads_back_equal(tmp_path: Path) -> None:
    suite = load_suite("demo")
    save_suite(tmp_path / "demo", suite)
    assert find_suites(tmp_path) == [(tmp_path / "demo", suite)]
    assert find_suites(tmp_path / "demo") == [(tmp_path / "demo", suite)]


def test_a_folder_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no records"):
        find_suites(tmp_path)
    with pytest.raises(ConfigError, match="no such folder"):
        find_suites(tmp_path / "nowhere")


def test_the_digest_changes_with_what_is_computed_and_not_with_names() -> None:
    suite = load_suite("demo")
    values: dict[str, Any] = {
        "suite": "demo",
        "row": "mae",
        "label": "MAE",
        "method": "mae",
        "options": {},
        "image_size": 64,
        "data": suite.data,
        "recipe": suite.recipes["equal"],
        "steps": 3,
        "lr_warmup_steps": 0,
        "untimed_steps": 0,
        "precision": "fp32",
        "compile": False,
        "seed": 0,
        "device": "cpu",
        "log_every_steps": 50,
        "evaluation": suite.evaluation,
        "estimator": suite.estimator,
    }
    base = RunConfig(**values)
    assert base.digest() == RunConfig(**{**values, "label": "Other"}).digest()
    without_targets = suite.evaluation.model_copy(update={"targets": ()})
    assert base.digest() == RunConfig(**{**values, "evaluation": without_targets}).digest()
    tuning = {"steps": 2, "lr_warmup_steps": 0, "num_train": None, "num_val": 8, "num_checks": 1, "batch_size_val": 8,
              "val_crop": 1.0, "probes": (), "probe_images": 10, "knn_neighbors": 1,
              "recipe": {"batch_size": 8, "lr": {"base": 1e-3, "per_images": None}}}  # fmt: skip
    assert base.digest() == RunConfig(**{**values, "finetune": tuning, "image_quality": {"num_images": 5}}).digest()
    assert base.digest() != RunConfig(**{**values, "code": "abc"}).digest()
    assert base.digest() != RunConfig(**{**values, "inputs": "abc"}).digest()
    assert base.digest() != RunConfig(**{**values, "steps": 4}).digest()
    averaged = suite.recipes["equal"].model_copy(update={"ema_decay": 0.9})
    warmed = averaged.model_copy(update={"ema_warmup": True})
    assert len({RunConfig(**{**values, "recipe": recipe}).digest() for recipe in (averaged, warmed)}) == 2
    assert base.digest() != RunConfig(**{**values, "options": {"patch_size": 8}}).digest()
