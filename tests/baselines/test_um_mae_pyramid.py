"""UM-MAE's pyramids: maps in quadtree order, windows at irregular places, the decoder's positions, sizes."""

import copy
import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from baselines._masked_pixels import PixelStats
from baselines._um_mae_classifier import PyramidClassifier
from baselines._um_mae_grid import merge_squares, quadtree_order, raster_ranks
from baselines._um_mae_pvt import PvtBlock
from baselines._um_mae_pyramid import PyramidAutoencoder
from baselines._um_mae_shape import PyramidShape, check_pyramid, pyramid_shape_of_checkpoint
from baselines._um_mae_swin import SwinBlock, Windows
from baselines._uniform_sampling import draw_uniform, visible_first
from lmd_bench.errors import ConfigError, WeightsError

BACKBONES = pytest.mark.parametrize("backbone", ["pvt", "swin"])


def tiny_shape(backbone: Any, image_size: int = 64, **changes: Any) -> PyramidShape:
    sizes: dict[str, Any] = {
        "stage_widths": (8, 12, 16, 24),
        "stage_depths": (2, 2, 1, 1),
        "stage_heads": (1, 2, 2, 3),
        "stage_mlp_ratios": (2.0, 2.0, 2.0, 2.0),
        "token_px": 8,
        "decoder_width": 16,
        "decoder_heads": 2,
    }
    return PyramidShape(backbone=backbone, image_size=image_size, **{**sizes, **changes})


def tiny_model(backbone: Any, image_size: int = 64, **changes: Any) -> PyramidAutoencoder:
    torch.manual_seed(0)
    return PyramidAutoencoder(tiny_shape(backbone, image_size, **changes))


def uniform_mask(batch_size: int, grid_size: int) -> Tensor:
    return draw_uniform(batch_size, grid_size, torch.device("cpu"), torch.Generator().manual_seed(1))


def to_map(x: Tensor) -> Tensor:
    """Patches (B, N, C) in quadtree order as a map (B, C, s, s)."""
    side = round(x.shape[1] ** 0.5)
    return x[:, raster_ranks(side)].transpose(1, 2).reshape(len(x), -1, side, side)


def to_sequence(x: Tensor) -> Tensor:
    """The inverse of `to_map`."""
    return x.flatten(2).transpose(1, 2)[:, quadtree_order(x.shape[-1])]


