"""VQGAN's losses: their values, and what their gradients reach. Parity stands in tests/parity/test_vqgan.py."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lmd_bench.projector import losses
from lmd_bench.projector.losses import adaptive_weight, discriminator_loss, generator_loss, quantise


def _latents_and_codebook() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 3, 5, 4, generator=generator).requires_grad_()
    codebook = torch.randn(11, 3, generator=generator).requires_grad_()
    return latents, codebook


def test_each_position_gets_the_codebook_vector_of_least_distance() -> None:
    latents, codebook = _latents_and_codebook()
    found = quantise(latents, codebook)
    distances = (latents.unsqueeze(1) - codebook.view(1, 11, 3, 1, 1)).square().sum(2)
    assert found.indices.dtype == torch.int64
    assert found.indices.equal(distances.argmin(1))
    torch.testing.assert_close(found.latents, codebook[found.indices].permute(0, 3, 1, 2))


def test_comparing_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    latents, codebook = _latents_and_codebook()
    whole = quantise(latents, codebook)
    monkeypatch.setattr(losses, "_DISTANCES_AT_ONCE", 34)  # three positions at a time
    assert quantise(latents, codebook).indices.equal(whole.indices)


def test_codebook_vectors_are_their_own_nearest_and_cost_nothing() -> None:
    _, codebook = _latents_and_codebook()
    latents = codebook.detach().t().reshape(1, 3, 1, 11)
    found = quantise(latents, codebook)
    assert found.indices.flatten().tolist() == list(range(11))
    assert found.loss.item() == 0.0


def test_gradients_pass_straight_through_to_the_latents_alone() -> None:
    latents, codebook = _latents_and_codebook()
    wanted = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(1))
    (quantise(latents, codebook).latents * wanted).sum().backward()
    assert latents.grad is not None
    assert latents.grad.equal(wanted)
    assert codebook.grad is None


@pytest.mark.parametrize(("legacy", "codebook_factor", "commitment_factor"), [(False, 1.0, 0.25), (True, 0.25, 1.0)])
def test_beta_stands_at_the_commitment_and_in_legacy_at_the_codebook(
    legacy: bool, codebook_factor: float, commitment_factor: float
) -> None:
    latents, codebook = _latents_and_codebook()
    found = quantise(latents, codebook, legacy=legacy)
    found.loss.backward()
    difference = latents.detach() - found.latents.detach()
    assert found.loss.item() == pytest.approx(1.25 * difference.square().mean().item(), rel=1e-5)
    assert latents.grad is not None
    assert codebook.grad is not None
    torch.testing.assert_close(latents.grad, commitment_factor * 2 * difference / difference.numel())
    pulls = torch.zeros_like(codebook).index_add(
        0, found.indices.flatten(), -difference.permute(0, 2, 3, 1).reshape(-1, 3)
    )
    torch.testing.assert_close(codebook.grad, codebook_factor * 2 * pulls / difference.numel())


def test_half_precision_training_still_compares_in_float32_wherever_the_codebook_lies() -> None:
    codebook = 1.0 + torch.arange(64.0).view(64, 1) * 1e-4  # bfloat16 cannot tell these apart
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = quantise(codebook.t().reshape(1, 1, 8, 8), codebook)
    assert found.indices.flatten().tolist() == list(range(64))
    assert found.loss.dtype == torch.float32


def test_a_codebook_of_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected \(B, d, h, w\) and \(K, d\)"):
        quantise(torch.zeros(1, 3, 2, 2), torch.zeros(5, 4))


REAL, FAKE = torch.tensor([2.0, 0.5, -1.0]), torch.tensor([-2.0, -0.5, 1.0])


def test_hinge_counts_only_what_is_within_the_margin() -> None:
    assert discriminator_loss(REAL, FAKE, "hinge").item() == pytest.approx((0.0 + 0.5 + 2.0) / 3)
    assert generator_loss(FAKE, "hinge").item() == pytest.approx(0.5)


def test_logistic_is_half_of_equation_5() -> None:
    equation = REAL.sigmoid().log().mean() + (1 - FAKE.sigmoid()).log().mean()
    assert discriminator_loss(REAL, FAKE, "logistic").item() == pytest.approx(-equation.item() / 2, rel=1e-6)
    assert generator_loss(FAKE, "logistic").item() == pytest.approx(-FAKE.sigmoid().log().mean().item(), rel=1e-6)


def test_logistic_stays_finite_and_keeps_its_gradient_where_every_fake_is_told_apart() -> None:
    logits = torch.full((4,), -200.0, requires_grad=True)
    loss = generator_loss(logits, "logistic")
    loss.backward()
    assert loss.item() == pytest.approx(200.0)
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.full((4,), -0.25))


def test_an_undecided_discriminator_pays_one_or_the_logarithm_of_two() -> None:
    zeros = torch.zeros(5)
    assert discriminator_loss(zeros, zeros, "hinge").item() == 1.0
    assert discriminator_loss(zeros, zeros, "logistic").item() == pytest.approx(math.log(2.0))


@pytest.mark.parametrize("loss", [lambda: discriminator_loss(REAL, FAKE, "w"), lambda: generator_loss(FAKE, "w")])  # type: ignore[arg-type]
def test_another_kind_is_refused(loss) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(ValueError, match="'hinge' or 'logistic'"):
        loss()


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_at_the_last_layer() -> None:
    layer = torch.tensor([1.0, 2.0], requires_grad=True)
    weight = adaptive_weight((3 * layer).sum(), (0.5 * layer).sum(), layer, weight=0.8)
    assert weight.item() == pytest.approx(0.8 * 3 * math.sqrt(2) / (0.5 * math.sqrt(2) + 1e-4))
    assert not weight.requires_grad
    assert layer.grad is None


def test_the_adaptive_weight_is_clamped_before_it_is_scaled_and_keeps_both_graphs() -> None:
    layer = torch.tensor([1.0], requires_grad=True)
    wanted, adversarial = (1e3 * layer).square().sum(), (1e-9 * layer).square().sum()
    assert adaptive_weight(wanted, adversarial, layer, weight=0.75).item() == pytest.approx(7500.0)
    (wanted + adversarial).backward()
    assert layer.grad is not None
