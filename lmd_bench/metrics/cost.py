"""What a step costs apart from time: floating-point operations, counted, and memory."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.method import Batch, Method, inputs_of


def count_step_flops(method: Method, batch: Batch, total_steps: int, steps: Sequence[int] | None = None) -> int:
    """FLOPs (2 x MAC) of one training step, projector included, mean over `steps` (default: 1 to `total_steps`).

    Of `batch` only shapes count. Where it brings latents from a cache, the step projects nothing and neither does this.

    Forward and backward run on a copy on the meta device, where nothing is computed and every attention kernel is
    counted (on a CPU the fused one is not: pytorch/pytorch#195460). Elementwise work and the optimizer are left out,
    as is usual. Where the length of the encoder's input changes, a transformer's count is a quadratic in it: three
    lengths give it, a fourth checks it, and if it is not one every length is counted.
    """
    stand_in = copy.deepcopy(method).to("meta")
    stand_in.train()
    shapes = Batch(
        batch.images.to("meta"),
        None if batch.labels is None else batch.labels.to("meta"),
        {name: tensor.to("meta") for name, tensor in batch.extra.items()},
        None if batch.prepared is None else batch.prepared.to("meta"),
    )
    lengths: Counter[int | None] = Counter()
    first_step: dict[int | None, int] = {}
    counted = range(1, total_steps + 1) if steps is None else steps
    for step in counted:
        length = method.num_tokens_at(step, total_steps)
        lengths[length] += 1
        first_step.setdefault(length, step)

    def count(length: int | None) -> int:
        return _step_flops(stand_in, shapes, first_step[length], total_steps)

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


def _step_flops(method: Method, batch: Batch, step: int, total_steps: int) -> int:
    with FlopCounterMode(display=False) as counter:
        output = method.training_step(inputs_of(method, batch), step=step, total_steps=total_steps)
        output.loss.backward()
    method.zero_grad(set_to_none=True)
    return int(counter.get_total_flops())


class PeakMemory:
    """Peak memory from `reset` on: allocated on a GPU, or the process's resident set on Linux.

    On a CPU memory that earlier work of the process has not given back counts too; a speed run's fresh processes are
    free of it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset_works = True
        self._earlier_peak = 0

    @property
    def kind(self) -> str:
        if self._device.type == "cuda":
            return "allocated on the GPU"
        if self._reset_works:
            return "resident set of the process, Python and libraries included"
        return "not measured: this system cannot reset the peak of the resident set"

    def reset(self) -> None:
        """Forget every peak so far."""
        self._earlier_peak = 0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self._reset_works = False

    @contextmanager
    def left_out(self) -> Iterator[None]:
        """What the block needs (an evaluation) does not count."""
        self._earlier_peak = self.peak_bytes() or 0
        try:
            yield
        finally:
            earlier = self._earlier_peak
            self.reset()
            self._earlier_peak = earlier

    def peak_bytes(self) -> int | None:
        """Bytes, None where the peak cannot be told apart from that of earlier work."""
        peak = self._peak_since_reset()
        return None if peak is None else max(peak, self._earlier_peak)

    def _peak_since_reset(self) -> int | None:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        if not self._reset_works:
            return None
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
        return None
