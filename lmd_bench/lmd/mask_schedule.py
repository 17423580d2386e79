"""The masking diffusion scheduler: how the mask ratio grows over training (paper sec. 3.2.3, fig. 5). No torch.

Every schedule is a function of t = 0 ... T - 1, T the number of training steps; the harness counts its steps from 1,
so t = step - 1. Where the authors' code differs from the paper in the piecewise form (its second ramp lacks the
"- T/3" and climbs past 1), the paper is followed.
"""

from __future__ import annotations

import math
from typing import Literal

MaskScheduleName = Literal["uniform", "piecewise", "cosine", "constant"]

_COSINE_OFFSET = 0.008  # s of Nichol and Dhariwal 2021, eq. 17


def mask_ratio(
    schedule: MaskScheduleName, step: int, total_steps: int, *, start: float, mid: float, end: float
) -> float:
    """Mask ratio of step 1 ... `total_steps` under a schedule from `start` to `end`.

    `mid` is the plateau of `piecewise` and unused elsewhere; `constant` is `end` throughout. Raises ValueError for a
    step outside 1 ... `total_steps`.
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"step must be in 1..{total_steps}, got {step}")
    t = step - 1
    if schedule == "uniform":
        return start + (end - start) * t / total_steps
    if schedule == "piecewise":
        return piecewise_ratio(t, total_steps, start, mid, end)
    if schedule == "cosine":
        return cosine_ratio(t, total_steps, start, end)
    return end


def piecewise_ratio(t: float, total_steps: int, start: float, mid: float, end: float) -> float:
    """Ramp to `mid` over T/6, hold it to T/3, ramp to `end` over the next T/3, hold that to T (LMD-PS)."""
    sixth = total_steps / 6
    if t < sixth:
        return start + (mid - start) * t / sixth
    if t < 2 * sixth:
        return mid
    if t < 4 * sixth:
        return mid + (end - mid) * (t - 2 * sixth) / (2 * sixth)
    return end


def cosine_ratio(t: float, total_steps: int, start: float, end: float) -> float:
    """iDDPM's cosine curve turned over, up to 2T/3, then `end` (LMD-CS; the authors' engine_pretrain)."""
    rise_steps = int(2 * total_steps / 3)
    if rise_steps == 0 or t > 2 * total_steps / 3:
        return start if t == 0 else end

    def curve(u: float) -> float:
        return math.cos((u + _COSINE_OFFSET) / (1 + _COSINE_OFFSET) * math.pi / 2) ** 2

    return min(end, start + (end - start) * (1 - curve(t / rise_steps) / curve(0.0)))


def num_kept(num_tokens: int, ratio: float) -> int:
    """Visible tokens at a mask ratio: int(L * (1 - r)) as in the authors' code.

    At least one token stays visible and one hidden, or there would be nothing to encode or to predict.
    """
    return max(1, min(num_tokens - 1, int(num_tokens * (1 - ratio))))


def mask_levels(num_tokens: int, start: float, end: float) -> range:
    """The numbers of visible tokens that a schedule walks through, from most to fewest.

    One less than its length is the number of transitions, the paper's "diffusion steps": 29 for 49 tokens from 0.15
    to 0.75 (Table 3), 38 for 64, 117 for 196, 9 for 16.
    """
    return range(num_kept(num_tokens, start), num_kept(num_tokens, end) - 1, -1)
