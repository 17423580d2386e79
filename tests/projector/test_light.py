"""The light autoencoder: exact transforms, a cheap encoder, no leak where none is promised, and that it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError
from lmd_bench.projector.light import LightAutoencoder, LightProjector, _Bands

SMALL: dict[str, Any] = {"factor": 4, "encoder_hidden": 8, "decoder_widths": (16, 8), "decoder_blocks": (1, 1)}
TRANSFORMS = [("wavelet", "haar"), ("wavelet", "cdf53"), ("wavelet", "cdf97"), ("space_to_depth", "haar")]


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


# -- the transforms ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [0, 1, 3])
@pytest.mark.parametrize(("transform", "wavelet"), TRANSFORMS)
def test_a_transform_and_its_inverse_give_the_image_back(transform: str, wavelet: str, levels: int) -> None:
    images, bands = random_images(2, 3, 16, 24), _Bands(transform, wavelet, levels)
    split = bands.split(images)
    assert split.shape == (2, 3 * 4**levels, 16 >> levels, 24 >> levels)
    torch.testing.assert_close(bands.join(split), images, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("transform", "wavelet"), TRANSFORMS[:1] + TRANSFORMS[3:])
def test_haar_and_space_to_depth_keep_lengths_and_angles(transform: str, wavelet: str) -> None:
    one, other = random_images(1, 3, 16, 16), random_images(1, 3, 16, 16, seed=1)
    bands = _Bands(transform, wavelet, 2)
    torch.testing.assert_close((bands.split(one) * bands.split(other)).sum(), (one * other).sum())


@pytest.mark.parametrize(("wavelet", "degree"), [("haar", 0), ("cdf53", 1), ("cdf97", 3)])
def test_wavelets_have_their_vanishing_moments(wavelet: str, degree: int) -> None:
    """High bands of polynomials up to the wavelet's order are 0 away from the border, and not of the next degree."""
    x = torch.linspace(-1, 1, 64, dtype=torch.float64)
    for power in range(degree + 2):
        signal = (x**power).expand(1, 1, 8, 64)
        high = _Bands("wavelet", wavelet, 1).split(signal)[0, 2, 2, 4:-4]
        assert (high.abs().max() < 1e-8) == (power <= degree)


@pytest.mark.parametrize("wavelet", ["haar", "cdf53", "cdf97"])
def test_the_low_band_of_a_constant_gains_the_root_of_two_per_axis_and_level(wavelet: str) -> None:
    split = _Bands("wavelet", wavelet, 3).split(torch.ones(1, 3, 64, 64, dtype=torch.float64))
    torch.testing.assert_close(split[0, :3, 4, 4], torch.full((3,), 8.0, dtype=torch.float64), rtol=1e-6, atol=0)
    assert split[0, 3:, 4, 4].abs().max() < 1e-6


# -- the network ------------------------------------------------------------------------------------------------------


def test_the_default_encoder_costs_a_twentieth_of_what_is_allowed() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        latents = LightAutoencoder().encode(torch.empty(1, 3, 224, 224))
    assert latents.shape == (1, 4, 28, 28)
    assert counter.get_total_flops() < 5e9 / 20


@pytest.mark.parametrize("widths", [(16,), (16, 8), (16, 8, 8)])
@pytest.mark.parametrize(("transform", "wavelet"), TRANSFORMS)
def test_any_number_of_decoder_levels_gives_whole_images(transform: Any, wavelet: Any, widths: tuple[int, ...]) -> None:
    options = {**SMALL, "decoder_widths": widths, "decoder_blocks": (1,) * len(widths)}
    model = LightAutoencoder(**options, transform=transform, wavelet=wavelet)
    assert model(torch.zeros(2, 3, 16, 32)).shape == (2, 3, 16, 32)
    assert model.last_layer.shape[1] == widths[-1]
    assert model.last_layer.requires_grad


def reach(model: LightAutoencoder, pixels: int = 48) -> Tensor:
    """Which pixels the latent in the middle depends on: bool (pixels, pixels)."""
    images = torch.rand(1, 3, pixels, pixels, requires_grad=True)
    latents = model.encode(images)
    middle = latents.shape[-1] // 2
    latents[..., middle, middle].sum().backward()
    assert images.grad is not None
    return images.grad.abs().sum((0, 1)) > 0


