"""What a step costs apart from time: floating-point operations, counted, and memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.method import Batch, Method


def count_step_flops(method: Method, batch_size: int, total_steps: int, steps: Sequence[int] | None = None) -> int:
    """FLOPs (2 x MAC) of one training step, projector included, mean over `steps` (default: 1 to `total_steps`).

    Forward and backward run on a copy on the meta device, where nothing is computed and every attention kernel is
    counted (on a CPU the fused one is not: pytorch/pytorch#195460). Elementwise work and the optimizer are left out,
    as is usual. Where the length of the encoder's input changes, a transformer's count is a quadratic in it: three
    lengths give it, a fourth checks it, and if it is not one every length is counted.
    """
    stand_in = copy.deepcopy(method).to("meta")
    stand_in.train()
    lengths: Counter[int | None] = Counter()
    first_step: dict[int | None, int] = {}
    counted = range(1, total_steps + 1) if steps is None else steps
    for step in counted:
        length = method.num_tokens_at(step, total_steps)
        lengths[length] += 1
        first_step.setdefault(length, step)

    def count(length: int | None) -> int:
        return _step_flops(stand_in, batch_size, first_step[length], total_steps)

    varying = sorted(length for length in lengths if length is not None)
    if len(varying) <= 4 or len(varying) != len(lengths):
        total = float(sum(count(length) * times for length, times in lengths.items()))
    else:
        total = _over_varying_lengths(varying, lengths, count)
    return round(total / len(counted))


def _over_varying_lengths(
    varying: list[int], lengths: Counter[int | None], count: Callable[[int | None], int]
) -> float:
    low, middle, high, check = varying[0], varying[len(varying) // 2], varying[-1], varying[len(varying) // 4]
    samples = {length: count(length) for length in (low, middle, high)}

    def quadratic(x: int) -> float:
        """Lagrange's form through the three samples."""
        value = 0.0
        for a, sample in samples.items():
            term = float(sample)
            for b in samples:
                if b != a:
                    term *= (x - b) / (a - b)
            value += term
        return value

    if abs(quadratic(check) - count(check)) <= 1e-6 * samples[high]:
        return sum(quadratic(length) * lengths[length] for length in varying)
    return float(sum(count(length) * lengths[length] for length in varying))


def _step_flops(method: Method, batch_size: int, step: int, total_steps: int) -> int:
    size = method.data.image_size
    labels = None
    if method.data.num_classes is not None:
        labels = torch.zeros(batch_size, dtype=torch.int64, device="meta")
    batch = Batch(torch.empty(batch_size, 3, size, size, device="meta"), labels)
    with FlopCounterMode(display=False) as counter:
        output = method.training_step(method.prepare(batch), step=step, total_steps=total_steps)
        output.loss.backward()
    method.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class PeakMemory:
    """Peak memory from `reset` on: allocated on a GPU, or the process's resident set on Linux."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset_works = True

    @property
    def kind(self) -> str:
        if self._device.type == "cuda":
            return "allocated on the GPU"
        if self._reset_works:
            return "resident set of the process, Python and libraries included"
        return "not measured: this system cannot reset the peak of the resident set"

    def reset(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._reset_works = False

    def peak_bytes(self) -> int | None:
        """Bytes, None where the peak cannot be told apart from that of earlier work."""
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._reset_works:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
