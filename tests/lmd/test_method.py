"""LMD as a method."""

import dataclasses
from pathlib import Path

import psutil
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lmd_bench.config import LearningRateConfig, RecipeConfig
from lmd_bench.errors import ConfigError, DataError, WeightsError
from lmd_bench.harness.loop import Trainer, TrainOptions, TrainResult, untimed_schedule
from lmd_bench.harness.noise import NoiseSource
from lmd_bench.harness.timer import clock_for
from lmd_bench.lmd.method import LMD, LMDConfig
from lmd_bench.lmd.model import lmd_vit_base_patch4
from lmd_bench.lmd.unet import UNetConfig
from lmd_bench.method import Batch, DataSpec
from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.testing import check_method

PIXELS = ProjectorConfig(kind="pixels")
TINY = {
    "encoder_width": 48,
    "encoder_depth": 2,
    "encoder_heads": 3,
    "decoder_width": 32,
    "decoder_depth": 2,
    "decoder_heads": 2,
}


SMALL_UNET = UNetConfig(
    block_out_channels=(8, 8), attention_levels=(), attention_head_dim=8, layers_per_block=1, norm_num_groups=4
)


class MeanProjector(LatentProjector):
    """A frozen convolution to 4 channels at factor 8 that sees a 24 px neighbourhood, as an autoencoder does."""

    def __init__(self) -> None:
        super().__init__(name="mean", factor=8, latent_channels=4)
        self.to_latents = nn.Conv2d(3, 4, 24, stride=8, padding=8)
        self.to_images = nn.ConvTranspose2d(4, 3, 8, stride=8)
        self.freeze()

    def _encode(self, images: Tensor) -> Tensor:
        out: Tensor = self.to_latents(images)
        return out

    def _decode(self, latents: Tensor, *, quantize: bool) -> Tensor:
        out: Tensor = self.to_images(latents)
        return out


def latent_lmd(**options: object) -> LMD:
    torch.manual_seed(0)
    config = LMDConfig(projector=PIXELS, **{"patch_size": 2, **TINY, **options})
    return LMD(config, DataSpec(64), projector=MeanProjector())


@pytest.mark.parametrize("schedule", ["uniform", "piecewise", "cosine", "constant"])
def test_lmd_in_pixel_space_keeps_the_contract(schedule: str) -> None:
    config = LMDConfig(projector=PIXELS, patch_size=8, mask_schedule=schedule, **TINY)
    check_method(LMD, config, DataSpec(32), overfit_steps=60, learning_rate=3e-3)


def test_lmd_on_latents_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    def opened(config: ProjectorConfig) -> LatentProjector:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return MeanProjector()

    monkeypatch.setattr("lmd_bench.lmd.method.open_projector", opened)
    check_method(LMD, LMDConfig(projector=PIXELS, patch_size=1, **TINY), DataSpec(32), overfit_share=0.8)


def test_each_step_masks_by_the_schedule() -> None:
    method = latent_lmd()
    latents = method.prepare(Batch(torch.rand(2, 3, 64, 64)))
    assert latents.shape == (2, 4, 8, 8)
    outputs = [method.training_step(latents, step=step, total_steps=60).scalars for step in (1, 30, 60)]
    assert [out["tokens"] for out in outputs] == [13, 5, 4]
    assert [method.num_tokens_at(step, 60) for step in (1, 30, 60)] == [13, 5, 4]
    assert outputs[0]["mask_ratio"] == method.mask_ratio_at(1, 60) == 0.15


def test_the_projector_is_frozen_and_left_out_of_the_optimizer() -> None:
    method = latent_lmd()
    method.train()
    assert not method.projector.training
    frozen = {id(parameter) for parameter in method.projector.parameters()}
    grouped = {id(p) for group in method.param_groups(0.05) for p in group["params"]}
    assert not frozen & grouped
    decayed = {id(p) for p in method.param_groups(0.05)[0]["params"]}
    assert id(method.model.cls_token) in decayed
    assert id(method.model.mask_token) in decayed
    assert id(method.model.blocks[0].norm1.weight) not in decayed


