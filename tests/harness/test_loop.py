"""The training loop: what it does to weights, losses and rows, whatever the time it takes."""

from __future__ import annotations

import math
import statistics
from collections.abc import Generator
from typing import Any

import pytest
import torch
from helpers.methods import Tiny, TinyConfig

from lmd_bench.config import LearningRateConfig, OptimizerConfig, RecipeConfig
from lmd_bench.errors import TrainingError
from lmd_bench.harness.loop import Trainer, TrainOptions, TrainResult, untimed_schedule
from lmd_bench.harness.optim import WeightAverage, build_optimizer, lr_at, peak_lr, set_lr
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import CpuClock
from lmd_bench.method import Batch, DataSpec
from lmd_bench.records import STEP_COLUMNS
from lmd_bench.seeding import derive_seed
from lmd_bench.suite_files import load_suite

CPU = torch.device("cpu")


class RandomImages:
    """Batches that depend on (seed, step) alone."""

    def batches(self, batch_size: int, seed: int, start_step: int = 1) -> Generator[Batch, None, None]:
        step = start_step
        while True:
            generator = torch.Generator().manual_seed(seed * 1000 + step)
            yield Batch(torch.rand(batch_size, 3, 16, 16, generator=generator))
            step += 1


def recipe(**changes: Any) -> RecipeConfig:
    values: dict[str, Any] = {
        "batch_size": 4,
        "optimizer": OptimizerConfig(),
        "lr": LearningRateConfig(base=1e-2, per_images=None),
        **changes,
    }
    return RecipeConfig.model_validate(values)


def tiny(**options: Any) -> Tiny:
    reseed(CPU, 0, "weights")
    return Tiny(TinyConfig.model_validate(options), DataSpec(16))


def train(method: Tiny, **changes: Any) -> tuple[TrainResult, list[tuple[object, ...]], list[tuple[int, float]]]:
    rows: list[tuple[object, ...]] = []
    checks: list[tuple[int, float]] = []
    values: dict[str, Any] = {
        "recipe": recipe(),
        "steps": 20,
        "lr_warmup_steps": 0,
        "untimed_steps": 0,
        "seed": 3,
        "device": CPU,
        "log_every_steps": 8,
        **changes,
    }
    trainer = Trainer(method, RandomImages(), TrainOptions(**values), CpuClock())
    result = trainer.run(rows.extend, lambda step, s: checks.append((step, s)), lambda *_: None)
    return result, rows, checks


def test_the_same_seed_gives_the_same_losses_bit_for_bit_and_another_seed_does_not() -> None:
    first, _, _ = train(tiny())
    again, _, _ = train(tiny())
    other, _, _ = train(tiny(), seed=4)
    assert first.losses == again.losses
    assert first.losses != other.losses


def test_untimed_steps_leave_no_trace_in_what_is_learned() -> None:
    without, rows, _ = train(tiny())
    with_untimed, more_rows, _ = train(tiny(), untimed_steps=5)
    assert with_untimed.losses == without.losses
    assert [row[0] for row in more_rows[:5]] == [-5, -4, -3, -2, -1]
    assert [row[1] for row in more_rows] == [0] * 5 + [1] * 20
    assert [row[:6] for row in more_rows[5:]] == [row[:6] for row in rows]


@pytest.mark.parametrize("name", ["adamw", "adam", "adan"])
def test_untimed_steps_leave_no_trace_with_any_optimizer_or_average(name: str) -> None:
    betas = (0.98, 0.92, 0.99) if name == "adan" else (0.9, 0.95)
    chosen = recipe(optimizer={"name": name, "betas": betas}, ema_decay=0.9, clip_grad_norm=0.1)
    without, with_untimed = tiny(), tiny()
    train(without, recipe=chosen)
    train(with_untimed, recipe=chosen, untimed_steps=3)
    for left, right in zip(without.parameters(), with_untimed.parameters(), strict=True):
        assert torch.equal(left, right)


