"""The three laws of the architecture, and what follows from them for the user."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from helpers.without_torch import run_without_torch

PACKAGE = Path(__file__).resolve().parents[1] / "lmd_bench"
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return modules


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_the_package_never_imports_the_baselines(path: Path) -> None:
    assert not any(module.split(".")[0] == "baselines" for module in imported_modules(path))


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_nothing_asks_for_the_name_of_a_method(path: Path) -> None:
    names = {"lmd", "lmd-us", "lmd-ps", "lmd-cs", "mae", "simmim", "greenmim", "um-mae", "ddpm", "iddpm", "ddim", "ldm"}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
            assert not names & {value for value in constants if isinstance(value, str)}, ast.unparse(node)


@pytest.mark.parametrize(
    "module",
    [
        "lmd_bench.config",
        "lmd_bench.suite_files",
        "lmd_bench.records",
        "lmd_bench.registry",
        "lmd_bench.texts",
        "lmd_bench.cli",
        "lmd_bench.progress",
        "lmd_bench.report.build",
        "lmd_bench.metrics.efficiency",
        "lmd_bench.metrics.intervals",
        "lmd_bench.metrics.quality",
        "lmd_bench.projector.config",
        "lmd_bench.lmd.mask_schedule",
    ],
)
def test_it_works_without_torch(module: str) -> None:
    done = run_without_torch(f"import {module}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_command_line_prints_and_exits(path: Path) -> None:
    if path.parent == PACKAGE / "cli" or path.name == "__main__.py":
        return
    assert not calls(path) & {"print", "exit", "quit", "sys.exit", "os._exit", "typer.Exit", "typer.echo"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_timer_reads_a_clock(path: Path) -> None:
    if path.name == "timer.py":
        return
    clocks = {"perf_counter", "perf_counter_ns", "monotonic", "process_time", "time_ns"}
    used = {call.rpartition(".")[2] for call in calls(path)}
    assert not used & clocks
    assert "time.time" not in calls(path)


def test_only_the_loop_and_the_training_of_projectors_and_evaluators_call_backward() -> None:
    callers = {str(p.relative_to(PACKAGE)) for p in FILES if any(c.endswith(".backward") for c in calls(p))}
    assert callers <= {"harness/loop.py", "metrics/cost.py", "projector/train.py", "evaluators/train.py", "testing.py"}
