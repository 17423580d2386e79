"""Random erasing, mixup and cutmix: what becomes of images and targets, and where their draws come from."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from lmd_bench.harness.mixing import RandomErasing, mix_pairs, one_hot

IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))
TARGETS = one_hot(torch.tensor([0, 1, 2, 3, 3, 0]), 4)


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0), (0.1, 0.0)])
def test_mixed_targets_sum_to_one_and_no_share_is_negative(mixup: float, cutmix: float) -> None:
    torch.manual_seed(1)
    for _ in range(20):
        _, targets = mix_pairs(IMAGES, TARGETS, mixup_alpha=mixup, cutmix_alpha=cutmix)
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(6))
        assert (targets >= 0).all()


def test_mixup_blends_an_image_and_its_target_with_the_one_from_the_end_by_the_same_share() -> None:
    torch.manual_seed(2)
    images, targets = mix_pairs(IMAGES, TARGETS, mixup_alpha=0.8)
    share = float(targets[1, 1])  # label 1 beside label 3
    assert 0 < share < 1
    torch.testing.assert_close(images, share * IMAGES + (1 - share) * IMAGES.flip(0))
    torch.testing.assert_close(targets, share * TARGETS + (1 - share) * TARGETS.flip(0))


def test_cutmix_pastes_one_box_and_the_target_tells_the_share_of_pixels_that_are_left() -> None:
    torch.manual_seed(3)
    for _ in range(10):
        images, targets = mix_pairs(IMAGES, TARGETS, cutmix_alpha=1.0)
        kept, pasted = (images == IMAGES).all(dim=1), (images == IMAGES.flip(0)).all(dim=1)
        assert (kept | pasted).all()
        assert torch.equal(kept[0], kept[1])  # one box for the whole batch
        rows, columns = (~kept[0]).any(dim=1).nonzero()[:, 0], (~kept[0]).any(dim=0).nonzero()[:, 0]
        if len(rows):
            assert not kept[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].any()
        assert float(targets[1, 1]) == pytest.approx(float(kept[1].float().mean()), abs=1e-6)


def test_where_both_are_on_about_half_of_the_batches_are_pasted_and_the_others_blended() -> None:
    torch.manual_seed(4)
    pasted = 0
    for _ in range(200):
        images, _ = mix_pairs(IMAGES, TARGETS, mixup_alpha=0.8, cutmix_alpha=1.0)
        pasted += bool(((images == IMAGES) | (images == IMAGES.flip(0))).all())
    assert 70 < pasted < 130


def test_both_off_leave_the_batch_as_it_is() -> None:
    images, targets = mix_pairs(IMAGES, TARGETS)
    assert images is IMAGES
    assert targets is TARGETS


def test_the_shares_of_mixup_are_those_of_beta() -> None:
    from scipy import stats

    torch.manual_seed(5)
    shares = [float(mix_pairs(IMAGES, TARGETS, mixup_alpha=0.8)[1][1, 1]) for _ in range(600)]
    assert stats.kstest(shares, stats.beta(0.8, 0.8).cdf).pvalue > 1e-3


def test_smoothed_and_mixed_targets_give_timms_loss() -> None:
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    torch.manual_seed(6)
    labels, logits = torch.tensor([0, 1, 2, 3, 3, 0]), torch.randn(6, 4)
    _, targets = mix_pairs(IMAGES, TARGETS, mixup_alpha=0.8)
    share = float(targets[1, 1])
    found = torch.nn.functional.cross_entropy(logits, targets, label_smoothing=0.1)
    wanted = SoftTargetCrossEntropy()(logits, mixup_target(labels, 4, share, 0.1))
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_erasing_replaces_one_rectangle_of_two_to_thirty_three_percent_by_noise_of_imagenets_statistics() -> None:
    torch.manual_seed(7)
    images = torch.full((400, 3, 32, 32), 0.5)
    erased = RandomErasing(0.25)(images)
    changed = (erased != images).any(dim=1)
    touched = changed.any(dim=(1, 2))
    assert 70 < int(touched.sum()) < 130
    for mask in changed[touched]:
        rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
        assert mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
        assert 0.015 < float(mask.float().mean()) < 0.35
    noise = erased.transpose(0, 1)[:, changed]
    torch.testing.assert_close(noise.mean(dim=1), torch.tensor([0.485, 0.456, 0.406]), rtol=0, atol=0.01)
    torch.testing.assert_close(noise.std(dim=1), torch.tensor([0.229, 0.224, 0.225]), rtol=0, atol=0.01)


def test_a_probability_of_zero_erases_nothing_and_draws_nothing() -> None:
    torch.manual_seed(8)
    state = torch.get_rng_state()
    assert RandomErasing(0.0)(IMAGES) is IMAGES
    assert torch.equal(torch.get_rng_state(), state)


def test_all_draws_come_from_torchs_generators() -> None:
    def drawn() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(9)
        return mix_pairs(RandomErasing(0.5)(IMAGES), TARGETS, mixup_alpha=0.8, cutmix_alpha=1.0)

    first = drawn()
    random.seed(1)
    np.random.seed(1)
    states = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    again = drawn()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
    assert random.getstate() == states[0]
    assert np.random.get_state()[1].tobytes() == states[1]  # type: ignore[union-attr]
