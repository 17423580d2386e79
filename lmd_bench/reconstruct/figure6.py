"""Figure 6 of the paper: masks along the schedule, and what the model makes of what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lmd_bench.data.yardstick import hide, paste
from lmd_bench.errors import ConfigError
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.weights import file_sha256
from lmd_bench.lmd.mask_schedule import num_kept
from lmd_bench.method import Method
from lmd_bench.metrics.image import psnr_hidden
from lmd_bench.nn.masking import ids_from_noise, pixel_mask
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.reconstruct.output import GREY, all_or_nothing, side_by_side, to_bytes, write_csv
from lmd_bench.reconstruct.pictures import Picture
from lmd_bench.seeding import derive_seed

FIGURE6 = "figure6"
FIGURE6_FILES = (f"{FIGURE6}.png", f"{FIGURE6}.csv")
FIGURE6_IMAGES = 5
FIGURE6_PROGRESS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class _Stage:
    """One column of figure 6: a point of the mask schedule."""

    progress: float
    ratio: float
    num_visible: int


def draw_figure6(checkpoint: Checkpoint, pictures: Sequence[Picture], seed: int, out: Path) -> list[Path]:
    """The masks along the schedule (paper, fig. 6): what the network sees at 0, 25, 50, 75 and 100 % of the training,
    and what it makes of it.

    At most five pictures, one a row. Within a row masks are nested: what is hidden once stays hidden. Writes
    figure6.png and figure6.csv to `out` and returns their paths. Raises ConfigError for methods without a schedule.
    """
    total = _total_steps(checkpoint)
    num_tokens = (checkpoint.image_size // require_schedule(checkpoint)) ** 2
    stages = [_stage(checkpoint.method, progress, total, num_tokens) for progress in FIGURE6_PROGRESS]
    digest = file_sha256(checkpoint.path)
    drawn, table = [], []
    for picture in pictures[:FIGURE6_IMAGES]:
        panels, psnrs = zip(*(_stage_panel(checkpoint, picture, stage, seed) for stage in stages), strict=True)
        drawn.append(panels)
        table += [
            (picture.name, stage.progress, stage.ratio, stage.num_visible, num_tokens, psnr, digest)
            for stage, psnr in zip(stages, psnrs, strict=True)
        ]
    with all_or_nothing(out) as folder:
        picture_file, table_file = FIGURE6_FILES
        _save_grid(drawn, stages, num_tokens, folder / picture_file)
        columns = ("image", "progress", "mask_ratio", "visible_tokens", "tokens", "psnr_hidden_db", "weights_sha256")
        write_csv(folder / table_file, columns, table)
    return [out / name for name in FIGURE6_FILES]


def require_schedule(checkpoint: Checkpoint) -> int:
    """Side of a token, px. Raises ConfigError for methods without tokens that a schedule masks."""
    token_px = checkpoint.token_px
    if token_px is None or checkpoint.method.mask_ratio_at(1, _total_steps(checkpoint)) is None:
        raise ConfigError(f"--figure6: {type(checkpoint.method).__name__} has no tokens that a schedule masks")
    return token_px


def _total_steps(checkpoint: Checkpoint) -> int:
    return checkpoint.config.steps if checkpoint.config is not None else 1000


def _stage(method: Method, progress: float, total: int, num_tokens: int) -> _Stage:
    ratio = method.mask_ratio_at(max(1, round(progress * total)), total) or 0.0
    return _Stage(progress, ratio, num_kept(num_tokens, ratio))


@torch.no_grad()
def _stage_panel(checkpoint: Checkpoint, picture: Picture, stage: _Stage, seed: int) -> tuple[Tensor, float]:
    """Masked and reconstructed beside each other, (3, S, W), and the PSNR over hidden pixels."""
    method = checkpoint.method
    device = next(method.parameters()).device
    side = checkpoint.image_size // (checkpoint.token_px or 1)
    own = derive_seed(FIGURE6, seed, picture.name)
    order = ids_from_noise(torch.rand(1, side**2, generator=torch.Generator().manual_seed(own)))
    hidden = torch.ones(1, side**2, dtype=torch.bool).scatter(1, order[:, : stage.num_visible], False)
    mask = hidden.view(1, side, side).to(device)
    image = picture.pixels.unsqueeze(0).float().to(device) / 255
    reseed(device, own, FIGURE6)
    composite = paste(method.reconstruct(hide(image, mask), mask), image, mask)
    seen = image.masked_fill(pixel_mask(mask, checkpoint.image_size), GREY)
    return side_by_side((seen.cpu(), composite.cpu())), float(psnr_hidden(composite, image, mask))


def _save_grid(drawn: Sequence[Sequence[Tensor]], stages: Sequence[_Stage], num_tokens: int, file: Path) -> None:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(wspace=0.07)  # more between columns than within a pair
    canvas = Canvas(figsize=(2.9 * len(stages), 1.42 * len(drawn) + 0.9), layout=layout, facecolor="white")
    axes = canvas.subplots(len(drawn), len(stages), squeeze=False)
    for row, panels in zip(axes, drawn, strict=True):
        for place, panel in zip(row, panels, strict=True):
            place.imshow(to_bytes(panel), interpolation="nearest")
            place.set_axis_off()
    for place, stage in zip(axes[0], stages, strict=True):
        place.set_title(
            f"{100 * stage.progress:.0f} % of the training\n"
            f"ratio {stage.ratio:.2f}: {stage.num_visible} of {num_tokens} tokens visible",
            fontsize=9,
        )
    canvas.suptitle("Masking along the schedule: what the network sees | what it makes of it", fontsize=11)
    canvas.savefig(file, dpi=150)
