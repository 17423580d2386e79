"""iDDPM as a method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from baselines.iddpm import IDDPM, IDDPMConfig
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.testing import check_method

TINY: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (1,),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "num_heads": 4,
    "num_inference_steps": 4,
}
DATA = DataSpec(16)


class Begun(IDDPM):
    """iDDPM a few steps on, so to say: at the start its output is zero, and the loss the same whatever the weights."""

    def __init__(self, config: IDDPMConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        nn.init.normal_(self.unet.conv_out.weight, std=0.02)


def tiny(method_class: type[IDDPM] = Begun, **options: Any) -> IDDPM:
    torch.manual_seed(0)
    return method_class(IDDPMConfig(**{**TINY, **options}), DATA)


def inputs_of_a_step(method: IDDPM, timesteps: list[int]) -> dict[str, Tensor]:
    """Clean images, noise and x_t at these timesteps, by the names of `loss_terms`."""
    torch.manual_seed(1)
    clean, noise = torch.rand(len(timesteps), 3, 16, 16) * 2 - 1, torch.randn(len(timesteps), 3, 16, 16)
    steps = torch.tensor(timesteps)
    return {"noise": noise, "clean": clean, "x_t": method.diffusion.q_sample(clean, noise, steps), "timesteps": steps}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "use_scale_shift_norm": True,
            "noise_schedule": "cosine",
            "num_train_timesteps": 4000,
            "loss": "rescaled_hybrid",
            "rescale_timesteps": True,
            "dropout": 0.1,
            "sampler": "ddim",
        },
        {"loss": "vlb", "timestep_sampler": "loss-second-moment"},
        {"learn_sigma": False, "loss": "simple"},
    ],
    ids=["hybrid", "rescaled", "importance", "ddpm"],
)
def test_iddpm_keeps_the_contract(options: dict[str, Any]) -> None:
    config = IDDPMConfig(**{**TINY, **options})
    check_method(IDDPM, config, DATA, learning_rate=1e-2)


def test_a_fresh_model_predicts_no_noise_and_the_variance_midway() -> None:
    method = tiny(IDDPM)
    step = inputs_of_a_step(method, [1, 400, 999])
    output = method.predict(step["x_t"], step["timesteps"])
    assert output.shape == (3, 6, 16, 16)
    assert not output.any()
    low, high = method.diffusion.small_log_variance, method.diffusion.log_betas
    learned = method.reverse_step(output, step["x_t"], step["timesteps"], clip=False).log_variance
    torch.testing.assert_close(learned[:, 0, 0, 0], (low + high)[step["timesteps"]] / 2)


def test_in_the_hybrid_the_bound_teaches_the_variance_alone() -> None:
    method = tiny()
    step = inputs_of_a_step(method, [0, 3, 700])
    output = method.predict(step["x_t"], step["timesteps"]).detach().requires_grad_()
    bound = method.loss_terms(output, **step).vb
    assert bound is not None
    bound.sum().backward()
    assert output.grad is not None
    assert not output.grad[:, :3].any()
    assert all(part.any() for part in output.grad[:, 3:])


def test_the_losses_weigh_the_bound_as_the_authors_do() -> None:
    terms = {}
    for kind in ("hybrid", "rescaled_hybrid", "vlb"):
        method = tiny(loss=kind, num_train_timesteps=4000, noise_schedule="cosine")
        step = inputs_of_a_step(method, [0, 30, 3999])
        terms[kind] = method.loss_terms(method.predict(step["x_t"], step["timesteps"]), **step)
    hybrid, rescaled, vlb = terms["hybrid"], terms["rescaled_hybrid"], terms["vlb"]
    assert hybrid.vb is not None
    assert hybrid.mse is not None
    torch.testing.assert_close(hybrid.loss, hybrid.mse + hybrid.vb)
    torch.testing.assert_close(rescaled.loss, hybrid.mse + 4 * hybrid.vb)
    torch.testing.assert_close(vlb.loss, 4000 * hybrid.vb)
    assert vlb.mse is None


def test_importance_sampling_fills_its_history_and_survives_a_state_dict() -> None:
    method = tiny(timestep_sampler="loss-second-moment", num_train_timesteps=4, noise_schedule="cosine", loss="vlb")
    images = torch.rand(16, 3, 16, 16)
    with torch.no_grad():
        for step in range(1, 9):
            method.training_step(images, step=step, total_steps=8)
    assert method.importance is not None
    assert method.importance.counts.sum() == 8 * 16
    probabilities = method.importance.probabilities()
    assert probabilities.sum().item() == pytest.approx(1)
    assert probabilities.max() > 2 * probabilities.min() > 0
    copy = tiny(timestep_sampler="loss-second-moment", num_train_timesteps=4, noise_schedule="cosine", loss="vlb")
    copy.load_state_dict(method.state_dict())
    assert copy.importance is not None
    assert torch.equal(copy.importance.probabilities(), probabilities)


def test_importance_weights_keep_the_expected_loss() -> None:
    method = tiny(
        timestep_sampler="loss-second-moment", num_train_timesteps=4, noise_schedule="cosine", loss="vlb"
    ).eval()
    plain = tiny(num_train_timesteps=4, noise_schedule="cosine", loss="vlb").eval()
    plain.load_state_dict({k: v for k, v in method.state_dict().items() if not k.startswith("importance")})
    assert method.importance is not None
    for timestep in range(4):
        method.importance.update(torch.full((10,), timestep), torch.full((10,), float(timestep + 1)))
    images = torch.rand(1, 3, 16, 16).expand(256, -1, -1, -1)
    losses = []
    with torch.no_grad():
        for own in (method, plain):
            torch.manual_seed(2)
            losses.append(torch.stack([own.training_step(images, step=1, total_steps=1).loss for _ in range(4)]).mean())
    torch.testing.assert_close(losses[0], losses[1], rtol=0.1, atol=0)


def test_the_network_is_told_a_thousandth_of_the_process() -> None:
    told: list[Tensor] = []
    for rescale in (False, True):
        method = tiny(num_train_timesteps=4000, rescale_timesteps=rescale)
        method.unet.register_forward_pre_hook(lambda _, args: told.append(args[1]))
        method.predict(torch.zeros(2, 3, 16, 16), torch.tensor([2, 3999]))
    assert told[0].tolist() == [2, 3999]
    assert told[1].tolist() == [0.5, 999.75]


def test_samplers_visit_the_authors_timesteps() -> None:
    ancestral = tiny(num_train_timesteps=1000, num_inference_steps=50).sampler
    assert ancestral.timesteps[:5] == (0, 20, 41, 61, 82)
    assert ancestral.timesteps[-1] == 999
    ddim = tiny(num_train_timesteps=1000, num_inference_steps=50, sampler="ddim").sampler
    assert ddim.timesteps[-1] == 980
    assert not any(ddim.adds_noise(index) for index in range(50))


@pytest.mark.parametrize("options", [{}, {"sampler": "ddim"}, {"learn_sigma": False}])
def test_reconstruction_keeps_the_visible_pixels_and_samples_are_images(options: dict[str, Any]) -> None:
    method = tiny(**options).eval()
    images, mask = torch.rand(2, 3, 16, 16), torch.rand(2, 4, 4) > 0.25
    hidden = mask.repeat_interleave(4, 1).repeat_interleave(4, 2).unsqueeze(1).expand_as(images)
    reconstruction = method.reconstruct(images, mask)
    torch.testing.assert_close(reconstruction[~hidden], images[~hidden])
    assert method.num_function_evaluations == 4
    samples = method.sample(2)
    assert samples.shape == (2, 3, 16, 16)
    assert 0 <= samples.min() < samples.max() <= 1


def test_a_step_under_autocast_is_finite_and_its_loss_float32() -> None:
    method = tiny(use_scale_shift_norm=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = method.training_step(torch.rand(4, 3, 16, 16), step=1, total_steps=1).loss
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize("learn_sigma", [False, True])
def test_a_checkpoint_comes_back_bit_for_bit(learn_sigma: bool) -> None:
    method = tiny(learn_sigma=learn_sigma, use_scale_shift_norm=True)
    official = method.to_official()
    again = IDDPM.from_official(official, image_size=16, num_heads=4, norm_num_groups=8, num_inference_steps=4)
    assert again.config == method.config
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), method.parameters(), strict=True))
    assert all(torch.equal(tensor, official[key]) for key, tensor in again.to_official().items())


def test_a_checkpoint_of_unknown_size_asks_for_what_weights_do_not_tell() -> None:
    official = tiny().to_official()
    with pytest.raises(WeightsError, match=r"channels \[16, 32\].* do not tell image_size and num_heads: give them"):
        IDDPM.from_official(official)
    with pytest.raises(WeightsError, match=r"do not tell image_size: give it"):
        IDDPM.from_official(official, attention_head_dim=8)
    with pytest.raises(WeightsError, match="a class-conditional model"):
        IDDPM.from_official({**official, "label_emb.weight": torch.zeros(10, 64)}, image_size=16, num_heads=4)
    with pytest.raises(WeightsError, match="checkpoint: norm_num_groups"):
        IDDPM.from_official(official, image_size=16, num_heads=4, norm_num_groups=0)
    with pytest.raises(WeightsError, match=r"a U-Net from 3 to 4 channels; expected 3 to 3, or to 6"):
        IDDPM.from_official({**official, "out.2.weight": torch.zeros(4, 16, 3, 3)})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"loss": "simple"},
            "loss simple trains no variance: give hybrid, rescaled_hybrid or vlb, or learn_sigma false",
        ),
        (
            {"variance": "fixed_small"},
            "variance: fixed_small has no effect where it is learned; give learn_sigma false",
        ),
        (
            {"sampler": "ddim", "num_inference_steps": 300},
            "no integer stride over 1000 timesteps gives exactly 300; give a divisor of num_train_timesteps",
        ),
        (
            {"num_train_timesteps": 20},
            "num_train_timesteps: 20 gives linear betas up to 1, not below 1; use more than 20",
        ),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most num_train_timesteps 1000, got 1001"),
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        IDDPMConfig(**{**TINY, **options})


def test_images_that_cannot_be_halved_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 levels need an image size divisible by 32, got 100"):
        IDDPM.check(IDDPMConfig(), DataSpec(100))
