"""Projectors: shapes, what is frozen and what is not, and what a user hears when a folder does not serve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from pydantic import ValidationError
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, check_projector
from lmd_bench.projector.open import open_projector


def tiny_autoencoder(seed: int = 0, latent_channels: int = 5) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=latent_channels,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "tiny-f4"
    tiny_autoencoder().save_pretrained(path, safe_serialization=True)
    return path


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))


def open_kl(folder: Path, **options: object) -> LatentProjector:
    return open_projector(ProjectorConfig.model_validate({"kind": "kl", "path": str(folder), **options}))


def test_pixels_go_to_the_methods_range_and_back(images: Tensor) -> None:
    projector = open_projector(ProjectorConfig(kind="pixels"))
    assert (projector.name, projector.factor, projector.latent_channels) == ("pixels", 1, 3)
    latents = projector.encode(images)
    assert torch.equal(latents, images * 2 - 1)
    torch.testing.assert_close(projector.decode(latents), images)


def test_kl_latents_are_the_mode_of_the_posterior_without_any_factor(folder: Path, images: Tensor) -> None:
    projector = open_kl(folder)
    assert (projector.name, projector.factor, projector.latent_channels) == ("tiny-f4", 4, 5)
    model = tiny_autoencoder().eval()
    with torch.no_grad():
        expected = model.encode(images * 2 - 1).latent_dist.mode()
        rebuilt = (model.decode(expected).sample * 0.5 + 0.5).clamp(0, 1)
    latents = projector.encode(images)
    assert latents.shape == (2, 5, 8, 12)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.decode(latents), rebuilt, rtol=1e-4, atol=1e-5)


def test_scale_multiplies_latents_and_cancels_in_the_decoder(folder: Path, images: Tensor) -> None:
    plain, scaled = open_kl(folder), open_kl(folder, scale=0.18215)
    latents = plain.encode(images)
    torch.testing.assert_close(scaled.encode(images), latents * 0.18215)
    torch.testing.assert_close(scaled.decode(latents * 0.18215), plain.decode(latents), rtol=1e-4, atol=1e-5)


def test_bf16_runs_the_network_in_bf16_and_returns_float32(folder: Path, images: Tensor) -> None:
    projector, reference = open_kl(folder, precision="bf16"), open_kl(folder)
    assert {parameter.dtype for parameter in projector.parameters()} == {torch.bfloat16}
    latents = projector.encode(images)
    assert latents.dtype == projector.decode(latents).dtype == torch.float32
    assert not torch.equal(latents, reference.encode(images))
    torch.testing.assert_close(latents, reference.encode(images), rtol=0.1, atol=0.05)


def test_the_loops_autocast_does_not_reach_the_projector(folder: Path, images: Tensor) -> None:
    projector = open_kl(folder)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = projector.encode(images)
    assert torch.equal(inside, projector.encode(images))


@pytest.mark.parametrize("kind", ["pixels", "kl"])
def test_images_come_back_inside_the_unit_range(kind: str, folder: Path, images: Tensor) -> None:
    projector = open_projector(ProjectorConfig(kind="pixels")) if kind == "pixels" else open_kl(folder)
    rebuilt = projector.decode(projector.encode(images) * 50, quantize=True)
    assert rebuilt.shape == images.shape
    assert 0.0 <= rebuilt.min() < rebuilt.max() <= 1.0


def test_a_projector_stays_frozen_and_in_evaluation_mode_under_a_training_parent(folder: Path) -> None:
    parent = nn.ModuleDict({"projector": open_kl(folder), "head": nn.Linear(2, 2)})
    parent.train()
    assert parent["head"].training
    assert not any(module.training for module in parent["projector"].modules())
    assert not any(parameter.requires_grad for parameter in parent["projector"].parameters())


def test_gradients_reach_latents_through_the_decoder_but_no_weights(folder: Path, images: Tensor) -> None:
    projector = open_kl(folder)
    latents = projector.encode(images)
    assert not latents.requires_grad
    latents.requires_grad_()
    projector.decode(latents).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in projector.parameters())


def test_encoding_takes_no_part_in_a_graph_but_its_latents_can(folder: Path, images: Tensor) -> None:
    projector = open_kl(folder)
    latents = projector.encode(images.requires_grad_())
    assert not latents.requires_grad
    weight = torch.ones((), requires_grad=True)
    (latents * weight).sum().backward()  # an inference-mode tensor would raise here
    assert weight.grad is not None


def test_the_check_knows_what_opening_finds(folder: Path) -> None:
    config = ProjectorConfig(kind="kl", path=str(folder), scale=2.0)
    info, projector = check_projector(config, image_size=64), open_projector(config)
    assert (info.name, info.factor, info.latent_channels) == ("tiny-f4 x 2", 4, 5)
    assert (projector.name, projector.factor, projector.latent_channels) == ("tiny-f4 x 2", 4, 5)


def rewrite_config(folder: Path, target: Path, **changes: object) -> ProjectorConfig:
    """A copy of the folder with other values in its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return ProjectorConfig(kind="kl", path=str(target))


