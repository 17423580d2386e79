"""Rows that need published weights: what lies there, what is missing, and when something is downloaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from lmd_bench.config import Suite
from lmd_bench.errors import ConfigError
from lmd_bench.harness.plan import Plan, make_plan
from lmd_bench.harness.published_weights import resolve_weights
from lmd_bench.pretrained import Manifest, WeightsStore
from lmd_bench.suite_files import parse_suite
from tests.helpers.pipelines import save_stable_diffusion

MAE = {"patch_size": 8, "encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 16,
       "decoder_depth": 1, "decoder_heads": 2}  # fmt: skip
VALUES: dict[str, Any] = {
    "name": "mixed",
    "title": "One trained here, one that comes trained",
    "data": {"image_size": 32, "num_train": 16, "num_held_out": 4},
    "steps": 4,
    "untimed_steps": 1,
    "recipes": {"equal": {"batch_size": 4, "lr": {"base": 1e-3, "per_images": None}}},
    "methods": {
        "sd": {"method": "stable-diffusion", "label": "SD", "options": {"path": "weights:tiny"}},
        "mae": {"method": "mae", "label": "MAE", "recipe": "equal", "options": MAE},
    },
    "evaluation": {"num_checks": 1, "num_images": 4, "unit_px": 16},
    "image_quality": {"num_images": 4, "metrics": ["psnr"], "evaluators": "scenes"},
    "estimator": {"half_life_steps": 2, "num_resamples": 100},
}
SUITE = parse_suite(VALUES, "test")
LACKING = "no Tiny weights: put the folder tiny into --weights DIR (lmd-bench doctor lists all)"


def manifest(**file: Any) -> Manifest:
    """Tiny weights, a folder with an index, and those that a plan asks for by itself."""
    entry = {"what": "w", "used_for": "tests", "licence": "none"}
    index = {"name": "model_index.json", **file}
    tiny = {**entry, "title": "Tiny", "hub": "x/tiny", "is_folder": True, "about_mib": 3, "files": [index]}
    alexnet = {**entry, "title": "AlexNet", "url": "https://weights.example/a.pth", "files": [{"name": "a.pth"}]}
    return Manifest.model_validate({"weights": {"tiny": tiny, "alexnet": alexnet}})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the hub would send: a tiny pipeline."""
    return save_stable_diffusion(tmp_path_factory.mktemp("hub") / "tiny")


