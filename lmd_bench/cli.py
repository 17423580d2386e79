"""The command line: the only file that prints, parses or exits. Heavy imports wait until a command needs them."""

from __future__ import annotations

import inspect
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from lmd_bench.errors import BenchError, ConfigError

if TYPE_CHECKING:
    from lmd_bench.config import Suite
    from lmd_bench.harness.plan import Cell, Plan

DEFAULT_OUT = Path("reports/local")
MIN_IMAGE_PX, MAX_IMAGE_PX = 16, 4096
"""Of `lsp inspect`."""

app = typer.Typer(
    name="lmd-bench",
    help="Measure, side by side, what it costs to train models that reconstruct images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
lsp_app = typer.Typer(help="Latent space projectors: train, inspect, import, encode with one.", no_args_is_help=True)
app.add_typer(lsp_app, name="lsp")

SuiteOption = Annotated[str, typer.Option("--suite", help="A shipped suite by name, or a path ending in .yaml.")]
MethodsOption = Annotated[
    str | None, typer.Option("--methods", help="Rows of the suite, separated by commas. Default: all that are built.")
]
DataOption = Annotated[Path | None, typer.Option("--data", help="Folder of images to train on.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32 or bf16.")]
CompileOption = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where records and reports go.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: dotted.key=value; * matches. Repeatable.")
]
AddOption = Annotated[
    list[str] | None, typer.Option("--add", help="A method of your own: file.py:ClassName. Repeatable.")
]


def main() -> None:
    """Entry point: runs a command, turns a user's errors into one line each and the exit code 2."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp's threads spin at barriers without end: beside another busy process steps take 20 times as long.
        # Sleeping at once (passive) makes steps of many small operations twice as slow on an idle machine. A short
        # spin costs neither.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is like Ctrl-C: clean, and told
    try:
        app()
    except BenchError as error:
        for line in str(error).splitlines():
            _errors().print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        _errors().print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        _errors().print("interrupted", markup=False)
        sys.exit(130)


def _errors() -> Console:
    return Console(stderr=True)


def _console() -> Console:
    console = Console()
    if not console.is_terminal:
        console.width = 160  # a pipe or file has no width of its own; rich would take 80 and fold the tables
    return console


def _say(text: str = "") -> None:
    _console().print(text, markup=False, highlight=False, soft_wrap=True)


def _command() -> str:
    """This command as one would type it again."""
    return shlex.join(["lmd-bench", *sys.argv[1:]])


# -- run --------------------------------------------------------------------------------------------------------------


@app.command()
def run(
    suite: SuiteOption = "demo",
    methods: MethodsOption = None,
    seeds: Annotated[str | None, typer.Option("--seeds", help="Seeds, separated by commas.")] = None,
    steps: Annotated[int | None, typer.Option("--steps", help="Training steps of every row.")] = None,
    data: DataOption = None,
    device: DeviceOption = "auto",
    precision: PrecisionOption = None,
    compile: CompileOption = None,
    out: OutOption = DEFAULT_OUT,
    settings: SetOption = None,
    add: AddOption = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and estimate time and disk.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run cells again that are finished.")] = False,
    save_weights: Annotated[
        bool,
        typer.Option("--save-weights/--no-save-weights", help="Keep every cell's trained weights, for `reconstruct`."),
    ] = True,
) -> None:
    """Train and measure every row of a suite, then write its tables and figures."""
    plan, _ = _plan(
        suite,
        methods,
        _overrides(seeds=seeds, steps=steps, data=data, precision=precision, compile=compile),
        settings,
        add,
        device,
        out,
        force,
        save_weights=save_weights,
    )
    _show_plan(plan)
    if dry_run:
        _show_estimate(plan)
        return
    failed = _run_cells(plan, force)
    _report(plan.out / plan.suite.name, plan.suite)
    if failed:
        names = ", ".join(failed)
        _errors().print(
            f"{len(failed)} of {len(plan.cells)} cells failed: {names}. The reasons stand above and in their "
            "record.json; once they are put right, the same command runs these cells again",
            style="red",
            markup=False,
            soft_wrap=True,
        )
        sys.exit(1)


def _overrides(
    *, seeds: str | None, steps: int | None, data: Path | None, precision: str | None, compile: bool | None
) -> dict[str, Any]:
    """Values that options of their own lay on the suite's."""
    values: dict[str, Any] = {}
    if seeds is not None:
        try:
            values["seeds"] = [int(part) for part in seeds.split(",") if part.strip()]
        except ValueError as error:
            raise ConfigError(f"--seeds {seeds}: whole numbers separated by commas, such as 0,1,2") from error
    if steps is not None:
        values["steps"], values["epochs"] = steps, None
    if data is not None:
        values["data"] = {"name": "folder", "path": str(data), "num_train": None}
    if precision is not None:
        values["precision"] = precision
    if compile is not None:
        values["compile"] = compile
    return values


