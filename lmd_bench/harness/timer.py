"""The only clock behind a reported figure: boundary marks between steps, inner marks between phases.

Step i lasts from boundary i-1 to boundary i, so nothing falls between two steps. On a GPU the marks are CUDA events
on the compute stream, taken from a reused pool and read late, so that the host never waits for them; on a CPU they
are `time.perf_counter_ns`. Work that is not training (evaluation, writing) happens inside `pause`, which drains the
device first and keeps its own account.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from lmd_bench.records import PHASES

if TYPE_CHECKING:
    import torch

WALL_TOLERANCE = 0.005
"""Largest share of the wall time that steps and pauses together may miss in a valid run."""


class Clock(ABC):
    """Source of marks. One is chosen per run; arithmetic on marks goes through it."""

    @abstractmethod
    def mark(self) -> Any:
        """The present moment on the device's timeline."""

    @abstractmethod
    def ready(self, mark: Any) -> bool:
        """Whether the device has passed the mark. Never waits."""

    @abstractmethod
    def elapsed_ms(self, start: Any, end: Any) -> float:
        """Milliseconds between two marks that are both ready."""

    @abstractmethod
    def drain(self) -> None:
        """Wait until the device has done everything asked of it."""

    @abstractmethod
    def host_s(self) -> float:
        """Seconds on the host's own monotonic clock."""

    def release(self, mark: Any) -> None:
        """Give a mark back for reuse."""
        return


class CpuClock(Clock):
    """`time.perf_counter_ns`: on a CPU the host and the device are one."""

    def mark(self) -> int:
        return time.perf_counter_ns()

    def ready(self, mark: int) -> bool:
        return True

    def elapsed_ms(self, start: int, end: int) -> float:
        return (end - start) / 1e6

    def drain(self) -> None:
        return

    def host_s(self) -> float:
        return time.perf_counter()


class CudaClock(Clock):
    """CUDA events on the current stream of a device, from a pool that grows only when the reader lags behind."""

    def __init__(self, device: torch.device) -> None:
        import torch

        self._torch = torch
        self._device = device
        self._pool: deque[Any] = deque()

    def mark(self) -> Any:
        event = self._pool.popleft() if self._pool else self._torch.cuda.Event(enable_timing=True)
        event.record(self._torch.cuda.current_stream(self._device))
        return event

    def ready(self, mark: Any) -> bool:
        return bool(mark.query())

    def elapsed_ms(self, start: Any, end: Any) -> float:
        return float(start.elapsed_time(end))

    def drain(self) -> None:
        self._torch.cuda.synchronize(self._device)

    def host_s(self) -> float:
        return time.perf_counter()

    def release(self, mark: Any) -> None:
        self._pool.append(mark)


def clock_for(device: torch.device) -> Clock:
    """CUDA events on a CUDA device, the host's counter elsewhere."""
    return CudaClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class StepTimes:
    """One step's period and its phases in the order of `records.PHASES`, milliseconds. They add up to the period."""

    period_ms: float
    phases_ms: tuple[float, ...]
    """Empty where inner marks were off."""


@dataclass(frozen=True)
class WallCheck:
    """Does the account add up?"""

    train_s: float
    pauses_s: dict[str, float]
    wall_s: float

    @property
    def residual_share(self) -> float:
        """|wall - train - pauses| / wall."""
        missing = self.wall_s - self.train_s - sum(self.pauses_s.values())
        return abs(missing) / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def valid(self) -> bool:
        return self.residual_share <= WALL_TOLERANCE


class StepTimer:
    """Times consecutive steps.

        timer.start()
        for ...:
            ...; timer.mark()      # once after each phase but the last
            ...; timer.end_step()  # the boundary ends the last phase and the step
        timer.stop()

    `times` holds what has been read so far; `read` collects what the device has passed meanwhile.
    """

    def __init__(self, clock: Clock, *, inner_marks: bool = True) -> None:
        self.clock = clock
        self.times: list[StepTimes] = []
        self.pauses_s: dict[str, float] = {}
        self.inner_marks = inner_marks
        """Whether `mark` does anything; may change between steps."""
        self._pending: deque[list[Any]] = deque()  # a step's marks without the boundary it began with
        self._open: list[Any] = []
        self._read_boundary: Any = None  # of the oldest step not yet read
        self._wall_start = self._wall_end = 0.0

    def start(self) -> None:
        """Begin: drain the device and set the first boundary."""
        self.clock.drain()
        self._wall_start = self.clock.host_s()
        self._set_boundary()

    def mark(self) -> None:
        """End one phase of the running step."""
        if self.inner_marks:
            self._open.append(self.clock.mark())

    def end_step(self) -> None:
        """End the step's last phase and the step."""
        self._open.append(self.clock.mark())
        self._pending.append(self._open)
        self._open = []

    def read(self) -> None:
        """Collect the steps that the device has finished, oldest first. Never waits."""
        while self._pending and self.clock.ready(self._pending[0][-1]):
            marks = [self._read_boundary, *self._pending.popleft()]
            spans = tuple(self.clock.elapsed_ms(start, end) for start, end in pairwise(marks))
            self.times.append(StepTimes(self.clock.elapsed_ms(marks[0], marks[-1]), spans if len(spans) > 1 else ()))
            for mark in marks[:-1]:
                self.clock.release(mark)
            self._read_boundary = marks[-1]

    @contextmanager
    def pause(self, purpose: str) -> Iterator[None]:
        """Stop the training clock: drain, read every step so far, and account for the block under `purpose`."""
        self.clock.drain()
        begin = self.clock.host_s()
        self.read()
        try:
            yield
        finally:
            self.clock.drain()
            self.clock.release(self._read_boundary)
            self.pauses_s[purpose] = self.pauses_s.get(purpose, 0.0) + self.clock.host_s() - begin
            self._set_boundary()

    def stop(self) -> WallCheck:
        """End: drain, read everything, and check the account against the host's clock."""
        self.clock.drain()
        self._wall_end = self.clock.host_s()
        self.read()
        return WallCheck(self.train_s, dict(self.pauses_s), self._wall_end - self._wall_start)

    @property
    def train_s(self) -> float:
        """Sum of the periods read so far, seconds."""
        return sum(step.period_ms for step in self.times) / 1e3

    def _set_boundary(self) -> None:
        self._read_boundary = self.clock.mark()


NUM_INNER_MARKS = len(PHASES) - 1
"""`mark` calls in a step: the boundary ends the last phase."""
