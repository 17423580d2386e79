"""The U-Nets of the diffusion baselines, held against diffusers' own forward pass."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from pydantic import ValidationError
from torch import nn

from baselines._unet import UNetFlavour, UNetOptions, _ResidualBlock, build_unet
from lmd_bench.errors import ConfigError

TINY: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (1,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
FLAVOURS: dict[UNetFlavour, dict[str, Any]] = {
    "ddim": {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
    "openai": {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0},
}


def randomised(unet: UNet2DModel) -> UNet2DModel:
    """Its parameters made random, those that start at zero too."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return unet


def as_diffusers_has_it(unet: UNet2DModel, flavour: UNetFlavour, *, scale_shift: bool) -> UNet2DModel:
    """The same weights in diffusers' unchanged model with heads of eight channels."""
    plain = UNet2DModel(
        sample_size=16,
        block_out_channels=TINY["block_out_channels"],
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        attn_norm_num_groups=8,
        attention_head_dim=8,
        resnet_time_scale_shift="scale_shift" if scale_shift else "default",
        **FLAVOURS[flavour],
    )
    plain.load_state_dict(unet.state_dict())
    return plain


@pytest.mark.parametrize("scale_shift", [False, True])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_outputs_and_gradients_are_those_of_diffusers_own_pass(flavour: UNetFlavour, scale_shift: bool) -> None:
    options = UNetOptions(**TINY, attention_head_dim=8)
    unet = randomised(build_unet(options, image_size=16, flavour=flavour, scale_shift=scale_shift))
    plain = as_diffusers_has_it(unet, flavour, scale_shift=scale_shift)
    x, timesteps = torch.randn(3, 3, 16, 16), torch.tensor([0, 7, 900])
    own, theirs = (model(x, timesteps, return_dict=False)[0] for model in (unet, plain))
    torch.testing.assert_close(own, theirs, rtol=1e-4, atol=1e-5)
    for output in (own, theirs):
        output.square().mean().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_heads_are_counted_or_sized_and_change_the_output() -> None:
    assert [UNetOptions(**TINY, num_heads=4).heads_at(width) for width in (16, 32)] == [4, 4]
    assert [UNetOptions(**TINY, attention_head_dim=8).heads_at(width) for width in (16, 32)] == [2, 4]
    assert UNetOptions(**TINY).heads_at(32) == 1
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    single = randomised(build_unet(UNetOptions(**TINY), image_size=16))
    outputs = []
    for heads in ({"num_heads": 4}, {"attention_head_dim": 8}, {}):
        unet = build_unet(UNetOptions(**TINY, **heads), image_size=16)
        unet.load_state_dict(single.state_dict())
        outputs.append(unet(x, timesteps, return_dict=False)[0])
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4


def test_the_openai_flavour_starts_as_nothing_but_shortcuts() -> None:
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    unet = build_unet(UNetOptions(**TINY), image_size=16, out_channels=6, flavour="openai")
    output = unet(x, timesteps, return_dict=False)[0]
    assert output.shape == (2, 6, 16, 16)
    assert not output.any()
    block, attention = unet.down_blocks[1].resnets[0], unet.down_blocks[1].attentions[0]
    h = torch.randn(2, 32, 8, 8)
    torch.testing.assert_close(attention(h), h, rtol=0, atol=0)
    torch.testing.assert_close(block(h[:, :16], torch.randn(2, 64)), block.conv_shortcut(h[:, :16]), rtol=0, atol=0)
    assert build_unet(UNetOptions(**TINY), image_size=16)(x, timesteps, return_dict=False)[0].std() > 1e-3


@pytest.mark.parametrize("batch_size", [2, 64])
def test_feature_maps_lie_channels_last_and_stay_so_in_a_copy(batch_size: int) -> None:
    unet = copy.deepcopy(build_unet(UNetOptions(**TINY), image_size=32))
    layouts = []
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.register_forward_hook(
            lambda _, __, out: layouts.append((out[0] if isinstance(out, tuple) else out).stride(1))
        )
    for name, layer in unet.named_modules():
        if isinstance(layer, nn.Conv2d) and name != "conv_in":
            layer.register_forward_pre_hook(lambda _, args: layouts.append(args[0].stride(1)))
    with torch.no_grad():
        unet(torch.randn(batch_size, 3, 32, 32), torch.randint(1000, (batch_size,)))
    assert len(layouts) > 5
    assert set(layouts) == {1}


def test_small_feature_maps_and_their_weights_lie_channels_first() -> None:
    unet = build_unet(UNetOptions(**TINY), image_size=16)  # sides 16 and 8
    layouts: dict[int, set[int]] = {16: set(), 8: set()}
    for layer in (module for module in unet.modules() if isinstance(module, _ResidualBlock)):
        layer.conv1.register_forward_pre_hook(lambda _, args: layouts[args[0].shape[-1]].add(args[0].stride(1)))
    with torch.no_grad():
        unet(torch.randn(2, 3, 16, 16), torch.randint(1000, (2,)))
    assert layouts == {16: {1}, 8: {64}}
    small = [unet.down_blocks[-1], unet.mid_block, unet.up_blocks[0]]
    assert all(resnet.conv1.weight.is_contiguous() for block in small for resnet in block.resnets)
    assert not unet.down_blocks[0].resnets[0].conv1.weight.is_contiguous()


def test_dropout_acts_in_training_alone() -> None:
    unet = randomised(build_unet(UNetOptions(**TINY, dropout=0.5), image_size=16))
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    first, again = (unet.train()(x, timesteps, return_dict=False)[0] for _ in range(2))
    assert (first - again).abs().max() > 1e-3
    first, again = (unet.eval()(x, timesteps, return_dict=False)[0] for _ in range(2))
    assert torch.equal(first, again)


def test_group_norms_keep_their_statistics_in_float32_under_autocast() -> None:
    unet = randomised(build_unet(UNetOptions(**TINY), image_size=16))
    norm, x = unet.down_blocks[0].resnets[0].norm1, 100 + torch.randn(2, 16, 16, 16).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = norm(x)
    torch.testing.assert_close(under.float(), norm(x.float()), rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm_num_groups": 5}, "block_out_channels.0: 16 is not divisible by norm_num_groups"),
        ({"num_heads": 3}, "block_out_channels.1: 32 is not divisible by num_heads"),
        ({"attention_head_dim": 12}, "block_out_channels.1: 32 is not divisible by attention_head_dim"),
        ({"num_heads": 2, "attention_head_dim": 16}, "give attention_head_dim or num_heads, not both"),
        ({"attention_levels": (2,)}, r"attention_levels must be in 0..1, got \[2\]"),
        ({"dropout": 1.0}, "dropout"),
        ({"block_out_channels": (-16, 32)}, r"block_out_channels\.0"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetOptions(**{**TINY, **options})


def test_a_side_that_cannot_be_halved_often_enough_is_refused() -> None:
    UNetOptions().check_side(256, "image size")
    with pytest.raises(ConfigError, match="6 levels need an image size divisible by 32, got 200"):
        UNetOptions().check_side(200, "image size")
