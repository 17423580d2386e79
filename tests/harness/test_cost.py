"""Operations and memory of a step."""

from __future__ import annotations

from collections import Counter

import torch

from baselines.mae import MAE, MAEConfig
from lmd_bench.harness.noise import noise_batch
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.method import Batch, DataSpec, Method
from lmd_bench.metrics.cost import PeakMemory, _step_flops, count_step_flops
from lmd_bench.projector.config import ProjectorConfig

SMALL = {"encoder_width": 32, "encoder_depth": 2, "encoder_heads": 2, "decoder_width": 16, "decoder_depth": 2}


def batch(method: Method, size: int) -> Batch:
    return noise_batch(method, size, torch.device("cpu"))


def small_lmd() -> LMD:
    config = LMDConfig(projector=ProjectorConfig(kind="pixels"), patch_size=8, decoder_heads=2, **SMALL)  # type: ignore[arg-type]
    return LMD(config, DataSpec(64))


def test_the_mean_over_the_schedule_is_that_of_counting_every_step() -> None:
    method, steps = small_lmd(), 60
    stand_in = small_lmd().to("meta")
    shapes = noise_batch(stand_in, 2, torch.device("meta"))
    by_length: dict[int | None, int] = {}
    lengths = Counter(method.num_tokens_at(step, steps) for step in range(1, steps + 1))
    for step in range(1, steps + 1):
        length = method.num_tokens_at(step, steps)
        if length not in by_length:
            by_length[length] = _step_flops(stand_in, shapes, step, steps)
    expected = sum(by_length[length] * count for length, count in lengths.items()) / steps
    assert len(by_length) > 10, "the shortcut by a quadratic has to be at work here"
    assert count_step_flops(method, batch(method, 2), steps) == round(expected)


def test_counting_leaves_the_method_as_it_was() -> None:
    method = small_lmd()
    before = {name: value.clone() for name, value in method.state_dict().items()}
    count_step_flops(method, batch(method, 2), 10)
    assert all(torch.equal(before[name], value) for name, value in method.state_dict().items())
    assert all(parameter.grad is None for parameter in method.parameters())


def test_operations_are_proportional_to_the_batch() -> None:
    config = MAEConfig(patch_size=8, decoder_heads=2, **SMALL)  # type: ignore[arg-type]
    method = MAE(config, DataSpec(64))
    assert count_step_flops(method, batch(method, 6), 5) == 3 * count_step_flops(method, batch(method, 2), 5)


def test_peak_memory_sees_a_large_tensor_and_forgets_it_after_a_reset() -> None:
    memory = PeakMemory(torch.device("cpu"))
    memory.reset()
    before = memory.peak_bytes()
    if before is None:
        assert memory.kind.startswith("not measured")
        return
    torch.ones(64 * 2**20)  # 256 MiB of float32
    peak = memory.peak_bytes()
    assert peak is not None
    assert peak - before > 200 * 2**20
    memory.reset()
    after = memory.peak_bytes()
    assert after is not None
    assert after < peak - 200 * 2**20
