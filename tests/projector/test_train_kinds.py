"""What each kind of projector adds to the loss, and what normalising its latents leaves alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import WeightsError
from lmd_bench.projector.train_config import LSPTrainOptions
from lmd_bench.projector.train_kinds import (
    TRAINABLE,
    KLTrainable,
    LightTrainable,
    TrainableProjector,
    VQTrainable,
    noisy,
    num_quantised,
    quantises,
)

SMALL = LSPTrainOptions(
    batch_size=4,
    image_size=32,
    block_out_channels=(8, 8, 8),
    num_codes=24,
    disc_weight=0.0,
    light_factor=4,
    light_decoder_widths=(8,),
    light_decoder_blocks=(1,),
    light_encoder_hidden=4,
)


def built(kind: str) -> tuple[TrainableProjector, LSPTrainOptions, Tensor]:
    """A projector whose latents and codes are spread, its options and a batch in [-1, 1]."""
    options = replace(SMALL, kind=kind)
    projector = TRAINABLE[kind].build(options)
    with torch.no_grad():
        projector.model.quant_conv.weight.mul_(3.0)
        projector.model.quant_conv.bias.add_(2.0)
    batch = Scenes(0, 32).render(range(4)).float() / 127.5 - 1.0
    if isinstance(projector, VQTrainable):
        projector.spread_codebook((batch + 1.0) / 2.0, seed=0)
    return projector, options, batch


def test_the_kl_term_is_that_of_its_gaussians_per_latent_number() -> None:
    projector, options, batch = built("kl")
    done = projector.forward(batch, replace(options, kl_weight=0.5), step=3)
    posterior = projector.model.encode(batch).latent_dist
    mean, logvar = posterior.mean, posterior.logvar
    wanted = 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).mean()
    torch.testing.assert_close(done.regulariser, 0.5 * wanted)
    assert done.indices is None
    again = projector.forward(batch, options, step=3)
    assert torch.equal(done.images, again.images)  # posterior noise is a function of the step
    assert not torch.equal(done.images, projector.forward(batch, options, step=4).images)


@pytest.mark.parametrize("legacy", [False, True])
def test_the_codebook_terms_are_those_of_eq_4_or_of_the_release(legacy: bool) -> None:
    projector, options, batch = built("vq")
    assert isinstance(projector, VQTrainable)
    options = replace(options, beta=0.3, legacy_beta=legacy, codebook_weight=2.0)
    done = projector.forward(batch, options, step=0)
    latents = projector.encode(batch)
    vectors = latents.movedim(1, -1)
    nearest = torch.cdist(vectors.flatten(0, 2), projector.codebook).argmin(1).view(vectors.shape[:3])
    codes = projector.codebook[nearest]
    to_codes, to_latents = (codes - vectors.detach()).square().mean(), (codes.detach() - vectors).square().mean()
    wanted = 0.3 * to_codes + to_latents if legacy else to_codes + 0.3 * to_latents
    torch.testing.assert_close(done.regulariser, 2.0 * wanted)
    assert done.indices is not None
    assert torch.equal(done.indices, nearest)
    done.regulariser.backward()
    ours = projector.codebook.grad
    (expected,) = torch.autograd.grad(2.0 * wanted, projector.codebook)
    torch.testing.assert_close(ours, expected)


def test_gradients_pass_straight_through_the_codebook() -> None:
    projector, options, batch = built("vq")
    done = projector.forward(batch, options, step=0)
    done.images.square().mean().backward()
    assert projector.model.encoder.conv_in.weight.grad.abs().sum() > 0
    grad: Any = projector.codebook.grad  # type: ignore[union-attr]
    assert grad is None or not grad.any()


def test_the_share_decides_which_images_are_decoded_from_codes() -> None:
    projector, options, batch = built("vq")
    assert isinstance(projector, VQTrainable)
    with torch.no_grad():
        latents = projector.encode(batch)
        continuous, quantised = projector.decode(latents), projector.decode(projector.quantised(latents)[0])
        done = {s: projector.forward(batch, replace(options, quantised_share=s), step=0) for s in (0.0, 0.5, 1.0)}
    assert (continuous - quantised).abs().max() > 0.01
    torch.testing.assert_close(done[0.0].images, continuous)
    torch.testing.assert_close(done[1.0].images, quantised, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done[0.5].images[:2], quantised[:2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(done[0.5].images[2:], continuous[2:])
    assert len({float(each.regulariser) for each in done.values()}) == 1


def test_a_share_that_does_not_divide_the_batch_is_right_over_many_steps() -> None:
    options = replace(SMALL, batch_size=3, quantised_share=0.25)
    numbers = [num_quantised(options, step) for step in range(400)]
    assert sum(numbers) == 300
    assert set(numbers) == {0, 1}
    assert {num_quantised(replace(SMALL, quantised_share=1.0), step) for step in range(99)} == {4}


def test_nothing_is_quantised_before_a_codebook_from_data_is_there() -> None:
    projector, options, batch = built("vq")
    options = replace(options, codebook_init="data", codebook_init_step=7)
    assert [quantises(options, step) for step in (0, 6, 7)] == [False, False, True]
    assert quantises(SMALL, 0)
    early = projector.forward(batch, options, step=6)
    assert early.indices is None
    assert early.regulariser.item() == 0.0
    torch.testing.assert_close(early.images, projector.decode(projector.encode(batch)))
    assert projector.forward(batch, options, step=7).indices is not None


def test_the_light_kind_holds_down_the_mean_square_of_its_latents() -> None:
    projector, options, batch = built("light")
    done = projector.forward(batch, replace(options, latent_weight=0.2), step=0)
    torch.testing.assert_close(done.regulariser, 0.2 * projector.encode(batch).square().mean())
    assert projector.forward(batch, options, step=0).regulariser.item() == 0.0


@pytest.mark.parametrize("kind", TRAINABLE)
def test_normalised_latents_have_unit_scale_and_reconstructions_stay(kind: str) -> None:
    projector, _, _ = built(kind)
    images = Scenes(0, 32).render(range(32))
    with torch.no_grad():
        latents = projector.encode_all(images)
        before = projector.decode_all(latents)
        projector.normalise(images)
        after = projector.encode_all(images)
        torch.testing.assert_close(projector.decode_all(after), before, rtol=1e-3, atol=1e-4)
    assert latents.mean() > 0.5
    torch.testing.assert_close(after.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-4)
    if kind == "vq":
        torch.testing.assert_close(after.var((0, 2, 3)).mean(), torch.tensor(1.0), rtol=1e-3, atol=0)
    else:
        torch.testing.assert_close(after.std((0, 2, 3)), torch.ones(4), rtol=1e-3, atol=0)


def test_normalising_keeps_the_posteriors_noise_in_proportion() -> None:
    projector, _, batch = built("kl")
    assert isinstance(projector, KLTrainable)
    images = Scenes(0, 32).render(range(32))
    with torch.no_grad():
        before = projector.model.encode(batch).latent_dist
        spread = projector.encode_all(images).std((0, 2, 3))[None, :, None, None]
        projector.normalise(images)
        after = projector.model.encode(batch).latent_dist
    torch.testing.assert_close(after.std * spread, before.std, rtol=1e-3, atol=1e-5)


def test_normalising_keeps_the_code_of_every_position_and_what_is_decoded_from_it() -> None:
    projector, _, _ = built("vq")
    assert isinstance(projector, VQTrainable)
    images = Scenes(0, 32).render(range(32))
    quantised, indices = projector.quantised(projector.encode_all(images))
    before = projector.decode_all(quantised)
    old_codes = projector.codebook.detach().clone()
    projector.normalise(images)
    quantised_after, indices_after = projector.quantised(projector.encode_all(images))
    assert torch.equal(indices_after, indices)
    assert len(indices.unique()) > 8
    torch.testing.assert_close(projector.decode_all(quantised_after), before, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(projector.codebook, old_codes)


@pytest.mark.parametrize("kind", TRAINABLE)
def test_the_last_layer_is_the_decoders_last_convolution(kind: str) -> None:
    projector, _, batch = built(kind)
    wanted = copy.deepcopy(projector.decode(projector.encode(batch)).detach())
    parameters = {id(parameter): name for name, parameter in projector.model.named_parameters()}
    name = parameters[id(projector.last_layer)]
    assert name == ("decoder.out.weight" if kind == "light" else "decoder.conv_out.weight")
    with torch.no_grad():
        projector.last_layer.add_(0.1)
    assert not torch.allclose(projector.decode(projector.encode(batch)), wanted)


def test_weights_depend_on_the_seed_alone() -> None:
    for kind, kind_class in TRAINABLE.items():
        torch.manual_seed(len(kind))
        one, two, other = (kind_class.build(replace(SMALL, kind=kind, seed=seed)) for seed in (0, 0, 1))
        states = [each.model.state_dict() for each in (one, two, other)]
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        assert any(not torch.equal(states[0][name], states[2][name]) for name in states[0])
    assert TRAINABLE["light"] is LightTrainable


def test_a_vq_that_starts_from_a_kl_encodes_and_decodes_as_it_did(tmp_path: Path) -> None:
    source, options, batch = built("kl")
    source.model.save_pretrained(tmp_path)
    projector = TRAINABLE["vq"].build(replace(options, kind="vq"))
    projector.start_from(str(tmp_path))
    with torch.no_grad():
        latents = source.encode(batch)
        torch.testing.assert_close(projector.encode(batch), latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(projector.decode(latents), source.decode(latents), atol=1e-4, rtol=1e-4)


def test_starting_from_another_kind_or_size_is_refused_in_words(tmp_path: Path) -> None:
    source, options, _ = built("vq")
    source.model.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="is of kind 'vq'"):
        TRAINABLE["kl"].build(replace(options, kind="kl")).start_from(str(tmp_path))
    wider = TRAINABLE["vq"].build(replace(options, num_codes=30))
    with pytest.raises(WeightsError, match=r"num_vq_embeddings 24 \(now 30\); give the options it was trained"):
        wider.start_from(str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "changes", "told"),
    [
        ("light", {"light_wavelet": "cdf97"}, r"wavelet haar \(now cdf97\)"),
        ("light", {"light_transform": "space_to_depth"}, r"transform wavelet \(now space_to_depth\)"),
        ("vq", {"norm_num_groups": 4}, r"norm_num_groups 8 \(now 4\)"),
        ("kl", {"norm_num_groups": 4, "layers_per_block": 1}, r"layers_per_block 0 \(now 1\), .*norm_num_groups"),
    ],
)
def test_starting_from_another_network_of_the_same_shapes_is_refused_with_what_differs(
    kind: str, changes: dict[str, Any], told: str, tmp_path: Path
) -> None:
    source, options, _ = built(kind)
    source.model.save_pretrained(tmp_path)
    TRAINABLE[kind].build(replace(options, image_size=64)).start_from(str(tmp_path))  # its size is free
    with pytest.raises(WeightsError, match=told):
        TRAINABLE[kind].build(replace(options, **changes)).start_from(str(tmp_path))
    if kind == "kl":
        with pytest.raises(WeightsError, match=told):
            TRAINABLE["vq"].build(replace(options, kind="vq", **changes)).start_from(str(tmp_path))


def test_noise_is_a_share_of_each_channels_spread_and_a_function_of_the_step() -> None:
    latents = torch.randn(64, 2, 16, 16) * torch.tensor([1.0, 50.0]).view(1, 2, 1, 1)
    options = replace(SMALL, kind="light", latent_noise=0.1)
    added = noisy(latents, options, 3) - latents
    torch.testing.assert_close(added.std((0, 2, 3)), 0.1 * latents.std((0, 2, 3)), rtol=0.05, atol=0.0)
    assert torch.equal(noisy(latents, options, 3) - latents, added)
    assert not torch.equal(noisy(latents, options, 4) - latents, added)
    assert noisy(latents, SMALL, 3) is latents