def test_rows_hold_every_step_once_with_phases_that_add_up() -> None:
    result, rows, _ = train(tiny(), lr_warmup_steps=5)
    assert [row[0] for row in rows] == list(range(1, 21))
    assert all(len(row) == len(STEP_COLUMNS) for row in rows)
    table = [dict(zip(STEP_COLUMNS, row, strict=True)) for row in rows]
    assert [row["loss"] for row in table] == result.losses
    assert table[0]["lr"] == 0.0
    assert table[5]["lr"] == pytest.approx(1e-2)
    assert table[19]["mask_ratio"] == pytest.approx(0.5)
    assert table[19]["tokens"] == 5
    for row in table:
        phases = [row[f"{name}_ms"] for name in ("data", "projector", "forward", "backward", "optimizer")]
        assert sum(phases) == pytest.approx(row["period_ms"])


def test_the_account_of_a_run_with_checks_adds_up() -> None:
    result, _, checks = train(tiny(), check_steps=frozenset({0, 10, 20}), steps=20)
    assert [step for step, _ in checks] == [0, 10, 20]
    assert checks[0][1] == 0.0
    assert checks[1][1] < checks[2][1] <= result.wall.train_s + 1e-9
    assert set(result.wall.pauses_s) == {"evaluation", "log"}


def test_a_loss_that_is_not_finite_stops_the_run_at_its_step_and_keeps_the_rows_before() -> None:
    rows: list[tuple[object, ...]] = []
    options = TrainOptions(
        recipe=recipe(), steps=20, lr_warmup_steps=0, untimed_steps=0, seed=0, device=CPU, log_every_steps=8
    )
    trainer = Trainer(tiny(nan_at=11), RandomImages(), options, CpuClock())
    with pytest.raises(TrainingError, match="step 11: the loss is nan"):
        trainer.run(rows.extend, lambda *_: None, lambda *_: None)
    assert [row[0] for row in rows] == list(range(1, 12))
    assert math.isnan(float(rows[-1][2]))  # type: ignore[arg-type]


def test_checks_see_the_moving_average_and_training_goes_on_with_the_weights() -> None:
    chosen = recipe(ema_decay=0.9)
    method = tiny()
    options = TrainOptions(
        recipe=chosen,
        steps=4,
        lr_warmup_steps=0,
        untimed_steps=0,
        seed=0,
        device=CPU,
        check_steps=frozenset({4}),
    )
    trainer = Trainer(method, RandomImages(), options, CpuClock())
    seen: list[torch.Tensor] = []
    first = next(method.parameters())
    trainer.run(lambda _: None, lambda *_: seen.append(first.detach().clone()), lambda *_: None)
    assert not torch.equal(seen[0], first)
    with trainer.averaged():
        assert torch.equal(seen[0], first)


def test_the_moving_average_follows_its_formula() -> None:
    module = torch.nn.Linear(2, 1, bias=False)
    module.weight.data.fill_(1.0)
    average = WeightAverage(module, 0.75)
    for value in (2.0, 4.0):
        module.weight.data.fill_(value)
        average.update()
    with average.applied():
        assert module.weight.data[0, 0] == pytest.approx((1 * 0.75 + 2 * 0.25) * 0.75 + 4 * 0.25)
    assert module.weight.data[0, 0] == 4.0


def test_a_settled_trainer_leaves_the_average_in_place_for_good_and_holds_no_optimizer_state() -> None:
    method = tiny()
    options = TrainOptions(
        recipe=recipe(ema_decay=0.9), steps=4, lr_warmup_steps=0, untimed_steps=0, seed=0, device=CPU
    )
    trainer = Trainer(method, RandomImages(), options, CpuClock())
    trainer.run(lambda _: None, lambda *_: None, lambda *_: None)
    first = next(method.parameters())
    with trainer.averaged():
        average = first.detach().clone()
    assert not torch.equal(first, average)
    trainer.settle()
    assert torch.equal(first, average)
    with trainer.averaged():
        assert torch.equal(first, average)
    assert not trainer.optimizer.state


