"""Every suite, shipped or under reports/, is planned on this machine: its rows are checked as a run checks them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lmd_bench.config import RecipeConfig
from lmd_bench.harness.plan import make_plan
from lmd_bench.pretrained import WeightsStore, read_manifest
from lmd_bench.suite_files import load_suite, shipped_suites

PUBLISHED = read_manifest().weights
REPORTS = Path(__file__).parent.parent / "reports"
ROWS = {"lmd-scenes": {"lmd-cs", "lmd-cs-light"}, "photos": set(load_suite("demo").methods)}
"""The rows of the suites that reports are made of."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As many small images as fill a published batch beside those held out."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(100):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(folder / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", [*shipped_suites(), *(str(path) for path in sorted(REPORTS.glob("*.yaml")))])
def test_every_row_of_every_suite_can_be_planned(name: str, images: Path, tmp_path: Path) -> None:
    suite = load_suite(name)
    if suite.data.name == "folder":
        suite = suite.model_copy(update={"data": suite.data.model_copy(update={"path": str(images)})})
    rows = list(suite.methods)
    plan = make_plan(
        suite, rows, device="cpu", out=tmp_path, added={}, force=False, reads_data=False, save_weights=False,
        weights=WeightsStore(offline=True),
    )  # fmt: skip
    assert [cell.config.row for cell in plan.cells] == [row for row in rows if row not in plan.missing]
    assert all((cell.config.steps > 0) == cell.method.is_trained for cell in plan.cells)
    assert all(any(f"weights:{name}" in str(suite.methods[row].options) for name in PUBLISHED) for row in plan.missing)


def test_the_suites_of_reports_have_exactly_the_rows_they_are_about() -> None:
    found = {path.stem: set(load_suite(str(path)).methods) for path in REPORTS.glob("*.yaml")}
    assert found == ROWS


@pytest.mark.parametrize("name", shipped_suites())
def test_what_is_evaluated_of_an_average_is_not_its_initial_weights(name: str) -> None:
    suite = load_suite(name)
    for recipe in suite.recipes.values():
        assert suite.steps is None or initial_share(recipe, suite.steps) < 1e-6


def initial_share(recipe: RecipeConfig, steps: int) -> float:
    """Weight of the initial weights in the average after so many steps."""
    share = 1.0
    for update in range(1, steps + 1 if recipe.ema_decay is not None else 0):
        decay = recipe.ema_decay or 0.0
        share *= min(decay, (1 + update) / (10 + update)) if recipe.ema_warmup else decay
    return share if recipe.ema_decay is not None else 0.0
