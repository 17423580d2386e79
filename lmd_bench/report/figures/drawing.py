"""Which figures a report has, and in which order."""

from __future__ import annotations

from lmd_bench.report.figures.accuracy import draw_accuracy
from lmd_bench.report.figures.costs import draw_phases, draw_profile_phases
from lmd_bench.report.figures.curves import draw_loss_curves, draw_yardstick
from lmd_bench.report.figures.pictures import draw_reconstructions, draw_samples, take_over_figure6
from lmd_bench.report.figures.schedules import draw_schedules
from lmd_bench.report.figures.sheet import Figure, Sheet, finite


class Drawing(Sheet):
    """Draws what the records allow; a figure without data is left out."""

    def draw(self) -> list[Figure]:
        """All figures that have data, in the order of the page."""
        runs = self.results.all_runs
        curves = [run for run in runs if run.steps and run.steps["step"].size >= 2]
        if curves:
            draw_loss_curves(self, curves)
        masked = [run for run in curves if finite(run.steps["mask_ratio"]).size]
        if masked:
            draw_schedules(self, masked)
        checked = [run for run in runs if run.record.yardstick and run.record.yardstick.checks]
        if checked:
            draw_yardstick(self, checked)
        draw_reconstructions(self)
        draw_samples(self)
        tuned = [run for run in runs if run.record.finetune and run.record.finetune.checks]
        if tuned:
            draw_accuracy(self, tuned)
        phased = [run for run in runs if run.record.phases]
        if phased:
            draw_phases(self, phased)
        for profile in self.results.profiles:
            draw_profile_phases(self, profile)
        for row in self.labels:
            take_over_figure6(self, row)
        return self.figures
