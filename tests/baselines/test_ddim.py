"""DDIM as a method."""

import pytest
import torch
from pydantic import ValidationError

from baselines._gaussian import AncestralSampler, DDIMSampler
from baselines.ddim import DDIM, DDIMConfig
from baselines.ddpm import DDPM
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.testing import check_method

SMALL = {"block_out_channels": (16, 32), "attention_levels": (1,), "layers_per_block": 1, "norm_num_groups": 8}
TINY = DDIMConfig(**SMALL, num_inference_steps=4)
PUBLISHED_CIFAR = {"block_out_channels": (128, 256, 256, 256), "attention_levels": (1,), "dropout": 0.1}


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_ddim_keeps_the_contract(reduction: str) -> None:
    config = DDIMConfig(**SMALL, num_inference_steps=4, loss_reduction=reduction, eta=0.5)
    check_method(DDIM, config, DataSpec(16), learning_rate=1e-2)


def test_timesteps_are_antithetic() -> None:
    torch.manual_seed(0)
    method = DDIM(TINY, DataSpec(16))
    for num in (1, 2, 5, 8):
        timesteps, weights = method.draw_timesteps(num, torch.device("cpu"))
        assert weights is None
        assert timesteps.shape == (num,)
        assert timesteps.min() >= 0
        assert timesteps.max() <= 999
        drawn = num // 2 + 1
        assert torch.equal(timesteps[drawn:], 999 - timesteps[: num - drawn])


def test_the_summed_loss_is_the_mean_times_the_values_of_an_image() -> None:
    output, noise = torch.randn(2, 4, 3, 16, 16)
    parts = {"clean": noise, "x_t": noise, "timesteps": torch.zeros(4, dtype=torch.int64)}
    summed = DDIM(TINY, DataSpec(16)).loss(output, noise, **parts)
    mean = DDIM(DDIMConfig(**SMALL, loss_reduction="mean"), DataSpec(16)).loss(output, noise, **parts)
    torch.testing.assert_close(summed, (output - noise).square().sum(dim=(1, 2, 3)).mean(dim=0))
    torch.testing.assert_close(summed, mean * 3 * 16 * 16)


def test_without_noise_the_same_start_gives_the_same_sample() -> None:
    torch.manual_seed(0)
    method = DDIM(TINY, DataSpec(16)).eval()
    torch.manual_seed(1)
    first = method.sample(2)
    torch.manual_seed(1)
    start = torch.randn(2, 3, 16, 16)
    for index in reversed(range(4)):
        start = method._denoise(start, index)
    assert torch.equal(first, method.to_images(start))
    assert first.std() > 0.01


@pytest.mark.parametrize(
    ("spacing", "asked", "steps"), [("uniform", 30, 31), ("quadratic", 30, 30), ("uniform", 50, 50)]
)
def test_the_true_number_of_steps_is_stated(spacing: str, asked: int, steps: int) -> None:
    config = DDIMConfig(**SMALL, num_inference_steps=asked, spacing=spacing)
    method = DDIM(config, DataSpec(16))
    assert method.num_function_evaluations == steps
    text = DDIM.plan_text(config, DataSpec(16))
    expected = None if steps == asked else "31 reverse steps for num_inference_steps 30, as the authors count"
    assert text == expected


def test_either_sampler_of_the_repository_is_an_option() -> None:
    generalized = DDIM(DDIMConfig(**SMALL, eta=0.5), DataSpec(16)).sampler
    noisy = DDIM(DDIMConfig(**SMALL, sampler="ddpm_noisy"), DataSpec(16)).sampler
    assert isinstance(generalized, DDIMSampler)
    assert not generalized.clip
    assert isinstance(noisy, AncestralSampler)
    assert (noisy.clip, noisy.variance) == (True, "fixed_large")
    assert noisy.timesteps == generalized.timesteps


@pytest.mark.parametrize(
    ("options", "size", "count"), [({}, 256, 113_673_219), (PUBLISHED_CIFAR, 32, 35_746_307)], ids=["bedroom", "cifar"]
)
def test_the_published_models_have_their_parameters(options: dict[str, object], size: int, count: int) -> None:
    with torch.device("meta"):
        method = DDIM(DDIMConfig(**options), DataSpec(size))
    assert sum(p.numel() for p in method.parameters()) == count


