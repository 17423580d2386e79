"""Projectors of all kinds: shapes, what is frozen, and what a user hears where a folder does not serve."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor, nn

from lmd_bench.errors import WeightsError
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import (
    CLASS_OF_KIND,
    WEIGHTS_FILE,
    ProjectorConfig,
    check_projector,
    config_of_path,
    weights_bytes,
    weights_digest,
)
from lmd_bench.projector.light import LightAutoencoder
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


def tiny_vq(seed: int = 0) -> VQModel:
    torch.manual_seed(seed)
    return VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 16),
        norm_num_groups=4,
        latent_channels=6,
        vq_embed_dim=3,
        num_vq_embeddings=40,
    )


def tiny_taesd(seed: int = 0) -> AutoencoderTiny:
    torch.manual_seed(seed)
    return AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        latent_channels=2,
    )


def tiny_light(seed: int = 0) -> LightAutoencoder:
    torch.manual_seed(seed)
    return LightAutoencoder(factor=4, encoder_hidden=8, decoder_widths=(16, 8), decoder_blocks=(1, 1))


MODELS = {"kl": tiny_autoencoder, "vq": tiny_vq, "tiny": tiny_taesd, "light": tiny_light}
CHANNELS = {"kl": 5, "vq": 3, "tiny": 2, "light": 4}
KINDS = list(MODELS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of each kind, all of factor 4."""
    root = tmp_path_factory.mktemp("kinds")
    for kind, make in MODELS.items():
        make().save_pretrained(root / f"{kind}-f4", safe_serialization=True)
    return {kind: root / f"{kind}-f4" for kind in MODELS}


def config_of(kind: str, folder: Path, **options: object) -> ProjectorConfig:
    return ProjectorConfig.model_validate({"kind": kind, "path": str(folder), **options})


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


