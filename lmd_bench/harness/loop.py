"""The only training loop. It owns backward, precision, clipping, averaging and timing, the same for every method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lmd_bench.config import RecipeConfig, RunConfig
from lmd_bench.errors import TrainingError
from lmd_bench.harness.optim import WeightAverage, build_optimizer, clip_gradients, lr_at, set_lr
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import Clock, StepTimer, StepTimes, WallCheck
from lmd_bench.method import Batch, Method, StepOutput, inputs_of


class Batches(Protocol):
    """What the loop needs of a data source."""

    def batches(self, batch_size: int, seed: int, start_step: int = 1) -> Generator[Batch, None, None]: ...


@dataclass(frozen=True)
class TrainOptions:
    """How one run is trained. All values are explicit."""

    recipe: RecipeConfig
    steps: int
    lr_warmup_steps: int
    untimed_steps: int
    seed: int
    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    log_every_steps: int = 50
    check_steps: frozenset[int] = frozenset()
    """Steps after which (0: before the first) `on_check` is called, off the clock."""

    @classmethod
    def from_config(cls, config: RunConfig, **changes: Any) -> TrainOptions:
        """The options of a cell; `changes` replace single ones."""
        values: dict[str, Any] = {
            "recipe": config.recipe,
            "steps": config.steps,
            "lr_warmup_steps": config.lr_warmup_steps,
            "untimed_steps": config.untimed_steps,
            "seed": config.seed,
            "device": torch.device(config.device),
            "precision": config.precision,
            "compile": config.compile,
            "log_every_steps": config.log_every_steps,
        }
        return cls(**{**values, **changes})


@dataclass
class TrainResult:
    """What the loop measured."""

    losses: list[float]
    times: list[StepTimes]
    wall: WallCheck
    untimed_s: float
    compile_s: float | None
    compiled_graphs: int | None


MIN_SETTLED_STEPS = 3
"""Untimed steps at the end of a compiled run's warm-up that meet no new shape."""

RowSink = Callable[[Sequence[tuple[object, ...]]], None]
"""Takes finished rows in the order of `records.STEP_COLUMNS`."""


