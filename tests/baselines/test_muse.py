"""aMUSEd as a method: our loop over masked tokens beside the deprecated pipelines', from a local folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from baselines._text_to_image import hidden_cells
from baselines.muse import Muse, MuseConfig
from lmd_bench.errors import WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask
from lmd_bench.testing import check_method
from tests.helpers.pipelines import MASK_TOKEN, save_amused
from tests.parity.fill import filled_tensor

TOKENS = Path(__file__).parent / "amused_tokens.json"
CAPTIONS = ["a red ball", "blue", "a red box that is " * 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_amused(tmp_path_factory.mktemp("pipelines") / "tiny-amused")


@pytest.fixture(scope="module")
def method(folder: Path) -> Muse:
    return Muse(options(folder), DataSpec(32))


def options(folder: Path, **values: Any) -> MuseConfig:
    return MuseConfig(path=str(folder), **{"num_inference_steps": 5, **values})


def inputs(size: int = 32, units: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, size, size, generator=generator)
    return images, torch.rand(3, units, units, generator=generator) < 0.6


def filled(method: Muse, images: Tensor, mask: Tensor, captions: list[str] | None = None) -> Tensor:
    torch.manual_seed(7)
    return (
        method.reconstruct(images, mask) if captions is None else method.reconstruct_captioned(images, mask, captions)
    )


def deprecated_pipeline(name: str, folder: Path) -> Any:
    """diffusers' own pipeline, as long as it can be imported."""
    amused = pytest.importorskip("diffusers.pipelines.deprecated.amused", reason="diffusers has dropped the pipelines")
    pipeline = getattr(amused, name).from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.mark.parametrize("image_size", [32, 48])
def test_it_keeps_the_contract_of_a_method_that_comes_trained(folder: Path, image_size: int) -> None:
    check_method(Muse, options(folder), DataSpec(image_size))


def test_a_filled_picture_is_that_of_the_deprecated_inpainting_pipeline(folder: Path, method: Muse) -> None:
    pipeline = deprecated_pipeline("AmusedInpaintPipeline", folder)
    images, mask = inputs()
    hidden = pixel_mask(mask, 32)
    known = fill_with_visible_mean(images, hidden)
    torch.manual_seed(7)
    seeds = torch.randint(2**63 - 1, (3,)).tolist()
    expected = [
        pipeline(
            caption, known[i : i + 1], hidden[i : i + 1].float(), num_inference_steps=5,
            generator=torch.Generator().manual_seed(seeds[i]), output_type="pt", return_dict=False,
        )[0]
        for i, caption in enumerate(CAPTIONS)
    ]  # fmt: skip
    assert torch.allclose(filled(method, images, mask, CAPTIONS), torch.cat(expected), atol=1e-5)


# -- the same without the deprecated pipeline -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def settled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline whose weights follow a rule (`parity.fill`), not what a version of the libraries draws."""
    folder = save_amused(tmp_path_factory.mktemp("settled") / "tiny-amused")
    for file in sorted(folder.rglob("*.safetensors")):
        weights = load_file(file)
        for number, (key, value) in enumerate(sorted(weights.items())):
            kind = "matrix" if value.ndim > 1 else "norm_weight" if key.endswith("weight") else "vector"
            weights[key] = filled_tensor({"key": key, "index": number, "shape": list(value.shape), "fill": kind})
        if "mlm_layer.conv2.weight" in weights:
            weights["mlm_layer.conv2.weight"] *= 10  # as in `save_amused`
        save_file(weights, file, {"format": "pt"})
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The likeliest token in place of a drawn one: draws differ between processors."""
    monkeypatch.setattr(torch, "multinomial", lambda found, count, generator: found.argmax(-1, keepdim=True))


def stored_tokens() -> Tensor:
    """(3, 8, 8) tokens of diffusers 0.42.1's AmusedInpaintPipeline, as the next test has it make them."""
    return torch.tensor(json.loads(TOKENS.read_text()))


@pytest.mark.usefixtures("undrawn")
def test_the_stored_tokens_are_those_of_the_deprecated_pipeline(settled: Path) -> None:
    pipeline = deprecated_pipeline("AmusedInpaintPipeline", settled)
    images, mask = inputs()
    hidden = pixel_mask(mask, 32)
    known = fill_with_visible_mean(images, hidden)
    found = [
        pipeline(
            caption, known[i : i + 1], hidden[i : i + 1].float(), num_inference_steps=5, temperature=(0, 0),
            output_type="latent", return_dict=False,
        )[0]
        for i, caption in enumerate(CAPTIONS)
    ]  # fmt: skip
    assert torch.equal(torch.cat(found), stored_tokens())