# -- every kind -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_known_before_and_after_loading(kind: str, folders: dict[str, Path]) -> None:
    config = config_of(kind, folders[kind])
    info, projector = check_projector(config, image_size=32), open_projector(config)
    assert (info.name, info.factor, info.latent_channels) == (f"{kind}-f4", 4, CHANNELS[kind])
    assert (projector.name, projector.factor, projector.latent_channels) == (f"{kind}-f4", 4, CHANNELS[kind])
    assert config_of_path(str(folders[kind])) == config


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_frozen_and_gives_images_of_the_same_size(
    kind: str, folders: dict[str, Path], images: Tensor
) -> None:
    projector = open_projector(config_of(kind, folders[kind])).train()
    assert not any(parameter.requires_grad for parameter in projector.parameters())
    assert not any(module.training for module in projector.modules())
    latents = projector.encode(images)
    assert latents.shape == (2, CHANNELS[kind], 8, 12)
    assert projector.decode(latents).shape == images.shape
    scaled = open_projector(config_of(kind, folders[kind], scale=0.5))
    torch.testing.assert_close(scaled.encode(images), latents * 0.5)
    torch.testing.assert_close(scaled.decode(latents * 0.5), projector.decode(latents), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_half_precision_are_computed_with_in_the_configured_one(
    kind: str, folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    MODELS[kind]().half().save_pretrained(tmp_path / kind, safe_serialization=True)
    on_disk = load_file(tmp_path / kind / WEIGHTS_FILE)
    assert {tensor.dtype for tensor in on_disk.values()} == {torch.float16}
    full = open_projector(config_of(kind, tmp_path / kind))
    assert {parameter.dtype for parameter in full.parameters()} == {torch.float32}
    exact = open_projector(config_of(kind, folders[kind]))
    torch.testing.assert_close(full.encode(images), exact.encode(images), rtol=0.02, atol=0.01)
    short = open_projector(config_of(kind, tmp_path / kind, precision="bf16"))
    assert {parameter.dtype for parameter in short.parameters()} == {torch.bfloat16}
    assert short.encode(images).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_of_another_kind_is_refused_with_the_kind_that_takes_it(kind: str, folders: dict[str, Path]) -> None:
    for other in set(KINDS) - {kind}:
        needed, found = CLASS_OF_KIND[kind], CLASS_OF_KIND[other]
        with pytest.raises(WeightsError, match=f"class is {found}, kind '{kind}' needs {needed}; use kind '{other}'"):
            check_projector(config_of(kind, folders[other]), 32)


@pytest.mark.parametrize("kind", ["kl", "vq", "tiny"])
def test_an_autoencoder_of_grey_images_is_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = rewrite_config(folders[kind], tmp_path / "grey", kind, in_channels=1, out_channels=1)
    with pytest.raises(WeightsError, match=r"not an autoencoder of RGB images; .* must be 3, not 1, 1"):
        open_projector(config)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_model_of_the_class_are_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    config = rewrite_config(folders[kind], tmp_path / "other", kind, latent_channels=7, vq_embed_dim=7)
    with pytest.raises(WeightsError, match="cannot be loaded"):
        open_projector(config)


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("kl", {"block_out_channels": []}, r"has block_out_channels \[\]; a list with one number per resolution"),
        ("kl", {"latent_channels": "four"}, r"has latent_channels 'four'; a whole number of 1 or more"),
        ("vq", {"vq_embed_dim": 0}, r"has vq_embed_dim 0; a whole number of 1 or more"),
        ("tiny", {"num_decoder_blocks": [1, 1]}, r"shrinks images by 4 .* enlarges latents by 2"),
        ("light", {"factor": 6}, r"has factor 6; a power of two"),
    ],
)
def test_sizes_that_cannot_be_are_refused_without_loading(
    kind: str, changes: dict[str, object], message: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(WeightsError, match=message):
        check_projector(rewrite_config(folders[kind], tmp_path / "odd", kind, **changes), 32)


def test_a_folder_of_no_known_kind_is_refused_with_the_known_classes(folder: Path, tmp_path: Path) -> None:
    rewrite_config(folder, tmp_path / "unet", _class_name="UNet2DModel")
    with pytest.raises(WeightsError, match=r"is of the class UNet2DModel; known classes are AutoencoderKL, VQModel"):
        config_of_path(str(tmp_path / "unet"))


# -- vq and tiny ------------------------------------------------------------------------------------------------------


def test_vq_latents_lie_before_the_codebook_and_are_decoded_as_they_are(
    folders: dict[str, Path], images: Tensor
) -> None:
    projector, model = open_projector(config_of("vq", folders["vq"])), tiny_vq().eval()
    latents = projector.encode(images)
    with torch.no_grad():
        expected = model.encode(images * 2 - 1).latents
        rebuilt = model.decode(expected, force_not_quantize=True).sample * 0.5 + 0.5
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.decode(latents), rebuilt.clamp(0, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_vq_quantises_on_request_as_diffusers_does(scale: float, folders: dict[str, Path], images: Tensor) -> None:
    projector, model = open_projector(config_of("vq", folders["vq"], scale=scale)), tiny_vq().eval()
    latents = projector.encode(images)
    with torch.no_grad():
        rebuilt = (model.decode(latents / scale).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(projector.decode(latents, quantize=True), rebuilt, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(projector.decode(latents), rebuilt, atol=1e-3)
    assert projector.codebook is not None
    on_codes = projector.codebook[torch.arange(6) % 40].t().reshape(1, 3, 2, 3)
    torch.testing.assert_close(projector.decode(on_codes, quantize=True), projector.decode(on_codes))


def test_gradients_pass_straight_through_the_codebook(folders: dict[str, Path], images: Tensor) -> None:
    projector = open_projector(config_of("vq", folders["vq"]))
    latents = projector.encode(images).requires_grad_()
    projector.decode(latents, quantize=True).square().mean().backward()
    assert latents.grad is not None
    assert latents.grad.abs().sum() > 0


def test_only_vq_has_a_codebook(folders: dict[str, Path]) -> None:
    for kind in KINDS:
        codebook = open_projector(config_of(kind, folders[kind])).codebook
        assert (codebook is not None) == (kind == "vq")


def test_vq_ignores_a_config_that_takes_latents_for_indices(
    folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    plain = open_projector(config_of("vq", folders["vq"]))
    looking = open_projector(rewrite_config(folders["vq"], tmp_path / "lookup", "vq", lookup_from_codebook=True))
    latents = plain.encode(images)
    assert torch.equal(looking.decode(latents), plain.decode(latents))


def test_tiny_takes_images_in_the_classs_own_range(folders: dict[str, Path], images: Tensor) -> None:
    projector, model = open_projector(config_of("tiny", folders["tiny"])), tiny_taesd().eval()
    with torch.no_grad():
        # What TAESD was trained on: layers see [0, 1], and the decoder squashes its latents.
        expected = model.encoder.layers(images)
        rebuilt = model.decoder.layers(torch.tanh(expected / 3) * 3)
    latents = projector.encode(images)
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(projector.decode(latents), rebuilt.clamp(0, 1), rtol=1e-4, atol=1e-5)


# -- what latents depend on -------------------------------------------------------------------------------------------


def test_the_digest_changes_with_all_that_changes_latents_and_nothing_else(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    plain = config_of("light", folders["light"])
    copied = rewrite_config(folders["light"], tmp_path / "copied", "light")
    (tmp_path / "copied" / "config.json").write_bytes((folders["light"] / "config.json").read_bytes())
    assert weights_digest(plain) == weights_digest(copied)
    assert len(weights_digest(plain)) == 16
    assert weights_digest(plain) == weights_digest(plain.model_copy(update={"cache": "auto"}))
    others = [
        config_of("light", folders["light"], scale=2.0),
        config_of("light", folders["light"], precision="bf16"),
        rewrite_config(folders["light"], tmp_path / "edited", "light", sample_size=32),
        config_of("kl", folders["kl"]),
        ProjectorConfig(kind="pixels"),
        ProjectorConfig(kind="pixels", scale=2.0),
    ]
    weights = tmp_path / "copied" / WEIGHTS_FILE
    before = weights_digest(copied)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    digests = [before, weights_digest(copied), *map(weights_digest, others)]
    assert len(set(digests)) == len(digests)


def test_weights_in_several_files_are_counted_checked_and_loaded(
    folders: dict[str, Path], tmp_path: Path, images: Tensor
) -> None:
    tiny_light().save_pretrained(tmp_path / "parts", safe_serialization=True, max_shard_size="10KB")
    shards = sorted((tmp_path / "parts").glob("*.safetensors"))
    assert len(shards) > 1
    config = config_of("light", tmp_path / "parts")
    assert weights_bytes(config) > sum(shard.stat().st_size for shard in shards)
    whole = open_projector(config_of("light", folders["light"]))
    assert torch.equal(open_projector(config).encode(images), whole.encode(images))
    shards[0].unlink()
    with pytest.raises(WeightsError, match=r"safetensors.index.json names, is missing; copy it there too"):
        check_projector(config, 32)


# -- errors -----------------------------------------------------------------------------------------------------------


def rewrite_config(folder: Path, target: Path, kind: str = "kl", **changes: object) -> ProjectorConfig:
    """A copy of the folder with other values in its config.json."""
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    values = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**values, **changes}))
    return config_of(kind, target)


def test_a_missing_folder_is_named_with_what_would_be_right(tmp_path: Path) -> None:
    config = ProjectorConfig(kind="kl", path=str(tmp_path / "nowhere"))
    with pytest.raises(WeightsError, match=r"nowhere: no such folder; give a diffusers AutoencoderKL folder"):
        check_projector(config, 64)


def test_an_unknown_shipped_name_lists_the_shipped_ones() -> None:
    with pytest.raises(WeightsError, match=r"shipped:nope: no such weights; shipped are .*scenes-light-f8"):
        check_projector(ProjectorConfig(kind="kl", path="shipped:nope"), 64)


def test_another_model_class_is_refused(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "vq", _class_name="VQModel")
    with pytest.raises(
        WeightsError, match="the model's class is VQModel, kind 'kl' needs AutoencoderKL; use kind 'vq'"
    ):
        check_projector(config, 64)


def test_a_config_without_a_class_is_refused_in_words(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "nameless", _class_name=None)
    with pytest.raises(WeightsError, match=r"config\.json has no _class_name, kind 'kl' needs AutoencoderKL$"):
        check_projector(config, 64)
    with pytest.raises(WeightsError, match=r"config\.json has no _class_name; known classes are"):
        config_of_path(str(tmp_path / "nameless"))


def test_weights_in_one_file_and_in_several_at_once_are_refused(folder: Path, tmp_path: Path) -> None:
    config = rewrite_config(folder, tmp_path / "both")
    index = {"weight_map": {"a": WEIGHTS_FILE}}
    (tmp_path / "both" / (WEIGHTS_FILE + ".index.json")).write_text(json.dumps(index))
    for check in (weights_digest, lambda config: check_projector(config, 64)):
        with pytest.raises(WeightsError, match=r"holds both .*safetensors and .*index\.json; remove the one"):
            check(config)


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
    wanted = (
        r"cannot be loaded \(.*of different sizes: \S+ is \([\d, ]+\), by config\.json \([\d, ]+\).* and \d+ more\)"
    )
    with pytest.raises(WeightsError, match=wanted) as refused:
        open_projector(rewrite_config(folder, tmp_path / "wider", latent_channels=6))
    assert "decoder.conv_in.weight is (16, 5, 3, 3), by config.json (16, 6, 3, 3)" in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "kl"}, "needs a path"),
        ({"kind": "pixels", "path": "x"}, "loads nothing"),
        ({"kind": "pixels", "scale": 0.0}, "greater than 0"),
        ({"kind": "vq"}, "needs a path: a folder of a VQModel"),
        ({"kind": "jpeg"}, "'pixels', 'kl', 'vq', 'tiny' or 'light'"),
        ({"kind": "pixels", "cache": "auto"}, "nothing to keep; leave out cache 'auto'"),
        ({"kind": "kl", "path": "x", "cache": ""}, "cache is empty"),
        ({"kind": "pixels", "factor": 8}, "Extra inputs"),
    ],
)
def test_values_that_make_no_sense_are_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ProjectorConfig.model_validate(values)


def test_config_and_check_import_no_torch() -> None:
    code = (
        "import sys; from lmd_bench.projector.config import ProjectorConfig, check_projector, weights_digest;"
        "config = ProjectorConfig(kind='light', path='shipped:scenes-light-f8');"
        "print(check_projector(config, 64).factor, len(weights_digest(config)), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["8", "16", "False"]
