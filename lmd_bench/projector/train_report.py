"""What a projector's training reached: figures on held-out images, the folder, its README and its log."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from lmd_bench.projector.codebook import CodebookUse, codebook_use, count_codes
from lmd_bench.projector.config import WEIGHTS_FILE
from lmd_bench.projector.train_config import LSPTrainOptions
from lmd_bench.projector.train_data import TrainData, patch_pca_psnr
from lmd_bench.projector.train_folder import README_FILE, write_text
from lmd_bench.projector.train_kinds import TrainableProjector, VQTrainable
from lmd_bench.projector.training_split import SPLIT_FILE

_PCA_IMAGES = 2048


@dataclass(frozen=True)
class HeldOut:
    """A projector on held-out images. PSNR is of the mean squared error over all of their pixels, in [0, 1]."""

    psnr_db: float  # from latents as they are
    quantised_psnr_db: float | None  # from latents put through the codebook; None without one
    codes: CodebookUse | None
    latent_mean: tuple[float, ...]  # per channel
    latent_std: tuple[float, ...]

    def columns(self) -> dict[str, float | None]:
        """As columns of the log."""
        return {
            "held_out_psnr_db": self.psnr_db,
            "held_out_quantised_psnr_db": self.quantised_psnr_db,
            "held_out_code_usage": None if self.codes is None else self.codes.usage,
            "held_out_code_perplexity": None if self.codes is None else self.codes.perplexity,
            "held_out_dead_codes": None if self.codes is None else self.codes.dead,
        }


@dataclass(frozen=True)
class TrainReport:
    """What training reached, measured with the folder as it was written and read back."""

    held_out: HeldOut
    pca_psnr_db: float  # a PCA of non-overlapping patches with as many numbers a patch as latents have
    first_loss: float  # reconstruction loss, mean over the first tenth of the steps
    last_loss: float  # mean over the last tenth
    num_parameters: int
    weights_bytes: int

    @property
    def psnr_db(self) -> float:
        """On held-out images, from latents as they are."""
        return self.held_out.psnr_db

    @property
    def summary(self) -> str:
        """The figures in one line."""
        text = f"PSNR {self.psnr_db:.2f} dB (PCA of patches {self.pca_psnr_db:.2f} dB)"
        if self.held_out.quantised_psnr_db is not None and self.held_out.codes is not None:
            codes = self.held_out.codes
            text += f", quantised {self.held_out.quantised_psnr_db:.2f} dB, {codes.usage:.1%} of the codes in use"
        return text


def measure(projector: TrainableProjector, held_out: Tensor, *, quantising: bool = True) -> HeldOut:
    """Figures on uint8 images (N, 3, H, W). quantising: whether the codebook, if there is one, is in use yet."""
    wanted = held_out.float() / 255.0
    latents = projector.encode_all(held_out)
    quantised_psnr_db, codes = None, None
    if isinstance(projector, VQTrainable) and quantising:
        quantised, indices = projector.quantised(latents)
        quantised_psnr_db = _psnr_db(projector.decode_all(quantised), wanted)
        codes = codebook_use(count_codes(indices, len(projector.codebook)))
    return HeldOut(
        psnr_db=_psnr_db(projector.decode_all(latents), wanted),
        quantised_psnr_db=quantised_psnr_db,
        codes=codes,
        latent_mean=tuple(latents.mean((0, 2, 3)).tolist()),
        latent_std=tuple(latents.std((0, 2, 3)).tolist()),
    )


def _psnr_db(images: Tensor, wanted: Tensor) -> float:
    return -10.0 * math.log10(max(float((images - wanted).square().mean()), 1e-12))


def report_on(
    out: Path,
    projector: TrainableProjector,
    sample: Tensor,
    data: TrainData,
    options: LSPTrainOptions,
    losses: Sequence[float],
) -> TrainReport:
    """Measures a projector read back from `out` and writes its README there.

    sample: training images in [0, 1], on which the PCA is fitted. losses: reconstruction loss of every step.
    """
    tenth = max(1, len(losses) // 10)
    report = TrainReport(
        held_out=measure(projector, data.held_out),
        pca_psnr_db=patch_pca_psnr(
            sample[:_PCA_IMAGES], data.held_out, patch_size=options.factor, num_components=options.latent_channels
        ),
        first_loss=sum(losses[:tenth]) / tenth,
        last_loss=sum(losses[-tenth:]) / tenth,
        num_parameters=sum(parameter.numel() for parameter in projector.model.parameters()),
        weights_bytes=(out / WEIGHTS_FILE).stat().st_size,
    )
    write_text(out / README_FILE, _readme(out, projector, data, options, report))
    return report


def write_csv(file: Path, rows: Sequence[Mapping[str, float | None]]) -> None:
    """Writes the log, one line a row, under all columns that any row has; what a row lacks stays empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(value) for name, value in row.items()})
    write_text(file, text.getvalue())


