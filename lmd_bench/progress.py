"""How a run shows itself while it goes on: a live bar on a terminal, plain lines when piped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from lmd_bench.config import RunConfig
    from lmd_bench.records import RunRecord


def ended_line(record: RunRecord) -> str:
    """One line on a cell that has ended."""
    name = f"{record.row} seed {record.seed}"
    if record.status == "failed":
        return f"{name}: FAILED: {record.error}"
    timing = record.timing
    text = f"{name}: comes trained"
    if timing is not None:
        text = f"{name}: {record.num_steps} steps, {timing.train_s / record.num_steps * 1e3:.1f} ms/step"
    if record.yardstick is not None and record.yardstick.checks:
        text += f", PSNR of hidden pixels {record.yardstick.checks[-1].psnr_db:.2f} dB"
    return text + ("" if timing is None or timing.valid else " (INVALID: wall time does not add up)")


def encoded_line(num_images: int, total: int, images_per_s: float) -> str:
    """How the making of a latent cache gets on; views count as images."""
    left = (total - num_images) / max(1e-9, images_per_s)
    return f"latent cache: {num_images}/{total} images encoded  {images_per_s:.0f} images/s  {left:.0f} s left"


def filled_line(num_images: int, total: int) -> str:
    """How the measuring of image quality gets on."""
    return f"image quality: {num_images}/{total} images filled"


def tuned_line(step: int, total: int, top1: float) -> str:
    """How a fine-tuning gets on."""
    return f"fine-tuning, step {step}/{total}: top-1 accuracy {top1:.1f} %"


class PlainWatcher:
    """A line for each event, for pipes and logs."""

    def __init__(self, console: Console, num_cells: int) -> None:
        self._console = console
        self._num_cells = num_cells
        self._count = 0
        self._total = 0

    def began(self, config: RunConfig) -> None:
        self._count += 1
        self._total = config.steps
        what = f"{config.steps} steps" if config.steps else "comes trained"
        self._line(f"[{self._count}/{self._num_cells}] {config.row} seed {config.seed}: {what}")

    def encoded(self, num_images: int, total: int, images_per_s: float) -> None:
        self._line("    " + encoded_line(num_images, total, images_per_s))

    def trained(self, step: int, loss: float, mask_ratio: float | None, steps_per_s: float) -> None:
        ratio = "" if mask_ratio is None else f"  mask {mask_ratio:.2f}"
        left = (self._total - step) / max(1e-9, steps_per_s)
        rest = f"{steps_per_s:.1f} it/s  {left:.0f} s left in this row"
        self._line(f"    step {step}/{self._total}  loss {loss:.4f}{ratio}  {rest}")

    def checked(self, step: int, psnr_db: float) -> None:
        self._line(f"    step {step}: PSNR of hidden pixels {psnr_db:.2f} dB")

    def filled(self, num_images: int, total: int) -> None:
        self._line("    " + filled_line(num_images, total))

    def tuned(self, step: int, total: int, top1: float) -> None:
        self._line("    " + tuned_line(step, total, top1))

    def ended(self, record: RunRecord) -> None:
        self._line("  " + ended_line(record))

    def close(self) -> None:
        """Nothing to take down."""

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


class LiveWatcher:
    """A progress bar with loss, mask ratio, steps per second and time left.

    It is drawn only when the loop reports, off the training clock: a bar that refreshes itself would do so from a
    thread of its own, in the middle of timed steps.
    """

    def __init__(self, console: Console, num_cells: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        self._console = console
        self._num_cells = num_cells
        self._count = 0
        self._total = 0
        self._task: Any = None
        self._psnr = ""
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            auto_refresh=False,
            transient=True,
        )

    def began(self, config: RunConfig) -> None:
        self._count += 1
        self._total = config.steps
        self._psnr = ""
        name = f"[{self._count}/{self._num_cells}] {config.row} seed {config.seed}"
        self._progress.start()
        self._task = self._progress.add_task(name.replace("[", r"\["), total=config.steps, figures="preparing")
        self._progress.refresh()

    def encoded(self, num_images: int, total: int, images_per_s: float) -> None:
        self._progress.update(self._task, figures=encoded_line(num_images, total, images_per_s))
        self._progress.refresh()

    def trained(self, step: int, loss: float, mask_ratio: float | None, steps_per_s: float) -> None:
        ratio = "" if mask_ratio is None else f"  mask {mask_ratio:.2f}"
        left = (self._total - step) / max(1e-9, steps_per_s)
        figures = f"loss {loss:.4f}{ratio}  {steps_per_s:.1f} it/s  {left:.0f} s left{self._psnr}"
        self._progress.update(self._task, completed=step, figures=figures)
        self._progress.refresh()

    def checked(self, step: int, psnr_db: float) -> None:
        self._psnr = f"  {psnr_db:.2f} dB"

    def filled(self, num_images: int, total: int) -> None:
        self._progress.update(self._task, figures=filled_line(num_images, total))
        self._progress.refresh()

    def tuned(self, step: int, total: int, top1: float) -> None:
        self._progress.update(self._task, total=total, completed=step, figures=tuned_line(step, total, top1))
        self._progress.refresh()

    def ended(self, record: RunRecord) -> None:
        self._progress.remove_task(self._task)
        self.close()
        self._console.print("  " + ended_line(record), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        self._progress.stop()


def watcher_for(console: Console, num_cells: int) -> PlainWatcher | LiveWatcher:
    """The live bar where the console is a terminal, plain lines elsewhere."""
    return LiveWatcher(console, num_cells) if console.is_terminal else PlainWatcher(console, num_cells)
