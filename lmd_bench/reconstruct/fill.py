"""From pictures and masks to reconstructions on disk, with a table of how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from lmd_bench.data.yardstick import hide, paste
from lmd_bench.errors import ConfigError
from lmd_bench.harness.evaluate import counted
from lmd_bench.harness.seeding import reseed
from lmd_bench.method import Method
from lmd_bench.metrics.image import psnr_hidden, ssim
from lmd_bench.nn.masking import pixel_mask
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.reconstruct.figure6 import FIGURE6_FILES, draw_figure6, require_schedule
from lmd_bench.reconstruct.masks import hidden_tokens, mask_from_image, random_mask
from lmd_bench.reconstruct.output import GREY, all_or_nothing, save_png, side_by_side, write_csv
from lmd_bench.reconstruct.pictures import Picture
from lmd_bench.seeding import derive_seed

TABLE_FILE = "reconstructions.csv"


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    mask_ratio: float | None = None
    """Share of the units hidden at random, None as many as the run's yardstick hides; not looked at where there is a
    `mask_image`."""
    mask_image: Path | None = None
    levels: int | None = None
    """Predictions on the way; 0 stands for every level of the method's schedule, None for the method's own default."""
    order: str | None = None
    """What is unveiled first, where there are several levels; None for the method's own default."""
    seed: int = 0
    figure6: bool = False
    """Draw masks along the schedule too (`lmd_bench.reconstruct.figure6`)."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    image: str
    picture: str
    """File with the picture beside the table."""
    seed: int
    levels: str
    function_evaluations: int
    hidden_px: int
    pixels: int
    hidden_tokens: int | None
    """Tokens that touch a hidden pixel: all of them are predicted; None for methods without tokens."""
    tokens: int | None
    psnr_hidden_db: float
    ssim: float
    """Of the composite: the reconstruction with the visible pixels pasted back."""

    @property
    def text(self) -> str:
        """The row in words."""
        hidden = f"{self.hidden_px} of {self.pixels} px hidden"
        if self.tokens is not None:
            hidden += f", {self.hidden_tokens} of {self.tokens} tokens touch them and are predicted"
        passes = f"{self.function_evaluations} evaluation{'s' if self.function_evaluations > 1 else ''}"
        return f"{hidden}; {passes}; PSNR {self.psnr_hidden_db:.2f} dB over hidden pixels, SSIM {self.ssim:.3f}"


def reconstruct(checkpoint: Checkpoint, pictures: Sequence[Picture], request: Request, out: Path) -> list[Row]:
    """Fill every picture's hidden part; write original | masked | reconstructed beside each other, and a table.

    Pictures are taken one by one, each under a seed made of its file's name, so that a result does not depend on the
    others. Files appear in `out` all together at the end. Raises BenchError where masks or levels do not fit, or a
    file to be written is one of those that are read, before anything is reconstructed.
    """
    _require_levels(checkpoint.method, request)
    if request.figure6:
        require_schedule(checkpoint)
    masks = [_mask_for(checkpoint, picture, request) for picture in pictures]
    for picture, mask in zip(pictures, masks, strict=True):
        hidden_tokens(checkpoint, mask, picture.name)
    names = _file_names(pictures)
    _spare_what_is_read(pictures, request, [*names, TABLE_FILE, *(FIGURE6_FILES if request.figure6 else ())], out)
    with all_or_nothing(out) as folder:
        rows = [
            _one(checkpoint, picture, mask, request, folder / name)
            for picture, mask, name in zip(pictures, masks, names, strict=True)
        ]
        _write_table(folder / TABLE_FILE, rows)
        if request.figure6:
            draw_figure6(checkpoint, pictures, request.seed, folder)
    return rows


def _require_levels(method: Method, request: Request) -> None:
    orders = method.progressive_orders
    if not orders:
        for option, value in (("--levels", request.levels), ("--order", request.order)):
            if value is not None:
                raise ConfigError(f"{option}: {type(method).__name__} reconstructs in one way only; leave it out")
    if request.levels is not None and request.levels < 0:
        raise ConfigError(f"--levels {request.levels}: levels are 1 or more, or all")
    if request.order is None:
        return
    if request.order not in orders:
        raise ConfigError(f"--order {request.order}: orders are {', '.join(orders)}")
    if request.levels in (None, 1):
        raise ConfigError(
            f"--order {request.order}: an order is for several predictions; give --levels of 2 or more, or all, with it"
        )


def _spare_what_is_read(pictures: Sequence[Picture], request: Request, names: Sequence[str], out: Path) -> None:
    """Raise ConfigError where a file to be written is one of the pictures or the mask."""
    read = [file for file in (*(picture.file for picture in pictures), request.mask_image) if file is not None]
    for target in (out / name for name in names):
        if target.exists() and any(target.samefile(file) for file in read):
            raise ConfigError(f"--out {out}: {target.name} would overwrite a file that is read; choose another folder")


def _image_seed(request: Request, picture: Picture) -> int:
    return derive_seed("reconstruct", request.seed, picture.name)


def _mask_for(checkpoint: Checkpoint, picture: Picture, request: Request) -> Tensor:
    if request.mask_image is not None:
        return mask_from_image(request.mask_image, picture, checkpoint.image_size)
    return random_mask(checkpoint, request.mask_ratio, _image_seed(request, picture))


@torch.no_grad()
def _one(checkpoint: Checkpoint, picture: Picture, mask: Tensor, request: Request, file: Path) -> Row:
    method, seed = checkpoint.method, _image_seed(request, picture)
    device = next(method.parameters()).device
    image = picture.pixels.unsqueeze(0).float().to(device) / 255
    hidden = mask.to(device)
    reseed(device, seed, "reconstruct")
    shown = hide(image, hidden)
    if request.levels is None:
        filled, passes = counted(method, lambda: method.reconstruct(shown, hidden))
    else:
        filled, passes = method.reconstruct_progressively(
            shown, hidden, levels=request.levels or None, order=_order(method, request), seeds=[seed]
        )
    composite = paste(filled, image, hidden)
    tokens = hidden_tokens(checkpoint, mask, picture.name)
    pixels = pixel_mask(mask, checkpoint.image_size)
    panels = (image.cpu(), _as_the_model_sees(image.cpu(), pixels, tokens), composite.cpu())
    save_png(side_by_side(panels), file)
    return Row(
        image=picture.name,
        picture=file.name,
        seed=request.seed,
        levels="default" if request.levels is None else str(request.levels or "all"),
        function_evaluations=passes,
        hidden_px=int(pixels.sum()),
        pixels=pixels.numel(),
        hidden_tokens=None if tokens is None else int(tokens.sum()),
        tokens=None if tokens is None else tokens.numel(),
        psnr_hidden_db=float(psnr_hidden(composite, image, hidden)),
        ssim=float(ssim(composite, image)),
    )


def _order(method: Method, request: Request) -> str:
    default: str = getattr(getattr(method, "config", None), "unveil_order", method.progressive_orders[0])
    return default if request.order is None else request.order


def _as_the_model_sees(image: Tensor, hidden_pixels: Tensor, tokens: Tensor | None) -> Tensor:
    """Hidden pixels in grey; visible ones inside a hidden token, which the network is not shown, half faded."""
    seen = image
    if tokens is not None:
        side = round(tokens.shape[1] ** 0.5)
        faded = pixel_mask(tokens.view(1, side, side), image.shape[-1])
        seen = torch.where(faded, (image + GREY) / 2, image)
    return seen.masked_fill(hidden_pixels, GREY)


def _file_names(pictures: Sequence[Picture]) -> list[str]:
    """One PNG name for each picture; the same stem again, even in other capitals, gets a number."""
    names: dict[str, str] = {}
    for picture in pictures:
        stem, number = f"{Path(picture.name).stem}-reconstructed", 1
        name = f"{stem}.png"
        while name.casefold() in names:
            number += 1
            name = f"{stem}-{number}.png"
        names[name.casefold()] = name
    return list(names.values())


def _write_table(file: Path, rows: Sequence[Row]) -> None:
    columns = [field.name for field in fields(Row)]
    write_csv(file, columns, [[getattr(row, name) for name in columns] for row in rows])
