"""VQGAN's discriminator and autoencoders against the authors' code (CompVis) on formula weights.

The autoencoders come in by the import of their checkpoints: three first stages of latent-diffusion at 256 px. Their
losses were taken with the quantiser's `legacy` placement of beta and without LPIPS. Codebook rows nearly tie, so what
is compared is the reconstruction, not the indices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from torch import Tensor

from lmd_bench.projector.compvis import discriminator_from_compvis, kl_from_compvis, vq_from_compvis
from lmd_bench.projector.discriminator import PatchDiscriminator
from lmd_bench.projector.losses import Quantised, adaptive_weight, discriminator_loss, generator_loss, quantise
from tests.parity.fill import assert_matches, filled_tensor, load_reference, reference_input

IMAGES = reference_input(2, 3, 256, 256) / 1.5


@contextmanager
def one_thread() -> Iterator[None]:
    """One of VQ-f4's 8192 positions lies between two codes within rounding: the order of sums decides which is nearer.

    Latents differ by 3e-6 between one and two threads, and that position then takes the other code. One thread picks
    the authors' (and float64's distances do).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def filled_discriminator(num_layers: int) -> PatchDiscriminator:
    """Weights of the rule; running statistics as the constructor makes them; training mode, as in the reference."""
    manifest = load_reference(f"taming_nlayer_discriminator_n{num_layers}.manifest")
    fixed = {"running_mean": torch.zeros, "running_var": torch.ones}
    state_dict = {}
    for entry in manifest["keys"]:
        if entry["fill"] != "fixed":
            state_dict[entry["key"]] = filled_tensor(entry)
        else:
            make: Callable[..., Tensor] = fixed.get(entry["key"].rpartition(".")[2], torch.zeros)
            state_dict[entry["key"]] = make(entry["shape"])
    return discriminator_from_compvis(state_dict).train()


def filled_autoencoder(name: str) -> dict[str, Tensor]:
    return {entry["key"]: filled_tensor(entry) for entry in load_reference(f"{name}.manifest")["keys"]}


def assert_close(actual: Tensor, expected: float, tolerance: float = 1e-5) -> None:
    assert abs(actual.item() - expected) <= tolerance * abs(expected)


@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_discriminators_layout_and_counts_equal_the_authors(num_layers: int) -> None:
    manifest = load_reference(f"taming_nlayer_discriminator_n{num_layers}.manifest")
    own = PatchDiscriminator(num_layers=num_layers)
    assert {key: list(tensor.shape) for key, tensor in own.state_dict().items()} == {
        entry["key"]: entry["shape"] for entry in manifest["keys"]
    }
    assert list(own.state_dict()) == [entry["key"] for entry in manifest["keys"]]
    assert sum(parameter.numel() for parameter in own.parameters()) == manifest["params_total"]


@pytest.mark.parametrize("num_layers", [2, 3])
def test_the_discriminators_logits_and_hinge_loss_equal_the_authors(num_layers: int) -> None:
    reference = load_reference(f"taming_nlayer_discriminator_n{num_layers}.strong.reference")
    discriminator = filled_discriminator(num_layers)
    with torch.no_grad():
        logits = discriminator(IMAGES)
        loss = discriminator_loss(logits, discriminator(-IMAGES), "hinge")
    assert_matches(logits, reference["output"])
    assert_close(loss, reference["loss"])


class VQCase:
    """One VQ first stage of latent-diffusion run once: latents, quantised latents, reconstruction."""

    def __init__(self, name: str, num_layers: int) -> None:
        self.manifest = load_reference(f"{name}.manifest")
        self.reference = load_reference(f"{name}.strong.reference")
        self.model: VQModel = vq_from_compvis(filled_autoencoder(name)).requires_grad_(False)
        self.discriminator = filled_discriminator(num_layers)
        # The adaptive weight asks for gradients there and nowhere else.
        self.last_layer: Tensor = self.model.decoder.conv_out.weight.requires_grad_()
        with one_thread():
            self.latents: Tensor = self.model.encode(IMAGES).latents
            self.quantised: Quantised = quantise(self.latents, self.model.quantize.embedding.weight, legacy=True)
        self.reconstruction: Tensor = self.model.decode(self.quantised.latents, force_not_quantize=True).sample