def test_gradients_are_clipped_to_the_recipes_norm() -> None:
    sgd_like = recipe(optimizer={"name": "adamw", "betas": (0.0, 0.0), "weight_decay": 0.0}, clip_grad_norm=1e-12)
    clipped, free = tiny(), tiny()
    start = [p.detach().clone() for p in clipped.parameters()]
    train(clipped, recipe=sgd_like, steps=1)
    train(free, recipe=sgd_like.model_copy(update={"clip_grad_norm": None}), steps=1)
    moved = [float((p.detach() - s).abs().max()) for p, s in zip(clipped.parameters(), start, strict=True)]
    moved_freely = [float((p.detach() - s).abs().max()) for p, s in zip(free.parameters(), start, strict=True)]
    assert max(moved) < 1e-2 * max(moved_freely)  # gradients of 1e-12 drown in AdamW's eps of 1e-8


@pytest.mark.parametrize(
    ("step", "expected"),
    [(1, 0.0), (2, 0.1), (11, 1.0), (61, 0.5 + 0.05), (110, 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 0.99)))],
)
def test_the_learning_rate_rises_linearly_from_zero_and_falls_along_half_a_cosine(step: int, expected: float) -> None:
    chosen = recipe(lr={"base": 1.0, "per_images": None, "minimum": 0.1})
    assert lr_at(chosen, step, 110, 10) == pytest.approx(expected)


def test_the_learning_rate_scales_with_the_batch_and_layer_decay_is_honoured() -> None:
    chosen = recipe(lr={"base": 1.5e-4, "per_images": 256}, batch_size=4096)
    assert peak_lr(chosen) == pytest.approx(2.4e-3)
    assert lr_at(recipe(lr={"base": 1.0, "per_images": None, "schedule": "constant"}), 99, 100, 0) == 1.0
    optimizer = build_optimizer(tiny(), recipe())
    optimizer.param_groups[0]["lr_scale"] = 0.5
    set_lr(optimizer, 0.2)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_untimed_steps_are_spread_over_the_schedule_and_cover_every_length_when_compiling() -> None:
    options = TrainOptions(recipe=recipe(), steps=100, lr_warmup_steps=0, untimed_steps=3, seed=0, device=CPU)
    method = tiny()
    assert untimed_schedule(method, options) == [1, 51, 100]
    compiled = TrainOptions(**{**vars(options), "compile": True})
    lengths = {method.num_tokens_at(step, 100) for step in untimed_schedule(method, compiled)}
    assert lengths == {method.num_tokens_at(step, 100) for step in range(1, 101)}


def test_a_network_of_constant_length_warms_up_on_the_ends_of_its_schedule_alone_when_compiling() -> None:
    class Constant(Tiny):
        def num_tokens_at(self, step: int, total_steps: int) -> int:
            return 10

    options = TrainOptions(
        recipe=recipe(), steps=100, lr_warmup_steps=0, untimed_steps=3, seed=0, device=CPU, compile=True
    )
    assert untimed_schedule(Constant(TinyConfig(), DataSpec(16)), options) == [1, 50, 100, 1, 51, 100]


def test_seeds_differ_by_purpose_and_step_and_reseeding_repeats() -> None:
    seeds = {derive_seed(purpose, seed, step) for seed in (0, 1) for purpose in ("a", "b") for step in range(50)}
    assert len(seeds) == 200
    reseed(CPU, 1, "step", 7)
    first = torch.rand(3)
    reseed(CPU, 1, "step", 7)
    assert torch.equal(first, torch.rand(3))


