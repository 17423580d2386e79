"""The U-Nets, losses and reverse steps of iDDPM against the authors' code (openai/improved-diffusion)."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from baselines._openai_layout import sizes_from_openai, to_openai
from baselines._unet import UNetOptions, build_unet
from baselines.iddpm import IDDPM
from tests.parity.fill import assert_matches, filled_state_dict, load_reference, reference_draw, reference_input

TIMESTEPS = torch.tensor([3, 500])
OPTIONS: dict[str, dict[str, Any]] = {
    "iddpm_unet_small32": {
        "image_size": 32,
        "num_heads": 4,
        "noise_schedule": "cosine",
        "loss": "rescaled_hybrid",
        "rescale_timesteps": True,
    },
    "iddpm_unet_cifar32": {},
    "iddpm_unet_imagenet64": {},
    "iddpm_unet_lsun256": {},
}
HEAVY = {"iddpm_unet_imagenet64", "iddpm_unet_lsun256"}


class Case:
    """A model on formula weights, and what the authors' code made of it."""

    def __init__(self, name: str) -> None:
        self.manifest = load_reference(f"{name}.manifest")
        self.reference = load_reference(f"{name}.strong.reference")
        self.official = filled_state_dict(self.manifest)
        self.method = IDDPM.from_official(self.official, **OPTIONS[name]).eval()
        self.images = reference_input(2, *self.method.space_shape)

    @cached_property
    def raw_output(self) -> Tensor:
        """What the network makes of the input and these timesteps as they are."""
        with torch.no_grad():
            output: Tensor = self.method.unet(self.images, TIMESTEPS, return_dict=False)[0]
        return output


@pytest.fixture(
    scope="module", params=[pytest.param(name, marks=[pytest.mark.slow] if name in HEAVY else []) for name in OPTIONS]
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


def test_keys_shapes_and_counts_equal_the_authors_and_come_back_bit_for_bit(case: Case) -> None:
    own = case.method.to_official()
    assert list(own) == [entry["key"] for entry in case.manifest["keys"]]
    assert all(torch.equal(own[key], tensor) for key, tensor in case.official.items())
    parameters = list(case.method.parameters())
    assert sum(p.numel() for p in parameters) == case.manifest["params_total"]
    assert sum(p.numel() for p in parameters if p.requires_grad) == case.manifest["params_trainable"]


def test_the_networks_output_equals_the_authors(case: Case) -> None:
    assert_matches(case.raw_output, case.reference["output"])


@torch.no_grad()
def test_noised_images_and_losses_equal_the_authors(case: Case) -> None:
    method, reference = case.method, case.reference
    clean = (case.images / 1.5).clamp(-1, 1)
    noise = reference_draw(*clean.shape)
    x_t = method.diffusion.q_sample(clean, noise, TIMESTEPS)
    assert_matches(x_t, reference["q_sample"])
    output = method.predict(x_t, TIMESTEPS)
    terms = method.loss_terms(output, noise, clean=clean, x_t=x_t, timesteps=TIMESTEPS)
    for name, wanted in reference["training_losses"].items():
        torch.testing.assert_close(getattr(terms, name), torch.tensor(wanted), rtol=1e-5, atol=0, msg=name)
    assert terms.loss.mean().item() == pytest.approx(reference["loss"], rel=1e-5)


@torch.no_grad()
def test_reverse_steps_equal_the_authors(case: Case) -> None:
    method, wanted = case.method, case.reference["p_mean_variance"]  # made from the input as it is, as if it were x_t
    rescales = method.config.rescale_timesteps  # elsewhere it is the same pass, and LSUN's takes long
    output = method.predict(case.images, TIMESTEPS) if rescales else case.raw_output
    step = method.reverse_step(output, case.images, TIMESTEPS, clip=True)
    assert_matches(step.clean, wanted["pred_xstart"])
    for name in ("mean", "variance", "log_variance"):
        assert_matches(getattr(step, name), wanted[name])


def test_the_authors_ddpm_has_their_keys_and_counts() -> None:
    manifest = load_reference("iddpm_unet_lsun256_ddpm_fixedsigma.manifest")
    with torch.device("meta"):
        unet = build_unet(UNetOptions(), image_size=256, flavour="openai")
        official = to_openai(unet)
    assert {key: list(tensor.shape) for key, tensor in official.items()} == {
        entry["key"]: entry["shape"] for entry in manifest["keys"]
    }
    assert sum(p.numel() for p in unet.parameters()) == manifest["params_total"] == 113_673_219
    sizes = sizes_from_openai(official)
    assert (sizes.block_out_channels, sizes.attention_levels) == ((128, 128, 256, 256, 512, 512), (4,))
    assert (sizes.layers_per_block, sizes.out_channels, sizes.scale_shift) == (2, 3, False)
