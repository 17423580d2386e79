"""The projector's own training, and the weights it shipped."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.projector.config import ProjectorConfig, projector_folder
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.train import HELD_OUT_START, KLTrainOptions, normalise_latents, patch_pca_psnr, train_kl

SHIPPED = ProjectorConfig(kind="kl", path="shipped:scenes-kl-f8")
TINY = KLTrainOptions(
    steps=40, batch_size=8, image_size=32, num_images=64, num_held_out=16, block_out_channels=(8, 8, 8)
)


def test_a_short_training_improves_and_writes_a_folder_diffusers_opens(tmp_path: Path) -> None:
    lines: list[str] = []
    report = train_kl(tmp_path / "tiny", TINY, log=lines.append)
    assert report.last_loss < 0.7 * report.first_loss
    model = AutoencoderKL.from_pretrained(tmp_path / "tiny", low_cpu_mem_usage=False, use_safetensors=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == report.num_parameters
    assert report.weights_bytes > 4 * report.num_parameters
    projector = open_projector(ProjectorConfig(kind="kl", path=str(tmp_path / "tiny")))
    held_out = Scenes(0, 32).render(torch.arange(16) + HELD_OUT_START).float() / 255.0
    error = (projector.decode(projector.encode(held_out)) - held_out).square().mean()
    assert -10 * torch.log10(error).item() == pytest.approx(report.psnr_db, abs=0.01)
    assert f"{report.psnr_db:.2f} dB" in lines[-1]


def test_the_readme_holds_the_command_that_repeats_the_training(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, steps=2, seed=5)
    train_kl(tmp_path / "tiny", options)
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert options.command(tmp_path / "tiny") in text
    assert "--seed 5 --steps 2 --batch-size 8 --image-size 32 --crop-size 32" in text
    assert "--block-out-channels 8,8,8" in text


def test_the_same_options_give_the_same_weights(tmp_path: Path) -> None:
    options = dataclasses.replace(TINY, steps=3)
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))  # the global generator must not matter
        train_kl(tmp_path / name, options)
    file = "diffusion_pytorch_model.safetensors"
    assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_normalised_latents_have_unit_scale_and_reconstructions_stay() -> None:
    torch.manual_seed(0)
    model = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    images = Scenes(0, 16).render(range(64))
    pixels = images.float() / 127.5 - 1.0
    with torch.no_grad():
        before = model.decode(model.encode(pixels).latent_dist.mode()).sample
        ratio = model.encode(pixels).latent_dist
        normalise_latents(model, images)
        after = model.encode(pixels).latent_dist
        torch.testing.assert_close(model.decode(after.mode()).sample, before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after.mean.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-4)
    torch.testing.assert_close(after.mean.std((0, 2, 3)), torch.ones(3), rtol=1e-3, atol=0)
    spread = ratio.mean.std((0, 2, 3))[None, :, None, None]
    torch.testing.assert_close(after.std * spread, ratio.std, rtol=1e-3, atol=1e-5)


def test_patch_pca_with_all_components_is_exact_and_with_fewer_is_worse() -> None:
    scenes = Scenes(0, 32).render(range(200))
    train, held_out = scenes[:150], scenes[150:]
    few, many = (patch_pca_psnr(train, held_out, patch_size=4, num_components=n) for n in (2, 12))
    assert few + 3 < many
    assert patch_pca_psnr(train, held_out, patch_size=4, num_components=48) > 80


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": (8, 16)}, "with layers_per_block 0 they must be equal"),
        ({"norm_num_groups": 5}, "must be multiples of norm_num_groups 5"),
        ({"image_size": 34}, "image_size 34 is not divisible by the factor 4"),
        ({"crop_size": 64}, "crop_size 64 must be from 1 to image_size"),
        ({"batch_size": 65}, "1 <= batch_size <= num_images"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step \d+; use a smaller --lr"):
        train_kl(tmp_path / "tiny", dataclasses.replace(TINY, lr=1e30, lr_warmup_steps=0))


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*; choose another --out"):
        train_kl(tmp_path / "file" / "out", TINY)


def test_shipped_weights_are_under_two_mebibytes() -> None:
    files = [file for file in projector_folder(SHIPPED).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 2 * 2**20


def test_shipped_weights_reconstruct_held_out_scenes_as_their_readme_says() -> None:
    readme = (projector_folder(SHIPPED) / "README.md").read_text()
    stated = float(re.search(r"encode and decode \| ([\d.]+) dB", readme)[1])  # type: ignore[index]
    scenes, projector = Scenes(0, 64), open_projector(SHIPPED)
    images = scenes.render(torch.arange(64) + HELD_OUT_START + 4096)  # not the ones the README measured
    wanted = images.float() / 255.0
    latents = projector.encode(wanted)
    psnr_db = -10 * torch.log10((projector.decode(latents) - wanted).square().mean()).item()
    assert psnr_db > stated - 0.5
    assert psnr_db > patch_pca_psnr(scenes.render(range(512)), images, patch_size=8, num_components=4) + 1.0
    assert latents.shape == (64, 4, 8, 8)
    assert ((latents.std((0, 2, 3)) > 0.5) & (latents.std((0, 2, 3)) < 2.0)).all()
