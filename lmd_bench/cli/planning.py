"""From the words of a command to a plan; every problem is a BenchError."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmd_bench.cli.terminal import say
from lmd_bench.errors import ConfigError

if TYPE_CHECKING:
    from lmd_bench.harness.plan import Plan
    from lmd_bench.pretrained import WeightsStore


def overrides(
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


def plan_suite(
    suite_name: str,
    methods: str | None,
    laid_on: dict[str, Any],
    settings: list[str] | None,
    add: list[str] | None,
    device: str,
    out: Path,
    force: bool,
    save_weights: bool = False,
    reads_data: bool = True,
    weights: WeightsStore | None = None,
    dry_run: bool = False,
) -> tuple[Plan, dict[str, str]]:
    """The plan for a suite with `laid_on` merged over it, and the added methods by name."""
    from lmd_bench.suite_files import apply_settings, merge, parse_suite, read_suite_values

    values = merge(read_suite_values(suite_name), laid_on)
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
        weights=weights,
        named=methods is not None,
        dry_run=dry_run,
    )
    return plan, added


def plan_without_data(
    suite_name: str,
    methods: str | None,
    settings: list[str] | None,
    add: list[str] | None,
    device: str,
    out: Path,
    *,
    precision: str | None,
    compile: bool | None = None,
    weights: Path | None = None,
) -> tuple[Plan, dict[str, str]]:
    """As `plan_suite`, for measurements on noise in place of the suite's data, whatever is finished.

    Says which rows are left out, and why. weights: folder with published ones; none are downloaded.
    """
    values = overrides(seeds=None, steps=None, data=None, precision=precision, compile=compile)
    values["data"] = {"name": "scenes", "path": None, "num_train": 4096}  # valid, and never read
    plan, added = plan_suite(
        suite_name,
        methods,
        values,
        settings,
        add,
        device,
        out,
        force=True,
        reads_data=False,
        weights=open_weights(weights),
    )
    say_left_out(plan)
    return plan, added


def open_weights(folder: Path | None, offline: bool = False) -> WeightsStore:
    """The published weights in a folder and where the libraries keep them; downloads are announced on the terminal."""
    from lmd_bench.pretrained import WeightsStore

    return WeightsStore(folder, offline, on_download=say)


def say_left_out(plan: Plan) -> None:
    """The suite's rows that cannot be run, and why."""
    for name, reason in {**plan.listed_only, **plan.missing}.items():
        say(f"  {name}: not measured: {reason}")


def unused_path(folder: Path, stem: str) -> Path:
    """`stem.json` in the folder, or with a number behind it where earlier speed runs have taken the name."""
    path, number = folder / f"{stem}.json", 2
    while path.exists():
        path, number = folder / f"{stem}-{number}.json", number + 1
    return path
