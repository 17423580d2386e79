"""Completing a latent map level by level."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lmd_bench.errors import ConfigError
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.lmd.sampling import UNVEIL_ORDERS, Unveiling, UnveilOrder, unveil
from lmd_bench.method import DataSpec
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.projector.config import ProjectorConfig

SHAPE = MaskedAutoencoderShape(
    input_size=8, patch_size=2, in_channels=3, encoder_width=32, encoder_depth=2, encoder_heads=2,
    decoder_width=32, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def model() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SHAPE, decoder_pos_sign=-1).eval().requires_grad_(False)


def latents(count: int = 3) -> Tensor:
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def hidden(*visible: int) -> Tensor:
    """One row for each count of visible tokens, of 16."""
    rows = torch.ones(len(visible), 16, dtype=torch.bool)
    for number, count in enumerate(visible):
        rows[number, torch.randperm(16, generator=torch.Generator().manual_seed(number))[:count]] = False
    return rows


def positions(tokens: Tensor) -> Tensor:
    return tokens.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)


def steps(levels: int | None, order: UnveilOrder = "random") -> Unveiling:
    return Unveiling.of_ratios(16, 0.15, 0.75, levels, order)


class Watched:
    """A completion that keeps the masks it was asked to fill."""

    def __init__(self) -> None:
        self.model = model()
        self.masks: list[Tensor] = []

    def __call__(self, given: Tensor, tokens: Tensor) -> Tensor:
        self.masks.append(tokens.clone())
        return self.model.complete(given, tokens)


def test_forty_nine_tokens_take_the_papers_twenty_nine_levels() -> None:
    whole = Unveiling.of_ratios(49, 0.15, 0.75, None, "random")
    assert whole.visible_counts(12) == list(range(12, 41))
    assert whole.num_function_evaluations(12) == 29
    assert whole.visible_counts(0) == [0, *range(12, 41)], "nothing visible takes one start level more"
    assert Unveiling.of_ratios(64, 0.15, 0.75, None, "random").num_function_evaluations(16) == 38


@pytest.mark.parametrize("levels", [1, 2, 5, 28, 29, 60])
@pytest.mark.parametrize("visible", [0, 3, 12, 20, 41, 48])
def test_counts_rise_from_what_is_given_and_are_as_many_as_asked_for(levels: int, visible: int) -> None:
    counts = Unveiling.of_ratios(49, 0.15, 0.75, levels, "random").visible_counts(visible)
    assert counts[0] == visible
    assert all(a < b for a, b in pairwise(counts))
    assert counts[-1] < 49
    assert len(counts) <= levels
    if levels == 5 and visible <= 20:
        assert len(counts) == 5


def test_past_the_schedule_all_levels_are_one_and_given_levels_go_on_to_the_last_token() -> None:
    whole = Unveiling.of_ratios(49, 0.15, 0.75, None, "random")
    assert whole.visible_counts(45) == [45]
    assert Unveiling.of_ratios(49, 0.15, 0.75, 3, "random").visible_counts(45) == [45, 46, 47]
    assert whole.visible_counts(49) == []


def test_levels_and_orders_that_do_not_exist_are_refused() -> None:
    with pytest.raises(ConfigError, match="levels: 0; give at least 1"):
        steps(0)
    with pytest.raises(ConfigError, match="use random or confidence"):
        steps(1, "raster")  # type: ignore[arg-type]


def test_one_level_is_the_models_own_completion() -> None:
    tokens = hidden(4, 7, 16)
    assert torch.equal(unveil(model().complete, latents(), tokens, steps(1)), model().complete(latents(), tokens))


@pytest.mark.parametrize("order", UNVEIL_ORDERS)
@pytest.mark.parametrize("levels", [1, 3, None])
def test_visible_latents_stay_bit_equal_and_hidden_ones_are_never_read(levels: int | None, order: UnveilOrder) -> None:
    tokens = hidden(4, 7, 0)
    given = latents()
    filled = unveil(model().complete, given, tokens, steps(levels, order), [1, 2, 3])
    assert filled.isfinite().all()
    assert torch.equal(filled.masked_fill(positions(tokens), 0), given.masked_fill(positions(tokens), 0))
    spoilt = given.masked_fill(positions(tokens), torch.nan)
    assert torch.equal(unveil(model().complete, spoilt, tokens, steps(levels, order), [1, 2, 3]), filled)


def test_every_level_predicts_all_that_is_hidden_and_unveils_what_it_calls_for() -> None:
    watched = Watched()
    unveil(watched, latents(1), hidden(4), steps(None), [5])
    assert [int((~mask).sum()) for mask in watched.masks] == list(range(4, 13))
    for before, after in pairwise(watched.masks):
        assert not (after & ~before).any(), "what was unveiled stays so"


@pytest.mark.parametrize("order", UNVEIL_ORDERS)
def test_the_count_of_evaluations_is_the_number_of_passes(order: UnveilOrder) -> None:
    for levels in (1, 4, None):
        for visible in (0, 1, 4, 9, 15):
            watched = Watched()
            plan = steps(levels, order)
            unveil(watched, latents(1), hidden(visible), plan, [0])
            assert len(watched.masks) == plan.num_function_evaluations(visible), (levels, visible)


@pytest.mark.parametrize("order", UNVEIL_ORDERS)
@pytest.mark.parametrize("levels", [4, None])
def test_an_image_alone_and_within_a_batch_is_unveiled_alike(levels: int | None, order: UnveilOrder) -> None:
    tokens, seeds = hidden(4, 9, 0, 16), [11, 12, 13, 14]
    together = Watched()
    whole = unveil(together, latents(4), tokens, steps(levels, order), seeds)
    for number in range(4):
        alone = Watched()
        one = slice(number, number + 1)
        single = unveil(alone, latents(4)[one], tokens[one], steps(levels, order), seeds[one])
        torch.testing.assert_close(single, whole[one], atol=1e-5, rtol=1e-5)
        for mask in alone.masks:  # every choice of tokens made alone was made in the batch too, bit for bit
            assert any((row == mask[0]).all() for other in together.masks for row in other)


def test_another_seed_is_another_random_order_and_the_same_seed_the_same() -> None:
    tokens = hidden(4)

    def run(seed: int) -> Tensor:
        return unveil(model().complete, latents(1), tokens, steps(3), [seed])

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))


def test_confidence_unveils_the_tokens_whose_prediction_moved_least() -> None:
    """A completion whose token i moves by i from call to call, and by nothing for even rows of the grid."""
    calls = 0

    def complete(given: Tensor, tokens: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return (torch.arange(16.0).view(1, 1, 4, 4) * calls).expand(len(given), 1, 4, 4)

    masks: list[Tensor] = []

    def watched(given: Tensor, tokens: Tensor) -> Tensor:
        masks.append(tokens)
        return complete(given, tokens)

    tokens = torch.ones(1, 16, dtype=torch.bool)
    tokens[0, 12:] = False
    plan = Unveiling(16, fewest_visible=4, most_visible=13, levels=3, order="confidence")
    unveil(watched, torch.zeros(1, 1, 4, 4), tokens, plan, [0])
    assert (~masks[0]).sum() == 2, "half of the visible tokens, for the first comparison"
    assert masks[2][0].nonzero().flatten().tolist() == list(range(3, 12)), "tokens 0, 1, 2 moved least"
    assert masks[3][0].nonzero().flatten().tolist() == list(range(6, 12))


def test_several_levels_need_a_seed_for_each_image() -> None:
    with pytest.raises(ValueError, match="needs a seed for each image"):
        unveil(model().complete, latents(2), hidden(4, 4), steps(2))
    with pytest.raises(ValueError, match="1 seeds for 2 images"):
        unveil(model().complete, latents(2), hidden(4, 4), steps(2), [1])


# -- LMD --------------------------------------------------------------------------------------------------------------


def lmd(**options: object) -> LMD:
    torch.manual_seed(0)
    sizes = {"encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 2}
    values = {"projector": ProjectorConfig(kind="pixels"), "patch_size": 8, "decoder_heads": 2, **sizes, **options}
    return LMD(LMDConfig(**values), DataSpec(32)).eval()


def masked_images() -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, 1, :3] = mask[1, 2:, 1] = False
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(2)), mask


def test_lmd_samples_images_from_nothing_seeded_by_torch() -> None:
    method = lmd()
    torch.manual_seed(3)
    first = method.sample(2)
    torch.manual_seed(3)
    assert torch.equal(method.sample(2), first)
    assert first.shape == (2, 3, 32, 32)
    assert 0 <= first.min() <= first.max() <= 1
    assert not torch.equal(first[0], first[1])


@pytest.mark.parametrize("levels", [1, 4, None])
def test_lmd_says_how_many_evaluations_a_reconstruction_takes(levels: int | None) -> None:
    method = lmd(reconstruct_levels=levels)
    assert method.num_function_evaluations == {1: 1, 4: 4, None: 9}[levels]
    images, mask = masked_images()
    torch.manual_seed(4)
    ours = method.reconstruct(images, mask)
    torch.manual_seed(4)
    seeds = torch.randint(2**62, (2,)).tolist()
    again, passes = method.reconstruct_progressively(images, mask, levels=levels, order="random", seeds=seeds)
    assert torch.equal(ours, again)
    # 3 and 2 visible tokens are fewer than the schedule's 4: its walk gets a start level
    assert passes == {1: 1, 4: 4, None: 10}[levels]


def test_one_shot_by_default_draws_no_random_number() -> None:
    images, mask = masked_images()
    method = lmd()
    state = torch.get_rng_state()
    method.reconstruct(images, mask)
    assert torch.equal(torch.get_rng_state(), state)


def test_progressive_reconstruction_sees_no_hidden_pixel() -> None:
    method = lmd()
    images, mask = masked_images()
    pixels = mask.repeat_interleave(8, 1).repeat_interleave(8, 2).unsqueeze(1)
    changed = torch.where(pixels, torch.rand_like(images), images)
    for order in UNVEIL_ORDERS:
        ours, theirs = (
            method.reconstruct_progressively(x, mask, levels=4, order=order, seeds=[1, 2])[0] for x in (images, changed)
        )
        assert torch.equal(ours, theirs)


def test_normalised_targets_cannot_be_sampled() -> None:
    with pytest.raises(ConfigError, match="normalised targets"):
        lmd(normalize_targets=True).sample(1)


def test_a_constant_schedule_has_no_levels_but_those_one_asks_for() -> None:
    assert lmd(mask_schedule="constant", reconstruct_levels=None).num_function_evaluations == 1
    assert lmd(mask_schedule="constant", reconstruct_levels=3).num_function_evaluations == 3
