"""The command line: the only file that prints, parses or exits. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import shlex
import signal
import sys
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

app = typer.Typer(
    name="lmd-bench",
    help="Measure, side by side, what it costs to train models that reconstruct images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
projector_app = typer.Typer(help="Train the small latent projector that ships with the package.", no_args_is_help=True)
app.add_typer(projector_app, name="projector")

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
    return make_plan(suite, rows, device=device, out=out, added=added, force=force), added


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
    plan, added = _plan(suite, methods, values, settings, add, device, out, force=True)
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


def _unused(folder: Path, stem: str) -> Path:
    """`stem.json`, or with a number behind it where earlier speed runs have taken the name."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path


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


@projector_app.callback()
def _projector() -> None:
    """Keeps `train` a subcommand of its own while it is the only one."""


@projector_app.command("train")
def projector_train(
    out: Annotated[Path, typer.Option("--out", help="Folder to write, readable by diffusers.")],
    seed: Annotated[int, typer.Option(help="Seed of scenes, weights and batches.")] = 0,
    steps: Annotated[int, typer.Option()] = 9000,
    batch_size: Annotated[int, typer.Option()] = 16,
    image_size: Annotated[int, typer.Option(help="px")] = 64,
    crop_size: Annotated[int, typer.Option(help="px; side of the random crops trained on")] = 32,
    num_images: Annotated[int, typer.Option(help="Training scenes, made once.")] = 8192,
    num_held_out: Annotated[int, typer.Option()] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 4e-3,
    lr_warmup_steps: Annotated[int, typer.Option()] = 100,
    block_out_channels: Annotated[str, typer.Option(help="One number per resolution.")] = "32,32,32,32",
    layers_per_block: Annotated[int, typer.Option()] = 0,
    latent_channels: Annotated[int, typer.Option()] = 4,
    norm_num_groups: Annotated[int, typer.Option()] = 8,
    l1_weight: Annotated[float, typer.Option()] = 0.1,
    l2_weight: Annotated[float, typer.Option()] = 1.0,
    kl_weight: Annotated[float, typer.Option(help="Per nat of a latent number.")] = 1e-5,
    device: DeviceOption = "auto",
) -> None:
    """Train a KL autoencoder (f = 8) on scenes and write it as a diffusers folder."""
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.projector.train import KLTrainOptions, train_kl

    try:
        channels = tuple(int(part) for part in block_out_channels.split(","))
    except ValueError as error:
        raise ConfigError(f"--block-out-channels {block_out_channels}: whole numbers separated by commas") from error
    options = KLTrainOptions(
        seed=seed,
        steps=steps,
        batch_size=batch_size,
        image_size=image_size,
        crop_size=crop_size,
        num_images=num_images,
        num_held_out=num_held_out,
        lr=lr,
        lr_warmup_steps=lr_warmup_steps,
        block_out_channels=channels,
        layers_per_block=layers_per_block,
        latent_channels=latent_channels,
        norm_num_groups=norm_num_groups,
        l1_weight=l1_weight,
        l2_weight=l2_weight,
        kl_weight=kl_weight,
    )
    train_kl(out, options, device=resolve_device(device), log=_say)
