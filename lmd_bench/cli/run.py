"""Training a suite, and making its report again: `run` and `report`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmd_bench.cli.options import (
    DEFAULT_OUT,
    AddOption,
    CompileOption,
    DataOption,
    DeviceOption,
    MethodsOption,
    OfflineOption,
    OutOption,
    PrecisionOption,
    SetOption,
    SuiteOption,
    WeightsOption,
)
from lmd_bench.cli.planning import open_weights, overrides, plan_suite, say_left_out
from lmd_bench.cli.terminal import command_line, complain, duration, new_console, report_on, say

if TYPE_CHECKING:
    from lmd_bench.harness.plan import Cell, Plan


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
    weights: WeightsOption = None,
    offline: OfflineOption = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and estimate time and disk.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Run cells again that are finished.")] = False,
    save_weights: Annotated[
        bool,
        typer.Option("--save-weights/--no-save-weights", help="Keep every cell's trained weights, for `reconstruct`."),
    ] = True,
) -> None:
    """Train and measure every row of a suite, then write its tables and figures."""
    plan, _ = plan_suite(
        suite,
        methods,
        overrides(seeds=seeds, steps=steps, data=data, precision=precision, compile=compile),
        settings,
        add,
        device,
        out,
        force,
        save_weights=save_weights,
        weights=open_weights(weights, offline),
        dry_run=dry_run,
    )
    _show_plan(plan)
    if dry_run:
        _show_estimate(plan)
        return
    failed = _run_cells(plan, force)
    report_on(plan.out / plan.suite.name, plan.suite)
    if failed:
        names = ", ".join(failed)
        complain(
            f"{len(failed)} of {len(plan.cells)} cells failed: {names}. The reasons stand above and in their "
            "record.json; once they are put right, the same command runs these cells again",
            red=True,
        )
        sys.exit(1)


def _show_plan(plan: Plan) -> None:
    suite = plan.suite
    everything = [*plan.cells, *plan.finished]
    device = f", on {everything[0].config.device}" if everything else ""
    say(f"{suite.title}: {len(plan.cells)} cells to run, {len(plan.finished)} finished before{device}")
    for cell in everything[: len({c.config.row for c in everything})]:
        config = cell.config
        if not cell.method.is_trained:
            done = ", finished" if cell in plan.finished else ""
            say(f"  {config.row}: comes trained, at {config.image_size} px{done}")
            continue
        state = "finished" if cell in plan.finished else f"{config.steps} steps"
        projector = config.options.get("projector", {})
        latent = f", projector {projector.get('path') or projector['kind']}" if projector else ""
        latent += ", cached latents" if projector and projector.get("cache") else ""
        say(f"  {config.row}: batch {config.recipe.batch_size} at {config.image_size} px, {state}{latent}")
    say_left_out(plan)
    rows = dict.fromkeys(cell.config.row for cell in everything)
    for note in dict.fromkeys([*(suite.methods[row].note for row in rows), *plan.notes]):
        if note:
            say(f"  note: {note}")


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
            say(f"  {row}: could not be timed: {type(error).__name__}: {error}")
            continue
        total += estimate.total_s
        say(f"  {row}: {estimate.text}")
    say(f"about {duration(total)} and {plan.disk_bytes / 2**20:.1f} MiB on disk; nothing was written")


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
        say(f"decreases counted anew, from the steps on disk: {', '.join(changed)}")
    if not plan.cells:
        return []
    console = new_console()
    machine = {**environment(plan.cells[0].config.device), "host_memory": keep_freed_memory()}
    watcher = watcher_for(console, len(plan.cells))
    shelf = DataShelf(plan)
    failed = []
    done = 0
    try:
        for cell in plan.cells:
            record = execute(cell, shelf, command=command_line(), environment=machine, watcher=watcher)
            done += 1
            if record.status == "failed":
                failed.append(f"{record.row} seed {record.seed}")
    except KeyboardInterrupt:
        watcher.close()
        console.print(
            f"\nstopped. Finished cells are kept in {plan.out / plan.suite.name}; go on with:\n"
            f"  {_go_on(plan, done) if force else command_line()}",
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


def report(folder: Annotated[Path, typer.Argument(help="OUT/<suite>, or an OUT with several suites.")]) -> None:
    """Make tables, figures and the page again from records on disk. Needs no torch."""
    from lmd_bench.suite_files import find_suites

    for place, suite in find_suites(folder):
        report_on(place, suite)
