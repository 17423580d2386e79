"""`lsp inspect` on paper: a table of projectors, and figure 7 of the paper for each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from lmd_bench.errors import ConfigError
from lmd_bench.projector.inspect import COST_IMAGE_PX, Inspection, Quality, psnr_of
from lmd_bench.report.cells import (
    Cell,
    Column,
    Section,
    Table,
    label,
    missing,
    number,
    percent,
    rows_to_csv,
    to_csv,
    to_markdown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

STEM: Final = "projectors"
_DPI: Final = 150
_TILE_INCHES: Final = 1.7
_NO_CODEBOOK: Final = "no codebook"
_COLUMNS: Final = (
    Column("projector", ("projector",)),
    Column("kind", ("kind",)),
    Column("factor", ("factor",)),
    Column("numbers per image", ("latent_channels", "numbers_per_image")),
    Column("encoder", ("encoder_parameters",), "parameters"),
    Column("decoder", ("decoder_parameters",), "parameters"),
    Column("encoder", ("encoder_gflop",), "GFLOP"),
    Column("decoder", ("decoder_gflop",), "GFLOP"),
    Column("PSNR", ("psnr_db",), "dB", "continuous"),
    Column("SSIM", ("ssim",), None, "continuous"),
    Column("LPIPS", ("lpips",), None, "continuous"),
    Column("PSNR", ("quantised_psnr_db",), "dB", "quantised"),
    Column("SSIM", ("quantised_ssim",), None, "quantised"),
    Column("LPIPS", ("quantised_lpips",), None, "quantised"),
    Column("trunk of LPIPS", ("lpips_net",)),
    Column("PSNR of PCA", ("pca_psnr_db",), "dB"),
    Column("codebook used", ("codes_used_share", "num_codes", "num_positions")),
    Column("perplexity", ("perplexity",)),
    Column("latent mean", ("latent_mean",)),
    Column("latent std", ("latent_std",)),
    Column("leak", ("leak_share",)),
    Column("weights", ("weights_bytes",), "MiB"),
)


def make_table(inspections: Sequence[Inspection], described: str) -> Table:
    """One row per projector; `described` says which images it was measured on."""
    return Table(
        STEM,
        "Latent projectors",
        _COLUMNS,
        (Section(None, tuple(_row(one) for one in inspections)),),
        notes=(
            f"Quality on {described}: PSNR of the mean squared error over all pixels, SSIM and LPIPS means over"
            " images; LPIPS is lower for better, and that of one trunk (alex, vgg) says nothing beside that of the"
            " other.",
            f"GFLOP (2 x MAC) for one image of {COST_IMAGE_PX} px, convolutions, matrix products and attention. The"
            " codebook counts neither as encoder nor as decoder.",
            "PSNR of PCA: patches as large as a latent position, not overlapping, reduced to as many numbers as it"
            " has; fitted on other images.",
            "Continuous: the decoder gets latents as the encoder gives them, as in LMD; quantised: their nearest"
            " codebook vectors.",
            "Leak: how much latents of visible positions change when hidden pixels take the mean visible colour, as a"
            " share of these latents' own standard deviation (a quarter of the units visible, as on the yardstick).",
            "Latent mean and std: over all positions, per channel.",
        ),
    )


def _row(one: Inspection) -> tuple[Cell, ...]:
    side = one.image_size // one.factor
    mebibytes = one.weights_bytes / 2**20
    name = one.name if one.precision == "fp32" else f"{one.name} ({one.precision})"
    return (
        label(name),
        label(one.kind),
        _figure(one.factor, "factor"),
        Cell(
            (f"{one.numbers_per_image:,} ({side} x {side} x {one.latent_channels})",),
            parts={"latent_channels": one.latent_channels, "numbers_per_image": one.numbers_per_image},
        ),
        Cell((f"{one.encoder_parameters:,}",), parts={"encoder_parameters": one.encoder_parameters}),
        Cell((f"{one.decoder_parameters:,}",), parts={"decoder_parameters": one.decoder_parameters}),
        _figure(one.encoder_gflop, "encoder_gflop"),
        _figure(one.decoder_gflop, "decoder_gflop"),
        *_quality(one.continuous, ""),
        *_quality(one.quantised, "quantised_"),
        Cell((one.lpips_net,), parts={"lpips_net": one.lpips_net}) if one.lpips_net else missing("not measured"),
        _figure(one.pca_psnr_db, "pca_psnr_db", "{:.2f}"),
        *_codebook(one),
        Cell((_list(one.latent_mean),)),
        Cell((_list(one.latent_std),)),
        missing(one.leak) if isinstance(one.leak, str) else Cell((percent(one.leak),), parts={"leak_share": one.leak}),
        Cell((number(mebibytes),), parts={"weights_bytes": one.weights_bytes}),
    )


def _figure(value: float | int | str, name: str, form: str | None = None) -> Cell:
    if isinstance(value, str):
        return missing(value)
    return Cell((form.format(value) if form else number(value),), parts={name: value})


def _quality(quality: Quality | None, prefix: str) -> tuple[Cell, Cell, Cell]:
    if quality is None:
        return missing(_NO_CODEBOOK), missing(_NO_CODEBOOK), missing(_NO_CODEBOOK)
    return (
        _figure(quality.psnr_db, f"{prefix}psnr_db", "{:.2f}"),
        _figure(quality.ssim, f"{prefix}ssim", "{:.4f}"),
        _figure(quality.lpips, f"{prefix}lpips", "{:.4f}"),
    )


def _codebook(one: Inspection) -> tuple[Cell, Cell]:
    codes = one.codes
    if codes is None:
        return missing(_NO_CODEBOOK), missing(_NO_CODEBOOK)
    used = round(codes.use.usage * codes.num_codes)
    return (
        Cell(
            (f"{percent(codes.use.usage)} ({used} of {codes.num_codes}, at {codes.num_positions:,} positions)",),
            parts={
                "codes_used_share": codes.use.usage,
                "num_codes": codes.num_codes,
                "num_positions": codes.num_positions,
            },
        ),
        _figure(codes.use.perplexity, "perplexity"),
    )


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.3f}" for value in values)


# -- figure 7 ---------------------------------------------------------------------------------------------------------


def false_colours(latents: Tensor) -> Tensor:
    """Latents (n, C, h, w) as colours (n, 3, h, w) in [0, 1], one map for all n.

    Up to three channels are red, green and blue as they stand; of more, the three principal components over all
    positions. Each colour runs from the 1st to the 99th percentile of its values.
    """
    channels = latents.shape[1]
    if channels > 3:
        vectors = latents.movedim(1, -1).flatten(0, 2).double()
        vectors = vectors - vectors.mean(0)
        basis = torch.linalg.eigh(vectors.t() @ vectors).eigenvectors[:, -3:].flip(1)
        # An eigenvector's sign is arbitrary: the largest entry points up, so that a figure repeats itself.
        largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
        latents = torch.einsum("nchw,ck->nkhw", latents.double(), basis * largest.sign())
    values = latents.double().movedim(1, 0).flatten(1)
    ends = torch.quantile(values, torch.tensor([0.01, 0.99], dtype=torch.float64), dim=1)
    low, high = ends[0].view(1, -1, 1, 1), ends[1].view(1, -1, 1, 1)
    colours = ((latents - low) / (high - low).clamp(min=1e-12)).clamp(0.0, 1.0)
    missing_channels = max(0, 3 - channels)
    return torch.nn.functional.pad(colours, (0, 0, 0, 0, 0, missing_channels)).float()


def caption(one: Inspection) -> str:
    """What figure 7 shows."""
    colours = "its channels" if one.latent_channels <= 3 else "the first three principal components of its channels"
    quantised = "" if one.samples.quantised is None else " | reconstruction from quantised latents"
    return (
        f"{one.name}: image | latent ({one.image_size // one.factor} x {one.image_size // one.factor} x"
        f" {one.latent_channels}) | reconstruction{quantised}. The latent in false colours: {colours} as red, green"
        " and blue, each from its 1st to its 99th percentile over the images shown. After figure 7 of the LMD paper."
    )


def sample_psnr(one: Inspection) -> list[tuple[int, float, float | None]]:
    """(image, PSNR in dB, PSNR from quantised latents or None) of the images shown."""
    shown = one.samples

    def psnr(rebuilt: Tensor) -> list[float]:
        return [psnr_of(error) for error in (rebuilt.double() - shown.images.double()).square().mean((1, 2, 3))]

    plain = psnr(shown.rebuilt)
    quantised = [None] * len(plain) if shown.quantised is None else psnr(shown.quantised)
    return list(zip(range(len(plain)), plain, quantised, strict=True))


def _draw(one: Inspection, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = one.samples
    columns = [("image", shown.images), ("latent", false_colours(shown.latents)), ("reconstruction", shown.rebuilt)]
    if shown.quantised is not None:
        columns.append(("quantised", shown.quantised))
    scores = sample_psnr(one)
    rows = len(scores)
    figure = Figure(figsize=(_TILE_INCHES * len(columns), (_TILE_INCHES + 0.2) * rows + 0.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, len(columns), squeeze=False)
    for row, (_, plain, quantised) in enumerate(scores):
        below = {"reconstruction": plain, "quantised": quantised}
        for place, (title, images) in zip(axes[row], columns, strict=True):
            _tile(place, images[row], title if row == 0 else "", below.get(title))
    figure.savefig(path, dpi=_DPI, format="png")


def _tile(place: Axes, image: Tensor, title: str, psnr_db: float | None) -> None:
    place.imshow(image.permute(1, 2, 0).numpy(), interpolation="nearest", vmin=0.0, vmax=1.0)
    place.set_xticks([])
    place.set_yticks([])
    if title:
        place.set_title(title, fontsize=10)
    if psnr_db is not None:
        place.set_xlabel(f"{psnr_db:.2f} dB", fontsize=8, labelpad=2)


# -- files ------------------------------------------------------------------------------------------------------------


def require_writable(out: Path) -> None:
    """Makes the folder. Raises ConfigError where nothing can be written there."""
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"lsp inspect: cannot write to {out} ({error.strerror}); choose another --out") from None
    if not os.access(out, os.W_OK):
        raise ConfigError(f"lsp inspect: cannot write to {out} (no permission); choose another --out")


def write_inspections(
    out: Path, inspections: Sequence[Inspection], described: str, provenance: Sequence[str]
) -> list[Path]:
    """Writes projectors.md and .csv, and figure7-NAME.png and .csv of each projector, to the folder `out`.

    The paths written. Raises ConfigError where the folder cannot be written to.
    """
    require_writable(out)
    table = make_table(inspections, described)
    written: list[Path] = []
    figures = []
    for one, slug in zip(inspections, _slugs(inspections), strict=True):
        png, csv = out / f"figure7-{slug}.png", out / f"figure7-{slug}.csv"
        _write(png, partial(_draw, one))
        names = ["image", "psnr_db", "quantised_psnr_db"]
        rows = [(image, plain, _NO_CODEBOOK if q is None else q) for image, plain, q in sample_psnr(one)]
        _write_text(csv, rows_to_csv([caption(one), *provenance], names, rows))
        figures += [f"![{one.name}]({png.name})", "", caption(one), ""]
        written += [png, csv]
    page = "\n".join([to_markdown(table, provenance), "# Image, latent, reconstruction", "", *figures])
    _write_text(out / f"{STEM}.csv", to_csv(table, provenance))
    _write_text(out / f"{STEM}.md", page)
    return [out / f"{STEM}.md", out / f"{STEM}.csv", *written]


def _slugs(inspections: Sequence[Inspection]) -> list[str]:
    """File names, with a number where two projectors are called the same."""
    taken: list[str] = []
    for one in inspections:
        stem = "".join(c if c.isalnum() or c in "-_." else "-" for c in one.name)
        slug, count = stem, 2
        while slug in taken:
            slug, count = f"{stem}-{count}", count + 1
        taken.append(slug)
    return taken


def _write_text(path: Path, text: str) -> None:
    _write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    """In one piece: complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)
