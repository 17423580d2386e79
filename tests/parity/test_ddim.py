"""The U-Nets of the DDIM repository (github.com/ermongroup/ddim) on formula weights; DDPM's is the same."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines.ddim import DDIM
from baselines.ddpm import DDPM
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_draw, reference_input

CIFAR = "ddim_unet_cifar10"
BEDROOM = "ddim_unet_bedroom256"


@pytest.fixture(scope="module")
def cifar() -> DDIM:
    return DDIM.from_official(filled_state_dict(load_reference(f"{CIFAR}.manifest"))).eval()


@pytest.fixture(scope="module")
def bedroom() -> DDIM:
    return DDIM.from_official(filled_state_dict(load_reference(f"{BEDROOM}.manifest"))).eval()


def assert_layout_matches(model: DDIM | DDPM, manifest: dict[str, Any]) -> None:
    """Same keys in the same order, same shapes, same count, the weights bit for bit."""
    official = model.to_official()
    assert list(official) == [entry["key"] for entry in manifest["keys"]]
    for key, tensor in filled_state_dict(manifest).items():
        assert torch.equal(official[key], tensor), key
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == manifest["params_trainable"]


def assert_output_matches(model: DDIM | DDPM, reference: dict[str, Any]) -> None:
    with torch.no_grad():
        output = model.predict(reference_input(*reference["output"]["shape"]), torch.tensor(reference["timesteps"]))
    assert_matches(output, reference["output"])


def loss_parts(model: DDIM | DDPM, reference: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The batch's loss, and the summed squared error of every sample."""
    shape = reference["output"]["shape"]
    clean, noise = (reference_input(*shape) / 1.5).clamp(-1, 1), reference_draw(*shape)
    timesteps = torch.tensor(reference["timesteps"])
    with torch.no_grad():
        x_t = model.diffusion.q_sample(clean, noise, timesteps)
        output = model.predict(x_t, timesteps)
        loss = model.loss(output, noise, clean=clean, x_t=x_t, timesteps=timesteps)
    return loss, (output - noise).square().flatten(1).sum(dim=1)


def assert_loss_matches(model: DDIM, reference: dict[str, Any]) -> None:
    loss, per_sample = loss_parts(model, reference)
    assert loss.item() == pytest.approx(reference["loss"], rel=1e-5)
    assert per_sample.tolist() == pytest.approx(reference["loss_per_sample_SUM_over_pixels"], rel=1e-5)


def test_the_cifar_models_layout_and_counts_equal_the_authors(cifar: DDIM) -> None:
    assert cifar.config.block_out_channels == (128, 256, 256, 256)
    assert cifar.config.attention_levels == (1,)
    assert cifar.data.image_size == 32
    assert_layout_matches(cifar, load_reference(f"{CIFAR}.manifest"))


def test_the_cifar_models_output_equals_the_authors(cifar: DDIM) -> None:
    assert_output_matches(cifar, load_reference(f"{CIFAR}.strong.reference"))


def test_the_cifar_models_loss_equals_the_authors(cifar: DDIM) -> None:
    assert_loss_matches(cifar, load_reference(f"{CIFAR}.strong.reference"))


@pytest.mark.slow
def test_the_bedroom_models_layout_and_counts_equal_the_authors(bedroom: DDIM) -> None:
    assert bedroom.data.image_size == 256
    assert bedroom.config == DDIM.Config()
    assert_layout_matches(bedroom, load_reference(f"{BEDROOM}.manifest"))


@pytest.mark.slow
def test_the_bedroom_models_output_equals_the_authors(bedroom: DDIM) -> None:
    assert_output_matches(bedroom, load_reference(f"{BEDROOM}.strong.reference"))


@pytest.mark.slow
def test_the_bedroom_models_loss_equals_the_authors(bedroom: DDIM) -> None:
    assert_loss_matches(bedroom, load_reference(f"{BEDROOM}.strong.reference"))


def assert_ddpms_loss_matches(model: DDPM, reference: dict[str, Any]) -> None:
    """DDPM averages over an image where the repository sums."""
    loss, per_sample = loss_parts(model, reference)
    values = math.prod(reference["output"]["shape"][1:])
    assert loss.item() * values == pytest.approx(reference["loss"], rel=1e-5)
    assert per_sample.tolist() == pytest.approx(reference["loss_per_sample_SUM_over_pixels"], rel=1e-5)


def test_ddpm_takes_the_same_checkpoint_and_predicts_the_same(cifar: DDIM) -> None:
    method = DDPM.from_official(cifar.to_official()).eval()
    assert_layout_matches(method, load_reference(f"{CIFAR}.manifest"))
    assert_output_matches(method, load_reference(f"{CIFAR}.strong.reference"))
    assert_ddpms_loss_matches(method, load_reference(f"{CIFAR}.strong.reference"))


@pytest.mark.slow
def test_ddpms_loss_on_the_bedroom_model_is_the_authors_over_the_values_of_an_image(bedroom: DDIM) -> None:
    method = DDPM.from_official(bedroom.to_official()).eval()
    assert method.config == DDPM.Config()
    assert_ddpms_loss_matches(method, load_reference(f"{BEDROOM}.strong.reference"))