def _plan(
    suite_name: str,
    methods: str | None,
    overrides: dict[str, Any],
    settings: list[str] | None,
    add: list[str] | None,
    device: str,
    out: Path,
    force: bool,
    save_weights: bool = False,
    reads_data: bool = True,
) -> tuple[Plan, dict[str, str]]:
    """From words to a plan; every problem is a BenchError."""
    from lmd_bench.suite_files import apply_settings, merge, parse_suite, read_suite_values

    values = merge(read_suite_values(suite_name), overrides)
    parse_suite(values, f"suite {suite_name}")
    from lmd_bench.harness.plan import add_rows, make_plan, method_options, select_rows

    added = add_rows(values, add or [])
    suite = parse_suite(values, f"suite {suite_name}")
    rows = select_rows(suite, methods)
    if settings:
        options = method_options(suite, added, rows)
        suite = parse_suite(apply_settings(values, settings, options), f"suite {suite_name} with --set")
    plan = make_plan(
        suite,
        rows,
        device=device,
        out=out,
        added=added,
        force=force,
        reads_data=reads_data,
        save_weights=save_weights,
    )
    return plan, added


def _show_plan(plan: Plan) -> None:
    suite = plan.suite
    everything = [*plan.cells, *plan.finished]
    first = everything[0].config
    _say(f"{suite.title}: {len(plan.cells)} cells to run, {len(plan.finished)} finished before, on {first.device}")
    for cell in everything[: len({c.config.row for c in everything})]:
        config = cell.config
        state = "finished" if cell in plan.finished else f"{config.steps} steps"
        projector = config.options.get("projector", {})
        latent = f", projector {projector.get('path') or projector['kind']}" if projector else ""
        latent += ", cached latents" if projector and projector.get("cache") else ""
        _say(f"  {config.row}: batch {config.recipe.batch_size} at {config.image_size} px, {state}{latent}")
    for name, reason in plan.planned.items():
        _say(f"  {name}: not measured: {reason}")
    rows = dict.fromkeys(cell.config.row for cell in everything)
    for note in dict.fromkeys([*(suite.methods[row].note for row in rows), *plan.notes]):
        if note:
            _say(f"  note: {note}")


