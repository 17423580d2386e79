"""The inference table's measurements: what is timed, how passes are counted, what is said of what cannot be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from helpers.methods import Tiny
from torch import Tensor, nn

from lmd_bench.config import RunConfig
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.harness import inference
from lmd_bench.harness.fresh_process import Failed
from lmd_bench.harness.inference import (
    InferenceOptions,
    Turn,
    counted_evaluations,
    measure_inference,
    most_common,
    time_row,
    unmeasured,
)
from lmd_bench.harness.plan import make_plan
from lmd_bench.harness.profile import calibrator_config
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.method import DataSpec, Method
from lmd_bench.records import InferenceRecord, InferenceRound, InferenceRow, NotMeasured, read_inference, write_json
from lmd_bench.registry import load_method
from lmd_bench.suite_files import load_suite

OPTIONS = InferenceOptions(batch_sizes=(1, 3), rounds=2, calls=2, untimed_calls=1)


class Levelled(Tiny):
    """Has levels, samples from nothing, and has a projector that halves the brightness."""

    progressive_orders: ClassVar[tuple[str, ...]] = ("random",)
    projector_name = "halving"

    def round_trip(self, images: Tensor) -> Tensor:
        return images / 2 * 2

    def reconstruct_progressively(
        self, images: Tensor, mask: Tensor, *, levels: int | None, order: str, seeds: Any
    ) -> tuple[Tensor, int]:
        assert len(list(seeds)) == len(images)
        passes = 5 if levels is None else levels
        for _ in range(passes):
            filled = self.reconstruct(images, mask)
        return filled, passes

    def sample(self, num_images: int) -> Tensor:
        size = self.data.image_size
        filled = self.network(torch.rand(num_images, 3)).sigmoid()
        return filled[:, :, None, None].expand(-1, -1, size, size)


class Broken(Tiny):
    """Forgets an image."""

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return super().reconstruct(images, mask)[1:]


def config_of(name: str) -> tuple[RunConfig, dict[str, str]]:
    """A cell of one of these methods, and where the method is."""
    suite = load_suite("demo")
    config = calibrator_config(suite, "cpu").model_copy(
        update={
            "method": name,
            "row": name,
            "label": name,
            "options": {},
            "image_size": 16,
            "evaluation": suite.evaluation.model_copy(update={"unit_px": 4}),
        }
    )
    return config, {name: f"{__file__}:{name.capitalize()}"}


def turn_of(name: str, skipped: frozenset[str] = frozenset()) -> Turn:
    config, added = config_of(name)
    return time_row(config, 3, OPTIONS, added, 0, set(skipped))


def test_every_task_is_timed_with_its_evaluations_and_the_projector_beside() -> None:
    turn = turn_of("levelled")
    assert turn.not_measured == []
    assert {part.task: part.function_evaluations for part in turn.rounds} == {
        "reconstruct": 1,
        "reconstruct, 8 levels, random": 8,
        "reconstruct, all levels, random": 5,
        "sample": 1,
    }
    for part in turn.rounds:
        assert part.batch_size == 3
        assert len(part.calls_ms) == OPTIONS.calls
        assert min(part.calls_ms) > 0
        assert part.encode_ms is not None
        assert part.decode_ms is not None
        assert part.decode_ms >= 0
    assert turn.about.projector == "halving"


def test_a_method_that_cannot_sample_says_so_and_has_no_projector_in_pixel_space() -> None:
    turn = turn_of("tiny")
    assert [part.task for part in turn.rounds] == ["reconstruct"]
    assert (turn.rounds[0].encode_ms, turn.rounds[0].decode_ms) == (None, None)
    assert [(miss.task, miss.batch_size, miss.reason) for miss in turn.not_measured] == [
        ("sample", 3, "Tiny does not generate images")
    ]


def test_tasks_known_to_fail_are_not_tried_again() -> None:
    assert turn_of("tiny", frozenset({"sample"})).not_measured == []


def test_images_that_are_missing_are_not_timed() -> None:
    turn = turn_of("broken")
    assert turn.rounds == []
    assert "missing, misshapen or not finite" in turn.not_measured[0].reason


def test_normalised_targets_are_the_reason_why_a_row_cannot_reconstruct() -> None:
    options = {**small_lmd().model_dump(mode="json"), "normalize_targets": True}
    config, _ = config_of("tiny")
    config = config.model_copy(update={"method": "lmd", "options": options, "image_size": 32})
    turn = time_row(config, 1, OPTIONS, {}, 0, set())
    assert {miss.reason for miss in turn.not_measured if miss.task != "sample"} == {"normalised targets"}


def test_a_row_that_trains_on_cached_latents_reconstructs_images_like_any_other() -> None:
    options = small_lmd().model_dump(mode="json")
    options |= {"projector": {"kind": "kl", "path": "shipped:scenes-kl-f8", "cache": "auto"}, "patch_size": 1}
    config, _ = config_of("tiny")
    evaluation = config.evaluation.model_copy(update={"unit_px": 8})
    changes = {"method": "lmd", "options": options, "image_size": 32, "evaluation": evaluation}
    turn = time_row(config.model_copy(update=changes), 2, OPTIONS, {}, 0, set())
    assert turn.not_measured == []
    assert {part.task for part in turn.rounds} >= {"reconstruct", "sample"}
    assert all(part.encode_ms for part in turn.rounds)


def a_round(row: str, batch_size: int) -> InferenceRound:
    return InferenceRound(
        round=0, row=row, task="reconstruct", batch_size=batch_size, calls_ms=[1.0], encode_ms=None, decode_ms=None,
        function_evaluations=1, peak_memory_bytes=None,
    )  # fmt: skip


def test_rows_without_any_figure_are_named_with_their_reasons_and_missing_tasks_are_not() -> None:
    misses = [("mae", "sample", 1, "MAE does not generate images"), ("mae", None, 3, "out of memory")]
    record = InferenceRecord(
        suite="demo", command="c", started_at="now", environment={}, reference=None, precision="fp32",
        batch_sizes=[1, 3], unit_px=16, keep=0.25, peak_memory_kind="resident set of the process", rows={},
        rounds=[a_round("mae", 1), a_round("ddpm", 1), a_round("ddpm", 3)],
        not_measured=[NotMeasured(row=r, task=t, batch_size=b, reason=why) for r, t, b, why in misses],
    )  # fmt: skip
    assert unmeasured(record, ["mae", "ddpm"]) == ["mae, batch 3: not measured: out of memory"]


def test_the_command_ends_with_1_where_a_row_was_not_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmd_bench.cli import main

    def answer(work: Any, config: RunConfig, batch_size: int, *_: Any) -> Any:
        if config.row == "ddpm":
            return Failed("out of memory")
        about = InferenceRow(label=config.label, method="mae", parameters=1, image_size=64)
        return Turn(about, [a_round(config.row, batch_size)], [])

    monkeypatch.setattr(inference, "in_fresh_process", answer)
    words = ["--methods", "mae,ddpm", "--batch", "2", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lmd-bench", "inference", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "ddpm, batch 2: not measured: out of memory\n"
    assert (tmp_path / "demo" / "report" / "inference.md").is_file()


def small_lmd() -> LMDConfig:
    sizes = {"encoder_width": 16, "encoder_depth": 2, "encoder_heads": 2}
    decoder = {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return LMDConfig.model_validate({"projector": {"kind": "pixels"}, "patch_size": 8, **sizes, **decoder})


def count_passes(method: Method, work: Any) -> int | None:
    with torch.no_grad(), counted_evaluations(method) as counts:
        work()
    return most_common(counts)


@pytest.mark.parametrize("levels", [1, 3, None])
@pytest.mark.parametrize("order", LMD.progressive_orders)
def test_counted_passes_are_those_that_unveiling_says_it_took(levels: int | None, order: str) -> None:
    method = LMD(small_lmd(), DataSpec(32)).eval()
    images, mask = torch.rand(2, 3, 32, 32), yardstick_masks(2, 32, 8, 0.25)
    said: list[int] = []

    def work() -> None:
        said.append(method.reconstruct_progressively(images, mask, levels=levels, order=order, seeds=[1, 2])[1])

    assert count_passes(method, work) == said[0]


def test_counted_passes_are_the_reverse_steps_of_a_diffusion_model() -> None:
    kind = load_method("ddpm", {})
    options = {"block_out_channels": [32, 32], "attention_levels": [1], "num_inference_steps": 7}
    method = kind(kind.Config.model_validate(options), DataSpec(16)).eval()
    assert count_passes(method, lambda: method.sample(2)) == 7 == method.num_function_evaluations


def test_layers_used_twice_in_a_pass_do_not_mislead_the_count() -> None:
    class Reusing(Tiny):
        def __init__(self) -> None:
            super().__init__(self.Config(), DataSpec(16))
            self.shared = nn.Linear(3, 3)

    method = Reusing()

    def work() -> None:
        for _ in range(4):
            method.network(method.shared(method.shared(torch.zeros(1, 3))))

    assert count_passes(method, work) == 4
    assert count_passes(method, lambda: None) is None


def test_rounds_are_interleaved_saved_as_they_come_and_failures_not_repeated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite = load_suite("demo")
    plan = make_plan(suite, ["lmd-cs", "mae"], device="cpu", out=tmp_path, added={}, force=True)
    started: list[tuple[int, str, int]] = []

    def answer(
        work: Any, config: RunConfig, batch_size: int, options: Any, added: Any, number: int, skipped: Any
    ) -> Any:
        started.append((number, config.row, batch_size))
        if (config.row, batch_size) == ("mae", 3):
            return Failed("out of memory")
        part = a_round(config.row, batch_size).model_copy(update={"round": number})
        return Turn(InferenceRow(label=config.label, method="m", parameters=1, image_size=64), [part], [])

    monkeypatch.setattr(inference, "in_fresh_process", answer)
    saved: list[int] = []
    record = measure_inference(
        plan,
        OPTIONS,
        {},
        command="lmd-bench inference",
        environment={},
        on_round=lambda part: None,
        save=lambda so_far: saved.append(len(so_far.rounds)),
    )
    first = [("lmd-cs", 1), ("lmd-cs", 3), ("mae", 1), ("mae", 3)]
    assert [job[1:] for job in started if job[0] == 0] == first
    assert [job[1:] for job in started if job[0] == 1] == [("lmd-cs", 3), ("mae", 1), ("lmd-cs", 1)]
    assert saved == [3, 6]
    assert [(miss.row, miss.batch_size, miss.reason) for miss in record.not_measured if miss.batch_size] == [
        ("mae", 3, "out of memory")
    ]
    write_json(tmp_path / "inference.json", record)
    assert read_inference(tmp_path / "inference.json") == record
    assert isinstance(record, InferenceRecord)


@pytest.mark.slow
def test_the_command_writes_a_record_and_a_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmd_bench.cli import main

    suite = tmp_path / "small.yaml"
    suite.write_text("extends: demo\nname: small\ndata: {image_size: 32}\nevaluation: {num_checks: 1, unit_px: 16}\n")
    words = ["--suite", str(suite), "--methods", "lmd-cs,mae", "--batch", "1,2", "--rounds", "1", "--calls", "1"]
    monkeypatch.setattr("sys.argv", ["lmd-bench", "inference", *words, "--device", "cpu", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    record = read_inference(next((tmp_path / "small").glob("inference-*.json")))
    assert {(part.row, part.batch_size) for part in record.rounds} == {
        (row, size) for row in ("lmd-cs", "mae") for size in (1, 2)
    }
    text = (tmp_path / "small" / "report" / "inference.md").read_text()
    assert "MAE does not generate images" in text


@pytest.mark.parametrize("batch", ["1,x", "0", "", "-1,4"])
def test_batch_sizes_that_are_none_are_refused(
    batch: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmd_bench.cli import main

    monkeypatch.setattr("sys.argv", ["lmd-bench", "inference", f"--batch={batch}"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: --batch" in capsys.readouterr().err
