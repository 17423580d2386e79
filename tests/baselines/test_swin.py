"""Swin's parts against the plain definition: windows cut from an image, every pair of tokens judged by itself."""

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._relative_position import (
    biased_attention,
    relative_position_index,
    relative_position_index_with_class_token,
)
from baselines._swin import PatchMerging, SwinBlock, SwinEncoder, SwinOptions, WindowOrder, quad_ids, reorder
from lmd_bench.errors import ConfigError

ORDERS = [WindowOrder(8, 4), WindowOrder(8, 4, 2), WindowOrder(9, 3, 1), WindowOrder(4, 4), WindowOrder(4, 8)]
TINY = SwinOptions(patch_size=2, window_size=4, embed_dim=8, depths=(2, 1, 2), num_heads=(1, 2, 4))


def test_the_index_tells_offsets_apart_and_nothing_else() -> None:
    index = relative_position_index(3)
    assert index.shape == (9, 9)
    rows = {}
    for i in range(9):
        for j in range(9):
            offset = (i // 3 - j // 3, i % 3 - j % 3)
            assert rows.setdefault(offset, index[i, j].item()) == index[i, j].item()
    assert [rows[offset] for offset in sorted(rows)] == list(range(25))


def test_a_class_token_has_three_rows_of_its_own() -> None:
    index = relative_position_index_with_class_token(3)
    assert torch.equal(index[1:, 1:], relative_position_index(3))
    assert index[0, 1:].unique().tolist() == [25]
    assert index[1:, 0].unique().tolist() == [26]
    assert index[0, 0].item() == 27


@pytest.mark.parametrize("windows", [1, 3])
def test_attention_with_a_bias_is_torchs(windows: int) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 3, 5, 3 * 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(windows, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    query, key, value = qkv.view(6, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
    each = bias.expand(3, -1, -1, -1).repeat(2, 1, 1, 1)
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=each).transpose(1, 2).reshape(2, 3, 5, 8)
    given = biased_attention(qkv, bias, 2)
    torch.testing.assert_close(given, wanted)
    weight = torch.randn_like(wanted)
    for own, torchs in zip(*(torch.autograd.grad(out, (qkv, bias), weight) for out in (given, wanted)), strict=True):
        torch.testing.assert_close(own, torchs)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("windows", [1, 4])
def test_attention_on_a_gpu_is_that_on_a_cpu(windows: int) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(2, 4, 36, 3 * 64), torch.randn(windows, 2, 36, 36), torch.randn(2, 4, 36, 64)
    results = []
    for device in ("cpu", "cuda"):
        qkv, bias, weight = (tensor.to(device) for tensor in inputs)
        leaves = qkv.requires_grad_(), bias.requires_grad_()
        attended = biased_attention(*leaves, 2)
        results.append([attended.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(attended, leaves, weight))])
    for on_cpu, on_gpu in zip(*results, strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("order", ORDERS)
def test_an_order_holds_every_token_once_and_windows_one_after_another(order: WindowOrder) -> None:
    ids = order.ids()
    assert ids.sort().values.tolist() == list(range(order.grid**2))
    side = min(order.window, order.grid)
    rolled = (torch.stack([ids // order.grid, ids % order.grid]) - order.shift) % order.grid
    window = (rolled // side)[0] * (order.grid // side) + (rolled // side)[1]
    assert torch.equal(window, torch.arange(len(ids)) // side**2)


@pytest.mark.parametrize("order", ORDERS[1:3])
def test_the_shift_mask_parts_tokens_that_are_no_neighbours_in_the_image(order: WindowOrder) -> None:
    ids = order.ids().view(-1, order.window**2)
    apart = [
        (place[:, :, None] - place[:, None, :]).abs() >= order.window for place in (ids // order.grid, ids % order.grid)
    ]
    assert torch.equal(order.shift_mask(), -100.0 * (apart[0] | apart[1]))


def test_reordering_moves_tokens_and_their_gradients() -> None:
    torch.manual_seed(0)
    source, target = ORDERS[:2]
    move = reorder(source, target)
    ids = torch.arange(64.0)
    assert torch.equal(move(source.ids().view(1, -1)), target.ids().view(1, -1))
    x = torch.randn(2, 64, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(move, x)
    assert torch.equal(source.ids()[move.sources(torch.arange(64))], target.ids())
    assert reorder(ORDERS[3], ORDERS[4])(ids) is ids
    assert not move.state_dict()


@pytest.mark.parametrize("order", [WindowOrder(8, 4), WindowOrder(8, 4, 2)])
def test_a_block_is_attention_among_the_tokens_of_a_window(order: WindowOrder) -> None:
    torch.manual_seed(0)
    block = SwinBlock(6, 2, order, mlp_ratio=2.0, drop_path=0.0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 64, 6)
    wanted = _plain_block(block, x)[:, order.ids()]
    torch.testing.assert_close(block(x[:, order.ids()]), wanted)
    some = torch.tensor([[5, 0], [63, 7]])
    torch.testing.assert_close(block(x[:, order.ids()], some), wanted[torch.arange(2)[:, None], some])


def _plain_block(block: SwinBlock, x: Tensor) -> Tensor:
    """Full attention in raster order; a pair in two windows, or torn apart by the shift, is forbidden."""
    order, place = block.order, torch.arange(64)
    rows, columns = place // 8, place % 8
    together = torch.ones(64, 64, dtype=torch.bool)
    offsets = []
    for axis in (rows, columns):
        window = (axis - order.shift) % 8 // order.window
        offset = axis[:, None] - axis[None, :]
        together &= (window[:, None] == window[None, :]) & (offset.abs() < order.window)
        offsets.append(offset.clamp(1 - order.window, order.window - 1) + order.window - 1)
    bias = block.attn.relative_position_bias_table[offsets[0] * (2 * order.window - 1) + offsets[1]].permute(2, 0, 1)
    bias = bias.masked_fill(~together, float("-inf"))
    query, key, value = block.attn.qkv(block.norm1(x)).view(2, 64, 3, 2, 3).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) / 3**0.5 + bias).softmax(-1)
    x = x + block.attn.proj((weights @ value).transpose(1, 2).reshape(2, 64, 6))
    return x + block.mlp(block.norm2(x))


def test_merging_sets_four_neighbours_side_by_side() -> None:
    torch.manual_seed(0)
    merge, order = PatchMerging(3), WindowOrder(4, 2)
    x = torch.randn(2, 64, 3)
    grid = x.view(2, 8, 8, 3)
    corners = [grid[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    wanted = merge.reduction(merge.norm(torch.cat(corners, dim=-1).view(2, 16, 12)))
    torch.testing.assert_close(merge(x[:, quad_ids(order)]), wanted[:, order.ids()])


def test_wanted_tokens_are_those_of_the_whole_grid() -> None:
    torch.manual_seed(0)
    options = TINY.model_copy(update={"window_size": 2})
    encoder = SwinEncoder(options, 32).eval()
    images, hidden = torch.randn(3, 3, 32, 32), torch.rand(3, 256) > 0.5
    wanted = torch.rand(3, 16).argsort(dim=1)[:, :5]
    everything = encoder(images, hidden)
    assert everything.shape == (3, 16, 32)
    torch.testing.assert_close(encoder(images, hidden, wanted), everything[torch.arange(3)[:, None], wanted])


def test_hidden_patches_reach_nothing() -> None:
    torch.manual_seed(0)
    encoder = SwinEncoder(TINY, 32).eval()
    images, hidden = torch.randn(2, 3, 32, 32), torch.rand(2, 256) > 0.5
    pixels = hidden.view(2, 1, 16, 16).repeat_interleave(2, 2).repeat_interleave(2, 3)
    spoilt = images.masked_fill(pixels, float("nan"))
    assert torch.equal(encoder(images, hidden), encoder(spoilt, hidden))


def test_drop_path_rises_with_depth() -> None:
    encoder = SwinEncoder(TINY.model_copy(update={"drop_path": 0.2}), 32)
    rates = [block.drop_path.rate for stage in encoder.layers for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def test_weights_start_as_in_the_release() -> None:
    torch.manual_seed(0)
    encoder = SwinEncoder(SwinOptions(depths=(2, 2, 2, 2)), 192)
    block = encoder.layers[1].blocks[0]
    for weight in (
        block.mlp.fc1.weight,
        block.attn.relative_position_bias_table,
        encoder.layers[0].downsample.reduction.weight,
    ):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert block.mlp.fc1.weight.abs().max() > 0.06  # not cut at a deviation
    assert not block.attn.qkv.bias.any()
    assert encoder.patch_embed.proj.weight.abs().max().item() == pytest.approx(1 / 48**0.5, rel=0.05)
    assert encoder.patch_embed.proj.bias.any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (4, 8)}, "num_heads needs one entry for each of 4 stages"),
        ({"num_heads": (3, 8, 16, 32)}, "num_heads: 3 heads do not divide the width 128"),
        ({"depths": (2, 0, 18, 2)}, "depths: every stage needs a block"),
        ({"depth": 2}, "depth"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        SwinOptions.model_validate(options)


@pytest.mark.parametrize(
    ("image_size", "message"),
    [
        (200, r"backbone: 4 stages with patch_size 4 need images whose side is a multiple of 32 px, got 200"),
        (224, r"backbone.window_size: 6 does not cut the grids 56, 28, 14, 7 of images of 224 px; possible: 1, 7, "),
    ],
)
def test_images_that_windows_do_not_cut_are_refused(image_size: int, message: str) -> None:
    SwinOptions().check(192)
    with pytest.raises(ConfigError, match=message):
        SwinOptions().check(image_size)
