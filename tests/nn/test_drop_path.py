"""Stochastic depth."""

import pytest
import torch
from timm.layers import DropPath as TimmDropPath

from lmd_bench.nn.drop_path import DropPath, drop_paths, drop_paths_of_stages, rising_rates


def test_branches_are_dropped_per_sample_in_training_alone() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25)
    x, branch = torch.ones(4000, 1, 2), torch.full((4000, 1, 2), 3.0)
    kept = (drop(x, branch, torch.tensor([1.0, 2.0])) - 1.0) / 3.0
    assert torch.equal(kept[..., 1], 2 * kept[..., 0])
    assert sorted(kept[..., 0].unique().tolist()) == pytest.approx([0.0, 1 / 0.75])
    assert kept[..., 0].mean().item() == pytest.approx(1.0, abs=0.05)
    assert torch.equal(drop.eval()(x, branch), x + branch)


@pytest.mark.parametrize("shape", [(6, 5, 4), (6, 3, 2, 2)])
def test_it_is_timms(shape: tuple[int, ...]) -> None:
    x, branch = torch.randn(shape), torch.randn(shape)
    torch.manual_seed(3)
    ours = DropPath(0.4)(x, branch)
    torch.manual_seed(3)
    torch.testing.assert_close(ours, x + TimmDropPath(0.4)(branch))


def test_a_rate_of_zero_draws_nothing_and_adds_bit_for_bit() -> None:
    x, branch = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    before = torch.random.get_rng_state()
    assert torch.equal(DropPath(0.0)(x, branch), x + branch)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_rates_rise_linearly_over_all_stages() -> None:
    assert rising_rates(0.2, 5) == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])
    assert rising_rates(0.2, 1) == [0.0]
    assert [path.rate for path in drop_paths(0.1, 2)] == pytest.approx([0.0, 0.1])
    staged = drop_paths_of_stages(0.2, [2, 3])
    assert [[path.rate for path in paths] for paths in staged] == [
        pytest.approx([0.0, 0.05]),
        pytest.approx([0.1, 0.15, 0.2]),
    ]