def test_a_missing_folder_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    config = ProjectorConfig(kind="kl", path=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"nowhere: no such folder; give a diffusers AutoencoderKL folder"):
        check_projector(config, 64)


def test_an_unknown_shipped_name_lists_the_shipped_ones() -> None:
    with pytest.raises(WeightsError, match=r"shipped:nope: no such weights; shipped are .*scenes-kl-f8"):
        check_projector(ProjectorConfig(kind="kl", path="shipped:nope"), 64)


def test_another_model_class_is_refused(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "vq", _class_name="VQModel")
    with pytest.raises(WeightsError, match="holds a VQModel; kind 'kl' needs an AutoencoderKL"):
        check_projector(config, 64)


def test_a_folder_without_safetensors_is_refused_even_if_it_has_a_pickle(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "bin")
    weights = tmp_path / "bin" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(WeightsError, match=r"safetensors is missing; only safetensors are loaded"):
        open_projector(config)


def test_a_folder_without_a_readable_config_is_refused(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "broken")
    (tmp_path / "broken" / "config.json").write_text("{")
    with pytest.raises(WeightsError, match="cannot be read as JSON"):
        check_projector(config, 64)
    (tmp_path / "broken" / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"config.json is missing"):
        check_projector(config, 64)


def test_an_image_size_the_factor_does_not_divide_is_refused(folder: Path) -> None:
    config = ProjectorConfig(kind="kl", path=str(folder))
    with pytest.raises(WeightsError, match="image_size 66 is not divisible by its factor 4; use 64 or 68"):
        check_projector(config, 66)


def test_a_damaged_weight_file_is_a_weights_error(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "cut")
    weights = tmp_path / "cut" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(WeightsError, match=r"cannot be loaded .* save the model again"):
        open_projector(config)


def test_weights_of_another_architecture_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"weights and config\.json are of different models"):
        open_projector(rewrite_config(folder, tmp_path / "deeper", layers_per_block=2))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        open_projector(rewrite_config(folder, tmp_path / "wider", latent_channels=6))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "kl"}, "needs a path"),
        ({"kind": "pixels", "path": "x"}, "loads nothing"),
        ({"kind": "pixels", "scale": 0.0}, "greater than 0"),
        ({"kind": "vq"}, "'pixels' or 'kl'"),
        ({"kind": "pixels", "factor": 8}, "Extra inputs"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProjectorConfig.model_validate(values)


def test_config_and_check_import_no_torch() -> None:
    code = (
        "import sys; from lmd_bench.projector.config import ProjectorConfig, check_projector;"
        "config = ProjectorConfig(kind='kl', path='shipped:scenes-kl-f8');"
        "print(check_projector(config, 64).factor, 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["8", "False"]
