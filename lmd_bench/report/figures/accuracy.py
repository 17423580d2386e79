"""Accuracy over the time and the steps of fine-tuning."""

from __future__ import annotations

from collections.abc import Sequence

from lmd_bench.report.figures.sheet import Sheet, add_legend, new_canvas, note_level
from lmd_bench.report.load import Run
from lmd_bench.report.tuning import same_validation_images


def draw_accuracy(sheet: Sheet, runs: Sequence[Run]) -> None:
    """Top-1 accuracy of every run that was fine-tuned and checked."""
    canvas, (left, right) = new_canvas(1, 2, height=4.4, sharey=True)
    table: list[Sequence[object]] = []
    for run in runs:
        record, look = run.record, sheet.looks[run.record.row]
        assert record.finetune is not None
        checks = record.finetune.checks
        top1 = [check.top1 for check in checks]
        for axes, places in ((left, [check.train_s for check in checks]), (right, [check.step for check in checks])):
            axes.plot(
                places, top1, color=look.colour, linestyle=look.dash, marker=look.marker, markersize=4,
                label=sheet.label(run, runs),
            )  # fmt: skip
        table += [(record.row, record.seed, c.step, c.train_s, c.top1, c.top5, c.num_images) for c in checks]
    classes = {run.record.finetune.num_classes for run in runs if run.record.finetune}
    if len(classes) == 1:
        note_level(left, "chance", 100 / classes.pop(), 0.995, "right")
    left.set(xlabel="fine-tuning time, s (pauses left out)", ylabel="top-1 accuracy, %")
    right.set(xlabel="optimizer step of fine-tuning")
    add_legend(canvas, left)
    same = same_validation_images(runs)
    images = (
        "The same validation images for every row" if same else "Mind: not the same validation images for every row"
    )
    sheet.save(
        canvas,
        "fine-tuning-accuracy",
        "Accuracy over the time and the steps of fine-tuning",
        f"{images}, looked at off the clock; the first point is before any step. "
        "MAT@1 is the time of the whole fine-tuning over the points gained up to the best check.",
        ["row", "seed", "step", "train_s", "top1_percent", "top5_percent", "num_images"],
        table,
    )