class Trainer:
    """Trains one method once."""

    def __init__(self, method: Method, source: Batches, options: TrainOptions, clock: Clock) -> None:
        """With `options.compile` the method's networks are compiled in place, on their first call."""
        self.method = method
        self.source = source
        self.options = options
        self.clock = clock
        self._optimizer_graphs = 0
        if options.compile:
            compile_method(method, options.steps)
        self.optimizer = self._new_optimizer()
        self.average = self._new_average()
        self._trainable = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._losses = torch.zeros(options.log_every_steps, device=options.device)

    def run(
        self,
        on_rows: RowSink,
        on_check: Callable[[int, float], None],
        on_log: Callable[[int, float, float | None, float], None],
    ) -> TrainResult:
        """Warm up on restored state, then train `steps` steps, all measured.

        `on_rows` gets rows for `steps.csv`; `on_check(step, train_s)` and `on_log(step, loss, mask_ratio,
        steps_per_s)` are called off the clock. Raises TrainingError at a loss that is not finite.
        """
        options = self.options
        untimed_s, compile_s = self._warm_up(on_rows)
        timer = StepTimer(self.clock)
        with closing(self.source.batches(options.recipe.batch_size, options.seed)) as batches:
            upcoming = next(batches)  # data workers start and fetch before the clock does
            timer.start()
            if 0 in options.check_steps:
                with timer.pause("evaluation"):
                    on_check(0, 0.0)
            losses: list[float] = []
            unread: list[StepOutput] = []
            for step in range(1, options.steps + 1):
                output = self._step(step, upcoming if step == 1 else None, batches, timer, len(unread))
                unread.append(output)
                timer.read()
                # Losses are looked at before every check too, so that a diverged run ends here, with step and value
                due = len(unread) == options.log_every_steps or step in options.check_steps
                if due or step == options.steps:
                    with timer.pause("log"):
                        losses.extend(self._write(step, unread, timer.times, on_rows))
                        recent = timer.times[-len(unread) :]
                        rate = len(recent) / max(1e-9, sum(t.period_ms for t in recent) / 1e3)
                        on_log(step, losses[-1], _host(unread[-1].scalars.get("mask_ratio")), rate)
                    unread = []
                if step in options.check_steps:
                    with timer.pause("evaluation"), self.averaged():
                        on_check(step, timer.train_s)
            wall = timer.stop()
        return TrainResult(
            losses, timer.times, wall, untimed_s, compile_s, self._method_graphs() if options.compile else None
        )

    def _new_optimizer(self) -> torch.optim.Optimizer:
        """The recipe's optimizer without state; graphs that it compiles itself are counted apart."""
        if not self.options.compile:
            return build_optimizer(self.method, self.options.recipe)
        before = count_compiled_graphs()
        optimizer = build_optimizer(self.method, self.options.recipe)
        self._optimizer_graphs += count_compiled_graphs() - before
        return optimizer

    def _method_graphs(self) -> int:
        """Graphs compiled of the method, without those of the optimizer."""
        return count_compiled_graphs() - self._optimizer_graphs

    def averaged(self) -> AbstractContextManager[None]:
        """The weights that are evaluated: the moving average where the recipe keeps one."""
        return self.average.applied() if self.average is not None else nullcontext()

    def settle(self) -> None:
        """After the last step: the evaluated weights for good, and no optimizer state in memory any more."""
        if self.average is not None:
            self.average.put_in_place()
            self.average = None
        self.optimizer.state.clear()

    def _step(
        self, step: int, ready: Batch | None, batches: Iterator[Batch], timer: StepTimer, slot: int
    ) -> StepOutput:
        """One optimizer step with its marks. The loss goes into the device buffer at `slot`."""
        options = self.options
        reseed(options.device, options.seed, "step", step)
        batch = ready if ready is not None else next(batches)
        timer.mark()
        inputs = inputs_of(self.method, batch)
        timer.mark()
        with autocast(options.device, options.precision):
            output = self.method.training_step(inputs, step=step, total_steps=options.steps)
        timer.mark()
        output.loss.backward()
        timer.mark()
        if options.recipe.clip_grad_norm is not None:
            clip_gradients(self._trainable, options.recipe.clip_grad_norm)
        set_lr(self.optimizer, self._lr(step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        self._losses[slot] = output.loss.detach()
        timer.end_step()
        return StepOutput(output.loss.detach(), output.scalars)

    def _new_average(self) -> WeightAverage | None:
        """The recipe's moving average, starting at the weights as they are."""
        recipe = self.options.recipe
        if recipe.ema_decay is None:
            return None
        return WeightAverage(self.method, recipe.ema_decay, warmup=recipe.ema_warmup)

    def _lr(self, step: int) -> float:
        return lr_at(self.options.recipe, step, self.options.steps, self.options.lr_warmup_steps)

    def _write(
        self, last_step: int, outputs: list[StepOutput], times: list[StepTimes], on_rows: RowSink
    ) -> list[float]:
        """Fetch the losses of the latest steps, write their rows, and stop at one that is not finite."""
        losses = [float(value) for value in self._losses[: len(outputs)].cpu()]
        first = last_step - len(outputs) + 1
        rows = []
        for offset, (loss, output) in enumerate(zip(losses, outputs, strict=True)):
            rows.append(self._row(first + offset, True, loss, output, times[first + offset - 1]))
            if not math.isfinite(loss):
                on_rows(rows)
                raise TrainingError(f"step {first + offset}: the loss is {loss}; try a lower learning rate or fp32")
        on_rows(rows)
        return losses

    def _row(self, step: int, timed: bool, loss: float, output: StepOutput, times: StepTimes) -> tuple[object, ...]:
        """One line of `steps.csv`. An untimed step is written under the number -k..-1."""
        mask_ratio, tokens = (_host(output.scalars.get(name)) for name in ("mask_ratio", "tokens"))
        lr = self._lr(step) if timed else None
        return (step, int(timed), loss, mask_ratio, tokens, lr, times.period_ms, *times.phases_ms)

    def _warm_up(self, on_rows: RowSink) -> tuple[float, float | None]:
        """Run the untimed steps, then put every weight and the optimizer back as they were.

        The steps are taken from all over the schedule, so that every length of the encoder's input has been seen
        (all of them when compiling). Returns their seconds and, of these, compilation's.
        """
        schedule = untimed_schedule(self.method, self.options)
        if not schedule:
            return 0.0, None
        saved = _trained_state(self.method)
        outputs, times, wall_s = self.time_steps(schedule)
        on_rows(
            [
                self._row(number - len(schedule), False, float(output.loss), output, step_times)
                for number, (output, step_times) in enumerate(zip(outputs, times, strict=True))
            ]
        )
        with torch.no_grad():
            for tensor, value in saved:
                tensor.copy_(value)
        self.optimizer = self._new_optimizer()
        self.average = self._new_average()
        return wall_s, self._compile_seconds(times) if self.options.compile else None

    def _compile_seconds(self, times: list[StepTimes]) -> float:
        """What the untimed steps that met a new shape took beyond those at the end, which met none."""
        if self._method_graphs() == 0:
            raise TrainingError("--compile: torch.compile compiled nothing of this method; run it without")
        settled = statistics.median(step.period_ms for step in times[-MIN_SETTLED_STEPS:])
        return sum(step.period_ms - settled for step in times[:-MIN_SETTLED_STEPS]) / 1e3

    def time_steps(
        self, schedule: Sequence[int], marked: Sequence[bool] | None = None
    ) -> tuple[list[StepOutput], list[StepTimes], float]:
        """Take one optimizer step for each position of the schedule; the weights go on changing.

        `marked` says for which of them the inner marks are on (default: all). Returns outputs, times and the wall
        seconds of the whole.
        """
        timer = StepTimer(self.clock)
        outputs: list[StepOutput] = []
        with closing(self.source.batches(self.options.recipe.batch_size, self.options.seed)) as batches:
            upcoming = next(batches)
            timer.start()
            for count, step in enumerate(schedule):
                timer.inner_marks = marked is None or marked[count]
                outputs.append(self._step(step, upcoming if count == 0 else None, batches, timer, 0))
            wall = timer.stop()
        return outputs, timer.times, wall.wall_s


def untimed_schedule(method: Method, options: TrainOptions) -> list[int]:
    """Which steps of the schedule the untimed steps stand for: spread evenly, first and last included.

    When compiling, the first step of every different token count comes before them, so that no shape is new later,
    and so do first, middle and last step: the loss of a network that always sees all tokens still takes as many as
    the mask ratio hides.
    """
    count = max(options.untimed_steps, MIN_SETTLED_STEPS) if options.compile else options.untimed_steps
    if count == 0:
        return []
    spread = [1 + round(i * (options.steps - 1) / max(1, count - 1)) for i in range(count)]
    if not options.compile:
        return spread
    ends = (1, (1 + options.steps) // 2, options.steps)
    return [*sorted({*first_steps_by_length(method, options.steps).values(), *ends}), *spread]


def first_steps_by_length(method: Method, steps: int) -> dict[int | None, int]:
    """Every length of the encoder's input along the schedule -> the first step that has it."""
    firsts: dict[int | None, int] = {}
    for step in range(1, steps + 1):
        firsts.setdefault(method.num_tokens_at(step, steps), step)
    return firsts


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """bf16 autocast, or nothing for fp32."""
    if precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def filling_precision(method: type[Method], precision: str) -> str:
    """The number format in which a row fills held-out images: rows that come trained in the suite's, trained ones in
    fp32 whatever they were trained in."""
    return "fp32" if method.is_trained else precision


def compile_method(method: Method, steps: int) -> None:
    """Compile the method's own networks in place; shapes that change along the schedule become dynamic.

    The limit on recompilations is lifted to what the schedule can ask for, and meeting it is an error: torch would
    fall back to eager execution without a word, and the run would be timed as something it is not.
    """
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch._dynamo.config.recompile_limit = 8 + 2 * len(first_steps_by_length(method, steps))
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    for module in method.compiled_modules():
        # not module.compile(): that leaves torch's own containers, such as nn.Sequential, uncompiled without a word
        module.forward = torch.compile(module.forward)


def count_compiled_graphs() -> int:
    """Graphs compiled since `compile_method`, the optimizer's included."""
    import torch._dynamo

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def _trained_state(method: Method) -> list[tuple[Tensor, Tensor]]:
    """Everything training changes, each with a copy: trainable parameters and all buffers, no frozen projector."""
    trained = [parameter.detach() for parameter in method.parameters() if parameter.requires_grad]
    return [(tensor, tensor.clone()) for tensor in (*trained, *method.buffers())]


def _host(value: Tensor | float | None) -> float | None:
    return None if value is None else float(value)
