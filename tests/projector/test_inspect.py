"""`lsp inspect`: every figure against a computation of its own, and what is written."""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.models import vgg16

from lmd_bench.cli import app
from lmd_bench.config import DataConfig
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.scenes import Scenes
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.metrics.image import PSNR_CAP_DB
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import WEIGHTS_FILE, ProjectorConfig
from lmd_bench.projector.inspect import (
    InspectData,
    Inspection,
    count_gflop,
    inspect_projector,
    latent_leak,
    open_inspect_data,
)
from lmd_bench.projector.inspect_report import caption, false_colours, make_table, write_inspections
from lmd_bench.projector.light import LightAutoencoder, LightProjector
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.pixels import PixelProjector
from lmd_bench.projector.training_split import SPLIT_FILE, split_of_folder

CPU = torch.device("cpu")
SIZE = 32


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ProjectorConfig]:
    root = tmp_path_factory.mktemp("inspected")
    torch.manual_seed(0)
    VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8),
        norm_num_groups=4,
        latent_channels=3,
        num_vq_embeddings=16,
    ).save_pretrained(root / "vq")
    LightAutoencoder(
        factor=4, encoder_hidden=8, encoder_kernel=1, decoder_widths=(8,), decoder_blocks=(1,)
    ).save_pretrained(root / "light")
    return {kind: ProjectorConfig.model_validate({"kind": kind, "path": str(root / kind)}) for kind in ("vq", "light")}


@pytest.fixture(scope="module")
def data() -> InspectData:
    scenes = Scenes(0, SIZE)
    images = scenes.render(torch.arange(20) + 2**40).float() / 255.0
    return InspectData(images, scenes.render(range(64)).float() / 255.0, "20 held-out scenes at 32 px")


@pytest.fixture(scope="module")
def vq(folders: dict[str, ProjectorConfig], data: InspectData) -> Inspection:
    return inspect_projector(folders["vq"], data, num_samples=3)


@pytest.fixture(scope="module")
def light(folders: dict[str, ProjectorConfig], data: InspectData) -> Inspection:
    return inspect_projector(folders["light"], data, num_samples=3)


# -- the figures ------------------------------------------------------------------------------------------------------


def psnr(one: Tensor, other: Tensor) -> float:
    return float(-10 * (one - other).square().mean().log10())


def test_quality_is_that_of_encode_and_decode_with_and_without_the_codebook(
    vq: Inspection, folders: dict[str, ProjectorConfig], data: InspectData
) -> None:
    projector = open_projector(folders["vq"])
    latents = projector.encode(data.images)
    with torch.no_grad():
        plain, quantised = projector.decode(latents), projector.decode(latents, quantize=True)
    assert vq.quantised is not None
    assert vq.continuous.psnr_db == pytest.approx(psnr(plain, data.images), abs=1e-3)
    assert vq.quantised.psnr_db == pytest.approx(psnr(quantised, data.images), abs=1e-3)
    assert vq.continuous.ssim != vq.quantised.ssim
    assert vq.latent_mean == pytest.approx(latents.mean((0, 2, 3)).tolist(), abs=1e-5)
    assert vq.latent_std == pytest.approx(latents.std((0, 2, 3)).tolist(), abs=1e-5)
    assert (vq.numbers_per_image, vq.factor) == (latents[0].numel(), 4)


def test_codebook_use_counts_nearest_vectors(
    vq: Inspection, folders: dict[str, ProjectorConfig], data: InspectData
) -> None:
    projector = open_projector(folders["vq"])
    assert projector.codebook is not None
    vectors = projector.encode(data.images).movedim(1, -1).flatten(0, 2)
    chosen = torch.cdist(vectors, projector.codebook).argmin(1)
    shares = torch.bincount(chosen, minlength=16).double() / len(chosen)
    assert vq.codes is not None
    assert vq.codes.num_positions == len(chosen) == 20 * 64
    assert vq.codes.use.usage == pytest.approx(float((shares > 0).double().mean()))
    assert vq.codes.use.perplexity == pytest.approx(float(torch.exp(-torch.xlogy(shares, shares).sum())))


def test_a_kind_without_a_codebook_has_none_of_its_figures(light: Inspection) -> None:
    assert light.codes is light.quantised is light.samples.quantised is None


