"""What measuring itself costs."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch

from lmd_bench.harness.timer import NUM_INNER_MARKS, StepTimer, clock_for
from lmd_bench.records import StepWriter


def measure_instrument(device: torch.device, log_every_steps: int, num_steps: int = 2000) -> float:
    """Microseconds that marks, the loss buffer and the rows cost in one step, timed without any training.

    Rows are written (and synced to disk) as often as in a run, to a file of their own.
    """
    clock = clock_for(device)
    buffer = torch.zeros(log_every_steps, device=device)
    loss = torch.tensor(1.0, device=device)
    timer = StepTimer(clock)
    with tempfile.TemporaryDirectory() as folder:
        writer = StepWriter(Path(folder) / "steps.csv")
        clock.drain()
        begin = clock.host_s()
        timer.start()
        for step in range(1, num_steps + 1):
            for _ in range(NUM_INNER_MARKS):
                timer.mark()
            slot = step % log_every_steps
            buffer[slot] = loss
            timer.end_step()
            timer.read()
            if slot == 0:
                with timer.pause("log"):
                    recent = timer.times[-log_every_steps:]
                    writer.append((step, 1, 1.0, None, None, None, t.period_ms, *t.phases_ms) for t in recent)
        timer.stop()
        seconds = clock.host_s() - begin
        writer.close()
    return seconds / num_steps * 1e6
