"""Stable Diffusion as a method: diffusers' inpainting pipeline, fed without a hidden pixel, from a local folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionInpaintPipeline
from torch import Tensor

from baselines._text_to_image import hidden_cells
from baselines.stable_diffusion import StableDiffusion, StableDiffusionConfig
from lmd_bench.errors import BenchError, ConfigError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask
from lmd_bench.testing import check_method
from tests.helpers.pipelines import save_stable_diffusion

CAPTIONS = ["a red ball", "blue", "a red box that is " * 5]
"""The last one is longer than the text encoder reads."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_stable_diffusion(tmp_path_factory.mktemp("pipelines") / "tiny-sd")


@pytest.fixture(scope="module")
def method(folder: Path) -> StableDiffusion:
    return StableDiffusion(options(folder), DataSpec(32))


def options(folder: Path, **values: Any) -> StableDiffusionConfig:
    return StableDiffusionConfig(path=str(folder), **{"num_inference_steps": 3, **values})


def inputs(size: int = 32, units: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, size, size, generator=generator)
    return images, torch.rand(3, units, units, generator=generator) < 0.6


def filled(method: StableDiffusion, images: Tensor, mask: Tensor, captions: list[str] | None = None) -> Tensor:
    torch.manual_seed(7)
    return (
        method.reconstruct(images, mask) if captions is None else method.reconstruct_captioned(images, mask, captions)
    )


@pytest.mark.parametrize("image_size", [32, 48])
def test_it_keeps_the_contract_of_a_method_that_comes_trained(folder: Path, image_size: int) -> None:
    check_method(StableDiffusion, options(folder), DataSpec(image_size))


def test_a_picture_is_that_of_diffusers_pipeline_given_pixels_and_prompts(folder: Path) -> None:
    images, mask = inputs()
    pipeline = StableDiffusionInpaintPipeline.from_pretrained(
        folder, local_files_only=True, low_cpu_mem_usage=False, safety_checker=None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    hidden = pixel_mask(mask, 32)
    torch.manual_seed(7)
    generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**63 - 1, (3,)).tolist()]
    expected = pipeline(
        prompt=[*CAPTIONS[:2], ""], image=fill_with_visible_mean(images, hidden), mask_image=hidden.float(), height=32,
        width=32, num_inference_steps=3, guidance_scale=7.5, generator=generators, output_type="pt", return_dict=False,
    )[0]  # fmt: skip
    found = filled(StableDiffusion(options(folder), DataSpec(32)), images, mask, [*CAPTIONS[:2], ""])
    assert torch.allclose(found, expected, atol=1e-5)
    assert expected.std() > 0.05


def test_no_hidden_pixel_reaches_the_model(method: StableDiffusion) -> None:
    images, mask = inputs()
    other = torch.where(pixel_mask(mask, 32), torch.rand_like(images), images)
    assert torch.equal(filled(method, images, mask, CAPTIONS), filled(method, other, mask, CAPTIONS))


def test_captions_matter_and_a_missing_one_is_an_empty_one_without_guidance(method: StableDiffusion) -> None:
    images, mask = inputs()
    with_captions = filled(method, images, mask, CAPTIONS)
    assert (with_captions - filled(method, images, mask, CAPTIONS[::-1])).abs().max() > 1e-3
    empty, none = filled(method, images, mask, ["", "", ""]), filled(method, images, mask)
    assert torch.allclose(empty, none, atol=1e-4)
    with pytest.raises(ConfigError, match=r"^2 captions for 3 images: give one for each$"):
        filled(method, images, mask, CAPTIONS[:2])


def test_a_picture_does_not_depend_on_the_others_of_its_batch(method: StableDiffusion) -> None:
    images, mask = inputs()
    alone = filled(method, images[:1], mask[:1], CAPTIONS[:1])
    assert torch.allclose(filled(method, images, mask, CAPTIONS)[:1], alone, atol=1e-5)