def test_parameters_are_split_between_encoder_and_decoder_without_the_codebook(
    vq: Inspection, light: Inspection, folders: dict[str, ProjectorConfig]
) -> None:
    total = sum(parameter.numel() for parameter in open_projector(folders["vq"]).parameters())
    assert vq.encoder_parameters + vq.decoder_parameters + 16 * 3 == total
    assert light.encoder_parameters == 48 * (4 + 8) + 12 + 8 * 4 + 4 + 4 * 4 + 4


def test_gflop_are_twice_the_multiplications_of_the_convolutions(light: Inspection) -> None:
    positions = (224 // 4) ** 2
    assert light.encoder_gflop == pytest.approx(2e-9 * positions * (48 * 12 + 8 * 4 + 4 * 4))
    assert isinstance(light.decoder_gflop, float)


def test_pixels_cost_nothing_and_lose_nothing(data: InspectData) -> None:
    found = inspect_projector(ProjectorConfig(kind="pixels"), data)
    assert (found.encoder_gflop, found.encoder_parameters, found.weights_bytes) == (0, 0, 0)
    assert found.continuous.psnr_db > 90
    assert found.pca_psnr_db == PSNR_CAP_DB
    assert found.leak == 0


def test_a_factor_that_does_not_divide_the_counted_image_is_said() -> None:
    projector = PixelProjector()
    projector.factor = 9
    assert count_gflop(projector)[0] == "not counted: 224 px are not divisible by its factor"


def test_the_pca_beside_it_has_as_many_numbers(light: Inspection, data: InspectData) -> None:
    patches = functional.unfold(data.fitted, 4, stride=4).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    basis = torch.linalg.svd(patches - mean, full_matrices=False).Vh[:4]
    wanted = functional.unfold(data.images, 4, stride=4).transpose(1, 2).flatten(0, 1) - mean
    assert light.pca_psnr_db == pytest.approx(psnr(wanted @ basis.t() @ basis, wanted), abs=1e-2)


# -- the leak ---------------------------------------------------------------------------------------------------------


class Smearing(LatentProjector):
    """Latents are the mean over squares of 4, plus `share` of the mean over the whole image."""

    def __init__(self, share: float) -> None:
        super().__init__(name="smearing", factor=4, latent_channels=3)
        self.share = share

    def _encode(self, images: Tensor) -> Tensor:
        return functional.avg_pool2d(images, 4) + self.share * images.mean((2, 3), keepdim=True)

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        return functional.interpolate(latents, scale_factor=4)


def test_latents_that_see_only_their_own_pixels_do_not_leak(data: InspectData, light: Inspection) -> None:
    assert latent_leak(Smearing(0.0), data.images) == 0.0
    assert light.leak == 0.0


def test_the_leak_is_the_change_of_visible_latents_over_their_own_spread(data: InspectData) -> None:
    """By hand: the mask is the yardstick's, the change is `share` times what filling does to an image's mean."""
    masks = yardstick_masks(20, SIZE, 16, 0.25)
    hidden = masks.repeat_interleave(16, 1).repeat_interleave(16, 2)
    changes, values = [], []
    for image, gone in zip(data.images, hidden, strict=True):
        filled = torch.where(gone, image[:, ~gone].mean(1)[:, None, None], image)
        change = 0.5 * (image.mean((1, 2)) - filled.mean((1, 2)))
        squares = Smearing(0.5)._encode(image[None])[0]
        visible = squares[:, ~gone[::4, ::4]]
        changes.append(change[:, None].expand_as(visible))
        values.append(visible)
    change, value = torch.cat(changes, 1), torch.cat(values, 1)
    wanted = math.sqrt(float(change.square().sum() / (value - value.mean(1, keepdim=True)).square().sum()))
    assert latent_leak(Smearing(0.5), data.images) == pytest.approx(wanted, rel=1e-4)


def test_a_wider_reach_leaks_more(data: InspectData) -> None:
    def leak(kernel: int) -> float:
        torch.manual_seed(0)
        model = LightAutoencoder(
            factor=4, encoder_hidden=8, encoder_kernel=kernel, decoder_widths=(8,), decoder_blocks=(0,)
        )
        found = latent_leak(LightProjector(model, name="light"), data.images)
        assert isinstance(found, float)
        return found

    assert leak(1) == 0.0
    assert leak(3) > 0.05


def test_a_leak_that_cannot_be_measured_says_why(data: InspectData) -> None:
    found = latent_leak(Smearing(0.0), data.images[..., :24, :24])
    assert isinstance(found, str)
    assert found.startswith("not measured: evaluation.unit_px")
    assert latent_leak(Smearing(0.0), torch.full((2, 3, 32, 32), 0.5)) == "not measured: the latents are all equal"


# -- images -----------------------------------------------------------------------------------------------------------


def test_scenes_are_held_out_and_the_pca_sees_others() -> None:
    found = open_inspect_data(None, 3, SIZE, CPU)
    assert torch.equal(found.images, Scenes(0, SIZE).render(torch.arange(3) + 2**40).float() / 255)
    assert found.described == "3 held-out scenes at 32 px"
    differences = (found.fitted[:, None] - found.images[None]).abs().amax((2, 3, 4))
    assert differences.min() > 0.05


def test_a_folder_gives_its_held_out_images_as_central_squares(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(tmp_path / f"{index}.png")
    found = open_inspect_data(str(tmp_path), 100, SIZE, CPU)
    assert (found.images.shape, found.fitted.shape) == ((2, 3, SIZE, SIZE), (6, 3, SIZE, SIZE))
    assert found.described.startswith("2 held-out images of")
    with pytest.raises(DataError, match="no such folder"):
        open_inspect_data(str(tmp_path / "nowhere"), 4, SIZE, CPU)


# -- what is written --------------------------------------------------------------------------------------------------


def test_table_and_figures_are_written_with_their_numbers(tmp_path: Path, vq: Inspection, light: Inspection) -> None:
    written = write_inspections(tmp_path / "out", [vq, light, light], "20 scenes", ["a command"])
    names = ["vq", "light", "light-2"]
    wanted = {"projectors.md", "projectors.csv", *(f"figure7-{n}.{e}" for n in names for e in ("png", "csv"))}
    assert {path.name for path in written} == wanted == {path.name for path in (tmp_path / "out").iterdir()}
    with Image.open(tmp_path / "out" / "figure7-vq.png") as picture:
        assert picture.width > picture.height > 300  # four columns, three rows
    lines = (tmp_path / "out" / "projectors.csv").read_text().splitlines()
    rows = list(csv.DictReader(line for line in lines if not line.startswith("#")))
    assert [row["projector"] for row in rows] == ["vq", "light", "light"]
    assert float(rows[0]["psnr_db"]) == vq.continuous.psnr_db
    assert vq.codes is not None
    assert float(rows[0]["codes_used_share"]) == vq.codes.use.usage
    assert rows[1]["quantised_psnr_db"] == "no codebook"
    assert float(rows[1]["leak_share"]) == 0.0
    page = (tmp_path / "out" / "projectors.md").read_text()
    assert f"{vq.continuous.psnr_db:.2f}" in page
    assert caption(vq) in page
    assert "![vq](figure7-vq.png)" in page
    figure_lines = (tmp_path / "out" / "figure7-vq.csv").read_text().splitlines()
    figures = list(csv.DictReader(line for line in figure_lines if not line.startswith("#")))
    shown = vq.samples
    assert len(figures) == 3
    assert float(figures[1]["psnr_db"]) == pytest.approx(psnr(shown.rebuilt[1], shown.images[1]), abs=1e-3)


def test_no_cell_is_empty(vq: Inspection, light: Inspection) -> None:
    for row in make_table([vq, light], "scenes").rows:
        assert all(cell.text.strip() for cell in row)


def test_the_trunk_of_lpips_stands_in_the_table(light: Inspection, vq: Inspection) -> None:
    measured = replace(light, continuous=replace(light.continuous, lpips=0.25), lpips_net="vgg")
    table = make_table([measured, replace(vq, lpips_net=None)], "scenes")
    place = [column.head for column in table.columns].index("trunk of LPIPS")
    assert [row[place].text for row in table.rows] == ["vgg", "not measured"]
    assert any("trunk" in note and "alex, vgg" in note for note in table.notes)


def test_the_trunk_is_that_whose_weights_are_here(
    folders: dict[str, ProjectorConfig], data: InspectData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights under VGG's names, AlexNet's are missing."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    few = InspectData(data.images[:2], data.fitted, "2 scenes")
    assert inspect_projector(folders["light"], few).lpips_net is None
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in vgg16(weights=None).features.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {f"features.{name}": 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "hub" / "checkpoints" / "vgg16-397923af.pth")
    found = inspect_projector(folders["light"], few)
    assert found.lpips_net == "vgg"
    assert isinstance(found.continuous.lpips, float)


def test_captions_say_what_the_columns_and_colours_are(vq: Inspection, light: Inspection) -> None:
    assert "image | latent (8 x 8 x 3) | reconstruction | reconstruction from quantised latents" in caption(vq)
    assert "its channels as red, green and blue" in caption(vq)
    assert "the first three principal components of its channels" in caption(light)
    assert "quantised" not in caption(light)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 9])
def test_false_colours_are_colours_whatever_the_number_of_channels(channels: int) -> None:
    latents = torch.randn(2, channels, 6, 5, generator=torch.Generator().manual_seed(0)) * 7 + 3
    colours = false_colours(latents)
    assert colours.shape == (2, 3, 6, 5)
    assert float(colours.min()) == 0.0
    assert float(colours.max()) == 1.0
    if channels > 3:  # principal components know no order of the channels
        torch.testing.assert_close(false_colours(latents.flip(1)), colours, rtol=1e-4, atol=1e-4)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, light: Inspection) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*; choose another --out"):
        write_inspections(tmp_path / "file" / "out", [light], "scenes", [])


