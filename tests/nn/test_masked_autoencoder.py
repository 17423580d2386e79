"""The masked autoencoder against its definition, and its checkpoints."""

import pytest
import torch

from lmd_bench.errors import WeightsError
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder, MaskedAutoencoderShape
from lmd_bench.nn.masking import random_ids
from lmd_bench.nn.official import load_exactly, shape_of_checkpoint
from lmd_bench.nn.patches import patchify

SHAPE = MaskedAutoencoderShape(
    input_size=16,
    patch_size=4,
    in_channels=3,
    encoder_width=24,
    encoder_depth=2,
    encoder_heads=2,
    decoder_width=16,
    decoder_depth=2,
    decoder_heads=2,
)


def make(**options: object) -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder(SHAPE, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_loss_equals_the_published_definition_in_raster_order(normalize: bool, sign: int) -> None:
    """Embed all, drop, encode, put mask tokens back in raster order, decode all, weigh by the mask."""
    model = make(normalize_targets=normalize, decoder_pos_sign=sign).double()
    images = torch.rand(3, 3, 16, 16, dtype=torch.float64)
    ids, kept = random_ids(3, 16, images.device), 5
    embedded = model.patch_embed.proj(images).flatten(2).transpose(1, 2) + model.pos_embed[:, 1:]
    rows = torch.arange(3).unsqueeze(1)
    x = torch.cat([(model.cls_token + model.pos_embed[:, :1]).expand(3, -1, -1), embedded[rows, ids[:, :kept]]], 1)
    for block in model.blocks:
        x = block(x)
    x = model.decoder_embed(model.norm(x))
    full = model.mask_token.repeat(3, 17, 1)
    full[:, :1] = x[:, :1]
    full[rows, ids[:, :kept] + 1] = x[:, 1:]
    full = full + sign * model.decoder_pos_embed
    for block in model.decoder_blocks:
        full = block(full)
    predicted = model.decoder_pred(model.decoder_norm(full))[:, 1:]
    target = patchify(images, 4)
    if normalize:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    mask = torch.ones(3, 16, dtype=torch.float64).scatter(1, ids[:, :kept], 0.0)
    expected = (((predicted - target) ** 2).mean(-1) * mask).sum() / mask.sum()
    torch.testing.assert_close(model(images, ids, kept), expected, rtol=1e-10, atol=0)


def test_completing_keeps_visible_tokens_and_ignores_hidden_values() -> None:
    model = make().eval()
    images = torch.rand(4, 3, 16, 16)
    hidden = torch.rand(4, 16) < torch.tensor([[0.3], [0.5], [0.8], [-1.0]])
    hidden[:, 3] = False
    with torch.no_grad():
        completed = model.complete(images, hidden)
        pixels = hidden.view(4, 4, 4).repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1)
        other = model.complete(images.masked_fill(pixels, float("nan")), hidden)
    assert torch.equal(completed, other)
    visible = ~pixels.expand_as(images)
    assert torch.equal(completed[visible], images[visible])
    assert not torch.equal(completed, images)
    assert torch.equal(completed[3], images[3]), "nothing hidden, nothing changed"


def test_completing_leaves_its_input_alone_even_with_patches_of_one_value() -> None:
    shape = MaskedAutoencoderShape(4, 1, 3, 24, 1, 2, 16, 1, 2)
    model, latents = MaskedAutoencoder(shape), torch.rand(2, 3, 4, 4)
    before = latents.clone()
    with torch.no_grad():
        model.complete(latents, torch.arange(16).expand(2, -1) % 2 == 0)
    assert torch.equal(latents, before)


def test_sizes_are_read_off_a_checkpoint() -> None:
    assert shape_of_checkpoint(make().state_dict(), encoder_heads=2, decoder_heads=2) == SHAPE


def test_a_checkpoint_that_does_not_fit_names_every_kind_of_fault() -> None:
    state = make().state_dict()
    state["head.weight"] = state.pop("norm.bias")
    state["mask_token"] = torch.zeros(1, 1, 12)
    with pytest.raises(WeightsError) as caught:
        load_exactly(make(), state)
    assert str(caught.value) == (
        "checkpoint does not fit the model: 1 missing: norm.bias; 1 unexpected: head.weight; "
        "1 of another shape: mask_token (1, 1, 12) instead of (1, 1, 16)"
    )


@pytest.mark.parametrize("state", [{}, {"model": {}}])
def test_a_file_of_another_layout_is_refused(state: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match=r"patch_embed.proj.weight is missing; expected MAE's layout"):
        shape_of_checkpoint(state, encoder_heads=2, decoder_heads=2)  # type: ignore[arg-type]