def _show_estimate(plan: Plan) -> None:
    """Time a few steps of every row and say what the whole would take."""
    from lmd_bench.harness.estimate import estimate_row

    total = 0.0
    pending: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        pending.setdefault(cell.config.row, []).append(cell)
    for row, cells in pending.items():
        try:
            estimate = estimate_row(cells[0], len(cells))
        except Exception as error:  # an estimate only: a row that cannot be timed is said so, the others go on
            _say(f"  {row}: could not be timed: {type(error).__name__}: {error}")
            continue
        total += estimate.total_s
        _say(f"  {row}: {estimate.text}")
    _say(f"about {_duration(total)} and {plan.disk_bytes / 2**20:.1f} MiB on disk; nothing was written")


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _run_cells(plan: Plan, force: bool) -> list[str]:
    """Run what is left to run; names of the cells that failed."""

    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.execute import DataShelf, execute, recount
    from lmd_bench.progress import watcher_for
    from lmd_bench.suite_files import save_suite

    save_suite(plan.out / plan.suite.name, plan.suite)
    changed = [cell.config.row for cell in plan.finished if recount(cell)]
    if changed:
        _say(f"decreases counted anew, from the steps on disk: {', '.join(changed)}")
    if not plan.cells:
        return []
    console = _console()
    machine = {**environment(plan.cells[0].config.device), "host_memory": keep_freed_memory()}
    watcher = watcher_for(console, len(plan.cells))
    shelf = DataShelf(plan)
    failed = []
    done = 0
    try:
        for cell in plan.cells:
            record = execute(cell, shelf, command=_command(), environment=machine, watcher=watcher)
            done += 1
            if record.status == "failed":
                failed.append(f"{record.row} seed {record.seed}")
    except KeyboardInterrupt:
        watcher.close()
        console.print(
            f"\nstopped. Finished cells are kept in {plan.out / plan.suite.name}; go on with:\n"
            f"  {_go_on(plan, done) if force else _command()}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(130)
    finally:
        shelf.close()
    return failed


def _go_on(plan: Plan, done: int) -> str:
    """After an interrupted `--force`: the same command for the rows that are left, so that none keeps an old record."""
    rows = ",".join(dict.fromkeys(cell.config.row for cell in plan.cells[done:]))
    words = sys.argv[1:]
    if "--methods" in words:
        at = words.index("--methods")
        words = [*words[:at], *words[at + 2 :]]
    return shlex.join(["lmd-bench", *[word for word in words if not word.startswith("--methods=")], "--methods", rows])


def _report(folder: Path, suite: Suite) -> None:
    from lmd_bench.report.build import build_report, terminal_tables

    report = build_report(folder, suite, command=_command())
    console = _console()
    for title, columns, rows in terminal_tables(report):
        table = Table(title=title, title_justify="left", show_lines=False)
        for column in columns:
            table.add_column(column, overflow="fold")
        for row in rows:
            table.add_row(*row)
        console.print(table, markup=False)
    for problem in report.problems:
        _say(f"note: {problem}")
    _say(f"report: {report.page}")


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="OUT/<suite>, or an OUT with several suites.")]) -> None:
    """Make tables, figures and the page again from records on disk. Needs no torch."""
    from lmd_bench.suite_files import find_suites

    for place, suite in find_suites(folder):
        _report(place, suite)


# -- list, show, doctor -----------------------------------------------------------------------------------------------


@app.command("list")
def list_command() -> None:
    """Suites, methods, datasets and metrics there are."""
    from lmd_bench.registry import installed_methods
    from lmd_bench.suite_files import load_suite, shipped_suites
    from lmd_bench.texts import DATASETS, METRICS

    _say("suites (lmd-bench run --suite NAME)")
    for name in shipped_suites():
        suite = load_suite(name)
        built = [row for row, values in suite.methods.items() if values.planned is None]
        _say(f"  {name:12} {suite.title}: {', '.join(built)}")
        for row, values in suite.methods.items():
            if values.planned is not None:
                _say(f"  {'':12} {row}: {values.planned}")
    for title, entries in (
        ("methods (a row of a suite is one of them with options)", installed_methods()),
        ("datasets", DATASETS),
        ("metrics", METRICS),
    ):
        _say(title)
        for name, text in entries.items():
            _say(f"  {name:12} {text}")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A suite (name or .yaml path) or an installed method.")],
) -> None:
    """A suite with every value resolved, or a method's options and their defaults."""
    import yaml

    from lmd_bench.config import near
    from lmd_bench.registry import installed_methods, load_method
    from lmd_bench.suite_files import load_suite, shipped_suites

    if name in shipped_suites() or name.endswith((".yaml", ".yml")):
        _say(yaml.safe_dump(load_suite(name).model_dump(mode="json"), sort_keys=False, width=110).rstrip())
        return
    if name not in installed_methods():
        raise ConfigError(f"no suite or method {name!r}{near(name, [*shipped_suites(), *installed_methods()])}")
    method = load_method(name, {})
    _say(f"{name}: {installed_methods()[name]}")
    _say((method.__doc__ or "").strip())
    _say("options:")
    from lmd_bench.texts import describe_options

    for line in describe_options(method.Config):
        _say(f"  {line}")


