"""Fine-tuning encoders that are trained already: `finetune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from lmd_bench.cli.options import AddOption, DeviceOption, SetOption, added_methods
from lmd_bench.cli.terminal import command_line, complain, new_console, report_on, say


def finetune(
    cell: Annotated[Path, typer.Argument(help="A finished or imported cell, or OUT/<suite>: all its finished cells.")],
    suite: Annotated[
        str | None, typer.Option("--suite", help="Whose finetune section is used. Default: the one beside the cells.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option("--recipe", help="One of its finetune_recipes. Default: what each row names.")
    ] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Folder of labelled images: class folders.")] = None,
    device: DeviceOption = "auto",
    settings: SetOption = None,
    add: AddOption = None,
    force: Annotated[bool, typer.Option("--force", help="Do it again where it is done.")] = False,
) -> None:
    """Fine-tune encoders from their saved weights: accuracy, its time (MAT), and probes of the frozen features."""
    from lmd_bench.harness.finetune_cells import (
        EncoderJob,
        FinetuneRequest,
        fine_tune_all,
        plan_finetune,
    )

    request = FinetuneRequest(cell, suite, recipe, data, tuple(settings or ()), device, force, added=added_methods(add))
    plan = plan_finetune(request)
    from lmd_bench.harness.allocator import keep_freed_memory
    from lmd_bench.harness.environment import environment
    from lmd_bench.progress import tuned_line

    for note in plan.notes:
        say(f"note: {note}")
    machine = {**environment(str(plan.jobs[0].job.device)), "host_memory": keep_freed_memory()}
    console = new_console()

    def began(job: EncoderJob) -> None:
        say(f"{job.name}: {job.job.settings.steps} steps on {job.job.device}")

    failed = fine_tune_all(
        plan,
        request,
        command=command_line(),
        environment=machine,
        on_began=began,
        on_tuned=lambda step, total, top1: console.print("  " + tuned_line(step, total, top1), highlight=False),
    )
    for name, reason in failed.items():
        complain(f"{name}: not fine-tuned: {reason}", red=True)
    if plan.suite_folder is not None:
        from lmd_bench.suite_files import SUITE_FILE, load_suite

        report_on(plan.suite_folder, load_suite(str(plan.suite_folder / SUITE_FILE)))
    if failed:
        sys.exit(1)
