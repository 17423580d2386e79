"""What an optimizer's step costs, by itself: the tensors of a named model, gradients filled, nothing else.

Every implementation takes its turn in a process of its own, in interleaved rounds, so that none finds its memory
paged in or its caches warm because of another.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from lmd_bench.config import LearningRateConfig, OptimizerConfig, RecipeConfig, near
from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.harness.allocator import keep_freed_memory
from lmd_bench.harness.fresh_process import Failed, in_fresh_process
from lmd_bench.harness.loop import count_compiled_graphs
from lmd_bench.harness.optim import check_optimizer, optimizer_over
from lmd_bench.harness.timer import Clock, clock_for
from lmd_bench.metrics.cost import PeakMemory
from lmd_bench.nn.config import AutoencoderConfig
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from lmd_bench.records import OptimizerCostRecord, OptimizerCostRound

_ADAN = {"name": "adan", "betas": (0.98, 0.92, 0.99), "weight_decay": 0.02}


def optimizers() -> dict[str, OptimizerConfig]:
    """What is compared, by the name that tables give it."""
    adamw = {f"AdamW {kind}": {"implementation": kind} for kind in ("loop", "foreach", "fused")}
    adan = {f"Adan {kind}": {**_ADAN, "implementation": kind} for kind in ("loop", "foreach", "compiled")}
    return {name: OptimizerConfig.model_validate(values) for name, values in {**adamw, **adan}.items()}


def model_tensors(name: str) -> list[torch.Size]:
    """Shapes of the trainable tensors of a model: "latent-vit-b4" or "pixel-vit-b16".

    ViT-B with a decoder of 512 x 8 in both, on 28 x 28 x 4 latents in patches of 4 (LMD's published size) or on
    224-px images in patches of 16 (MAE's). Raises ConfigError for another name.
    """
    inputs = {"latent-vit-b4": (4, 28, 4), "pixel-vit-b16": (16, 224, 3)}
    if name not in inputs:
        raise ConfigError(f"--model {name}: no such model{near(name, inputs)}")
    patch_size, input_size, channels = inputs[name]
    with torch.device("meta"):
        model = MaskedAutoencoder(AutoencoderConfig(patch_size=patch_size).shape(input_size, channels))
    return [parameter.shape for parameter in model.parameters() if parameter.requires_grad]


@dataclass(frozen=True)
class OptimizerCostOptions:
    """How the optimizers are timed."""

    model: str
    rounds: int
    steps: int
    """Timed steps per process."""
    untimed_steps: int
    device: str


def compare_optimizers(
    options: OptimizerCostOptions,
    *,
    command: str,
    environment: Mapping[str, Any],
    on_round: Callable[[OptimizerCostRound], None],
    save: Callable[[OptimizerCostRecord], None],
) -> OptimizerCostRecord:
    """Time all optimizers in interleaved rounds. One that cannot work here is left out with its reason.

    `save` gets the record so far after every round, so that nothing measured is lost.
    """
    shapes = [tuple(shape) for shape in model_tensors(options.model)]
    record = OptimizerCostRecord(
        command=command,
        started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        environment=dict(environment),
        model=options.model,
        num_tensors=len(shapes),
        num_parameters=sum(torch.Size(shape).numel() for shape in shapes),
        untimed_steps=options.untimed_steps,
        rounds=[],
    )
    configs = optimizers()
    names = list(configs)
    for name, config in configs.items():
        try:
            check_optimizer(config, options.device)
        except ConfigError as error:
            record.not_measured[name] = str(error)
    for number in range(options.rounds):
        shift = number % len(names)
        for name in [*names[shift:], *names[:shift]]:
            if name in record.not_measured:
                continue
            answer = in_fresh_process(time_optimizer, name, shapes, options, number)
            if isinstance(answer, Failed):
                record.not_measured[name] = answer.reason
                continue
            record.rounds.append(answer)
            on_round(answer)
        save(record)
    return record


def time_optimizer(
    name: str, shapes: list[tuple[int, ...]], options: OptimizerCostOptions, number: int
) -> OptimizerCostRound:
    """Time a few steps of one optimizer in this process."""
    keep_freed_memory()
    device = torch.device(options.device)
    generator = torch.Generator(device).manual_seed(0)
    weights = [nn.Parameter(torch.randn(shape, generator=generator, device=device)) for shape in shapes]
    for weight in weights:
        weight.grad = 0.01 * torch.randn(weight.shape, generator=generator, device=device)
    config = optimizers()[name]
    groups = [{"params": weights, "weight_decay": config.weight_decay}]
    recipe = RecipeConfig(batch_size=1, optimizer=config, lr=LearningRateConfig(base=1e-4, per_images=None))
    optimizer = optimizer_over(groups, recipe)
    clock, memory = clock_for(device), PeakMemory(device)
    untimed = [_time_step(optimizer, clock) for _ in range(options.untimed_steps)]
    memory.reset()
    times = [_time_step(optimizer, clock) for _ in range(options.steps)]
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise TrainingError("weights are not finite after a few steps; times of such steps mean little")
    return OptimizerCostRound(
        round=number,
        optimizer=name,
        step_ms=times,
        untimed_ms=untimed,
        compiled_graphs=count_compiled_graphs(),
        peak_memory_bytes=memory.peak_bytes(),
    )


def _time_step(optimizer: torch.optim.Optimizer, clock: Clock) -> float:
    clock.drain()
    start = clock.mark()
    optimizer.step()
    end = clock.mark()
    clock.drain()
    return clock.elapsed_ms(start, end)
