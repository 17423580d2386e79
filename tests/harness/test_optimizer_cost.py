"""Optimizers timed by themselves: over which tensors, in which order, and what is said of those that cannot work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from lmd_bench.errors import ConfigError
from lmd_bench.harness import optimizer_cost
from lmd_bench.harness.fresh_process import Failed
from lmd_bench.harness.optimizer_cost import (
    OptimizerCostOptions,
    compare_optimizers,
    model_tensors,
    optimizers,
    time_optimizer,
)
from lmd_bench.records import OptimizerCostRecord, OptimizerCostRound

OPTIONS = OptimizerCostOptions("latent-vit-b4", rounds=2, steps=3, untimed_steps=1, device="cpu")


def test_the_latent_model_has_the_published_size() -> None:
    shapes = model_tensors("latent-vit-b4")
    assert sum(math.prod(shape) for shape in shapes) == 110_753_856
    assert len(shapes) == 252
    with pytest.raises(ConfigError, match="--model latent-vit: no such model; did you mean 'latent-vit-b4'"):
        model_tensors("latent-vit")


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("name", optimizers())
def test_each_optimizer_takes_its_steps(name: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    part = time_optimizer(name, [(4, 3), (3,), (2, 2, 2)], OPTIONS, 1)
    assert (part.round, part.optimizer, len(part.step_ms), len(part.untimed_ms)) == (1, name, 3, 1)
    assert min(part.step_ms) > 0
    assert part.compiled_graphs == (1 if "compiled" in name else 0)


def test_rounds_are_interleaved_and_what_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[int, str]] = []

    def answer(work: Any, name: str, shapes: Any, options: Any, number: int) -> Any:
        started.append((number, name))
        if name == "AdamW fused":
            return Failed("no such kernel")
        return OptimizerCostRound(
            round=number, optimizer=name, step_ms=[1.0], untimed_ms=[2.0], compiled_graphs=0, peak_memory_bytes=None
        )

    def refuse(config: Any, device: str) -> None:
        if config.implementation == "compiled":
            raise ConfigError("no compiler")

    monkeypatch.setattr(optimizer_cost, "in_fresh_process", answer)
    monkeypatch.setattr(optimizer_cost, "check_optimizer", refuse)
    saved: list[int] = []
    record = compare_optimizers(
        OPTIONS,
        command="c",
        environment={},
        on_round=lambda part: None,
        save=lambda so_far: saved.append(len(so_far.rounds)),
    )
    assert saved == [4, 8]
    names = ["AdamW loop", "AdamW foreach", "AdamW fused", "Adan loop", "Adan foreach"]
    assert [name for number, name in started if number == 0] == names
    assert [name for number, name in started if number == 1] == [names[1], *names[3:], names[0]]
    assert record.not_measured == {"Adan compiled": "no compiler", "AdamW fused": "no such kernel"}
    assert record.num_parameters == 110_753_856


def test_the_command_writes_record_and_table_and_ends_with_1_where_one_is_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmd_bench.cli import main

    def answer(work: Any, name: str, shapes: Any, options: Any, number: int) -> Any:
        if name == "AdamW fused":
            return Failed("no such kernel")
        return OptimizerCostRound(
            round=number, optimizer=name, step_ms=[2.0], untimed_ms=[2.0], compiled_graphs=0, peak_memory_bytes=None
        )

    monkeypatch.setattr(optimizer_cost, "in_fresh_process", answer)
    words = ["profile-optimizers", "--rounds", "3", "--device", "cpu", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["lmd-bench", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 1
    assert "AdamW fused: not measured: no such kernel" in capsys.readouterr().err
    first = tmp_path / "optimizer-cost-latent-vit-b4-fp32-cpu.json"
    record = OptimizerCostRecord.model_validate_json(first.read_text())
    assert len(record.rounds) == 15
    assert "| Adan compiled<br>3 rounds | 2.00" in first.with_suffix(".md").read_text()
    before = first.read_bytes()
    with pytest.raises(SystemExit):
        main()
    assert first.read_bytes() == before, "an earlier measurement is kept"
    again = "optimizer-cost-latent-vit-b4-fp32-cpu-2"
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in (first.stem, again) for ending in ("json", "md")
    }


def test_an_unknown_model_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lmd_bench.cli import main

    out = tmp_path / "out"
    monkeypatch.setattr("sys.argv", ["lmd-bench", "profile-optimizers", "--model", "vit", "--out", str(out)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "error: --model vit: no such model" in capsys.readouterr().err
    assert not out.exists()