@app.command()
def doctor() -> None:
    """This machine, versions, GPU, and which weights are there."""
    import torch

    from lmd_bench.harness.environment import environment, machine_name
    from lmd_bench.texts import shipped_weights

    facts = environment("cuda:0" if torch.cuda.is_available() else "cpu")
    _say(f"machine: {machine_name(facts)}")
    for key, value in facts.items():
        if isinstance(value, dict):
            _say(key)
            for inner, text in value.items():
                _say(f"  {inner}: {text}")
        else:
            _say(f"{key}: {value}")
    _say("weights")
    for name, state in shipped_weights().items():
        _say(f"  {name}: {state}")


# -- profile ----------------------------------------------------------------------------------------------------------


@app.command()
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
) -> None:
    """Speed runs: what one step costs, in interleaved rounds and fresh processes, with a calibrator beside."""
    values = _overrides(seeds=None, steps=None, data=None, precision=precision, compile=compile)
    values["data"] = {"name": "scenes", "path": None, "num_train": 4096}  # speed runs read no data
    plan, added = _plan(suite, methods, values, settings, add, device, out, force=True, reads_data=False)
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.profile import SpeedOptions
    from lmd_bench.harness.profile import profile as run_profile
    from lmd_bench.records import CALIBRATOR, ProfileRecord, ProfileRound, write_json
    from lmd_bench.suite_files import save_suite

    options = SpeedOptions(rounds, steps, untimed, batch, keep_memory, progress)
    host_memory = keep_freed_memory() if keep_memory else "the system's default"
    device_name = plan.cells[0].config.device

    def on_round(measured: ProfileRound) -> None:
        median = sorted(measured.period_ms)[len(measured.period_ms) // 2]
        name = "calibrator" if measured.row == CALIBRATOR else measured.row
        _say(f"  round {measured.round + 1}/{rounds}  {name}: {median:.1f} ms/step")

    folder = plan.out / plan.suite.name
    tag = f"{'own-batch' if batch is None else f'b{batch}'}-{plan.suite.precision}"
    tag += ("-compiled" if plan.suite.compile else "") + ("" if progress is None else f"-at{progress:g}")
    tag += "" if keep_memory else "-default-memory"
    path = _unused(folder, f"profile-{tag}")

    def save(measured: ProfileRecord) -> None:
        write_json(path, measured)

    record = run_profile(
        plan,
        options,
        added,
        command=_command(),
        environment={**environment(device_name), "host_memory": host_memory},
        on_round=on_round,
        save=save,
    )
    save_suite(folder, plan.suite, keep=True)
    _report(folder, plan.suite)
    for name, reason in record.not_measured.items():
        _errors().print(f"{name}: not measured: {reason}", markup=False, soft_wrap=True)
    if record.not_measured:
        sys.exit(1)


@app.command()
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
) -> None:
    """What a reconstructed and a sampled image cost: seconds, function evaluations and memory, with random weights."""
    try:
        sizes = tuple(dict.fromkeys(int(part) for part in batch.split(",") if part.strip()))
    except ValueError as error:
        raise ConfigError(f"--batch {batch}: whole numbers separated by commas, such as 1,64") from error
    if not sizes or min(sizes) < 1:
        raise ConfigError(f"--batch {batch}: at least one number, and none below 1")
    values = _overrides(seeds=None, steps=None, data=None, precision=precision, compile=None)
    values["data"] = {"name": "scenes", "path": None, "num_train": 4096}  # inputs are noise
    plan, added = _plan(suite, methods, values, settings, add, device, out, force=True, reads_data=False)
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.harness.inference import InferenceOptions, measure_inference, unmeasured
    from lmd_bench.records import InferenceRecord, InferenceRound, write_json
    from lmd_bench.suite_files import save_suite

    def on_round(measured: InferenceRound) -> None:
        seconds = sum(measured.calls_ms) / len(measured.calls_ms) / 1e3 / measured.batch_size
        place = f"round {measured.round + 1}/{rounds}  {measured.row}, batch {measured.batch_size}"
        _say(f"  {place}, {measured.task}: {seconds:.4g} s/image")

    folder = plan.out / plan.suite.name
    path = _unused(folder, f"inference-{plan.suite.precision}")

    def save(measured: InferenceRecord) -> None:
        write_json(path, measured)

    record = measure_inference(
        plan,
        InferenceOptions(sizes, rounds, calls, untimed),
        added,
        command=_command(),
        environment={**environment(plan.cells[0].config.device), "host_memory": keep_freed_memory()},
        on_round=on_round,
        save=save,
    )
    save_suite(folder, plan.suite, keep=True)
    _report(folder, plan.suite)
    missed = unmeasured(record, [cell.config.row for cell in plan.cells])
    for text in missed:
        _errors().print(text, markup=False, soft_wrap=True)
    if missed:
        sys.exit(1)


