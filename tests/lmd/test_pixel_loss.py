"""Fine-tuning LMD on pixels through its frozen projector."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import WeightsError
from lmd_bench.harness.weights import save_weights
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.lmd.pixel_loss import left_out_of_the_graph, pixel_loss
from lmd_bench.method import Batch, DataSpec, StepOutput
from lmd_bench.nn.patches import patchify, unpatchify
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import weights_digest
from tests.harness.test_weights import config_for

SIDE = 32
TINY = {
    "encoder_width": 32,
    "encoder_depth": 2,
    "encoder_heads": 2,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


def smooth(count: int, seed: int, channels: int = 3) -> Tensor:
    """Images (count, 3, 32, 32) in [0, 1] that are blends of four random colours; of one channel, grey ones."""
    corners = torch.rand(count, channels, 2, 2, generator=torch.Generator().manual_seed(seed))
    return F.interpolate(corners, size=SIDE, mode="bilinear", align_corners=False).expand(-1, 3, -1, -1).contiguous()


class GreyProjector(LatentProjector):
    """Made for grey images, which it decodes exactly (least squares from 4 fixed projections of 8 x 8 pixels)."""

    def __init__(self) -> None:
        super().__init__(name="grey", factor=8, latent_channels=4)
        self.to_latents, self.to_pixels = nn.Linear(192, 4, bias=False), nn.Linear(4, 192)
        with torch.no_grad():
            weight = torch.randn(4, 192, generator=torch.Generator().manual_seed(0)) / 192**0.5
            self.to_latents.weight.copy_(weight)
            pixels = patchify(smooth(256, 0, channels=1), 8).flatten(0, 1)
            latents = torch.cat([pixels @ weight.T, torch.ones(len(pixels), 1)], dim=1)
            solved = torch.linalg.lstsq(latents, pixels).solution
            self.to_pixels.weight.copy_(solved[:4].T)
            self.to_pixels.bias.copy_(solved[4])
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        return unpatchify(self.to_latents(patchify(images, 8)), 1, 4)

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        return unpatchify(self.to_pixels(patchify(latents, 1)), 8, 3)


def lmd(**options: object) -> LMD:
    torch.manual_seed(0)
    values = {"projector": {"kind": "pixels"}, "patch_size": 1, "mask_schedule": "constant", **TINY, **options}
    return LMD(LMDConfig(**values), DataSpec(SIDE), projector=GreyProjector())


def fit(method: LMD, steps: int, learning_rate: float) -> StepOutput:
    images = smooth(64, 1)
    optimizer = torch.optim.AdamW(method.param_groups(0.05), lr=learning_rate)
    for step in range(1, steps + 1):
        torch.manual_seed(step)
        output = method.training_step(method.prepare(Batch(images)), step=step, total_steps=steps)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    return output


@torch.no_grad()
def held_out_error(method: LMD) -> float:
    """Mean squared error of held-out images decoded from completed latents, 12 of 16 tokens hidden."""
    images = smooth(32, 2)
    hidden = torch.rand(32, 16, generator=torch.Generator().manual_seed(3)).argsort(1) < 12
    completed = method.model.complete(method.projector.encode(images), hidden)
    return pixel_loss(method.projector, completed, images).item()


@pytest.fixture(scope="module")
def trained() -> LMD:
    method = lmd()
    fit(method, 100, 3e-3)
    return method


def with_weights_of(trained: LMD, **options: object) -> LMD:
    method = lmd(**options)
    method.load_state_dict(trained.state_dict())
    return method


def test_fine_tuning_on_pixels_mends_images_that_the_projector_was_not_made_for(trained: LMD) -> None:
    """A projector of grey images meets colour: the latents are poor targets, the images are the better ones."""
    grey, colour = smooth(8, 4, channels=1), smooth(8, 4)
    assert F.mse_loss(trained.round_trip(grey), grey) < 1e-6 < 0.05 < F.mse_loss(trained.round_trip(colour), colour)
    tuned, longer = with_weights_of(trained, pixel_loss=1.0), with_weights_of(trained)
    for method in (tuned, longer):
        fit(method, 50, 1e-3)
    assert held_out_error(tuned) < 0.95 * held_out_error(trained)
    assert held_out_error(tuned) < 0.95 * held_out_error(longer), "the same steps without the pixel loss"


def test_only_the_blocks_change_and_the_projector_stays_bit_for_bit(trained: LMD) -> None:
    method = with_weights_of(trained, pixel_loss=1.0)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    fit(method, 3, 1e-3)
    changed = {name for name, value in method.state_dict().items() if not torch.equal(value, before[name])}
    blocks = {name for name in before if ".blocks." in name or ".decoder_blocks." in name}
    assert changed == blocks
    assert {name for name, p in method.named_parameters() if p.requires_grad} == blocks
    assert {id(p) for group in method.param_groups(0.05) for p in group["params"]} == {
        id(p) for name, p in method.named_parameters() if name in blocks
    }


def test_with_all_everything_but_the_projector_changes(trained: LMD) -> None:
    method = with_weights_of(trained, pixel_loss=1.0, pixel_loss_trains="all")
    before = {name: value.clone() for name, value in method.state_dict().items()}
    fit(method, 3, 1e-3)
    same = {name for name, value in method.state_dict().items() if torch.equal(value, before[name])}
    fixed = {"model.pos_embed", "model.decoder_pos_embed"}
    assert same == fixed | {name for name in before if name.startswith("projector.")}


def test_the_loss_is_the_latents_plus_the_weighted_error_of_the_decoded_image(trained: LMD) -> None:
    images = smooth(4, 5)
    outputs = []
    for weight in (0.0, 0.5, 2.0):
        method = with_weights_of(trained, pixel_loss=weight)
        torch.manual_seed(0)
        outputs.append(method.training_step(method.prepare(Batch(images)), step=1, total_steps=2))
    plain, half, double = outputs
    assert set(plain.scalars) == {"mask_ratio", "tokens"}
    torch.testing.assert_close(half.scalars["latent_loss"], plain.loss.detach())
    for output, weight in ((half, 0.5), (double, 2.0)):
        error = output.scalars["pixel_loss"]
        assert isinstance(error, Tensor)
        assert error > 0
        torch.testing.assert_close(output.loss.detach(), plain.loss.detach() + weight * error)


def test_in_one_run_all_weights_train_first_and_then_the_blocks_alone() -> None:
    method = lmd(pixel_loss=1.0, pixel_loss_start=0.5)
    inputs = method.prepare(Batch(smooth(4, 6)))
    trainable = {name for name, p in method.named_parameters() if p.requires_grad}
    reached: dict[int, set[str]] = {}
    for step in (1, 50, 51, 100, 2):  # as untimed steps do: from all over the run, then from its start again
        method.zero_grad(set_to_none=True)
        method.training_step(inputs, step=step, total_steps=100).loss.backward()
        reached[step] = {name for name, p in method.named_parameters() if p.grad is not None}
        assert {name for name, p in method.named_parameters() if p.requires_grad} == trainable
    blocks = {name for name in trainable if ".blocks." in name or ".decoder_blocks." in name}
    assert blocks < trainable
    assert reached[1] == reached[50] == reached[2] == trainable
    assert reached[51] == reached[100] == blocks


def test_left_out_parameters_are_put_back_even_after_an_error() -> None:
    layer = nn.Linear(2, 2)
    layer.bias.requires_grad_(False)
    with pytest.raises(RuntimeError, match="shapes cannot be"), left_out_of_the_graph(layer.parameters()):
        layer(torch.zeros(3))
    with left_out_of_the_graph(layer.parameters()):
        assert not layer(torch.zeros(2)).requires_grad
    assert [p.requires_grad for p in layer.parameters()] == [True, False], "what was frozen before stays frozen"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalize_targets": True}, "pixel_loss needs plain targets"),
        ({"projector": {"kind": "kl", "path": "shipped:scenes-kl-f8", "cache": "auto"}}, "cached latents"),
        ({"network": "unet"}, "no ViT blocks to train alone; say all"),
        ({"pixel_loss": -1.0}, "greater than or equal to 0"),
        ({"pixel_loss_start": 1.0}, "less than 1"),
    ],
)
def test_options_that_cannot_go_with_a_pixel_loss_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        LMDConfig(**{"projector": {"kind": "pixels"}, "pixel_loss": 1.0, **options})


# -- starting from a finished run -------------------------------------------------------------------------------------


PIXEL_OPTIONS = {"projector": {"kind": "pixels"}, "patch_size": 8, **TINY}


def weights_file(path: Path, options: Mapping[str, object] = MappingProxyType({}), **changes: Tensor) -> Path:
    """What a finished run of pixel-space LMD leaves: its weights without the tables that are not trained."""
    torch.manual_seed(7)
    config = LMDConfig(**{**PIXEL_OPTIONS, **options})
    method = LMD(config, DataSpec(SIDE))
    metadata = {
        "config": json.dumps({"options": config.model_dump(mode="json")}),
        "projector_digest": weights_digest(config.projector),
    }
    save_file({n: p.detach() for n, p in method.named_parameters() if p.requires_grad} | changes, path, metadata)
    return path


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "weights.safetensors")
    config = LMDConfig(**PIXEL_OPTIONS, init_weights=str(path), pixel_loss=1.0)
    LMD.check(config, DataSpec(SIDE))
    method = LMD(config, DataSpec(SIDE))
    torch.manual_seed(7)
    finished = LMD(LMDConfig(**PIXEL_OPTIONS), DataSpec(SIDE))
    assert all(torch.equal(value, finished.state_dict()[name]) for name, value in method.state_dict().items())
    assert not method.model.patch_embed.proj.weight.requires_grad
    step = method.training_step(method.prepare(Batch(smooth(2, 0))), step=1, total_steps=2)
    assert step.loss.isfinite()


def test_another_file_is_another_experiment(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "weights.safetensors")
    first = LMDConfig(**PIXEL_OPTIONS, init_weights=str(path))
    assert LMDConfig.model_validate(first.model_dump(mode="json")) == first
    weights_file(path, **{"model.mask_token": torch.zeros(1, 1, 32)})
    second = LMDConfig(**PIXEL_OPTIONS, init_weights=str(path))
    assert first.init_weights_digest != second.init_weights_digest


def test_missing_initial_weights_are_found_when_the_options_are_read(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"init_weights: .*gone.safetensors cannot be read \(No such file"):
        LMDConfig(**PIXEL_OPTIONS, init_weights=str(tmp_path / "gone.safetensors"))


def test_initial_weights_of_another_model_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "weights.safetensors", **{"model.extra": torch.zeros(1)})
    config = LMDConfig(**{**PIXEL_OPTIONS, "encoder_depth": 3}, init_weights=str(path))
    with pytest.raises(WeightsError, match=r"weights.safetensors: .*12 missing: blocks.2.norm1.* 1 unexpected: extra"):
        LMD.check(config, DataSpec(SIDE))
    path.write_bytes(b"not tensors")
    with pytest.raises(WeightsError, match="is not a readable safetensors file"):
        LMD.check(LMDConfig(**PIXEL_OPTIONS, init_weights=str(path)), DataSpec(SIDE))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (
            {"normalize_targets": True},
            "was trained with normalize_targets True, this row has False: set normalize_targ",
        ),
        ({"decoder_pos_sign": 1}, "was trained with decoder_pos_sign 1, this row has -1: set decoder_pos_sign to 1"),
        (
            {"projector": {"kind": "pixels", "scale": 0.5}},
            "trained on latents of projector pixels with digest .{16}; p",
        ),
    ],
)
def test_weights_that_have_learned_something_else_are_refused_though_they_fit(
    options: dict[str, object], words: str, tmp_path: Path
) -> None:
    path = weights_file(tmp_path / "weights.safetensors", options)
    with pytest.raises(WeightsError, match=words):
        LMD.check(LMDConfig(**PIXEL_OPTIONS, init_weights=str(path)), DataSpec(SIDE))
    LMD.check(LMDConfig(**{**PIXEL_OPTIONS, **options}, init_weights=str(path)), DataSpec(SIDE))


def test_a_cells_own_weights_file_says_what_it_was_trained_on(tmp_path: Path) -> None:
    method = LMD(LMDConfig(**PIXEL_OPTIONS), DataSpec(SIDE))
    config = config_for("lmd", method.config.model_dump(mode="json"))
    save_weights(method, tmp_path / "weights.safetensors", config)
    LMD.check(LMDConfig(**PIXEL_OPTIONS, init_weights=str(tmp_path / "weights.safetensors")), DataSpec(SIDE))


def test_weights_that_do_not_say_what_they_were_trained_on_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    method = LMD(LMDConfig(**PIXEL_OPTIONS), DataSpec(SIDE))
    save_file({name: value.detach() for name, value in method.state_dict().items()}, path)
    with pytest.raises(WeightsError, match=r"does not say what it was trained on; name the weights\.safetensors of a"):
        LMD.check(LMDConfig(**PIXEL_OPTIONS, init_weights=str(path)), DataSpec(SIDE))


def test_a_finished_run_loads_without_the_weights_it_started_from_but_does_not_train(tmp_path: Path) -> None:
    path = weights_file(tmp_path / "weights.safetensors")
    config = LMDConfig(**PIXEL_OPTIONS, init_weights=str(path))
    path.unlink()
    again = LMDConfig.model_validate(config.model_dump(mode="json"))
    LMD.check(again, DataSpec(SIDE))
    method = LMD(again, DataSpec(SIDE))
    with pytest.raises(WeightsError, match="is gone, or another file than it was"):
        method.training_step(method.prepare(Batch(smooth(2, 0))), step=1, total_steps=2)