def _cell(value: float | None) -> str:
    if value is None:
        return ""
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def log_line(row: Mapping[str, float | None], steps: int) -> str:
    """One row of the log in words."""
    words = [f"step {row['step']}/{steps}: loss {row['loss']:.5f}, PSNR {row['psnr_db']:.2f} dB"]
    if row.get("code_usage"):
        words.append(f"codes used {row['code_usage']:.1%}, perplexity {row['code_perplexity']:.0f}")
    if row.get("adaptive_weight"):
        words.append(f"adversarial weight {row['adaptive_weight']:.3g}, discriminator {row['disc']:.3f}")
    if row.get("held_out_psnr_db") is not None:
        words.append(f"held-out {row['held_out_psnr_db']:.2f} dB")
    if row.get("held_out_quantised_psnr_db") is not None:
        words.append(f"quantised {row['held_out_quantised_psnr_db']:.2f} dB")
    return ", ".join(words)


def _readme(
    out: Path, projector: TrainableProjector, data: TrainData, options: LSPTrainOptions, report: TrainReport
) -> str:
    number_format = "float16" if options.half else "float32"
    rows = "\n".join(f"| {name} | {value} |" for name, value in _figures(options, report))
    mode = {
        "kl": "the posterior's mode",
        "vq": "the encoder's output before quantisation",
        "light": "the encoder's output",
    }[options.kind]
    return f"""# {out.resolve().name}

A `{type(projector.model).__name__}` trained on {data.described}:
factor {options.factor}, {options.latent_channels} latent channels, {report.num_parameters:,} parameters,
{report.weights_bytes:,} bytes ({report.weights_bytes / 2**20:.2f} MiB) in {number_format}. Made by

    {options.command(out)}

| on {data.described_held_out} | |
|---|---|
{rows}

Images are scaled to [-1, 1], latents are {mode} and are used as they are
(`scale: 1.0`). training.csv holds the course of the training, {SPLIT_FILE} what was trained on.
{_closing(data)}
"""


def _closing(data: TrainData) -> str:
    """Of a folder: who may be measured with it. Our own scenes: the license; of others' images we know none."""
    split = data.split
    if split.data == "scenes":
        return "Weights are under the license of lmd-bench."
    if split.layout == "train and val":
        return "None of the images under val/ was trained on."
    return (
        f"Never trained on: the first {split.num_held_out} images in the order of data seed {split.data_seed}."
        f" Runs and `lsp inspect` measure\non none but these with that seed (`data.seed`) and at most"
        f" {split.num_held_out} held-out images."
    )


def _figures(options: LSPTrainOptions, report: TrainReport) -> list[tuple[str, str]]:
    held_out, factor = report.held_out, options.factor
    figures = [("PSNR of encode and decode", f"{held_out.psnr_db:.2f} dB")]
    if held_out.quantised_psnr_db is not None:
        figures.append(("PSNR with quantisation between", f"{held_out.quantised_psnr_db:.2f} dB"))
    numbers = options.latent_channels
    figures.append(
        (f"PSNR of a PCA of {factor} x {factor} patches to {numbers} numbers", f"{report.pca_psnr_db:.2f} dB")
    )
    if held_out.codes is not None:
        codes = held_out.codes
        used = f"{codes.usage:.1%} of {options.num_codes}, {codes.dead} dead"
        figures += [("codes in use", used), ("perplexity of the codes", f"{codes.perplexity:.0f}")]
    for name, values in (("mean", held_out.latent_mean), ("standard deviation", held_out.latent_std)):
        figures.append((f"{name} of the latents, per channel", ", ".join(f"{value:.2f}" for value in values)))
    return figures
