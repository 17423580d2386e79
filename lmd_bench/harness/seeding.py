"""Randomness as a function of (seed, purpose, step), so that a repeated or resumed run is the same run."""

from __future__ import annotations

import torch

from lmd_bench.seeding import derive_seed


def reseed(device: torch.device, seed: int, purpose: str, step: int = 0) -> None:
    """Reseed torch's global generators of the CPU and of `device`.

    The generators are seeded directly: `torch.manual_seed` formats a stack trace on every call while CUDA is not
    initialised, which costs more than everything else the harness does in a step.
    """
    value = derive_seed(purpose, seed, step)
    torch.default_generator.manual_seed(value)
    if device.type == "cuda":
        index = device.index if device.index is not None else torch.cuda.current_device()
        torch.cuda.default_generators[index].manual_seed(value)