def test_bf16_trains_under_autocast_and_keeps_the_weights_in_fp32() -> None:
    method = tiny()
    result, _, _ = train(method, precision="bf16")
    exact, _, _ = train(tiny())
    assert all(p.dtype == torch.float32 for p in method.parameters())
    assert result.losses != exact.losses
    assert result.losses == pytest.approx(exact.losses, rel=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_a_compiled_run_learns_the_same_and_compiles_every_shape_before_the_clock_starts() -> None:
    from lmd_bench.harness.loop import count_compiled_graphs

    plain, _, _ = train(tiny())
    compiled, _, _ = train(tiny(), compile=True, untimed_steps=1)
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-4)
    assert compiled.compiled_graphs is not None
    assert 1 <= compiled.compiled_graphs <= 2
    assert compiled.compiled_graphs == count_compiled_graphs()
    assert compiled.compile_s is not None
    assert compiled.compile_s > 10 * statistics.median(step.period_ms for step in compiled.times) / 1e3


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_an_optimizers_own_kernels_do_not_pass_for_a_compiled_method() -> None:
    from lmd_bench.harness.loop import count_compiled_graphs

    class Uncompilable(Tiny):
        def compiled_modules(self) -> list[torch.nn.Module]:
            return []

    adan = {"name": "adan", "betas": (0.98, 0.92, 0.99), "implementation": "compiled"}
    with pytest.raises(TrainingError, match=r"torch\.compile compiled nothing of this method"):
        train(Uncompilable(TinyConfig(), DataSpec(16)), recipe=recipe(optimizer=adan), compile=True)
    assert count_compiled_graphs() == 1  # the optimizer's, made once


TINY_UNET = {"block_out_channels": [16, 32], "attention_levels": [1], "layers_per_block": 1, "norm_num_groups": 8}
TINY_PYRAMID = {
    "patch_size": 8,
    "stage_widths": [16, 24, 32, 48],
    "stage_depths": [1, 1, 2, 1],
    "stage_heads": [1, 2, 2, 3],
    "stage_mlp_ratios": [2, 2, 2, 2],
    "decoder_width": 32,
    "decoder_depth": 1,
    "decoder_heads": 2,
}
BESIDE_THE_DEMO: dict[str, tuple[str, dict[str, Any]]] = {
    "um-mae-pvt": ("um-mae", {"backbone": "pvt", **TINY_PYRAMID}),
    "um-mae-swin": ("um-mae", {"backbone": "swin", **TINY_PYRAMID}),
    "simmim-vit": (
        "simmim",
        {"backbone": {"kind": "vit", "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}, "mask_unit_px": 16},
    ),
    "iddpm-importance": ("iddpm", {**TINY_UNET, "loss": "vlb", "timestep_sampler": "loss-second-moment"}),
    "iddpm-rescaled": ("iddpm", {**TINY_UNET, "rescale_timesteps": True, "use_scale_shift_norm": True}),
}
"""What the demo has no row of: name -> (method, options)."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("row", [*load_suite("demo").methods, *BESIDE_THE_DEMO])
def test_the_timed_loop_never_makes_the_host_wait(row: str, precision: str) -> None:
    """Every method trains with synchronisation forbidden, but for the pauses, which are off the clock."""
    from lmd_bench.harness.noise import NoiseSource
    from lmd_bench.harness.timer import CudaClock
    from lmd_bench.registry import load_method

    class Clock(CudaClock):
        def drain(self) -> None:
            torch.cuda.set_sync_debug_mode("default")
            super().drain()

        def mark(self) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            return super().mark()

    device = torch.device("cuda:0")
    suite = load_suite("demo")
    if row in BESIDE_THE_DEMO:
        (name, values), recipe_name = BESIDE_THE_DEMO[row], "equal"
    else:
        settings = suite.methods[row]
        name, values, recipe_name = settings.method, settings.options, settings.recipe
    method_class = load_method(name, {})
    method = method_class(method_class.Config.model_validate(values), DataSpec(64, 10)).to(device).train()
    options = TrainOptions(
        recipe=suite.recipes[recipe_name],
        steps=20,
        lr_warmup_steps=2,
        untimed_steps=0,
        seed=0,
        device=device,
        precision=precision,
        log_every_steps=20,
    )
    trainer = Trainer(method, NoiseSource(method, device), options, Clock(device))
    trainer.time_steps([1, 20])  # the first steps load kernels and make optimizer state
    try:
        result = trainer.run(lambda _: None, lambda *_: None, lambda *_: None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(result.times) == 20
    assert result.wall.valid
