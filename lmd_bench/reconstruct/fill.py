"""From pictures and masks to reconstructions on disk, with a table of how good they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lmd_bench.data.yardstick import hide, paste
from lmd_bench.errors import ConfigError
from lmd_bench.harness.seeding import reseed
from lmd_bench.method import Method
from lmd_bench.metrics.image import psnr_hidden, ssim
from lmd_bench.nn.masking import pixel_mask
from lmd_bench.reconstruct.checkpoint import Checkpoint
from lmd_bench.reconstruct.masks import hidden_tokens, mask_from_image, random_mask
from lmd_bench.reconstruct.output import GREY, all_or_nothing, side_by_side, to_bytes, write_csv
from lmd_bench.reconstruct.pictures import Picture
from lmd_bench.seeding import derive_seed

TABLE_FILE = "reconstructions.csv"


@dataclass(frozen=True)
class Request:
    """What is asked for."""

    mask_ratio: float = 0.75
    """Share of the units hidden at random; not looked at where there is a `mask_image`."""
    mask_image: Path | None = None
    levels: int | None = None
    """Predictions on the way; 0 stands for every level of the method's schedule, None for the method's own default."""
    order: str = "random"
    seed: int = 0


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
    others. Files appear in `out` all together at the end. Raises BenchError where masks do not fit, before anything
    is reconstructed.
    """
    _require_levels(checkpoint.method, request)
    masks = [_mask_for(checkpoint, picture, request) for picture in pictures]
    for picture, mask in zip(pictures, masks, strict=True):
        hidden_tokens(checkpoint, mask, picture.name)
    names = _file_names(pictures)
    with all_or_nothing(out) as folder:
        rows = [
            _one(checkpoint, picture, mask, request, folder / name)
            for picture, mask, name in zip(pictures, masks, names, strict=True)
        ]
        _write_table(folder / TABLE_FILE, rows)
    return rows


def _require_levels(method: Method, request: Request) -> None:
    if request.levels is None:
        return
    if not method.progressive_orders:
        raise ConfigError(f"--levels: {type(method).__name__} reconstructs in one way only; leave it out")
    if request.levels < 0 or request.order not in method.progressive_orders:
        raise ConfigError(
            f"--levels {request.levels} --order {request.order}: levels are 1 or more, or all; "
            f"orders are {', '.join(method.progressive_orders)}"
        )


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
        filled, passes = method.reconstruct(shown, hidden), method.num_function_evaluations
    else:
        filled, passes = method.reconstruct_progressively(
            shown, hidden, levels=request.levels or None, order=request.order, seeds=[seed]
        )
    composite = paste(filled, image, hidden)
    tokens = hidden_tokens(checkpoint, mask, picture.name)
    pixels = pixel_mask(mask, checkpoint.image_size)
    panels = (image.cpu(), _as_the_model_sees(image.cpu(), pixels, tokens), composite.cpu())
    _save_png(side_by_side(panels), file)
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


def _as_the_model_sees(image: Tensor, hidden_pixels: Tensor, tokens: Tensor | None) -> Tensor:
    """Hidden pixels in grey; visible ones inside a hidden token, which the network is not shown, half faded."""
    seen = image
    if tokens is not None:
        side = round(tokens.shape[1] ** 0.5)
        faded = pixel_mask(tokens.view(1, side, side), image.shape[-1])
        seen = torch.where(faded, (image + GREY) / 2, image)
    return seen.masked_fill(hidden_pixels, GREY)


def _save_png(image: Tensor, file: Path) -> None:
    Image.fromarray(to_bytes(image)).save(file)


def _file_names(pictures: Sequence[Picture]) -> list[str]:
    """One PNG name for each picture; the same stem again gets a number."""
    names: list[str] = []
    for picture in pictures:
        stem, number = Path(picture.name).stem, 1
        name = f"{stem}.png"
        while name in names:
            number += 1
            name = f"{stem}-{number}.png"
        names.append(name)
    return names


def _write_table(file: Path, rows: Sequence[Row]) -> None:
    columns = [field.name for field in fields(Row)]
    write_csv(file, columns, [[getattr(row, name) for name in columns] for row in rows])
