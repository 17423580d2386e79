"""Recipes turned into optimizers, learning rates and moving averages: the same code for every method."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lmd_bench.config import OptimizerConfig, RecipeConfig
from lmd_bench.errors import ConfigError
from lmd_bench.harness.adan import CompiledAdan, compile_obstacle
from lmd_bench.method import Method


def build_optimizer(method: Method, recipe: RecipeConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over the method's own parameter groups. The learning rate is set anew at every step."""
    optimizer = optimizer_over(method.param_groups(recipe.optimizer.weight_decay), recipe)
    if isinstance(optimizer, CompiledAdan):
        optimizer.compile_kernels()  # here, off the clock: a run may be without untimed steps
    return optimizer


def optimizer_over(groups: list[dict[str, Any]], recipe: RecipeConfig) -> torch.optim.Optimizer:
    """The recipe's optimizer over groups that are given. Raises ConfigError where it cannot work on their device."""
    config = recipe.optimizer
    if config.name == "adan":
        return _build_adan(config, groups, peak_lr(recipe))
    options: dict[str, Any] = {}
    if config.implementation != "default":
        options = {"foreach": config.implementation == "foreach", "fused": config.implementation == "fused"}
    kind = torch.optim.AdamW if config.name == "adamw" else torch.optim.Adam
    return kind(groups, lr=peak_lr(recipe), betas=(config.betas[0], config.betas[1]), eps=config.eps, **options)


def _build_adan(config: OptimizerConfig, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    """timm's Adan, or ours where the recipe asks for one compiled kernel."""
    if config.implementation == "compiled":
        for kind in sorted({parameter.device.type for group in groups for parameter in group["params"]}):
            check_optimizer(config, kind)
        return CompiledAdan(groups, lr=lr, betas=_three(config), eps=config.eps)
    from timm.optim.adan import Adan

    adan: torch.optim.Optimizer = Adan(
        groups, lr=lr, betas=_three(config), eps=config.eps, foreach=_adan_foreach(config, groups)
    )
    return adan


def check_optimizer(config: OptimizerConfig, device: str) -> None:
    """Raise ConfigError where an optimizer cannot work on a device ("cpu", "cuda:0"). Builds nothing."""
    if config.implementation != "compiled":
        return
    kind = device.partition(":")[0]
    if (obstacle := compile_obstacle(kind)) is not None:
        instead = "foreach" if kind == "cuda" else "loop"
        raise ConfigError(
            f"optimizer.implementation: compiled cannot be used on {kind}: {obstacle}; put that right, "
            f"or choose {instead}"
        )


def _three(config: OptimizerConfig) -> tuple[float, float, float]:
    first, second, third = config.betas
    return first, second, third


def _adan_foreach(config: OptimizerConfig, groups: list[dict[str, Any]]) -> bool:
    """On a CPU Adan's loop is faster than its foreach form (0.3 against 0.5 s at 111 M parameters); on a GPU slower."""
    if config.implementation == "default":
        return all(parameter.is_cuda for group in groups for parameter in group["params"])
    return config.implementation == "foreach"


def peak_lr(recipe: RecipeConfig) -> float:
    """The learning rate after warm-up: base x batch / per_images."""
    return recipe.lr.base * _batch_scale(recipe)


def _batch_scale(recipe: RecipeConfig) -> float:
    return 1.0 if recipe.lr.per_images is None else recipe.batch_size / recipe.lr.per_images


def lr_at(recipe: RecipeConfig, step: int, total_steps: int, warmup_steps: int) -> float:
    """Learning rate of a step (1 to total_steps): linear warm-up, then the recipe's schedule.

    The first step has the rate at which the warm-up starts, exactly 0 in MAE's schedule, which is evaluated before
    each step.
    """
    lr, peak, done = recipe.lr, peak_lr(recipe), step - 1
    bound_scale = _batch_scale(recipe) if lr.scale_bounds else 1.0
    if done < warmup_steps:
        start = lr.warmup_start * bound_scale
        return start + (peak - start) * done / warmup_steps
    if lr.schedule == "constant":
        return peak
    begin = warmup_steps if lr.warmup_prefix else 0
    since, length = done - begin, max(1, total_steps - begin)
    if lr.schedule == "multistep":
        return peak * lr.gamma ** bisect_right([round(share * length) for share in lr.milestones], since)
    minimum = lr.minimum * bound_scale
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * since / length))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the rate of every group, times the group's own `lr_scale` (layer decay)."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


class WeightAverage:
    """Exponential moving average of the trainable weights, from the first step, without bias correction (DDPM).

    With `warmup` its n-th update, from 1, decays by min(decay, (1 + n) / (10 + n)), as latent diffusion's does.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False) -> None:
        self._decay = decay
        self._warmup = warmup
        self._updates = 0
        self._weights = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self._average = [weight.detach().clone() for weight in self._weights]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now; once after every step of the optimizer."""
        self._updates += 1
        ramp = (1 + self._updates) / (10 + self._updates) if self._warmup else 1.0
        torch._foreach_lerp_(self._average, [w.detach() for w in self._weights], 1 - min(self._decay, ramp))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the averaged weights inside the block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def put_in_place(self) -> None:
        """The module holds the averaged weights from now on; those that were trained are gone."""
        torch._foreach_copy_([weight.detach() for weight in self._weights], self._average)

    @torch.no_grad()
    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._average, strict=True):
            kept = weight.detach().clone()
            weight.copy_(average)
            average.copy_(kept)


def clip_gradients(parameters: list[Tensor], largest_norm: float) -> None:
    """Scale gradients so that their global norm is at most `largest_norm`; the host does not wait."""
    torch.nn.utils.clip_grad_norm_(parameters, largest_norm)