def test_reconstruction_sees_no_hidden_pixel_but_the_leaking_one_does() -> None:
    method = latent_lmd().eval()
    images, other = torch.rand(2, 2, 3, 64, 64)
    mask = torch.ones(2, 4, 4, dtype=torch.bool)
    mask[0, :2, :2] = mask[1, 1:3, 1:3] = False
    hidden = mask.repeat_interleave(16, 1).repeat_interleave(16, 2).unsqueeze(1)
    changed = torch.where(hidden, other, images)
    assert torch.equal(method.reconstruct(images, mask), method.reconstruct(changed, mask))
    leaking, leaking_changed = (method.reconstruct_leaking(x, mask) for x in (images, changed))
    assert leaking is not None
    assert leaking_changed is not None
    assert not torch.equal(leaking, leaking_changed)


def test_visible_latents_are_decoded_as_they_are() -> None:
    method = latent_lmd().eval()
    images = torch.rand(2, 3, 64, 64)
    nothing_hidden = torch.zeros(2, 4, 4, dtype=torch.bool)
    round_trip = method.round_trip(images)
    assert round_trip is not None
    assert torch.equal(method.reconstruct(images, nothing_hidden), round_trip)


def test_images_of_one_batch_may_hide_different_numbers_of_units() -> None:
    method = latent_lmd().eval()
    images = torch.rand(3, 3, 64, 64)
    mask = torch.zeros(3, 4, 4, dtype=torch.bool)
    mask[0, 0], mask[1, :2], mask[2, 3, 3] = True, True, True
    whole = method.reconstruct(images, mask)
    single = torch.cat([method.reconstruct(images[i : i + 1], mask[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(whole, single)


def test_tokens_too_large_for_the_units_are_an_error_of_the_data() -> None:
    method = latent_lmd(patch_size=4).eval()  # tokens of 32 px
    mask = torch.eye(4, dtype=torch.bool).flip(0).unsqueeze(0) | torch.eye(4, dtype=torch.bool)
    with pytest.raises(DataError, match="every token of image 0 touches a hidden unit"):
        method.reconstruct(torch.rand(1, 3, 64, 64), mask)


def test_pixel_space_has_no_ceiling_and_no_leak() -> None:
    method = LMD(LMDConfig(projector=PIXELS, patch_size=16, **TINY), DataSpec(32))
    images, mask = torch.rand(1, 3, 32, 32), torch.zeros(1, 2, 2, dtype=torch.bool)
    assert method.projector_name is None
    assert method.round_trip(images) is None
    assert method.reconstruct_leaking(images, mask) is None
    assert latent_lmd().projector_name == "mean"


def test_normalised_targets_cannot_take_the_yardstick() -> None:
    method = latent_lmd(normalize_targets=True)
    assert LMD.yardstick_obstacle(method.config) == "normalised targets"
    assert LMD.yardstick_obstacle(latent_lmd().config) is None
    with pytest.raises(ConfigError, match="normalised targets"):
        method.reconstruct(torch.rand(1, 3, 64, 64), torch.zeros(1, 4, 4, dtype=torch.bool))


@pytest.mark.parametrize("ratios", [(0.5, 0.4, 0.75), (0.15, 0.8, 0.75), (0.8, 0.8, 0.1)])
def test_mask_ratios_out_of_order_are_refused(ratios: tuple[float, float, float]) -> None:
    names = ("mask_ratio_start", "mask_ratio_mid", "mask_ratio_end")
    with pytest.raises(ValidationError, match="mask ratios out of order"):
        LMDConfig(projector=PIXELS, **dict(zip(names, ratios, strict=True)))


@pytest.mark.parametrize(
    "option", [{"mask_ratio_end": 1.0}, {"mask_ratio_start": -0.1}, {"decoder_pos_sign": 2}, {"encoder_heads": 5}]
)
def test_values_out_of_range_are_refused(option: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        LMDConfig(projector=PIXELS, **option)


def test_a_patch_that_does_not_cut_the_map_is_refused_with_those_that_do() -> None:
    with pytest.raises(ConfigError, match="patch_size: 5 does not cut images of 64 x 64; possible: 1, 2, 4, 8, 16, 32"):
        LMD.check(LMDConfig(projector=PIXELS, patch_size=5), DataSpec(64))


def test_the_published_model_has_its_parameters_shapes_and_flops() -> None:
    with torch.device("meta"):
        model = lmd_vit_base_patch4()
        assert sum(p.numel() for p in model.parameters()) == 110_817_856
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == 110_753_856
        method = LMD(LMDConfig(projector=PIXELS), DataSpec(224), projector=MeanProjector())
        latents = torch.empty(4, 4, 28, 28)
        with FlopCounterMode(display=False) as counter:
            output = method.training_step(latents, step=100, total_steps=100)
            output.loss.backward()
    assert output.loss.shape == ()
    assert output.scalars["tokens"] == 12
    assert counter.get_total_flops() == pytest.approx(3 * lmd_forward_flops(4, 12), rel=0.01)


def lmd_forward_flops(batch: int, kept: int) -> float:
    """2 x multiply-adds of ViT-B/4 on 28 x 28 x 4 with a decoder of 512 x 8, by hand."""

    def block(tokens: int, width: int, queries: int | None = None) -> int:
        asking = tokens if queries is None else queries
        return 2 * (2 * tokens * width**2 + 10 * asking * width**2 + 2 * tokens * asking * width)

    hidden = 49 - kept
    encoder = 12 * block(kept + 1, 768) + 2 * kept * 64 * 768
    decoder = 7 * block(50, 512) + block(50, 512, hidden) + 2 * (kept + 1) * 768 * 512 + 2 * hidden * 512 * 64
    return batch * (encoder + decoder)


@pytest.mark.parametrize(
    ("options", "parameters"),
    [
        ({}, 110_817_856),
        ({"variant": "generative"}, 95_075_904),
        ({"variant": "generative", "decoder_width": 1024}, 208_855_616),
    ],
)
def test_the_papers_shapes_have_their_blocks_and_parameters(options: dict[str, object], parameters: int) -> None:
    """By hand: block(d) = 12 d^2 + 13 d; beside the blocks only what depends on the two widths."""
    config = LMDConfig(projector=PIXELS, **options)
    depths = (8, 12) if options else (12, 8)
    assert (config.encoder_depth, config.decoder_depth) == depths
    with torch.device("meta"):
        model = LMD(config, DataSpec(224), projector=MeanProjector()).model
    width = config.decoder_width
    assert (model.decoder_embed.in_features, model.decoder_embed.out_features) == (768, width)
    blocks = sum(depth * (12 * d * d + 13 * d) for depth, d in zip(depths, (768, width), strict=True))
    encoder = 64 * 768 + 768 + 768 + 50 * 768 + 2 * 768  # embedding, class token, positions, norm
    decoder = 768 * width + width + width + 50 * width + 2 * width + width * 64 + 64
    assert sum(p.numel() for p in model.parameters()) == blocks + encoder + decoder == parameters


def test_a_depth_that_is_given_wins_over_the_variants() -> None:
    config = LMDConfig(projector=PIXELS, variant="generative", decoder_depth=3)
    assert (config.encoder_depth, config.decoder_depth) == (8, 3)
    assert LMDConfig.model_validate(config.model_dump(mode="json")) == config


def test_a_schedule_of_ones_own_masks_by_its_points(tmp_path: Path) -> None:
    method = latent_lmd(mask_schedule=[[0, 0.5], [0.5, 0.5], [0.5, 0.9], [1, 0.9]])
    assert [method.num_tokens_at(step, 100) for step in (1, 50, 51, 100)] == [8, 8, 1, 1]
    path = tmp_path / "own.py"
    path.write_text("def ramp(progress):\n    return 0.2 + 0.5 * progress\n")
    config = latent_lmd(mask_schedule=f"{path}:ramp").config
    path.unlink()
    again = LMDConfig.model_validate(config.model_dump(mode="json"))
    assert again == config, "a finished run is loaded without the function's file"
    assert again.mask_range() == (0.2, pytest.approx(0.7))


def test_the_curve_of_a_function_enters_the_options_of_the_run(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    dumps = []
    for end in (0.5, 0.6):
        path.write_text(f"def ramp(progress):\n    return {end} * progress\n")
        dumps.append(LMDConfig(projector=PIXELS, mask_schedule=f"{path}:ramp").model_dump(mode="json"))
    assert dumps[0] != dumps[1]


def test_a_schedule_that_leaves_no_token_is_refused_before_anything_is_built() -> None:
    points = LMDConfig(projector=PIXELS, patch_size=16, mask_schedule=[[0, 0.1], [1, 0.95]])
    LMD.check(points, DataSpec(128))
    with pytest.raises(ConfigError, match=r"^mask_schedule: a mask ratio of 0.95 leaves none of 16 tokens visible"):
        LMD.check(points, DataSpec(64))
    with pytest.raises(ConfigError, match=r"^mask_ratio_end: a mask ratio of 0.8 leaves none of 4 tokens visible"):
        LMD.check(LMDConfig(projector=PIXELS, patch_size=16, mask_ratio_end=0.8), DataSpec(32))


def test_points_and_named_ratios_do_not_mix() -> None:
    with pytest.raises(ValidationError, match="mask_ratio_end belongs to the named schedules"):
        LMDConfig(projector=PIXELS, mask_schedule=[[0, 0.1], [1, 0.5]], mask_ratio_end=0.5)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"patch_size": 32}, "49 tokens, 29 mask levels (41 to 12 visible)"),
        ({"patch_size": 16}, "196 tokens, 117 mask levels (166 to 49 visible)"),
        ({"patch_size": 32, "mask_schedule": "constant"}, "49 tokens, 0 mask levels (12 to 12 visible)"),
        ({"patch_size": 32, "mask_schedule": [[0, 0], [1, 0.5]]}, "49 tokens, 24 mask levels (48 to 24 visible)"),
    ],
)
def test_the_number_of_mask_levels_follows_from_tokens_and_schedule(options: dict[str, object], text: str) -> None:
    assert LMD.plan_text(LMDConfig(projector=PIXELS, **options), DataSpec(224)) == text


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_compiling_makes_few_graphs_however_many_lengths_the_schedule_has() -> None:
    config = LMDConfig(projector=PIXELS, patch_size=4, **TINY)
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        method = LMD(config, DataSpec(28)).train()
        runs.append(train_on_noise(method, compiled))
    plain, compiled_run = runs
    assert len({method.num_tokens_at(step, 60) for step in range(1, 61)}) >= 25
    assert compiled_run.compiled_graphs is not None
    assert 1 <= compiled_run.compiled_graphs <= 3
    assert compiled_run.losses == pytest.approx(plain.losses, rel=2e-3)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
@pytest.mark.parametrize("options", [{"network": "unet"}, {"pixel_loss": 1.0, "pixel_loss_start": 0.5}], ids=str)
def test_the_other_networks_and_losses_make_few_graphs_too(options: dict[str, object]) -> None:
    """Graphs are counted where they are made, before code is generated from them, which takes a minute for a U-Net."""
    import torch._dynamo

    method = LMD(LMDConfig(projector=PIXELS, patch_size=4, unet=SMALL_UNET, **TINY, **options), DataSpec(28)).train()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method.model.forward = torch.compile(method.model.forward, backend="eager")
    inputs = method.prepare(Batch(torch.rand(2, 3, 28, 28)))
    counts = []
    for steps in (untimed_schedule(method, compiled_options(untimed_steps=3)), range(1, 61)):
        for step in steps:
            method.training_step(inputs, step=step, total_steps=60).loss.backward()
        counts.append(int(torch._dynamo.utils.counters["stats"]["unique_graphs"]))
    assert 1 <= counts[0] <= 4
    assert counts[1] == counts[0], "no shape is new once the untimed steps are over"


def test_a_unet_has_no_lengths_to_warm_up_for() -> None:
    unet = LMD(LMDConfig(projector=PIXELS, patch_size=4, network="unet", unet=SMALL_UNET), DataSpec(28))
    vit = LMD(LMDConfig(projector=PIXELS, patch_size=4, **TINY), DataSpec(28))
    options = compiled_options(untimed_steps=3)
    assert len(untimed_schedule(unet, options)) == 6
    assert len(untimed_schedule(vit, options)) >= 30
    ratios = [[method.mask_ratio_at(step, 60) for step in range(1, 61)] for method in (unet, vit)]
    assert ratios[0] == ratios[1], "figure 5 shows the schedule of both"


def compiled_options(*, untimed_steps: int) -> TrainOptions:
    return TrainOptions(
        recipe=RecipeConfig(batch_size=2, lr=LearningRateConfig(base=1e-4, per_images=None)),
        steps=60,
        lr_warmup_steps=0,
        untimed_steps=untimed_steps,
        seed=0,
        device=torch.device("cpu"),
        compile=True,
    )


def train_on_noise(method: LMD, compiled: bool) -> TrainResult:
    options = dataclasses.replace(compiled_options(untimed_steps=1), compile=compiled)
    trainer = Trainer(method, NoiseSource(method, options.device), options, clock_for(options.device))
    return trainer.run(lambda _: None, lambda *_: None, lambda *_: None)


@pytest.mark.slow
def test_memory_stays_level_over_repeated_passes_along_the_schedule() -> None:
    """Lengths that change from step to step must not make the process grow: the allocator reuses what it holds."""
    sizes = {"encoder_width": 192, "encoder_depth": 4, "encoder_heads": 3}
    sizes |= {"decoder_width": 128, "decoder_depth": 2, "decoder_heads": 4}
    method = LMD(LMDConfig(projector=PIXELS, patch_size=4, **sizes), DataSpec(28)).train()
    images, process = torch.rand(8, 3, 28, 28), psutil.Process()
    resident = []
    for _ in range(4):
        for step in range(1, 46):
            output = method.training_step(method.prepare(Batch(images)), step=step, total_steps=45)
            output.loss.backward()
            method.zero_grad(set_to_none=True)
        resident.append(process.memory_info().rss / 2**20)
    assert max(resident[1:]) - resident[0] < 16, f"resident set after each pass, MiB: {resident}"


def official_state() -> dict[str, Tensor]:
    return latent_lmd().to_official()


def test_official_weights_come_back_bit_for_bit() -> None:
    state = official_state()
    method = LMD.from_official(state, encoder_heads=3, decoder_heads=2, projector=MeanProjector())
    assert method.data.image_size == 64
    back = method.to_official()
    assert list(back) == list(state)
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_official_weights_load_without_a_projector_but_then_take_latents_only() -> None:
    method = LMD.from_official(official_state(), encoder_heads=3, decoder_heads=2)
    assert method.training_step(torch.randn(2, 4, 8, 8), step=1, total_steps=2).loss.isfinite()
    with pytest.raises(WeightsError, match="loaded without a projector"):
        method.prepare(Batch(torch.rand(1, 3, 64, 64)))


def test_official_weights_with_other_keys_are_refused_by_name() -> None:
    state = official_state()
    state["surplus"] = state.pop("decoder_blocks.1.attn.qkv.bias")
    with pytest.raises(WeightsError, match=r"1 missing: decoder_blocks.1.attn.qkv.bias; 1 unexpected: surplus"):
        LMD.from_official(state, encoder_heads=3, decoder_heads=2, projector=MeanProjector())
