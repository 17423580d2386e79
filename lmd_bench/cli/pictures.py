"""What a trained method makes of images: `reconstruct` and `sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd_bench.cli.checkpoint import tell
from lmd_bench.cli.options import (
    AddOption,
    DeviceOption,
    EmaOption,
    MethodSetOption,
    ProjectorOption,
    added_methods,
    levels_of,
)
from lmd_bench.cli.terminal import say
from lmd_bench.errors import ConfigError


def reconstruct(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            help="A finished or imported cell (OUT/<suite>/<row>/seed-<n>), its weights file, or with --method a "
            "checkpoint of the method's authors.",
        ),
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Image files or folders. Default: the first held-out images of the run, which authors' weights lack."
        ),
    ] = None,
    mask_ratio: Annotated[
        float | None,
        typer.Option(
            "--mask-ratio",
            help="Share of the image hidden at random. Default: as in the run; 0.75 for authors' weights.",
        ),
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
    settings: MethodSetOption = None,
    projector: ProjectorOption = None,
    ema: EmaOption = False,
) -> None:
    """Fill hidden parts of images with a trained method: original, masked and reconstructed beside each other."""
    if mask_ratio is not None and mask_image is not None:
        raise ConfigError("--mask-ratio and --mask-image: give one of them")
    wanted_levels = levels_of(levels)
    if method is None and (settings or projector is not None or ema):
        raise ConfigError("--set, --projector and --ema belong to --method; a finished cell says all that itself")
    import torch

    from lmd_bench.checkpoints.official import OfficialRequest, open_official_method
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.reconstruct.checkpoint import open_official, open_run
    from lmd_bench.reconstruct.figure6 import FIGURE6_FILES, FIGURE6_IMAGES
    from lmd_bench.reconstruct.fill import TABLE_FILE, Request
    from lmd_bench.reconstruct.fill import reconstruct as fill
    from lmd_bench.reconstruct.pictures import held_out_pictures, read_pictures
    from lmd_bench.records import RECONSTRUCTIONS

    place = torch.device(resolve_device(device))
    added = added_methods(add)
    if method is None:
        opened = open_run(checkpoint, place, added)
    else:
        request = OfficialRequest(checkpoint, method, tuple(settings or ()), projector, ema)
        official = open_official_method(request, added)
        tell(official)
        opened = open_official(official, place)
    pictures = read_pictures(images, opened.image_size) if images else held_out_pictures(opened, FIGURE6_IMAGES)
    folder = out or opened.path.parent / RECONSTRUCTIONS
    rows = fill(opened, pictures, Request(mask_ratio, mask_image, wanted_levels, order, seed, figure6), folder)
    for name in FIGURE6_FILES if figure6 else ():
        say(f"written: {folder / name}")
    for row in rows:
        say(f"  {row.picture}: {row.text}")
    say(f"written: {len(rows)} pictures (original | masked | reconstructed) and {TABLE_FILE} in {folder}")


def sample(
    checkpoint: Annotated[
        Path,
        typer.Option(
            "--checkpoint",
            help="A finished or imported cell (OUT/<suite>/<row>/seed-<n>), or its weights file; an authors' "
            "checkpoint is imported first (`lmd-bench checkpoint import`).",
        ),
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
    wanted_levels = levels_of(levels)
    import torch

    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.reconstruct.checkpoint import open_cell
    from lmd_bench.reconstruct.sample import SAMPLES, SampleRequest, note_on_samples, sample_images

    place = torch.device(resolve_device(device))
    opened = open_cell(checkpoint, place, added_methods(add))
    written = sample_images(opened, SampleRequest(images, wanted_levels, seed), out or opened.path.parent / SAMPLES)
    if note := note_on_samples(opened.method):
        say(note)
    say(f"written: {images} image{'s' if images > 1 else ''} and {written[-1].name} in {written[-1].parent}")
