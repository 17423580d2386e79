"""The checkpoint layout of improved-diffusion's U-Nets, and what is said of checkpoints that do not fit."""

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from baselines._openai_layout import _official_shapes, load_openai, sizes_from_openai, to_openai
from baselines._unet import UNetOptions, build_unet
from lmd_bench.errors import WeightsError
from tests.baselines.test_unet import randomised

TINY = UNetOptions(
    block_out_channels=(16, 32, 32), attention_levels=(1,), layers_per_block=2, norm_num_groups=8, num_heads=4
)


def tiny_unet(*, scale_shift: bool = True) -> UNet2DModel:
    return randomised(build_unet(TINY, image_size=16, out_channels=6, flavour="openai", scale_shift=scale_shift))


def legacy_attention(x: Tensor, official: dict[str, Tensor], heads: int) -> Tensor:
    """Attention as the release computes it: one joint projection, cut into heads first and into q, k, v second."""
    h = F.group_norm(x, 8, official["norm.weight"], official["norm.bias"], eps=1e-5).flatten(2)
    joint = F.conv1d(h, official["qkv.weight"], official["qkv.bias"]).view(len(x) * heads, -1, h.shape[-1])
    q, k, v = joint.chunk(3, dim=1)
    weights = (q.transpose(1, 2) @ k / q.shape[1] ** 0.5).softmax(dim=-1)
    attended = (v @ weights.transpose(1, 2)).view_as(h)
    return x + F.conv1d(attended, official["proj_out.weight"], official["proj_out.bias"]).view_as(x)


def test_weights_come_back_bit_for_bit_and_in_one_piece_each() -> None:
    original = tiny_unet()
    official = to_openai(original)
    unet = build_unet(TINY, image_size=16, out_channels=6, flavour="openai", scale_shift=True)
    load_openai(unet, official)
    again = to_openai(unet)
    assert list(again) == list(official)
    assert all(torch.equal(again[key], tensor) and again[key].is_contiguous() for key, tensor in official.items())
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), original.parameters(), strict=True))
    assert len(official) == len(list(unet.parameters())) - 4 * (2 + 1 + 3)  # three projections are one convolution


def test_queries_keys_and_values_go_head_by_head() -> None:
    unet = tiny_unet()
    prefix = "input_blocks.4.1."
    official = {key.removeprefix(prefix): value for key, value in to_openai(unet).items() if key.startswith(prefix)}
    assert official["qkv.weight"].shape == (96, 32, 1)
    x = torch.randn(2, 32, 8, 8)
    own = unet.down_blocks[1].attentions[0](x)
    torch.testing.assert_close(own, legacy_attention(x, official, heads=4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_sizes_are_read_off_the_tensors(scale_shift: bool) -> None:
    sizes = sizes_from_openai(to_openai(tiny_unet(scale_shift=scale_shift)))
    assert sizes.block_out_channels == (16, 32, 32)
    assert sizes.attention_levels == (1,)
    assert (sizes.layers_per_block, sizes.in_channels, sizes.out_channels) == (2, 3, 6)
    assert sizes.scale_shift == scale_shift


def test_shapes_of_the_authors_layout_are_known_without_copies_of_weights() -> None:
    unet = tiny_unet()
    assert _official_shapes(unet) == {key: tensor.shape for key, tensor in to_openai(unet).items()}
    assert list(_official_shapes(unet)) == list(to_openai(unet))


def test_a_model_of_class_labels_is_told_before_anything_else() -> None:
    with pytest.raises(WeightsError, match=r"a class-conditional model \(label_emb.weight\); only unconditional ones"):
        sizes_from_openai({"label_emb.weight": torch.zeros(1000, 64)})


def test_keys_that_do_not_fit_are_named_and_nothing_is_loaded() -> None:
    unet, official = build_unet(TINY, image_size=16, out_channels=6, flavour="openai"), to_openai(tiny_unet())
    before = [parameter.clone() for parameter in unet.parameters()]
    del official["out.0.bias"]
    official["label_emb.weight"] = torch.zeros(10, 64)
    with pytest.raises(WeightsError) as error:
        load_openai(unet, official)
    assert "1 missing: out.0.bias; 1 unexpected: label_emb.weight" in str(error.value)
    assert "of another shape: input_blocks.1.0.emb_layers.1.weight (32, 64) instead of (16, 64)" in str(error.value)
    assert "\n" not in str(error.value)
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters(), strict=True))


def test_other_layouts_are_refused() -> None:
    with pytest.raises(WeightsError, match=r"input_blocks.0.0.weight is missing; expected improved-diffusion's layout"):
        sizes_from_openai({"cls_token": torch.zeros(1, 1, 8)})
    official = to_openai(tiny_unet())
    with pytest.raises(WeightsError, match="levels of unequal blocks"):
        sizes_from_openai({**official, "input_blocks.2.0.out_layers.3.weight": torch.zeros(24, 24, 3, 3)})
    with pytest.raises(WeightsError, match="a resolution without residual blocks"):
        sizes_from_openai(
            {
                key: value
                for key, value in official.items()
                if not key.startswith("input_blocks.7.") and not key.startswith("input_blocks.8.")
            }
        )
