"""Use of a codebook, its start from data, and the revival of dead codes."""

from __future__ import annotations

import math

import pytest
import torch

from lmd_bench.projector.codebook import codebook_use, count_codes, kmeans, positions, revive_dead_codes


def test_use_counts_codes_and_weighs_them_by_entropy() -> None:
    use = codebook_use(torch.tensor([5, 5, 0, 5, 5, 0, 0, 0]))
    assert (use.usage, use.dead) == (0.5, 4)
    assert use.perplexity == pytest.approx(4.0)
    uneven = codebook_use(torch.tensor([3, 1]))
    assert uneven.perplexity == pytest.approx(math.exp(-0.75 * math.log(0.75) - 0.25 * math.log(0.25)))
    assert codebook_use(torch.zeros(4, dtype=torch.int64)).perplexity == 0.0


def test_counting_keeps_codes_that_never_come() -> None:
    assert count_codes(torch.tensor([[0, 2], [2, 2]]), 5).tolist() == [1, 0, 3, 0, 0]


def test_positions_hold_the_channels_of_one_place() -> None:
    latents = torch.arange(2 * 3 * 2 * 2).view(2, 3, 2, 2)
    vectors = positions(latents)
    assert vectors.shape == (8, 3)
    assert torch.equal(vectors[1], latents[0, :, 0, 1])
    assert torch.equal(vectors[6], latents[1, :, 1, 0])


def test_kmeans_finds_clusters_that_lie_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    vectors = centres.repeat(50, 1) + 0.1 * torch.randn(200, 2, generator=generator)
    found = kmeans(vectors, 4, torch.Generator().manual_seed(3))
    spread = torch.cdist(vectors, found).min(1).values.mean()
    one = torch.cdist(vectors, kmeans(vectors, 1, torch.Generator().manual_seed(3))).mean()
    assert spread < 0.5 * one
    assert torch.equal(found, kmeans(vectors, 4, torch.Generator().manual_seed(3)))


def test_kmeans_of_fewer_vectors_than_codes_gives_codes_that_all_differ() -> None:
    found = kmeans(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), 16, torch.Generator())
    assert found.isfinite().all()
    assert len(found.unique(dim=0)) == 16


def test_dead_codes_move_onto_latents_and_lose_their_moments() -> None:
    codebook = torch.full((6, 2), 100.0)
    counts = torch.tensor([4, 0, 1, 0, 0, 2])
    moments = [torch.ones(6, 2), torch.ones(6, 2)]
    latents = torch.randn(1, 2, 2, 4, generator=torch.Generator().manual_seed(1))
    assert revive_dead_codes(codebook, counts, latents, moments, torch.Generator().manual_seed(0)) == 3
    assert (codebook[[0, 2, 5]] == 100.0).all()
    moved = codebook[[1, 3, 4]]
    assert all(any(torch.equal(code, vector) for vector in positions(latents)) for code in moved)
    assert len(moved.unique(dim=0)) == 3
    for moment in moments:
        assert moment.sum(1).tolist() == [2, 0, 2, 0, 0, 2]


def test_no_more_codes_are_revived_than_there_are_positions() -> None:
    codebook = torch.zeros(10, 2)
    number = revive_dead_codes(
        codebook, torch.zeros(10, dtype=torch.int64), torch.ones(1, 2, 1, 3), [], torch.Generator().manual_seed(0)
    )
    assert number == 3
    assert codebook.sum(1).tolist().count(2.0) == 3