# -- the command ------------------------------------------------------------------------------------------------------


def inspect_command(*words: str) -> None:
    app(["lsp", "inspect", *words], standalone_mode=False)


def test_the_command_measures_several_kinds_at_once(
    tmp_path: Path, folders: dict[str, ProjectorConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(folders[kind].path) for kind in ("vq", "light")]
    inspect_command(*paths, "--images", "6", "--image-size", "32", "--out", str(tmp_path), "--device", "cpu")
    told = capsys.readouterr().out
    assert "continuous: PSNR, dB" in told
    assert "projectors.md" in told
    assert len(list(tmp_path.glob("figure7-*.png"))) == 2


def make_images(folder: Path, number: int) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    for index in range(number):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{index}.png")


def test_a_projector_is_not_measured_on_images_it_may_have_been_trained_on(
    tmp_path: Path, folders: dict[str, ProjectorConfig], capsys: pytest.CaptureFixture[str]
) -> None:
    make_images(tmp_path / "images", 16)
    (tmp_path / "images" / "broken.png").write_bytes(b"no image")
    shutil.copytree(str(folders["light"].path), tmp_path / "light")
    data = DataConfig(name="folder", path=str(tmp_path / "images"), num_held_out=2, seed=3)
    split = split_of_folder(scan_folder(tmp_path / "images", data), 3)
    (tmp_path / "light" / SPLIT_FILE).write_text(split.model_dump_json())
    words = [str(tmp_path / "light"), "--data", str(tmp_path / "images"), "--image-size", "32", "--device", "cpu"]
    with pytest.raises(ConfigError, match=r"may have been trained on .* use --images 2 --data-seed 3"):
        inspect_command(*words, "--out", str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
    inspect_command(*words, "--images", "2", "--data-seed", "3", "--out", str(tmp_path / "out"))
    told = capsys.readouterr().out
    assert "2 held-out images of" in told.replace("\n", " ")
    assert "left out 1 of 17 images" in told.replace("\n", " ")


@pytest.mark.parametrize("size", ["0", "15", "5000"])
def test_image_sizes_that_cannot_be_are_refused(size: str, folders: dict[str, ProjectorConfig], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"--image-size {size}: must be from 16 to 4096 px"):
        inspect_command(str(folders["light"].path), "--image-size", size, "--out", str(tmp_path / "out"))


def test_the_command_checks_every_projector_before_it_measures_one(
    tmp_path: Path, folders: dict[str, ProjectorConfig]
) -> None:
    good = str(folders["light"].path)
    out = tmp_path / "out"
    with pytest.raises(WeightsError, match="nowhere: no such folder"):
        inspect_command(good, str(tmp_path / "nowhere"), "--out", str(out))
    with pytest.raises(WeightsError, match="image_size 66 is not divisible by its factor 4"):
        inspect_command(good, "--image-size", "66", "--out", str(out))
    with pytest.raises(ConfigError, match=r"--precision fp16: must be fp32 or bf16"):
        inspect_command(good, "--precision", "fp16", "--out", str(out))
    assert not out.exists()


def test_a_bad_projector_ends_the_command_with_one_line_and_code_2(tmp_path: Path) -> None:
    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, in_channels=1, out_channels=1).save_pretrained(
        tmp_path / "grey"
    )
    assert (tmp_path / "grey" / WEIGHTS_FILE).is_file()
    words = [sys.executable, "-m", "lmd_bench", "lsp", "inspect", str(tmp_path / "grey")]
    result = subprocess.run(words, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "not an autoencoder of RGB images" in result.stderr