@pytest.mark.usefixtures("undrawn")
def test_our_loop_arrives_at_the_stored_tokens(settled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Muse(options(settled, temperature=(0.0, 0.0)), DataSpec(32))
    images, mask = inputs()
    decoded: list[Tensor] = []
    decode = method.decode
    monkeypatch.setattr(method, "decode", lambda tokens: (decoded.append(tokens), decode(tokens))[1])
    filled(method, images, mask, CAPTIONS)
    assert torch.equal(decoded[0], stored_tokens())
    assert len(stored_tokens().unique()) > 5


def test_a_picture_from_nothing_is_that_of_the_deprecated_text_to_image_pipeline(folder: Path) -> None:
    pipeline = deprecated_pipeline("AmusedPipeline", folder)
    torch.manual_seed(7)
    seed = int(torch.randint(2**63 - 1, (1,)))
    expected = pipeline(
        CAPTIONS[0], height=32, width=32, num_inference_steps=5, generator=torch.Generator().manual_seed(seed),
        output_type="pt", return_dict=False,
    )[0]  # fmt: skip
    method = Muse(options(folder, mask_schedule="cosine"), DataSpec(32))
    found = filled(method, torch.zeros(1, 3, 32, 32), torch.ones(1, 4, 4, dtype=torch.bool), CAPTIONS[:1])
    assert torch.allclose(found, expected, atol=1e-5)


def test_only_hidden_tokens_are_changed_and_none_is_left_masked(method: Muse, monkeypatch: pytest.MonkeyPatch) -> None:
    images, mask = inputs()
    decoded: list[Tensor] = []
    decode = method.decode
    monkeypatch.setattr(method, "decode", lambda tokens: (decoded.append(tokens), decode(tokens))[1])
    filled(method, images, mask, CAPTIONS)
    with torch.no_grad():
        own = method.encode(fill_with_visible_mean(images, pixel_mask(mask, 32)))
    hidden = hidden_cells(mask, 8)
    assert torch.equal(decoded[0][~hidden], own[~hidden])
    assert (decoded[0][hidden] != own[hidden]).any()
    assert (decoded[0] != MASK_TOKEN).all()


def test_fewer_tokens_are_masked_at_every_step(method: Muse) -> None:
    seen: list[Tensor] = []
    handle = method.transformer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    images, mask = inputs()
    filled(method, images, mask)
    handle.remove()
    counts = torch.stack([(tokens == MASK_TOKEN).sum(dim=(1, 2)) for tokens in seen])
    assert torch.equal(counts[0], hidden_cells(mask, 8).sum(dim=(1, 2)))
    assert (counts.diff(dim=0) < 0).all()
    assert len(seen) == method.num_function_evaluations == 5


def test_no_hidden_pixel_reaches_the_model(method: Muse) -> None:
    images, mask = inputs()
    other = torch.where(pixel_mask(mask, 32), torch.rand_like(images), images)
    assert torch.equal(filled(method, images, mask, CAPTIONS), filled(method, other, mask, CAPTIONS))


def test_captions_and_seeds_matter_and_the_others_of_the_batch_do_not(method: Muse) -> None:
    images, mask = inputs()
    first = filled(method, images, mask, CAPTIONS)
    assert not torch.allclose(first, filled(method, images, mask, CAPTIONS[::-1]))
    torch.manual_seed(8)
    assert not torch.allclose(first, method.reconstruct_captioned(images, mask, CAPTIONS))
    assert torch.allclose(first[:1], filled(method, images[:1], mask[:1], CAPTIONS[:1]), atol=1e-5)


def test_it_follows_the_precision_of_its_caller(method: Muse) -> None:
    images, mask = inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = filled(method, images, mask, CAPTIONS)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        (
            "scheduler/scheduler_config.json",
            {"_class_name": "DDIMScheduler"},
            r"a DDIMScheduler, AmusedScheduler is need",
        ),
        (
            "scheduler/scheduler_config.json",
            {"mask_token_id": 0},
            r"scheduler/scheduler_config.json: mask_token_id is 0, a whole number of at least 1 is needed",
        ),
        ("scheduler/scheduler_config.json", {"mask_token_id": 3}, r"mask_token_id 3 must lie beyond the 24 codes"),
        ("transformer/config.json", {"codebook_size": 8}, r"paints with 8 tokens, the VQ model has 24: two models"),
        ("transformer/config.json", {"encoder_hidden_size": 9}, r"reads text 9 wide, the encoder's is 16"),
        ("vqvae/config.json", {"lookup_from_codebook": False}, r"does not decode from tokens"),
        ("text_encoder/config.json", {"architectures": ["CLIPTextModel"]}, r"a CLIPTextModel, CLIPTextModelWithProj"),
    ],
)
def test_a_folder_of_another_kind_is_refused_before_weights_are_read(
    folder: Path, tmp_path: Path, file: str, values: dict[str, Any], words: str
) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / file).write_text(json.dumps({**json.loads((copy / file).read_text()), **values}))
    with pytest.raises(WeightsError, match=words):
        Muse.check(options(copy), DataSpec(32))
