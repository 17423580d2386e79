"""All timing arithmetic, exactly, on a clock that the test moves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmd_bench.harness.timer import NUM_INNER_MARKS, Clock, CpuClock, CudaClock, StepTimer, clock_for
from lmd_bench.records import PHASES


class FakeClock(Clock):
    """Host and device time move only when told; the device may lag behind what was asked of it."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.device_ms: float | None = None
        self.released: list[float] = []
        self.drains = 0

    def mark(self) -> float:
        return self.now_ms

    def ready(self, mark: float) -> bool:
        return self.device_ms is None or mark <= self.device_ms

    def elapsed_ms(self, start: float, end: float) -> float:
        return end - start

    def drain(self) -> None:
        self.drains += 1
        if self.device_ms is not None:
            self.device_ms = self.now_ms

    def host_s(self) -> float:
        return self.now_ms / 1e3

    def release(self, mark: float) -> None:
        self.released.append(mark)


def take_step(timer: StepTimer, clock: FakeClock, *durations_ms: float) -> None:
    """One step whose phases last as given."""
    for duration in durations_ms[:-1]:
        clock.now_ms += duration
        timer.mark()
    clock.now_ms += durations_ms[-1]
    timer.end_step()


def test_phases_add_up_to_the_period_and_nothing_falls_between_two_steps() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()
    take_step(timer, clock, 1, 2, 4, 8, 16)
    clock.now_ms += 100  # whatever happens after a boundary belongs to the next step
    take_step(timer, clock, 1, 2, 4, 8, 16)
    wall = timer.stop()
    assert [step.period_ms for step in timer.times] == [31, 131]
    assert timer.times[0].phases_ms == (1, 2, 4, 8, 16)
    assert timer.times[1].phases_ms == (101, 2, 4, 8, 16)
    assert wall.train_s == pytest.approx(0.162)
    assert wall.residual_share == pytest.approx(0)
    assert wall.valid


def test_pauses_stop_the_clock_and_are_accounted_by_purpose() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()
    take_step(timer, clock, 1, 1, 1, 1, 1)
    with timer.pause("evaluation"):
        clock.now_ms += 1000
    take_step(timer, clock, 2, 2, 2, 2, 2)
    with timer.pause("log"):
        clock.now_ms += 10
    with timer.pause("evaluation"):
        clock.now_ms += 500
    wall = timer.stop()
    assert [step.period_ms for step in timer.times] == [5, 10]
    assert wall.pauses_s == pytest.approx({"evaluation": 1.5, "log": 0.01})
    assert wall.wall_s == pytest.approx(1.525)
    assert wall.valid


def test_a_pause_that_raises_is_still_accounted_for() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()

    def fail() -> None:
        with timer.pause("evaluation"):
            clock.now_ms += 1000
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    take_step(timer, clock, 1, 1, 1, 1, 1)
    assert timer.stop().residual_share == pytest.approx(0)


def test_time_that_is_nobodys_makes_the_run_invalid() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()
    take_step(timer, clock, 20, 20, 20, 20, 20)
    clock.now_ms += 0.6  # after the last boundary, before the end
    wall = timer.stop()
    assert wall.residual_share == pytest.approx(0.6 / 100.6)
    assert not wall.valid


def test_reading_never_waits_and_keeps_the_order() -> None:
    clock = FakeClock()
    clock.device_ms = 0.0
    timer = StepTimer(clock)
    timer.start()
    for _ in range(3):
        take_step(timer, clock, 1, 1, 1, 1, 1)
    timer.read()
    assert timer.times == []
    clock.device_ms = 11.0  # the device has passed two boundaries and is inside the third step
    timer.read()
    assert [step.period_ms for step in timer.times] == [5, 5]
    assert clock.drains == 1, "reading drained the device"
    timer.stop()
    assert len(timer.times) == 3


def test_every_mark_is_given_back_once_and_only_after_it_was_read() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()
    for _ in range(4):
        take_step(timer, clock, 1, 1, 1, 1, 1)
    timer.read()
    assert clock.released == [float(t) for t in range(20)], "the newest boundary is still needed"


def test_inner_marks_can_be_off_for_single_steps() -> None:
    clock = FakeClock()
    timer = StepTimer(clock)
    timer.start()
    take_step(timer, clock, 1, 1, 1, 1, 1)
    timer.inner_marks = False
    take_step(timer, clock, 1, 1, 1, 1, 1)
    timer.stop()
    assert [len(step.phases_ms) for step in timer.times] == [len(PHASES), 0]
    assert [step.period_ms for step in timer.times] == [5, 5]


def test_a_mark_for_every_phase_but_the_last() -> None:
    assert len(PHASES) - 1 == NUM_INNER_MARKS


def test_the_cpu_clock_runs_and_the_account_of_real_work_adds_up() -> None:
    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, CpuClock)
    timer = StepTimer(clock)
    work = torch.rand(200, 200)
    timer.start()
    for _ in range(30):
        for _ in range(NUM_INNER_MARKS):
            work = (work @ work).softmax(0)
            timer.mark()
        timer.end_step()
    with timer.pause("log"):
        work = (work @ work).softmax(0)
    wall = timer.stop()
    assert len(timer.times) == 30
    assert all(sum(s.phases_ms) == pytest.approx(s.period_ms) for s in timer.times)
    assert wall.valid


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_events_agree_with_wall_time_and_the_timed_steps_never_make_the_host_wait() -> None:
    device = torch.device("cuda")
    clock = CudaClock(device)
    timer = StepTimer(clock)
    work: Any = torch.rand(4096, 4096, device=device)
    for _ in range(5):
        work = (work @ work).softmax(0)
    timer.start()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(100):
            for _ in range(NUM_INNER_MARKS):
                work = (work @ work).softmax(0)
                timer.mark()
            timer.end_step()
            timer.read()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wall = timer.stop()
    assert len(timer.times) == 100
    assert wall.residual_share <= 0.005