def test_kernel_1_encodes_each_square_from_its_own_pixels_alone() -> None:
    model = LightAutoencoder(**SMALL, encoder_kernel=1)
    seen = reach(model)
    assert int(seen.sum()) == 16
    assert seen[24:28, 24:28].all()
    assert not model.sees_neighbours


def test_kernel_3_and_long_wavelets_look_at_neighbours_and_say_so() -> None:
    wide = LightAutoencoder(**SMALL)
    assert reach(wide)[20:32, 20:32].all()
    assert int(reach(wide).sum()) == 144
    wavelet = LightAutoencoder(**SMALL, encoder_kernel=1, wavelet="cdf97")
    assert int(reach(wavelet).sum()) > 16
    assert wide.sees_neighbours
    assert wavelet.sees_neighbours


def test_visible_squares_encode_alike_whether_the_others_are_there_or_not() -> None:
    projector = LightProjector(LightAutoencoder(**SMALL, encoder_kernel=1), name="light")
    images = torch.rand(1, 3, 16, 16)
    hidden = images.clone()
    hidden[..., 8:] = 0.0
    assert torch.equal(projector.encode(images)[..., :2], projector.encode(hidden)[..., :2])


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("transform", "wavelet"), TRANSFORMS)
def test_the_frozen_projector_encodes_as_the_model_does_with_the_transform_folded_in(
    transform: Any, wavelet: Any, kernel: Any
) -> None:
    model = LightAutoencoder(**SMALL, transform=transform, wavelet=wavelet, encoder_kernel=kernel)
    images = torch.rand(2, 3, 16, 24)
    with torch.no_grad():
        expected = model.encode(images * 2 - 1)
    projector = LightProjector(model, name="light")
    assert (projector.folded is None) == (wavelet != "haar")
    torch.testing.assert_close(projector.encode(images), expected, rtol=1e-4, atol=1e-5)
    assert "folded" not in projector.state_dict()


def test_without_a_hidden_branch_the_encoder_is_linear() -> None:
    def bent(hidden: int) -> float:
        torch.manual_seed(0)
        model = LightAutoencoder(**{**SMALL, "encoder_hidden": hidden}).double()
        one, other = random_images(1, 3, 16, 16), random_images(1, 3, 16, 16, seed=1)
        middle = model.encode((one + other) / 2) - (model.encode(one) + model.encode(other)) / 2
        return float(middle.abs().max().detach())

    assert bent(0) < 1e-12
    assert bent(8) > 1e-6


def test_a_saved_folder_is_the_same_model(tmp_path: Path) -> None:
    model = LightAutoencoder(**SMALL, wavelet="cdf53", sample_size=32)
    model.save_pretrained(tmp_path, safe_serialization=True)
    loaded = LightAutoencoder.from_pretrained(tmp_path, low_cpu_mem_usage=False, use_safetensors=True)
    images = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    assert loaded.config["wavelet"] == "cdf53"


def test_a_few_steps_bring_it_above_the_mean_colour_of_every_square() -> None:
    """Scenes of 32 px; four numbers per 8 x 8 pixels. The mean colour takes three of them."""
    torch.manual_seed(0)
    images = Scenes(0, 32).render(range(16)).float() / 127.5 - 1.0
    means = torch.nn.functional.avg_pool2d(images, 8)
    baseline = (torch.nn.functional.interpolate(means, scale_factor=8) - images).square().mean()
    model = LightAutoencoder(encoder_hidden=8, decoder_widths=(16, 8), decoder_blocks=(1, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(150):
        optimizer.zero_grad()
        loss = (model(images) - images).square().mean()
        loss.backward()
        optimizer.step()
    assert loss.detach() < baseline
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"factor": 6}, "factor 6 must be a power of two"),
        ({"factor": 1}, "factor 1 must be a power of two"),
        ({"decoder_widths": (8,)}, "need one number per level each"),
        ({"decoder_widths": (8,) * 4, "decoder_blocks": (1,) * 4}, "at most 3 for factor 4"),
        ({"decoder_blocks": (1, -1)}, "decoder_blocks 0 or more"),
        ({"transform": "dct"}, "transform 'dct' must be wavelet or space_to_depth"),
        ({"wavelet": "db4"}, "wavelet 'db4' must be haar, cdf53 or cdf97"),
        ({"encoder_kernel": 5}, "encoder_kernel 5 must be 1 or 3"),
        ({"latent_channels": 0}, "latent_channels 0 must be 1 or more"),
    ],
)
def test_values_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LightAutoencoder(**{**SMALL, **changes})