@pytest.fixture(autouse=True)
def downloads(published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Repositories that were fetched; the libraries' caches are empty."""
    for name in ("LMD_BENCH_WEIGHTS", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "torch"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    fetched: list[str] = []

    def fetch(repository: str, **named: Any) -> str:
        fetched.append(repository)
        place = tmp_path / "hub" / "models--x--tiny"
        shutil.copytree(published, place / "snapshots" / "abc")
        (place / "refs").mkdir()
        (place / "refs" / "main").write_text("abc")
        return str(place / "snapshots" / "abc")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    return fetched


@pytest.fixture
def given(tmp_path: Path) -> Path:
    """An empty folder for --weights."""
    folder = tmp_path / "given"
    folder.mkdir()
    return folder


def store(tmp_path: Path, folder: Path | None = None, *, answers: bool = False, **values: Any) -> WeightsStore:
    defaults = {"manifest": manifest(), "hash_cache": tmp_path / "hashes.json", "can_reach": lambda url: answers}
    return WeightsStore(folder, **{**defaults, **values})


def planned(weights: WeightsStore, out: Path, rows: list[str] | None = None, **options: Any) -> Plan:
    suite: Suite = options.pop("suite", SUITE)
    return make_plan(
        suite, rows or list(suite.methods), device=options.pop("device", "cpu"), out=out, added={}, force=False,
        weights=weights, named=rows is not None, **options,
    )  # fmt: skip


def rows_of(plan: Plan) -> list[str]:
    return [cell.config.row for cell in plan.cells]


# -- missing, or wrong ------------------------------------------------------------------------------------------------


def test_weights_are_found_wherever_an_option_names_them(given: Path, published: Path, tmp_path: Path) -> None:
    shutil.copytree(published, given / "tiny")
    options = {"path": "weights:tiny", "parts": [{"x": "weights:tiny/vae"}, 3, "c"]}
    row = SUITE.methods["sd"].model_copy(update={"options": options})
    suite = SUITE.model_copy(update={"methods": {**SUITE.methods, "sd": row}})
    found = resolve_weights(suite, ["sd", "mae"], store(tmp_path, given), named=True, download=False)
    assert found.options["sd"] == {"path": f"{given}/tiny", "parts": [{"x": f"{given}/tiny/vae"}, 3, "c"]}
    assert (found.rows, found.to_download, found.problems) == (["sd", "mae"], [], [])
    assert found.suite == suite


@pytest.mark.parametrize("how", ["offline", "unreachable", "not allowed"])
def test_a_row_of_which_nothing_can_be_had_is_left_out(how: str, tmp_path: Path) -> None:
    suite = SUITE
    if how == "not allowed":
        suite = parse_suite({**VALUES, "image_quality": {**VALUES["image_quality"], "download": False}}, "test")
    plan = planned(store(tmp_path, answers=how != "unreachable", offline=how == "offline"), tmp_path, suite=suite)
    assert rows_of(plan) == ["mae"]
    assert plan.missing.keys() == {"sd"}
    assert plan.missing["sd"].startswith("no Tiny weights: ")
    assert plan.missing["sd"].endswith("put the folder tiny into --weights DIR (lmd-bench doctor lists all)")


def test_the_reason_stays_with_the_suite_when_other_rows_are_asked_for(tmp_path: Path) -> None:
    lacking = store(tmp_path, offline=True)
    suite = planned(lacking, tmp_path / "out").suite
    plan = planned(lacking, tmp_path / "out", ["mae"], suite=suite)
    assert rows_of(plan) == ["mae"]
    assert plan.missing == {"sd": LACKING}
    assert plan.suite.methods["sd"].missing == LACKING


@pytest.mark.parametrize("rows", [["sd", "mae"], ["sd"]])
def test_a_row_asked_for_by_name_needs_its_weights(rows: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as raised:
        planned(store(tmp_path, offline=True), tmp_path, rows)
    assert str(raised.value) == f"row sd cannot be run: {LACKING}"


def damage(how: str, folder: Path) -> dict[str, Any]:
    """Makes weights wrong; returns what the manifest says of their file."""
    index = folder / "model_index.json"
    if how == "hash":
        return {"sha256": "0" * 64}
    if how == "size":
        return {"size": 7}
    if how == "incomplete":
        index.unlink()
        return {}
    (folder / "a.bin").touch()
    return {"name": "a.safetensors"}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hash", r"model_index\.json: wrong hash: expected 0{64}, found"),
        ("size", r"model_index\.json: not Tiny: \d+ bytes, expected 7"),
        ("incomplete", r"model_index\.json is missing; the folder must hold what"),
        ("format", r"holds a\.bin in place of a\.safetensors; only safetensors are read"),
    ],
)
def test_wrong_weights_end_the_plan_and_are_no_reason_to_leave_a_row_out(
    how: str, said: str, given: Path, published: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(published, given / "tiny"))
    weights = store(tmp_path, given, manifest=manifest(**damage(how, folder)))
    for rows in (None, ["sd", "mae"]):
        with pytest.raises(ConfigError, match=rf"^row sd cannot be run: .*{said}"):
            planned(weights, tmp_path, rows)
    assert planned(weights, tmp_path, ["mae"]).missing == {}, "wrong weights of another row are not in the way"


def test_a_mistyped_name_ends_the_plan_with_all_other_problems(tmp_path: Path) -> None:
    options = {**VALUES["methods"]["sd"], "options": {"path": "weights:tinny"}}
    suite = parse_suite({**VALUES, "methods": {**VALUES["methods"], "sd": options}}, "test")
    with pytest.raises(ConfigError) as raised:
        planned(store(tmp_path), tmp_path, suite=suite, device="tpu")
    assert str(raised.value).splitlines() == [
        "row sd cannot be run: no weights are named 'tinny'; did you mean 'tiny'?",
        "--device tpu: use auto, cpu, cuda or cuda:N",
    ]


# -- downloads --------------------------------------------------------------------------------------------------------


def test_a_download_is_announced_and_its_row_is_checked_and_takes_its_place(
    downloads: list[str], tmp_path: Path
) -> None:
    said: list[str] = []
    suite = SUITE.model_copy(update={"seeds": (0, 1)})
    plan = planned(store(tmp_path, answers=True, on_download=said.append), tmp_path, suite=suite)
    assert downloads == ["x/tiny"]
    assert said == ["downloading Tiny weights, about 3 MiB, from https://huggingface.co/x/tiny"]
    assert [(cell.config.seed, cell.config.row) for cell in plan.cells] == [
        (seed, row) for seed in (0, 1) for row in ("sd", "mae")
    ]
    assert plan.cells[0].config.options["path"] == str(tmp_path / "hub" / "models--x--tiny" / "snapshots" / "abc")
    assert plan.missing == {}


def test_a_dry_run_downloads_nothing_and_says_what_a_run_would(downloads: list[str], tmp_path: Path) -> None:
    plan = planned(store(tmp_path, answers=True), tmp_path, dry_run=True)
    assert downloads == []
    assert rows_of(plan) == ["mae"]
    assert plan.missing == {}
    note = "sd: a run downloads Tiny weights (about 3 MiB from https://huggingface.co/x/tiny) first"
    assert any(line.startswith(note) for line in plan.notes)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"evaluation": {**VALUES["evaluation"], "unit_px": 5}}, "units of 5 px do not tile"),
        ({"data": {**VALUES["data"], "num_train": 2}}, "2 training images do not fill one batch of 4"),
        ({"methods": {**VALUES["methods"], "sd": {**VALUES["methods"]["sd"], "recipe": "equal"}}}, "comes trained"),
    ],
)
def test_nothing_is_downloaded_while_something_else_is_wrong(
    changes: dict[str, Any], line: str, downloads: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=line):
        planned(store(tmp_path, answers=True), tmp_path, suite=parse_suite({**VALUES, **changes}, "test"))
    assert downloads == []


def test_a_download_that_fails_ends_the_plan_and_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*words: object, **named: object) -> str:
        raise OSError("403 Client Error")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    said = (
        r"^row sd cannot be run: no Tiny weights: .* cannot be fetched \(403 Client Error\); put the folder tiny into"
    )
    with pytest.raises(ConfigError, match=said):
        planned(store(tmp_path, answers=True), tmp_path)


def test_speed_runs_download_nothing(downloads: list[str], tmp_path: Path) -> None:
    plan = planned(store(tmp_path, answers=True), tmp_path, reads_data=False)
    assert downloads == []
    assert plan.missing == {"sd": LACKING}