def test_a_checkpoint_comes_back_bit_for_bit_and_options_given_win() -> None:
    torch.manual_seed(0)
    method = DDIM(TINY, DataSpec(16))
    official = method.to_official()
    again = DDIM.from_official(official, norm_num_groups=8, num_inference_steps=7, image_size=16)
    assert again.config == DDIMConfig(**SMALL, num_inference_steps=7)
    assert list(again.to_official()) == list(official)
    assert all(torch.equal(tensor, again.to_official()[key]) for key, tensor in official.items())
    x, timesteps = torch.randn(2, 3, 16, 16), torch.tensor([3, 500])
    assert torch.equal(method.eval().predict(x, timesteps), again.eval().predict(x, timesteps))


def test_a_checkpoint_of_ddpm_is_one_of_ddim() -> None:
    official = DDPM(DDPM.Config(**SMALL), DataSpec(16)).to_official()
    again = DDIM.from_official(official, norm_num_groups=8, image_size=16).to_official()
    assert all(torch.equal(tensor, again[key]) for key, tensor in official.items())


def test_what_weights_do_not_tell_is_that_of_the_released_model_unless_it_is_given() -> None:
    with torch.device("meta"):
        official = DDIM(DDIMConfig(**PUBLISHED_CIFAR), DataSpec(32)).to_official()
        ddim, ddpm = DDIM.from_official(official), DDPM.from_official(official)
        given = DDPM.from_official(official, dropout=0.2, variance="fixed_small", image_size=64)
    assert (ddim.config, ddim.data.image_size) == (DDIMConfig(**PUBLISHED_CIFAR), 32)
    assert ddpm.config == DDPM.Config(**PUBLISHED_CIFAR, variance="fixed_large")
    assert (given.config.dropout, given.data.image_size) == (0.2, 64)
    assert given.config == DDPM.Config(**{**PUBLISHED_CIFAR, "dropout": 0.2})


def test_checkpoints_that_do_not_fit_are_refused_in_one_line() -> None:
    official = DDIM(TINY, DataSpec(16)).to_official()
    options = {"norm_num_groups": 8, "image_size": 16}
    wrong = {**official, "head.weight": torch.zeros(1), "conv_out.bias": torch.zeros(6)}
    del wrong["mid.attn_1.q.weight"]
    problems = r"1 missing: mid\.attn_1\.q\.weight; 1 unexpected: head\.weight; 1 of another shape: conv_out\.bias"
    with pytest.raises(WeightsError, match=problems):
        DDIM.from_official(wrong, **options)
    with pytest.raises(
        WeightsError, match=r"down\.0\.block\.0\.conv1\.weight is missing; expected the layout of github"
    ):
        DDIM.from_official({"patch_embed.proj.weight": torch.zeros(8, 3, 4, 4)}, **options)
    with pytest.raises(WeightsError, match=r"no published model has the channels \[16, 32\]; give image_size"):
        DDIM.from_official(official, norm_num_groups=8)
    with pytest.raises(
        WeightsError, match=r"57 of another shape: temb\.dense\.0\.weight \(64, 16\) instead of \(128, 32\)"
    ):
        DDIM.from_official(official, **options, block_out_channels=(32, 32))
    with pytest.raises(WeightsError, match="16 is not divisible by norm_num_groups"):
        DDIM.from_official(official, image_size=16)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"eta": 1.5}, "eta"),
        ({"spacing": "cosine"}, "spacing"),
        ({"sampler": "ddpm_noisy", "eta": 0.5}, "eta: 0.5 is noise of the generalized sampler"),
        ({"block_out_channels": (0, 32)}, r"block_out_channels\.0"),
        ({"num_inference_steps": 1001}, "num_inference_steps must be at most num_train_timesteps 1000"),
    ],
)
def test_options_that_cannot_work_are_refused(option: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DDIMConfig(**option)


def test_images_that_cannot_be_halved_often_enough_are_refused() -> None:
    with pytest.raises(ConfigError, match="6 levels need an image size divisible by 32, got 80"):
        DDIM.check(DDIMConfig(), DataSpec(80))