@app.command("profile-optimizers")
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
        _say(f"  round {measured.round + 1}/{rounds}  {measured.optimizer}: {median:.2f} ms/step")

    name = resolve_device(device)
    path = _unused(out, f"optimizer-cost-{model}-fp32-{name.partition(':')[0]}")

    def save(measured: OptimizerCostRecord) -> None:
        machine, commit = machine_text(measured.environment), commit_text(measured.environment)
        origin = [f"Machine: {machine}", f"Commit: {commit}", f"Command: {measured.command}"]
        write_json(path, measured)
        text = to_markdown(optimizer_cost_table(measured), origin)
        path.with_suffix(".md").write_text(text, encoding="utf-8")

    record = compare_optimizers(
        OptimizerCostOptions(model, rounds, steps, untimed, name),
        command=_command(),
        environment={**environment(name), "host_memory": keep_freed_memory()},
        on_round=on_round,
        save=save,
    )
    _say(f"written: {path}, {path.with_suffix('.md')}")
    for left_out, reason in record.not_measured.items():
        _errors().print(f"{left_out}: not measured: {reason}", markup=False, soft_wrap=True)
    if record.not_measured:
        sys.exit(1)


def _unused(folder: Path, stem: str) -> Path:
    """`stem.json`, or with a number behind it where earlier speed runs have taken the name."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


# -- reconstruct ------------------------------------------------------------------------------------------------------


@app.command()
def reconstruct(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="A finished cell, OUT/<suite>/<row>/seed-<n>, or a weights file.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(help="Image files or folders. Default: the first held-out images of the run."),
    ] = None,
    mask_ratio: Annotated[
        float | None, typer.Option("--mask-ratio", help="Share of the image hidden at random. Default: as in the run.")
    ] = None,
    mask_image: Annotated[
        Path | None, typer.Option("--mask-image", help="A picture of the mask: white is hidden.")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option("--levels", help="Unveil in so many predictions: 1 is one shot, `all` the whole mask schedule."),
    ] = None,
    order: Annotated[
        str | None,
        typer.Option("--order", help="What --levels unveil first: random or confidence. Default: as in the run."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of masks and orders; each image makes its own of it.")] = 0,
    figure6: Annotated[
        bool, typer.Option("--figure6", help="Draw masks along the schedule for five images, for the report too.")
    ] = False,
    out: Annotated[Path | None, typer.Option("--out", help="Default: `reconstructions` beside the weights.")] = None,
    device: DeviceOption = "auto",
    add: AddOption = None,
    method: Annotated[
        str | None, typer.Option("--method", help="The checkpoint is its authors': load it as this method.")
    ] = None,
    projector: Annotated[
        str | None, typer.Option("--projector", help="Of an authors' checkpoint: a folder or shipped:NAME.")
    ] = None,
    normalized_targets: Annotated[
        bool | None,
        typer.Option("--normalized-targets/--plain-targets", help="What an authors' checkpoint was trained on."),
    ] = None,
    encoder_heads: Annotated[
        int | None,
        typer.Option("--encoder-heads", min=1, help="Of an authors' checkpoint. Default: as published for its width."),
    ] = None,
    decoder_heads: Annotated[
        int | None, typer.Option("--decoder-heads", min=1, help="The same for the decoder.")
    ] = None,
) -> None:
    """Fill hidden parts of images with a trained method: original, masked and reconstructed beside each other."""
    if mask_ratio is not None and mask_image is not None:
        raise ConfigError("--mask-ratio and --mask-image: give one of them")
    wanted_levels = _levels(levels)
    if method is None and any(
        given is not None for given in (projector, normalized_targets, encoder_heads, decoder_heads)
    ):
        raise ConfigError(
            "--projector, --normalized-targets, --plain-targets, --encoder-heads and --decoder-heads belong to --method"
        )
    import torch

    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.reconstruct import checkpoint as opening
    from lmd_bench.reconstruct.figure6 import FIGURE6_FILES, FIGURE6_IMAGES
    from lmd_bench.reconstruct.fill import TABLE_FILE, Request
    from lmd_bench.reconstruct.fill import reconstruct as fill
    from lmd_bench.reconstruct.pictures import held_out_pictures, read_pictures
    from lmd_bench.records import RECONSTRUCTIONS
    from lmd_bench.registry import check_added, method_name

    place = torch.device(resolve_device(device))
    for target in add or []:
        check_added(target)
    if method is None:
        opened = opening.open_run(checkpoint, place, {method_name(target): target for target in add or []})
    else:
        opened = opening.open_official(
            checkpoint,
            method,
            place,
            projector=projector,
            normalized_targets=normalized_targets,
            encoder_heads=encoder_heads,
            decoder_heads=decoder_heads,
        )
        _say(f"{checkpoint}: {opened.shape_text}")
    pictures = read_pictures(images, opened.image_size) if images else held_out_pictures(opened, FIGURE6_IMAGES)
    folder = out or opened.path.parent / RECONSTRUCTIONS
    rows = fill(opened, pictures, Request(mask_ratio, mask_image, wanted_levels, order, seed, figure6), folder)
    for name in FIGURE6_FILES if figure6 else ():
        _say(f"written: {folder / name}")
    for row in rows:
        _say(f"  {row.picture}: {row.text}")
    _say(f"written: {len(rows)} pictures (original | masked | reconstructed) and {TABLE_FILE} in {folder}")


@app.command()
def sample(
    checkpoint: Annotated[
        Path, typer.Option("--checkpoint", help="A finished cell, OUT/<suite>/<row>/seed-<n>, or a weights file.")
    ],
    images: Annotated[int, typer.Option("--images", min=1, help="How many to make.")] = 16,
    levels: Annotated[
        str | None,
        typer.Option("--levels", help="Unveil in so many predictions, or `all` the schedule. Default: as in the run."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Image i depends on this and on i alone.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Default: `samples` beside the weights.")] = None,
    device: DeviceOption = "auto",
    add: AddOption = None,
) -> None:
    """Make images from nothing with a trained method that generates: one PNG each, and a grid of all."""
    wanted_levels = _levels(levels)
    import torch

    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.reconstruct.checkpoint import open_cell
    from lmd_bench.reconstruct.sample import SAMPLES, SampleRequest, note_on_samples, sample_images
    from lmd_bench.registry import check_added, method_name

    place = torch.device(resolve_device(device))
    for target in add or []:
        check_added(target)
    opened = open_cell(checkpoint, place, {method_name(target): target for target in add or []})
    written = sample_images(opened, SampleRequest(images, wanted_levels, seed), out or opened.path.parent / SAMPLES)
    if note := note_on_samples(opened.method):
        _say(note)
    _say(f"written: {images} image{'s' if images > 1 else ''} and {written[-1].name} in {written[-1].parent}")


def _levels(text: str | None) -> int | None:
    """`--levels`: None is the method's default, 0 stands for all."""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--levels {text}: a whole number from 1 on, or all")
    return int(text)


