"""What the report says of floors, unveiling in levels, and figure 6."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from PIL import Image

from lmd_bench.config import Suite
from lmd_bench.records import RECONSTRUCTIONS, Progressive, SavedWeights, cell_folder, write_json
from lmd_bench.report.build import build_report
from tests.report.conftest import write_run
from tests.report.test_build import build, row, table

DIGEST = "ab" * 32


def way(levels: int | None, order: str, evaluations: int, psnr_db: float) -> Progressive:
    return Progressive(levels=levels, order=order, function_evaluations=evaluations, psnr_db=psnr_db, num_images=16)


def write_unveiled(out: Path, suite: Suite, seed: int, *ways: Progressive) -> None:
    record = write_run(out, suite, "lmd-cs", seed=seed)
    assert record.yardstick is not None
    yardstick = record.yardstick.model_copy(update={"progressive": list(ways), "nearest_unit_psnr_db": 12.25})
    write_json(
        cell_folder(out, suite.name, "lmd-cs", seed) / "record.json", record.model_copy(update={"yardstick": yardstick})
    )


def test_every_way_of_unveiling_is_shown_against_one_shot_without_choosing_the_best(
    tmp_path: Path, suite: Suite
) -> None:
    ways = [(1, "none", 1, 0.0), (8, "random", 8, 0.1), (8, "confidence", 9, -0.2), (None, "random", 38, 0.3)]
    for seed in (0, 1):
        write_unveiled(tmp_path, suite, seed, *(way(a, b, c, 12.0 + seed + d * (1 + seed)) for a, b, c, d in ways))
    write_run(tmp_path, suite, "mae")
    quality = table(build(tmp_path, suite), "ttq")
    cells = row(quality, "LMD-CS")
    assert cells["progressive_8_confidence_gain_db"].lines == (
        "+0.15: 8 levels, random, 8 evaluations",
        "-0.30: 8 levels, confidence, 9 evaluations",
        "+0.45: all levels, random, 38 evaluations",
    )
    frame = pd.read_csv(tmp_path / "demo" / "report" / "ttq.csv", comment="#").set_index("row")
    gains = {"progressive_8_random": 0.15, "progressive_8_confidence": -0.3, "progressive_all_random": 0.45}
    for name, gain in gains.items():
        assert float(frame.loc["lmd-cs", f"{name}_gain_db"]) == pytest.approx(gain)
    assert int(frame.loc["lmd-cs", "progressive_all_random_evaluations"]) == 38
    assert cells["nearest_unit_psnr_db"].lines[0] == "12.25"
    assert row(quality, "MAE")["progressive_8_confidence_gain_db"].lines == ("none: one prediction only",)
    assert any("compared on the same images: the best of them is chosen with hindsight" in n for n in quality.notes)
    assert any("on the first 16 of the images" in note for note in quality.notes)


def test_without_levels_no_note_speaks_of_them(tmp_path: Path, suite: Suite) -> None:
    write_run(tmp_path, suite, "mae")
    assert not any("Unveiled" in note for note in table(build(tmp_path, suite), "ttq").notes)


def draw(out: Path, suite: Suite, digest: str) -> list[str]:
    """Figure 6 beside the weights of a cell whose record says DIGEST; stems of the report's figures."""
    write_run(out, suite, "lmd-cs", weights=SavedWeights(file="weights.safetensors", sha256=DIGEST, num_bytes=1))
    folder = cell_folder(out, suite.name, "lmd-cs", 0) / RECONSTRUCTIONS
    folder.mkdir(exist_ok=True)
    Image.new("RGB", (50, 50)).save(folder / "figure6.png")
    (folder / "figure6.csv").write_text(f"image,progress,weights_sha256\na.png,0.0,{digest}\n")
    report = build_report(out / suite.name, suite, command="lmd-bench report")
    return sorted(path.name for path in report.paths if path.name.startswith("figure6"))


def test_figure_6_is_picked_up_from_beside_the_weights(tmp_path: Path, suite: Suite) -> None:
    assert draw(tmp_path, suite, DIGEST) == ["figure6-lmd-cs.csv", "figure6-lmd-cs.png"]
    text = (tmp_path / "demo" / "report" / "figure6-lmd-cs.csv").read_text()
    assert text.startswith("# Masks along the schedule: LMD-CS\n# ")
    assert text.endswith(f"a.png,0.0,{DIGEST}\n")
    assert "Masks along the schedule: LMD-CS" in (tmp_path / "demo" / "report" / "index.html").read_text()


def test_figure_6_of_other_weights_is_left_out_and_an_older_copy_goes(tmp_path: Path, suite: Suite) -> None:
    assert draw(tmp_path, suite, DIGEST)
    assert draw(tmp_path, suite, "cd" * 32) == []
    assert not list((tmp_path / "demo" / "report").glob("figure6*"))
