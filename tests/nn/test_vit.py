"""Transformer blocks and position tables."""

from functools import partial

import pytest
import timm
import torch

from lmd_bench.nn.pos_embed import sincos_pos_embed
from lmd_bench.nn.vit import Block


def test_a_block_equals_timms_block_with_the_same_weights() -> None:
    torch.manual_seed(0)
    block = Block(48, 3)
    theirs = timm.models.vision_transformer.Block(
        dim=48, num_heads=3, mlp_ratio=4.0, qkv_bias=True, norm_layer=partial(torch.nn.LayerNorm, eps=1e-6)
    )
    theirs.load_state_dict(block.state_dict(), strict=True)
    x = torch.randn(2, 7, 48)
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_fewer_queries_give_the_same_values_and_gradients() -> None:
    torch.manual_seed(0)
    block = Block(32, 4).double()
    x = torch.randn(3, 9, 32, dtype=torch.float64)
    weights = torch.randn(3, 4, 32, dtype=torch.float64)
    gradients = []
    for few in (False, True):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        out = block(leaf, 4) if few else block(leaf)[:, -4:]
        (out * weights).sum().backward()
        gradients.append([out.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for whole, part in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, part, rtol=1e-10, atol=1e-12)


def test_position_table_has_a_zero_class_row_and_column_before_row() -> None:
    table = sincos_pos_embed(16, 3)[0]
    assert table.shape == (10, 16)
    assert not table[0].any()
    tokens = table[1:].view(3, 3, 16)
    assert torch.equal(tokens[0, 2, :8], tokens[2, 2, :8]), "the first half depends on the column alone"
    assert torch.equal(tokens[1, 0, 8:], tokens[1, 2, 8:]), "the second half depends on the row alone"
    torch.testing.assert_close(tokens[0, 2, :4], torch.sin(2.0 * 10000.0 ** -(torch.arange(4) / 4)))
    torch.testing.assert_close(tokens[0, 2, 4:8], torch.cos(2.0 * 10000.0 ** -(torch.arange(4) / 4)))


def test_position_table_needs_a_width_divisible_by_four() -> None:
    with pytest.raises(ValueError, match="divisible by 4, got 18"):
        sincos_pos_embed(18, 3)