# -- quadtree order ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", [1, 2, 3, 4, 6, 8, 12])
def test_quadtree_order_holds_every_patch_once_and_every_2_x_2_together(side: int) -> None:
    order = quadtree_order(side)
    assert np.array_equal(np.sort(order), np.arange(side**2))
    assert np.array_equal(order[raster_ranks(side)], np.arange(side**2))
    if side % 2 == 0:
        rows, columns = np.divmod(order.reshape(-1, 4), side)
        assert np.array_equal(rows - rows[:, :1], np.tile([0, 0, 1, 1], (len(rows), 1)))
        assert np.array_equal(columns - columns[:, :1], np.tile([0, 1, 0, 1], (len(rows), 1)))
        assert np.array_equal(rows[:, 0] // 2 * (side // 2) + columns[:, 0] // 2, quadtree_order(side // 2))


@pytest.mark.parametrize(("out_dim", "patches_are_turned"), [(4, False), (12, True)])
def test_merging_is_the_strided_convolution_whichever_side_is_turned(out_dim: int, patches_are_turned: bool) -> None:
    torch.manual_seed(0)
    conv, images = nn.Conv2d(6, out_dim, 2, stride=2), torch.randn(2, 6, 4, 4)
    assert (images.numel() < conv.weight.numel()) == patches_are_turned
    torch.testing.assert_close(to_map(merge_squares(to_sequence(images), conv)), conv(images))


# -- blocks against their definition ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [1, 2, 4])
def test_a_pvt_block_attends_to_the_average_pooled_map(reduction: int) -> None:
    torch.manual_seed(0)
    block, images = PvtBlock(12, 3, 2.0), torch.randn(2, 12, 8, 8)
    attn, x = block.attn, to_sequence(images)
    normed = block.norm1(x)
    pooled = attn.sr(F.avg_pool2d(to_map(normed), reduction))
    context = F.layer_norm(pooled.flatten(2).transpose(1, 2), (12,), attn.norm.weight, attn.norm.bias)
    heads = [part.unflatten(2, (3, 4)).transpose(1, 2) for part in (attn.q(normed), *attn.kv(context).chunk(2, 2))]
    weights = (heads[0] @ heads[1].transpose(2, 3) / 2).softmax(dim=-1)
    x = x + attn.proj((weights @ heads[2]).transpose(1, 2).flatten(2))
    x = x + block.mlp(block.norm2(x))
    torch.testing.assert_close(block(to_sequence(images), reduction), x)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_swin_block_on_a_whole_map_attends_within_windows(shifted: bool) -> None:
    torch.manual_seed(0)
    block, images = SwinBlock(12, 3, 2.0, bias_hidden=5), torch.randn(2, 12, 8, 8)
    windows = Windows(8, 4, shifted=shifted)
    rows, columns = (torch.from_numpy(part).unsqueeze(0) for part in np.divmod(quadtree_order(8), 8))
    coordinates = torch.stack([rows, columns], dim=1).float().expand(2, -1, -1)
    expected = plain_swin_block(block, images, to_map(coordinates.transpose(1, 2)), 4, shift=2 if shifted else 0)
    torch.testing.assert_close(block(to_sequence(images), windows, windows.offsets(rows, columns)), expected)


@pytest.mark.parametrize("shifted", [False, True])
def test_a_swin_block_on_the_compact_map_knows_how_far_apart_patches_really_are(shifted: bool) -> None:
    torch.manual_seed(0)
    side, unit = 16, 4  # 4 x 4 cells of one visible token each, of 4 x 4 patches
    block, images = SwinBlock(12, 3, 2.0, bias_hidden=5), torch.randn(2, 12, side, side)
    windows = Windows(side, 8, unit=unit, stride=2, jitter=1, spacing=float(unit), shifted=shifted)
    slot_rows, slot_columns = torch.randint(2, (2, 2, 4, 4))
    cells = torch.arange(4)
    rows, columns = 2 * cells[:, None] + slot_rows, 2 * cells[None, :] + slot_columns
    inner = torch.arange(unit).repeat(4)
    patch_rows = unit * rows.repeat_interleave(unit, 1).repeat_interleave(unit, 2) + inner[:, None]
    patch_columns = unit * columns.repeat_interleave(unit, 1).repeat_interleave(unit, 2) + inner[None, :]
    coordinates = torch.stack([patch_rows, patch_columns], dim=1).float()
    expected = plain_swin_block(block, images, coordinates, 8, shift=4 if shifted else 0)
    order = quadtree_order(4)
    offsets = windows.offsets(rows.flatten(1)[:, order], columns.flatten(1)[:, order])
    torch.testing.assert_close(block(to_sequence(images), windows, offsets), expected)


def plain_swin_block(block: SwinBlock, images: Tensor, coordinates: Tensor, window: int, *, shift: int) -> Tensor:
    """The block by its definition: roll, cut, a bias for every pair, regions that the roll joined kept apart."""
    batch, dim, side, _ = images.shape
    heads = block.attn.num_heads
    x = to_sequence(images)
    normed = to_map(block.norm1(x)).roll((-shift, -shift), (2, 3))
    places = coordinates.roll((-shift, -shift), (2, 3))
    edge = (torch.arange(side) >= side - shift).long()
    region = (2 * edge[:, None] + edge[None, :]).expand(batch, 1, -1, -1)

    def cut(values: Tensor) -> Tensor:
        squares = values.unfold(2, window, window).unfold(3, window, window)
        return squares.permute(0, 2, 3, 4, 5, 1).reshape(-1, window**2, values.shape[1])

    tokens, places, region = cut(normed), cut(places), cut(region).squeeze(2)
    offsets = places[:, None, :, :] - places[:, :, None, :]
    logarithms = offsets.sign() * (1 + offsets.abs()).log()
    bias = block.attn.posmlp(logarithms.permute(0, 3, 1, 2))
    bias = bias.masked_fill((region[:, :, None] != region[:, None, :]).unsqueeze(1), -100.0)
    query, key, value = block.attn.qkv(tokens).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(2, 3) * (dim // heads) ** -0.5 + bias).softmax(dim=-1)
    attended = block.attn.proj((weights @ value).transpose(1, 2).flatten(2))
    count = side // window
    squares = attended.view(batch, count, count, window, window, dim).permute(0, 5, 1, 3, 2, 4)
    x = x + to_sequence(squares.reshape(batch, dim, side, side).roll((shift, shift), (2, 3)))
    out: Tensor = x + block.mlp(block.norm2(x))
    return out


# -- the autoencoder --------------------------------------------------------------------------------------------------


@BACKBONES
def test_only_visible_tokens_that_are_not_replaced_are_looked_at(backbone: Any) -> None:
    model, visible = tiny_model(backbone), uniform_mask(2, 8)
    images, noise = torch.randn(2, 3, 64, 64), torch.rand(2, 16)
    replaced = model.replaced_cells(noise)
    assert replaced.sum(dim=1).tolist() == [4, 4]
    in_cells = replaced.view(2, 4, 1, 4, 1).expand(-1, -1, 2, -1, 2).reshape(2, 64)
    seen = (visible & ~in_cells).view(2, 1, 8, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    other = torch.where(seen, images, torch.randn_like(images))
    with torch.no_grad():
        predicted = model(images, visible, noise)
        assert predicted.shape == (2, 48, 192)
        assert torch.equal(model(other, visible, noise), predicted)
        assert not torch.equal(model(other, visible, None), model(images, visible, None))
        seen_nowhere = torch.where(seen, torch.randn_like(images), images)
        assert not torch.equal(model(seen_nowhere, visible, noise), predicted)


@BACKBONES
def test_every_parameter_but_the_position_tables_gets_a_gradient(backbone: Any) -> None:
    model = tiny_model(backbone, image_size=128)
    model(torch.randn(2, 3, 128, 128), uniform_mask(2, 16), torch.rand(2, 64)).square().mean().backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    assert without == ({"pos_embed", "decoder_pos_embed"} if backbone == "pvt" else {"decoder_pos_embed"})
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters() if parameter.grad is not None)


@BACKBONES
def test_repaired_each_token_is_decoded_at_its_own_position(backbone: Any) -> None:
    model, visible = tiny_model(backbone), uniform_mask(2, 8)
    features = torch.randn(2, 4, 24)
    with torch.no_grad():
        embedded = F.pixel_shuffle(to_map(model.decoder_embed(features)), 2)  # the compact map, a position per cell
        spread = embedded.repeat_interleave(2, 2).repeat_interleave(2, 3).flatten(2).transpose(1, 2)
        x = torch.where(visible.unsqueeze(2), spread, model.mask_token) + model.decoder_pos_embed
        for block in model.decoder_blocks:
            x = block(x)
        expected = model.decoder_pred(model.decoder_norm(x))
        hidden = visible_first(visible)[:, 16:]
        expected = expected.gather(1, hidden.unsqueeze(2).expand(-1, -1, 192))
        torch.testing.assert_close(model.decode(features, visible), expected)
        assert model.decode(features, visible, all_tokens=True).shape == (2, 64, 192)


@BACKBONES
def test_the_release_order_is_the_tokens_own_only_where_cell_and_raster_order_agree(backbone: Any) -> None:
    model, images = tiny_model(backbone), torch.randn(1, 3, 64, 64)
    official = copy.deepcopy(model)
    official.shape = dataclasses.replace(model.shape, official_order=True)
    slots = torch.zeros(1, 4, 2, 4, 2, dtype=torch.bool)
    slots[:, :, 0, :, 0] = True
    agreeing, other = slots.view(1, 64), uniform_mask(1, 8)
    with torch.no_grad():
        assert torch.equal(official(images, agreeing, None), model(images, agreeing, None))
        assert not torch.allclose(official(images, other, None), model(images, other, None))


@BACKBONES
def test_the_model_can_be_made_and_moved_to_the_meta_device(backbone: Any) -> None:
    with torch.device("meta"):
        made = PyramidAutoencoder(tiny_shape(backbone))
    moved = copy.deepcopy(tiny_model(backbone)).to("meta")
    inputs = torch.empty(2, 3, 64, 64, device="meta")
    visible = torch.empty(2, 64, dtype=torch.bool, device="meta")
    for model in (made, moved):
        assert model(inputs, visible, torch.empty(2, 16, device="meta")).shape == (2, 48, 192)


# -- the classifier ---------------------------------------------------------------------------------------------------


@BACKBONES
def test_the_classifier_shares_the_encoder_and_sees_whole_images(backbone: Any) -> None:
    model = tiny_model(backbone, image_size=128)
    classifier = PyramidClassifier(model, PixelStats("half"), num_classes=5)
    images = torch.rand(2, 3, 128, 128, requires_grad=True)
    logits = classifier(images)
    assert logits.shape == (2, 5)
    features = classifier.features(images)
    assert features.shape == (2, 64, 24)
    features.square().sum().backward()
    assert images.grad is not None
    assert bool((images.grad.abs().sum(dim=1) > 0).all())
    shared = {id(parameter) for parameter in model.parameters()}
    own = {name for name, parameter in classifier.named_parameters() if id(parameter) not in shared}
    trained_copy = {"pos_embed"} if backbone == "pvt" else set()
    assert own == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias", *trained_copy}


def test_swin_classifies_a_map_as_its_stages_say_patch_by_patch() -> None:
    model = tiny_model("swin", image_size=128, stage_depths=(1, 2, 2, 1))
    classifier, images = PyramidClassifier(model, nn.Identity(), num_classes=5), torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        x = model.patch_embed.norm(model.patch_embed.proj(images).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        blocks = iter(model.blocks)
        for depth, side in zip((1, 2, 2, 1), (64, 32, 16, 8), strict=True):
            axis = torch.arange(side, dtype=torch.float32)
            coordinates = torch.stack(torch.meshgrid(axis, axis, indexing="ij")).unsqueeze(0)
            for index in range(depth):
                block = next(blocks)
                assert isinstance(block, SwinBlock)
                if index == 0 and block.downsample is not None:
                    x = to_map(block.downsample(to_sequence(x)))
                shift = 8 if index % 2 and side > 16 else 0
                x = to_map(plain_swin_block(block, x, coordinates, min(16, side), shift=shift))
        torch.testing.assert_close(classifier.features(images), to_sequence(x))


# -- sizes and checkpoints --------------------------------------------------------------------------------------------


@BACKBONES
@pytest.mark.parametrize("image_size", [64, 128, 256, 512])
def test_powers_of_two_from_64_px_fit_both_pyramids(backbone: Any, image_size: int) -> None:
    check_pyramid(tiny_shape(backbone, image_size, token_px=16))


def test_published_sizes_fit() -> None:
    for name in ("pvt_small", "swin_tiny"):
        check_pyramid(PyramidShape.published(name))


@pytest.mark.parametrize(
    ("backbone", "changes", "message"),
    [
        ("pvt", {"image_size": 224, "token_px": 16}, "image_size: 224 px are not a multiple of 64, 4 tokens of 16 px"),
        ("swin", {"image_size": 192, "token_px": 16}, r"give swin compact maps of \(24, 12, 6, 3\).*12 is not cut"),
        ("swin", {"token_px": 18}, "^patch_size: a pyramid's tokens are 4 x 4 patches, got 18 px"),
        ("pvt", {"stage_widths": (8, 16)}, r"stage_widths: \(8, 16\) are not the 4 positive values"),
        ("pvt", {"stage_depths": (1, 0, 1, 1)}, "stage_depths: .* positive"),
        ("swin", {"stage_heads": (3, 2, 2, 3)}, "stage_heads: 3 heads do not divide a stage's width 8"),
        ("pvt", {"decoder_heads": 3}, "decoder_width must be divisible by 4 .* and by decoder_heads, got 16, 3"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(backbone: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_pyramid(tiny_shape(backbone, **changes))


def test_pvt_takes_sizes_that_swin_windows_do_not_cut() -> None:
    model = tiny_model("pvt", 96)
    assert model(torch.randn(1, 3, 96, 96), uniform_mask(1, 12), torch.rand(1, 36)).shape == (1, 108, 192)


@BACKBONES
def test_sizes_are_read_off_a_checkpoint(backbone: Any) -> None:
    model = tiny_model(backbone, image_size=128, stage_depths=(1, 2, 3, 1), decoder_depth=3)
    heads = {"stage_heads": (1, 2, 2, 3), "decoder_heads": 2}
    shape = pyramid_shape_of_checkpoint(model.state_dict(), **heads)
    assert shape == dataclasses.replace(model.shape, official_order=True)


def test_heads_that_leave_no_trace_are_asked_for() -> None:
    weights = tiny_model("pvt").state_dict()
    with pytest.raises(WeightsError, match=r"a PVT with stages of widths \(8, 12, 16, 24\) was not published"):
        pyramid_shape_of_checkpoint(weights, decoder_heads=2)
    with pytest.raises(WeightsError, match=r"no published decoder has the width 16.*give decoder_heads"):
        pyramid_shape_of_checkpoint(weights, stage_heads=(1, 2, 2, 3))


def test_another_layout_is_refused() -> None:
    with pytest.raises(WeightsError, match=r"blocks.0.norm1.weight is missing.*UM-MAE's pyramids"):
        pyramid_shape_of_checkpoint({"model": torch.zeros(1)})
    weights = tiny_model("swin").state_dict()
    weights["decoder_pos_embed"] = torch.zeros(1, 9, 16)
    with pytest.raises(WeightsError, match="no pyramid of UM-MAE: image_size: 24 px are not a multiple of 32"):
        pyramid_shape_of_checkpoint(weights, decoder_heads=2)