@pytest.fixture(scope="module", params=[("ldm_vqmodel_f4", 3), ("ldm_vqmodel_f8", 2)], ids=["f4", "f8"])
def vq(request: pytest.FixtureRequest) -> VQCase:
    return VQCase(*request.param)


@pytest.mark.slow
def test_a_vq_model_has_the_authors_number_of_parameters(vq: VQCase) -> None:
    assert sum(parameter.numel() for parameter in vq.model.parameters()) == vq.manifest["params_total"]


@pytest.mark.slow
def test_latents_before_quantisation_equal_the_authors(vq: VQCase) -> None:
    assert_matches(vq.latents, vq.reference["prequant"])
    assert_matches(vq.latents, vq.reference["interface_encode"])


@pytest.mark.slow
def test_the_quantised_reconstruction_and_codebook_loss_equal_the_authors(vq: VQCase) -> None:
    assert_matches(vq.reconstruction, vq.reference["reconstruction"])
    assert_close(vq.quantised.loss, vq.reference["codebook_loss"])
    assert vq.quantised.indices.numel() == vq.reference["indices"]["n"]


@pytest.mark.slow
def test_the_quantiser_picks_what_diffusers_picks(vq: VQCase) -> None:
    theirs, loss, _ = vq.model.quantize(vq.latents)
    torch.testing.assert_close(vq.quantised.latents, theirs, rtol=0, atol=2e-3)  # near ties may fall otherwise
    assert (vq.quantised.latents - theirs).abs().mean().item() <= 1e-6
    torch.testing.assert_close(vq.quantised.loss, loss, rtol=1e-5, atol=0)


@pytest.mark.slow
def test_the_generators_loss_and_its_adaptive_weight_equal_the_authors(vq: VQCase) -> None:
    wanted = vq.reference["generator_loss"]
    reconstruction_loss = (IMAGES - vq.reconstruction).abs().mean()
    adversarial_loss = generator_loss(vq.discriminator(vq.reconstruction), "hinge")
    disc_weight = vq.manifest["official_loss_params"]["disc_weight"]
    weight = adaptive_weight(reconstruction_loss, adversarial_loss, vq.last_layer, weight=disc_weight)
    assert_close(reconstruction_loss, wanted["train/nll_loss"])
    assert_close(vq.quantised.loss, wanted["train/quant_loss"])
    assert_close(adversarial_loss, wanted["train/g_loss"])
    assert_close(weight, wanted["train/d_weight"], tolerance=1e-3)
    total = reconstruction_loss + wanted["train/d_weight"] * adversarial_loss + vq.quantised.loss
    assert_close(total, wanted["train/total_loss"])
    assert_close(total, vq.reference["loss"])


@pytest.mark.slow
def test_the_discriminators_loss_of_a_reconstruction_equals_the_authors(vq: VQCase) -> None:
    wanted = vq.reference["discriminator_loss"]
    with torch.no_grad():
        real, fake = vq.discriminator(IMAGES), vq.discriminator(vq.reconstruction.detach())
    assert_close(real.mean(), wanted["train/logits_real"])
    assert_close(fake.mean(), wanted["train/logits_fake"])
    assert_close(discriminator_loss(real, fake, "hinge"), wanted["train/disc_loss"])


@pytest.mark.slow
def test_the_kl_first_stage_equals_the_authors() -> None:
    reference: dict[str, Any] = load_reference("ldm_kl_f8.strong.reference")
    model: AutoencoderKL = kl_from_compvis(filled_autoencoder("ldm_kl_f8"))
    assert sum(p.numel() for p in model.parameters()) == load_reference("ldm_kl_f8.manifest")["params_total"]
    with torch.no_grad():
        posterior = model.encode(IMAGES).latent_dist
        decoded = model.decode(posterior.mode()).sample
    assert_matches(posterior.mode(), reference["mode"])
    assert_matches(posterior.logvar, reference["logvar"])
    torch.testing.assert_close(posterior.kl(), torch.tensor(reference["kl"]), rtol=1e-5, atol=0)
    assert_matches(decoded, reference["decode_of_mode"])
    assert_close((IMAGES - decoded).abs().mean(), reference["loss"])