# -- making what is shipped -------------------------------------------------------------------------------------------


@app.command()
def coverage(
    out: Annotated[Path, typer.Option("--out", help="Folder for coverage.md and coverage.csv.")] = Path("reports"),
    runs: Annotated[int, typer.Option("--runs", min=10, help="Simulated runs per case.")] = 1000,
) -> None:
    """Check by simulation that the intervals of a single run hold what they promise."""
    from lmd_bench.metrics.simulate import coverage_study, write_coverage

    write_coverage(list(coverage_study(num_runs=runs)), out, _command())
    _say(f"written: {out / 'coverage.md'}, {out / 'coverage.csv'}")


@lsp_app.command("encode")
def lsp_encode(
    projector: Annotated[str, typer.Option("--projector", help="A projector's folder, or shipped:NAME.")],
    data: Annotated[str, typer.Option("--data", help="Folder of training images, or scenes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; `projector.cache` of a row names it.")],
    views: Annotated[int, typer.Option("--views", help="Augmented views of every image.")] = 4,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="px. Default: 64 for scenes, 224 for a folder.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", help="Training images. Default: 4096 scenes, all of a folder.")
    ] = None,
    num_held_out: Annotated[
        int, typer.Option("--num-held-out", help="Images kept away from training (data.num_held_out).")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Which scenes, which held-out images (data.seed).")] = 0,
    view_seed: Annotated[
        int, typer.Option("--view-seed", help="View v is what a run of this seed sees in its epoch v.")
    ] = 0,
    crop: Annotated[str, typer.Option("--crop", help="auto, none or random_resized, as in recipes.")] = "auto",
    crop_scale: Annotated[tuple[float, float], typer.Option("--crop-scale", help="Share of the area.")] = (0.2, 1.0),
    crop_ratio: Annotated[tuple[float, float], typer.Option("--crop-ratio", help="Width over height.")] = (0.75, 4 / 3),
    interpolation: Annotated[str, typer.Option("--interpolation", help="bicubic or bilinear.")] = "bicubic",
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror one in two.")] = True,
    scale: Annotated[float, typer.Option("--scale", help="Factor on the latents (projector.scale).")] = 1.0,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16, of the encoder.")] = "fp32",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16, on disk.")] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images encoded at once.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Encode training images once, so that rows with `projector.cache: DIR` read latents instead of projecting."""
    from lmd_bench.harness.encode import EncodeOptions, encode_data
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.progress import encoded_line

    folder = None if data == "scenes" else data
    options = EncodeOptions.parse(
        {
            "projector": projector,
            "scale": scale,
            "precision": precision,
            "data": {
                "name": "scenes" if folder is None else "folder",
                "path": folder,
                "image_size": image_size if image_size is not None else (64 if folder is None else 224),
                "num_train": num_images if num_images is not None else (4096 if folder is None else None),
                "num_held_out": num_held_out,
                "seed": seed,
            },
            "augmentation": {
                "crop": crop,
                "scale": crop_scale,
                "ratio": crop_ratio,
                "interpolation": interpolation,
                "flip": flip,
            },
            "views": views,
            "view_seed": view_seed,
            "dtype": dtype,
            "batch_size": batch_size,
        },
        "lsp encode",
    )
    meta = encode_data(
        options,
        out,
        device=resolve_device(device),
        command=_command(),
        on_progress=lambda *figures: _say(encoded_line(*figures)),
        log=_say,
    )
    _say(
        f"{out}: {meta.views} x {meta.shape[1]} images as latents {'x'.join(map(str, meta.shape[2:]))} {meta.dtype}, "
        f"{meta.num_bytes / 2**20:.1f} MiB, in {_duration(meta.seconds)}; use it with "
        f"--set methods.ROW.options.projector.cache={out}"
    )


# -- latent space projectors ------------------------------------------------------------------------------------------


def _lsp_train(
    out: Annotated[Path, typer.Option("--out", help="Folder to write, readable by diffusers.")],
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a projector that lies in --out.")] = False,
    **values: Any,
) -> None:
    """Train a latent space projector (VQGAN, KL or light) and write it as a diffusers folder.

    The same command goes on where an interrupted one stopped.
    """
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.projector.train_config import parse_options

    options = parse_options(values)
    device_name = resolve_device(device)
    from lmd_bench.projector.train import STATE_FILE, train_lsp

    try:
        train_lsp(out, options, device=device_name, force=force, log=_say)
    except KeyboardInterrupt:
        kept = "The last saved state is kept" if (out / STATE_FILE).exists() else "No state was saved yet"
        _say(f"\nstopped. {kept} in {out}; go on with:\n  {_command()}")
        sys.exit(130)


@lsp_app.command("import")
def lsp_import(
    checkpoint: Annotated[Path, typer.Argument(help="Of taming-transformers or latent-diffusion (.ckpt, ...).")],
    out: Annotated[Path, typer.Argument(help="Folder to write, readable by diffusers; must not exist yet.")],
) -> None:
    """Turn a CompVis checkpoint (VQGAN, KL or VQ first stage, or a whole latent diffusion model) into a projector."""
    from lmd_bench.projector.compvis import import_checkpoint

    report = import_checkpoint(checkpoint, out)
    _say(
        f"{out}: {report.num_parameters:,} parameters, factor {report.factor}, {report.latent_channels} latent "
        f"channels, from {len(report.used)} keys; use it as projector {{kind: {report.kind}, path: {out}}}"
    )
    if report.scaling_factor != 1.0:
        _say(
            f"scale_factor of the checkpoint: {report.scaling_factor:.6g}; projector.scale={report.scaling_factor:.6g} "
            "gives latents of unit scale, as its diffusion model sees them (LMD's authors use 1)"
        )
    if report.left_out:
        groups = ", ".join(f"{name} ({count})" for name, count in report.left_out_groups.items())
        _say(f"left out, not part of the projector: {len(report.left_out)} keys: {groups}")


@lsp_app.command("inspect")
def lsp_inspect(
    projectors: Annotated[list[str], typer.Argument(help="Folders of projectors, or shipped:NAME.")],
    data: Annotated[str, typer.Option("--data", help="Folder of images, or scenes.")] = "scenes",
    images: Annotated[int, typer.Option("--images", min=1, help="Held-out images to measure on.")] = 256,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="px. Default: 64 for scenes, 224 for a folder.")
    ] = None,
    data_seed: Annotated[
        int, typer.Option("--data-seed", min=0, help="Which scenes, which held-out images (data.seed of runs).")
    ] = 0,
    shown: Annotated[int, typer.Option("--shown", min=1, help="Images in figure 7.")] = 4,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16, of the projectors.")] = "fp32",
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for the table and figure 7.")] = DEFAULT_OUT / "projectors",
) -> None:
    """Measure projectors: cost, quality, codebook use and leak, with figure 7 (image, latent, reconstruction)."""
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.projector.config import check_projector, config_of_path

    size = image_size if image_size is not None else (64 if data == "scenes" else 224)
    if not MIN_IMAGE_PX <= size <= MAX_IMAGE_PX:
        raise ConfigError(f"--image-size {size}: must be from {MIN_IMAGE_PX} to {MAX_IMAGE_PX} px")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision {precision}: must be fp32 or bf16")
    configs = [config_of_path(path, precision) for path in projectors]
    for config in configs:
        check_projector(config, size)
    device_name = resolve_device(device)
    import torch

    from lmd_bench.harness.environment import environment, machine_name
    from lmd_bench.projector.inspect import inspect_projector, open_inspect_data, require_held_out
    from lmd_bench.projector.inspect_report import make_table, require_writable, write_inspections

    found = open_inspect_data(None if data == "scenes" else data, images, size, torch.device(device_name), data_seed)
    if found.index is not None and (warning := found.index.warning()) is not None:
        _say(warning)
    require_held_out(configs, found)
    require_writable(out)
    inspections = [inspect_projector(config, found, num_samples=shown) for config in configs]
    provenance = [_command(), machine_name(environment(device_name))]
    written = write_inspections(out, inspections, found.described, provenance)
    table = make_table(inspections, found.described)
    console = _console()
    turned = Table("", *(row[0].text for row in table.rows), title=table.title, title_justify="left")
    for place, column in enumerate(table.columns[1:], 1):
        head = f"{column.group}: {column.head}" if column.group else column.head
        turned.add_row(head, *(row[place].text for row in table.rows))
    console.print(turned, markup=False)
    for note in table.notes:
        _say(note)
    _say(f"written: {', '.join(path.name for path in written)} in {out}")


def _with_train_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with one option for every field of LSPTrainOptions, so that each default and text stands once."""
    from lmd_bench.projector.train_config import command_line_options

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "values"]
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(help=text)]
        )
        for name, kind, default, text in command_line_options()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + options
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


lsp_train = lsp_app.command("train")(_with_train_options(_lsp_train))
