"""What steps and images cost, without training: `profile`, `inference` and `profile-optimizers`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer

from lmd_bench.cli.options import (
    DEFAULT_OUT,
    AddOption,
    CompileOption,
    DeviceOption,
    MethodsOption,
    OutOption,
    PrecisionOption,
    SetOption,
    SpeedWeightsOption,
    SuiteOption,
)
from lmd_bench.cli.planning import plan_without_data, unused_path
from lmd_bench.cli.terminal import command_line, complain, report_on, say
from lmd_bench.errors import ConfigError

if TYPE_CHECKING:
    from lmd_bench.config import Suite
    from lmd_bench.harness.profile import SpeedOptions


def profile(
    suite: SuiteOption = "demo",
    methods: MethodsOption = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Batch of every row; default: its own.")] = None,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps per row and round.")] = 7,
    untimed: Annotated[int, typer.Option("--untimed", min=0, help="Untimed steps first, per process.")] = 2,
    progress: Annotated[
        float | None,
        typer.Option("--progress", min=0, max=1, help="Point of the mask schedule; default: the mean over all of it."),
    ] = None,
    keep_memory: Annotated[
        bool,
        typer.Option("--keep-memory/--no-keep-memory", help="Keep freed host memory, as runs do, or the default."),
    ] = True,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    compile: CompileOption = None,
    out: OutOption = DEFAULT_OUT,
    settings: SetOption = None,
    add: AddOption = None,
    weights: SpeedWeightsOption = None,
) -> None:
    """Speed runs: what one step costs, in interleaved rounds and fresh processes, with a calibrator beside."""
    plan, added = plan_without_data(
        suite, methods, settings, add, device, out, precision=precision, compile=compile, weights=weights
    )
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.profile import SpeedOptions
    from lmd_bench.harness.profile import profile as run_profile
    from lmd_bench.records import CALIBRATOR, ProfileRecord, ProfileRound, write_json
    from lmd_bench.suite_files import save_suite

    untrained = dict.fromkeys(cell.config.row for cell in plan.cells if not cell.method.is_trained)
    for row in untrained if any(cell.method.is_trained for cell in plan.cells) else ():
        say(f"  {row}: comes trained: there is no training step to time")
    options = SpeedOptions(rounds, steps, untimed, batch, keep_memory, progress)
    host_memory = keep_freed_memory() if keep_memory else "the system's default"
    device_name = plan.cells[0].config.device

    def on_round(measured: ProfileRound) -> None:
        median = sorted(measured.period_ms)[len(measured.period_ms) // 2]
        name = "calibrator" if measured.row == CALIBRATOR else measured.row
        say(f"  round {measured.round + 1}/{rounds}  {name}: {median:.1f} ms/step")

    folder = plan.out / plan.suite.name
    path = unused_path(folder, _profile_name(plan.suite, options))

    def save(measured: ProfileRecord) -> None:
        write_json(path, measured)

    record = run_profile(
        plan,
        options,
        added,
        command=command_line(),
        environment={**environment(device_name), "host_memory": host_memory},
        on_round=on_round,
        save=save,
    )
    save_suite(folder, plan.suite, keep=True)
    report_on(folder, plan.suite)
    _end([f"{name}: not measured: {reason}" for name, reason in record.not_measured.items()])


def inference(
    suite: SuiteOption = "demo",
    methods: MethodsOption = None,
    batch: Annotated[str, typer.Option("--batch", help="Batch sizes, separated by commas.")] = "1,64",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 5,
    calls: Annotated[int, typer.Option("--calls", min=1, help="Timed calls per task, row and round.")] = 3,
    untimed: Annotated[int, typer.Option("--untimed", min=1, help="Untimed calls first, per process.")] = 1,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    out: OutOption = DEFAULT_OUT,
    settings: SetOption = None,
    add: AddOption = None,
    weights: SpeedWeightsOption = None,
) -> None:
    """What a reconstructed and a sampled image cost: seconds, function evaluations and memory.

    Weights are random, as times do not depend on them; rows that come trained are timed with their published ones.
    """
    sizes = _batch_sizes(batch)
    plan, added = plan_without_data(suite, methods, settings, add, device, out, precision=precision, weights=weights)
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.inference import InferenceOptions, measure_inference, unmeasured
    from lmd_bench.records import InferenceRecord, InferenceRound, write_json
    from lmd_bench.suite_files import save_suite

    def on_round(measured: InferenceRound) -> None:
        seconds = sum(measured.calls_ms) / len(measured.calls_ms) / 1e3 / measured.batch_size
        place = f"round {measured.round + 1}/{rounds}  {measured.row}, batch {measured.batch_size}"
        say(f"  {place}, {measured.task}: {seconds:.4g} s/image")

    folder = plan.out / plan.suite.name
    path = unused_path(folder, f"inference-{plan.suite.precision}")

    def save(measured: InferenceRecord) -> None:
        write_json(path, measured)

    record = measure_inference(
        plan,
        InferenceOptions(sizes, rounds, calls, untimed),
        added,
        command=command_line(),
        environment={**environment(plan.cells[0].config.device), "host_memory": keep_freed_memory()},
        on_round=on_round,
        save=save,
    )
    save_suite(folder, plan.suite, keep=True)
    report_on(folder, plan.suite)
    _end(unmeasured(record, [cell.config.row for cell in plan.cells]))


def profile_optimizers(
    model: Annotated[
        str, typer.Option("--model", help="Whose tensors: latent-vit-b4 (110.8 M) or pixel-vit-b16 (111.7 M).")
    ] = "latent-vit-b4",
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Interleaved rounds.")] = 5,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Timed steps per optimizer and round.")] = 5,
    untimed: Annotated[int, typer.Option("--untimed", min=1, help="Untimed steps first, per process.")] = 2,
    device: DeviceOption = "auto",
    out: OutOption = DEFAULT_OUT,
) -> None:
    """What AdamW's and Adan's steps cost by themselves, in every implementation, over the tensors of one model."""
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.optimizer_cost import OptimizerCostOptions, compare_optimizers
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.records import OptimizerCostRecord, OptimizerCostRound, write_json
    from lmd_bench.report.cells import to_markdown
    from lmd_bench.report.optimizer_cost import optimizer_cost_table
    from lmd_bench.report.origin import commit_text, machine_text

    def on_round(measured: OptimizerCostRound) -> None:
        median = sorted(measured.step_ms)[len(measured.step_ms) // 2]
        say(f"  round {measured.round + 1}/{rounds}  {measured.optimizer}: {median:.2f} ms/step")

    name = resolve_device(device)
    path = unused_path(out, f"optimizer-cost-{model}-fp32-{name.partition(':')[0]}")

    def save(measured: OptimizerCostRecord) -> None:
        machine, commit = machine_text(measured.environment), commit_text(measured.environment)
        origin = [f"Machine: {machine}", f"Commit: {commit}", f"Command: {measured.command}"]
        write_json(path, measured)
        text = to_markdown(optimizer_cost_table(measured), origin)
        path.with_suffix(".md").write_text(text, encoding="utf-8")

    record = compare_optimizers(
        OptimizerCostOptions(model, rounds, steps, untimed, name),
        command=command_line(),
        environment={**environment(name), "host_memory": keep_freed_memory()},
        on_round=on_round,
        save=save,
    )
    say(f"written: {path}, {path.with_suffix('.md')}")
    _end([f"{left_out}: not measured: {reason}" for left_out, reason in record.not_measured.items()])


def _batch_sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(f"--batch {text}: whole numbers separated by commas, such as 1,64") from error
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--batch {text}: at least one number, and none below 1")
    return sizes


def _profile_name(suite: Suite, options: SpeedOptions) -> str:
    """A speed run's file without its ending: what tells it from others of the suite."""
    name = f"profile-{'own-batch' if options.batch_size is None else f'b{options.batch_size}'}-{suite.precision}"
    name += ("-compiled" if suite.compile else "") + ("" if options.progress is None else f"-at{options.progress:g}")
    return name + ("" if options.keep_memory else "-default-memory")


def _end(missed: list[str]) -> None:
    """Say what could not be measured, if anything, and end with the code 1."""
    for text in missed:
        complain(text)
    if missed:
        sys.exit(1)