def test_visible_latents_are_the_images_own_at_the_end(
    method: StableDiffusion, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, mask = inputs()
    decoded: list[Tensor] = []
    decode = method.vae.decode

    def spy(latents: Tensor, **kwargs: Any) -> Any:
        decoded.append(latents)
        return decode(latents, **kwargs)

    monkeypatch.setattr(method.vae, "decode", spy)
    filled(method, images, mask)
    torch.manual_seed(7)
    generators = [torch.Generator().manual_seed(seed) for seed in torch.randint(2**63 - 1, (3,)).tolist()]
    with torch.no_grad():
        own = method.encode(fill_with_visible_mean(images, pixel_mask(mask, 32)), generators)
    visible = ~hidden_cells(mask, 8).unsqueeze(1).expand_as(own)
    gap = (decoded[0] * method.vae.config.scaling_factor - own).abs()
    assert gap[visible].max() < 1e-6
    assert gap[~visible].mean() > 1e-3


@pytest.mark.parametrize(("units", "cells"), [(4, 8), (3, 8), (8, 3), (7, 64), (5, 5)])
def test_latent_positions_that_touch_a_hidden_unit_are_hidden(units: int, cells: int) -> None:
    mask = torch.rand(6, units, units, generator=torch.Generator().manual_seed(0)) < 0.3
    pixels = pixel_mask(mask, units * cells).float()
    expected = torch.nn.functional.max_pool2d(pixels, units).squeeze(1).bool()
    assert torch.equal(hidden_cells(mask, cells), expected)


def test_the_network_is_called_as_often_as_it_says(method: StableDiffusion) -> None:
    calls: list[int] = []
    handle = method.unet.register_forward_hook(lambda module, given, out: calls.append(len(out[0])))
    images, mask = inputs()
    filled(method, images, mask)
    assert calls == [3] * method.num_function_evaluations == [3] * 4  # PNDM repeats a timestep
    calls.clear()
    filled(method, images, mask, CAPTIONS)
    handle.remove()
    assert calls == [6] * 4


def test_it_follows_the_precision_of_its_caller(method: StableDiffusion) -> None:
    images, mask = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = filled(method, images, mask, CAPTIONS)
    full = filled(method, images, mask, CAPTIONS)
    assert found.dtype == torch.float32
    assert 0 < (found - full).abs().mean() < 0.1


def test_another_native_size_is_painted_at_and_eta_draws_noise(tmp_path: Path) -> None:
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    folder = save_stable_diffusion(tmp_path / "ddim", scheduler=scheduler)
    images, mask = inputs(48, 3)
    small, large = (StableDiffusion(options(folder, native_size=size), DataSpec(48)) for size in (32, 64))
    assert filled(small, images, mask).shape == filled(large, images, mask).shape == images.shape
    assert large.cells == 16
    assert StableDiffusion.token_px(options(folder, native_size=64), DataSpec(48)) == 3
    assert StableDiffusion.token_px(options(folder, native_size=32), DataSpec(36)) is None
    noisy = StableDiffusion(options(folder, eta=1.0), DataSpec(48))
    assert not torch.allclose(filled(noisy, images, mask), filled(small, images, mask))


def test_the_ceiling_is_the_autoencoders_and_is_named(method: StableDiffusion) -> None:
    images, _ = inputs()
    assert method.projector_name == "tiny-sd/vae"
    with torch.no_grad():
        assert torch.equal(method.round_trip(images), method.decode(method.encode(images)))


def test_there_is_no_step_to_train(method: StableDiffusion) -> None:
    with pytest.raises(TypeError, match=r"^StableDiffusion comes trained: it has no training step$"):
        method.training_step(inputs()[0], step=1, total_steps=2)


# -- folders that cannot be used --------------------------------------------------------------------------------------


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def rename(name: str, other: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).rename((folder / name).with_name(other)) and None


def change(name: str, **values: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / name
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return apply


SCHEDULER = "scheduler/scheduler_config.json"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: shutil.rmtree(folder), r"no such folder; give a pipeline's folder in diffusers' layout"),
        (remove("vae/config.json"), r"vae/config.json is missing; copy the whole pipeline"),
        (remove("scheduler/scheduler_config.json"), r"scheduler/scheduler_config.json is missing"),
        (remove("tokenizer/merges.txt"), r"tokenizer/merges.txt is missing"),
        (remove(WEIGHTS), rf"{WEIGHTS} is missing; copy the whole pipeline"),
        (rename(WEIGHTS, "diffusion_pytorch_model.bin"), r"from safetensors only: save the pipeline again"),
        (rename(WEIGHTS, "diffusion_pytorch_model.fp16.safetensors"), r"fp16.safetensors is another variant: copy"),
        (change("unet/config.json", in_channels=9), r"9 input channels: an inpainting model; give a text-to-image"),
        (change("unet/config.json", _class_name="UNet2DModel"), r"a UNet2DModel, UNet2DConditionModel is needed"),
        (change("unet/config.json", cross_attention_dim=99), r"reads text 99 wide, the text encoder's is 16: parts"),
        (change("unet/config.json", sample_size=None), r"sample_size is None, a whole number of at least 1 is need"),
        (change("vae/config.json", latent_channels=16), r"not 4 latent channels, as the U-Net has"),
        (change("scheduler/scheduler_config.json", _class_name="AmusedScheduler"), r"AmusedScheduler does not fit"),
        (change(SCHEDULER, beta_start="x"), r"scheduler/scheduler_config.json: no PNDMScheduler for 3 steps"),
        (change(SCHEDULER, num_train_timesteps=None), r"for 3 steps can be made of it \(TypeError: "),
        (change(SCHEDULER, timestep_spacing="odd"), r"\(ValueError: odd is not .*\); copy the file again$"),
        (lambda folder: (folder / "text_encoder_2").mkdir(), r"Stable Diffusion XL \(two text encoders\); give a v1"),
        (lambda folder: (folder / "unet/config.json").write_text("{"), r"cannot be read as JSON"),
    ],
)  # fmt: skip
def test_a_folder_of_another_kind_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    with pytest.raises(WeightsError, match=words) as caught:
        StableDiffusion.check(options(copy), DataSpec(32))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"eta": 0.5}, r"^eta 0.5: PNDMScheduler has none; leave it 0"),
        ({"num_inference_steps": 1001}, r"^num_inference_steps 1001: too many for PNDMScheduler with its 1000 time"),
        ({"num_inference_steps": 1000}, r"^num_inference_steps 1000: too many"),  # its offset leads beyond the last one
        ({"native_size": 36}, r"^native_size 36: the model paints at multiples of 8 px$"),
    ],
)
def test_options_that_the_folder_cannot_serve_are_refused(folder: Path, values: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        StableDiffusion.check(options(folder, **values), DataSpec(32))


def test_without_transformers_it_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs transformers: pip install 'lmd-bench\[sd\]'$"):
        StableDiffusion.check(options(folder), DataSpec(32))


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_weights_that_do_not_fit_their_configuration_are_an_error(folder: Path, tmp_path: Path, part: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    change(f"{part}/config.json", **({"block_out_channels": [8, 24]} if part == "unet" else {"num_hidden_layers": 3}))(
        copy
    )
    with pytest.raises(BenchError, match=rf"{part} .*copy/{part}: .*(different|cannot be loaded)"):
        StableDiffusion(options(copy), DataSpec(32))


def test_the_digest_changes_with_a_weight_and_with_a_setting(folder: Path, tmp_path: Path) -> None:
    first = StableDiffusion.inputs_digest(options(folder))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    assert StableDiffusion.inputs_digest(options(copy)) == first
    weights = copy / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    second = StableDiffusion.inputs_digest(options(copy))
    change("scheduler/scheduler_config.json", beta_end=0.02)(copy)
    assert len({first, second, StableDiffusion.inputs_digest(options(copy))}) == 3
