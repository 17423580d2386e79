"""The U-Net that replaces the ViT in the ablation "w/o MAE"."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import ConfigError
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.lmd.model import lmd_vit_base_patch4
from lmd_bench.lmd.unet import MaskedUNet, MaskedUNetShape, UNetConfig
from lmd_bench.method import Batch, DataSpec
from lmd_bench.nn.masking import random_ids, take_tokens
from lmd_bench.nn.patches import patchify
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.testing import check_method

SMALL = {
    "block_out_channels": (16, 32),
    "attention_levels": (1,),
    "attention_head_dim": 8,
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
PIXELS = ProjectorConfig(kind="pixels")


def make(*, normalize_targets: bool = False) -> MaskedUNet:
    torch.manual_seed(0)
    return MaskedUNet(MaskedUNetShape(8, 2, 4), UNetConfig(**SMALL), normalize_targets=normalize_targets)


def test_lmd_with_a_unet_keeps_the_contract() -> None:
    config = LMDConfig(projector=PIXELS, patch_size=4, network="unet", unet=UNetConfig(**SMALL))
    check_method(LMD, config, DataSpec(16), overfit_steps=25, learning_rate=3e-3)


def test_the_published_size_has_as_many_parameters_as_the_vit_it_replaces() -> None:
    with torch.device("meta"):
        unet, vit = MaskedUNet(MaskedUNetShape(28, 4, 4), UNetConfig()), lmd_vit_base_patch4()
    counts = [sum(p.numel() for p in network.parameters()) for network in (unet, vit)]
    assert counts == [110_913_224, 110_817_856]


def test_values_of_hidden_latents_reach_neither_completion_nor_prediction() -> None:
    model, latents = make().eval(), torch.randn(3, 4, 8, 8)
    hidden = torch.rand(3, 16) < torch.tensor([[0.3], [0.6], [0.9]])
    hidden[:, 3] = True
    positions = hidden.view(3, 4, 4).repeat_interleave(2, 1).repeat_interleave(2, 2).unsqueeze(1)
    with torch.no_grad():
        completed = model.complete(latents, hidden)
        for other in (float("nan"), 1e4):
            assert torch.equal(completed, model.complete(latents.masked_fill(positions, other), hidden))
        assert not torch.equal(completed, model.complete(latents.masked_fill(~positions, 0.0), hidden))
    visible = ~positions.expand_as(latents)
    assert torch.equal(completed[visible], latents[visible])
    assert not (completed == latents)[~visible].any()


def test_the_mask_itself_reaches_the_network() -> None:
    """A visible position whose latent happens to be the learned filling is not taken for a hidden one."""
    model = make().eval()
    latents = model.mask_token.detach().expand(1, 4, 8, 8).contiguous()
    with torch.no_grad():
        few, many = (model._predict(latents, model._position_mask(torch.arange(16)[None] < n)) for n in (2, 14))
    assert not torch.allclose(few, many)


def test_nothing_hidden_changes_nothing_and_all_hidden_still_completes() -> None:
    model, latents = make().eval(), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(model.complete(latents, torch.zeros(2, 16, dtype=torch.bool)), latents)
        assert model.complete(latents, torch.ones(2, 16, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("normalize", [False, True])
def test_the_loss_is_the_error_of_the_hidden_tokens_alone(normalize: bool) -> None:
    model, latents = make(normalize_targets=normalize).eval(), torch.randn(3, 4, 8, 8)
    ids, kept = random_ids(3, 16, latents.device), 5
    hidden = torch.ones(3, 16, dtype=torch.bool).scatter(1, ids[:, :kept], False)
    with torch.no_grad():
        loss, completed = model(latents, ids, kept, completed=True)
        assert torch.equal(completed, model.complete(latents, hidden))
        predicted, wanted = (take_tokens(patchify(x, 2), ids[:, kept:]) for x in (completed, latents))
        if normalize:
            wanted = (wanted - wanted.mean(-1, keepdim=True)) / (wanted.var(-1, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(loss, F.mse_loss(predicted, wanted))
        torch.testing.assert_close(model(latents, ids, kept), loss)


def test_schedule_tokens_and_steps_are_those_of_the_vit() -> None:
    torch.manual_seed(0)
    options = {"projector": PIXELS, "patch_size": 4, "unet": UNetConfig(**SMALL)}
    method = LMD(LMDConfig(**options, network="unet"), DataSpec(32))
    assert isinstance(method.model, MaskedUNet)
    inputs = method.prepare(Batch(torch.rand(2, 3, 32, 32)))
    output = method.training_step(inputs, step=60, total_steps=60)
    assert output.scalars == {"mask_ratio": 0.75, "tokens": 64.0}
    assert method.num_tokens_at(1, 60) == 64


def test_a_map_that_cannot_be_halved_often_enough_is_refused() -> None:
    config = LMDConfig(projector=PIXELS, patch_size=3, network="unet", unet=UNetConfig(**SMALL))
    with pytest.raises(ConfigError, match=r"unet.block_out_channels: 2 levels need .* divisible by 2, got 9"):
        LMD.check(config, DataSpec(9))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"attention_levels": (2,)}, "attention_levels must be in 0..1"),
        ({"block_out_channels": (0, 32)}, r"block_out_channels\.0"),
        ({"block_out_channels": (12, 32)}, "block_out_channels.0: 12 is not divisible by norm_num_groups"),
        ({"attention_head_dim": 5}, "block_out_channels.1: 32 is not divisible by attention_head_dim"),
    ],
)
def test_sizes_that_do_not_fit_each_other_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        UNetConfig(**{**SMALL, **options})


def test_the_authors_checkpoints_load_into_no_unet() -> None:
    state = lmd_state()
    with pytest.raises(ConfigError, match="hold a ViT; leave out network 'unet'"):
        LMD.from_official(state, encoder_heads=2, decoder_heads=2, network="unet")


def lmd_state() -> dict[str, torch.Tensor]:
    sizes = {"encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2}
    sizes |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    return LMD(LMDConfig(projector=PIXELS, patch_size=4, **sizes), DataSpec(16)).to_official()
