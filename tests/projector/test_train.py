"""The projector's training from end to end."""

from __future__ import annotations

import csv
import dataclasses
import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from torchvision.models import alexnet

from lmd_bench.data.scenes import Scenes
from lmd_bench.errors import ConfigError, TrainingError, WeightsError
from lmd_bench.projector import train
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.projector.light import LightAutoencoder
from lmd_bench.projector.losses import PerceptualDistance
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.train import HELD_OUT_START, STATE_FILE, LSPTrainOptions, train_lsp
from lmd_bench.projector.train_config import resolve, unused_options
from lmd_bench.projector.train_data import TrainData

WEIGHTS = "diffusion_pytorch_model.safetensors"
TINY = LSPTrainOptions(
    kind="vq",
    steps=24,
    batch_size=8,
    image_size=32,
    crop_size=16,
    num_images=32,
    num_held_out=16,
    block_out_channels=(8, 8),
    num_codes=32,
    light_factor=4,
    light_decoder_widths=(8,),
    light_decoder_blocks=(1,),
    light_encoder_hidden=4,
    perceptual_weight=0.0,
    disc_weight=0.0,
    disc_channels=8,
    disc_layers=2,
    log_every=5,
    eval_every=10,
)
WITH_EVERYTHING = dataclasses.replace(
    TINY,
    steps=16,
    disc_weight=0.5,
    disc_start=6,
    optimizer="adamw",
    quantised_share=0.4,
    codebook_init="data",
    codebook_init_step=3,
    revive_dead_codes=True,
    revive_every=5,
    save_every=6,
)


def changed(options: LSPTrainOptions = TINY, **values: Any) -> LSPTrainOptions:
    return dataclasses.replace(options, **values)


def started(options: LSPTrainOptions) -> tuple[Any, Tensor]:
    """A training before its first step, and the batch of that step."""
    options = resolve(options, perceptual=False)
    data = TrainData(options, torch.device("cpu"))
    return train._Training(options, data, None, torch.device("cpu")), next(data.batches(0))


def log_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "training.csv").open() as file:
        return list(csv.DictReader(file))


# -- what is written --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "model_class"), [("vq", VQModel), ("kl", AutoencoderKL), ("light", LightAutoencoder)])
def test_a_short_training_improves_and_writes_a_folder_diffusers_opens(
    kind: str, model_class: Any, tmp_path: Path
) -> None:
    lines: list[str] = []
    report = train_lsp(tmp_path / "tiny", changed(kind=kind, steps=40), log=lines.append)
    assert report.last_loss < 0.7 * report.first_loss
    model = model_class.from_pretrained(tmp_path / "tiny", low_cpu_mem_usage=False, use_safetensors=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == report.num_parameters
    assert report.weights_bytes > 4 * report.num_parameters
    projector = open_projector(ProjectorConfig(kind=kind, path=str(tmp_path / "tiny")))  # type: ignore[arg-type]
    held_out = Scenes(0, 32).render(torch.arange(16) + HELD_OUT_START).float() / 255.0
    latents = projector.encode(held_out)
    for quantize, psnr_db in ((False, report.psnr_db), (True, report.held_out.quantised_psnr_db)):
        if psnr_db is not None:
            error = (projector.decode(latents, quantize=quantize) - held_out).square().mean()
            assert -10 * torch.log10(error).item() == pytest.approx(psnr_db, abs=0.01)
    assert (kind == "vq") == (report.held_out.quantised_psnr_db is not None)
    assert f"{report.psnr_db:.2f} dB" in lines[-1]
    assert sorted(file.name for file in (tmp_path / "tiny").iterdir()) == [
        "README.md",
        "config.json",
        WEIGHTS,
        "training-data.json",
        "training.csv",
    ]


def test_the_readme_holds_the_command_and_the_figures(tmp_path: Path) -> None:
    options = changed(seed=5)
    report = train_lsp(tmp_path / "tiny", options)
    text = (tmp_path / "tiny" / "README.md").read_text()
    assert resolve(options, perceptual=False).command(tmp_path / "tiny") in text
    assert "lmd-bench lsp train --out" in text
    assert "--seed 5 --data-seed 0 --steps 24 --batch-size 8 --image-size 32" in text
    assert "under the license of lmd-bench" in text
    assert f"| PSNR of encode and decode | {report.psnr_db:.2f} dB |" in text
    assert f"| PSNR with quantisation between | {report.held_out.quantised_psnr_db:.2f} dB |" in text
    codes = report.held_out.codes
    assert codes is not None
    assert f"{codes.usage:.1%} of 32, {codes.dead} dead" in text


def test_the_log_tells_losses_codes_and_held_out_figures(tmp_path: Path) -> None:
    report = train_lsp(tmp_path / "tiny", TINY)
    rows = log_of(tmp_path / "tiny")
    assert [row["step"] for row in rows] == ["5", "10", "15", "20", "24"]
    assert [bool(row["held_out_psnr_db"]) for row in rows] == [False, True, False, True, True]
    for row in rows:
        assert 0 < float(row["code_usage"]) <= 1 <= float(row["code_perplexity"]) <= 32
        assert int(row["dead_codes"]) == round(32 * (1 - float(row["code_usage"])))
        total = float(row["reconstruction"]) + float(row["regulariser"])
        assert float(row["loss"]) == pytest.approx(total, rel=1e-4)
        assert float(row["reconstruction"]) == pytest.approx(0.1 * float(row["l1"]) + float(row["l2"]), rel=1e-4)
    assert float(rows[-1]["held_out_psnr_db"]) == pytest.approx(report.psnr_db, abs=0.02)


def test_half_precision_halves_the_file_and_is_measured_as_written(tmp_path: Path) -> None:
    full = train_lsp(tmp_path / "full", TINY)
    half = train_lsp(tmp_path / "half", changed(half=True))
    assert half.weights_bytes < 0.7 * full.weights_bytes
    assert half.psnr_db == pytest.approx(full.psnr_db, abs=0.05)
    assert {tensor.dtype for tensor in load_file(tmp_path / "half" / WEIGHTS).values()} == {torch.float16}


def test_latents_are_left_as_they_are_on_request(tmp_path: Path) -> None:
    plain = train_lsp(tmp_path / "plain", changed(normalise_latents=False))
    unit = train_lsp(tmp_path / "unit", TINY)
    assert unit.psnr_db == pytest.approx(plain.psnr_db, abs=0.02)
    assert unit.held_out.codes is not None
    assert plain.held_out.codes is not None
    assert unit.held_out.codes.usage == pytest.approx(plain.held_out.codes.usage, abs=0.07)
    spread = [torch.tensor(report.held_out.latent_std).square().mean().item() for report in (unit, plain)]
    assert abs(spread[0] - 1.0) < 0.3 < abs(spread[1] - 1.0)


def test_the_same_options_give_the_same_weights(tmp_path: Path) -> None:
    for name in ("one", "two"):
        torch.manual_seed(len(name) + ord(name[0]))  # the global generator must not matter
        train_lsp(tmp_path / name, changed(WITH_EVERYTHING, steps=8))
    assert (tmp_path / "one" / WEIGHTS).read_bytes() == (tmp_path / "two" / WEIGHTS).read_bytes()


def test_a_folder_of_images_is_trained_on(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, scene in enumerate(Scenes(0, 48).render(range(24))):
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index}.png")
    report = train_lsp(tmp_path / "tiny", changed(kind="light", data=str(tmp_path / "images"), data_seed=3))
    assert report.last_loss < report.first_loss
    readme = (tmp_path / "tiny" / "README.md").read_text()
    assert "6 held-out images of" in readme
    assert "the first 6 images in the order of data seed 3" in readme
    assert "license" not in readme  # these are not our images


# -- losses -----------------------------------------------------------------------------------------------------------


def test_eq_4_and_eq_6_add_up_to_the_loss() -> None:
    training, batch = started(changed(disc_weight=0.7, disc_start=0, l1_weight=0.2, l2_weight=0.9, optimizer="adamw"))
    projector, discriminator = training.projector, training._discriminator
    done = projector.forward(batch, training.options, 0)
    l1, l2 = functional.l1_loss(done.images, batch), functional.mse_loss(done.images, batch)
    reconstruction, generator = 0.2 * l1 + 0.9 * l2, -discriminator(done.images).mean()
    last = projector.model.decoder.conv_out.weight
    norms = [torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (reconstruction, generator)]
    weight = 0.7 * norms[0] / (norms[1] + 1e-4)
    real, fake = discriminator(batch), discriminator(done.images.detach())
    disc = 0.5 * (functional.relu(1 - real).mean() + functional.relu(1 + fake).mean())
    training.take_step(batch)
    told = dict(zip(train._PARTS, training._parts[0][0].tolist(), strict=True))
    assert told["reconstruction"] == pytest.approx(reconstruction.item(), rel=1e-5)
    assert told["regulariser"] == pytest.approx(done.regulariser.item(), rel=1e-5)
    assert told["generator"] == pytest.approx(generator.item(), rel=1e-4)
    assert told["adaptive_weight"] == pytest.approx(weight.item(), rel=1e-4)
    assert told["disc"] == pytest.approx(disc.item(), rel=1e-4)
    total = reconstruction + done.regulariser + weight * generator
    assert told["loss"] == pytest.approx(total.item(), rel=1e-4)


def test_the_discriminator_learns_from_both_and_the_autoencoder_never_moves_it() -> None:
    training, batch = started(changed(disc_weight=0.7, disc_start=0, disc_loss="logistic"))
    before = [p.clone() for p in training._discriminator.parameters()]
    training._step_discriminator = lambda images, rebuilt: images.new_zeros(())
    training.take_step(batch)
    assert all(torch.equal(a, b) for a, b in zip(before, training._discriminator.parameters(), strict=True))
    del training._step_discriminator
    training.take_step(batch)
    assert not any(torch.equal(a, b) for a, b in zip(before, training._discriminator.parameters(), strict=True))


def test_before_its_start_the_discriminator_changes_nothing(tmp_path: Path) -> None:
    # One optimizer for all, since a discriminator would choose another by default.
    with_it = changed(optimizer="adamw", disc_weight=0.8)
    train_lsp(tmp_path / "without", TINY)
    train_lsp(tmp_path / "late", changed(with_it, disc_start=20))
    assert log_of(tmp_path / "late")[:4] == log_of(tmp_path / "without")[:4]
    assert log_of(tmp_path / "late")[4] != log_of(tmp_path / "without")[4]


def test_parts_that_take_no_part_leave_their_cells_empty_and_do_not_thin_out_means(tmp_path: Path) -> None:
    options = changed(optimizer="adamw", disc_weight=0.8, disc_start=13, steps=15, log_every=5)
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "tiny", changed(options, save_every=5), log=stopping_at(10))
    state = torch.load(tmp_path / "tiny" / STATE_FILE, weights_only=True)
    assert state["parts"][:, train._PARTS.index("disc")].isnan().all()
    train_lsp(tmp_path / "tiny", changed(options, save_every=5))
    rows = log_of(tmp_path / "tiny")
    names = ("generator", "adaptive_weight", "disc")
    assert [[row[name] for name in names] for row in rows[:2]] == [[""] * 3] * 2
    training, _ = started(options)
    for step, batch in zip(range(15), training.data.batches(0), strict=False):
        assert training.step == step
        training.take_step(batch)
    for name in names:
        seen = training.column(name)[13:]
        assert float(rows[2][name]) == pytest.approx(sum(seen) / 2, rel=1e-3)
    assert all(row["perceptual"] == "" for row in rows)


def test_windows_of_revival_start_with_the_codebook() -> None:
    options = changed(
        codebook_init="data", codebook_init_step=4, revive_dead_codes=True, revive_every=5, steps=20, num_codes=64
    )
    training, _ = started(options)
    ends = []
    for step, batch in zip(range(20), training.data.batches(0), strict=False):
        training.take_step(batch)
        if step >= 4 and not training._revival_counts.any():
            ends.append(step)
    assert ends == [8, 13, 18]  # steps 4 to 8 are the first five with a codebook


def test_gan_runs_take_the_released_optimizer_unless_told_otherwise() -> None:
    training, batch = started(changed(disc_weight=0.8))
    training.take_step(batch)
    for optimizer in (training._optimizer, training._disc_optimizer):
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert group["betas"] == (0.5, 0.9)
        assert group["lr"] == pytest.approx(4.5e-6 * 8)
    plain, batch = started(TINY)
    plain.take_step(batch)
    assert type(plain._optimizer) is torch.optim.AdamW
    assert plain._optimizer.param_groups[0]["lr"] == pytest.approx(4e-3 / 12)


def test_the_rate_rises_then_falls_as_half_a_cosine() -> None:
    options = resolve(changed(steps=100, lr_warmup_steps=10, lr=1.0), perceptual=False)
    rates = [train._rate(step, options) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (step + 1) for step in range(10)])
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] < 0.001
    assert all(earlier >= later for earlier, later in itertools.pairwise(rates[10:]))


def test_codes_come_from_data_and_dead_ones_are_revived(tmp_path: Path) -> None:
    train_lsp(tmp_path / "dead", changed(codebook_init="uniform", num_codes=64))
    options = changed(num_codes=64, codebook_init="data", codebook_init_step=5, revive_dead_codes=True, revive_every=5)
    train_lsp(tmp_path / "alive", options)
    dead, alive = (log_of(tmp_path / name) for name in ("dead", "alive"))
    assert int(dead[-1]["dead_codes"]) > 2 * int(alive[-1]["dead_codes"])
    assert sum(int(row["revived_codes"]) for row in dead) == 0
    assert sum(int(row["revived_codes"]) for row in alive) > 0
    assert float(alive[0]["code_usage"]) == 0.0  # nothing is quantised yet
    assert float(alive[1]["code_usage"]) > 0.8


# -- LPIPS ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def alexnet_file(tmp_path: Path) -> Path:
    """Random weights under AlexNet's names; what they say does not matter here, only that it enters."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in alexnet(weights=None).features.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    weights = {f"features.{name}": 0.05 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    torch.save(weights, tmp_path / "alexnet.pth")
    return tmp_path / "alexnet.pth"


@pytest.fixture
def no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))


def test_lpips_enters_with_its_weight_where_its_trunk_is_named(alexnet_file: Path, tmp_path: Path) -> None:
    options = changed(
        steps=2,
        crop_size=32,
        log_every=1,
        perceptual_weight=None,
        perceptual_net="alex",
        perceptual_trunk=str(alexnet_file),
    )
    lines: list[str] = []
    train_lsp(tmp_path / "tiny", options, log=lines.append)
    row = log_of(tmp_path / "tiny")[0]
    distance = PerceptualDistance.open("alex", alexnet_file)
    training, batch = started(changed(crop_size=32))
    rebuilt = training.projector.forward(batch, training.options, 0).images
    wanted = distance(rebuilt, batch).mean().item()
    assert float(row["perceptual"]) == pytest.approx(wanted, rel=1e-3)
    parts = 0.1 * float(row["l1"]) + float(row["l2"]) + float(row["perceptual"])
    assert float(row["reconstruction"]) == pytest.approx(parts, rel=1e-4)
    assert "--perceptual-weight 1.0" in (tmp_path / "tiny" / "README.md").read_text()
    assert not any("LPIPS" in line for line in lines)


@pytest.mark.usefixtures("no_weights")
def test_without_its_trunk_training_goes_on_plainly_and_says_so_in_one_line(tmp_path: Path) -> None:
    lines: list[str] = []
    train_lsp(tmp_path / "tiny", changed(steps=1, crop_size=32, perceptual_weight=None), log=lines.append)
    (told,) = [line for line in lines if "LPIPS" in line]
    assert told.startswith("without LPIPS: ")
    assert "vgg16-397923af.pth" in told
    assert "\n" not in told
    assert "--perceptual-weight 0.0" in (tmp_path / "tiny" / "README.md").read_text()


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("values", [{"perceptual_weight": 0.5}, {"perceptual_trunk": "/no/such/file.pth"}])
def test_lpips_on_request_without_its_trunk_is_refused(values: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"is missing|no such file"):
        train_lsp(tmp_path / "tiny", changed(**{"perceptual_weight": None, "crop_size": 32, **values}))
    assert not (tmp_path / "tiny").exists()


# -- going on ---------------------------------------------------------------------------------------------------------


class StoppedError(Exception):
    """What ends a training in these tests."""


def stopping_at(step: int) -> Callable[[str], None]:
    def log(line: str) -> None:
        if line.startswith(f"step {step}/"):
            raise StoppedError

    return log


@pytest.mark.parametrize(
    "options", [WITH_EVERYTHING, changed(kind="kl", save_every=7), changed(kind="light", save_every=4)]
)
def test_a_training_that_was_stopped_ends_in_the_same_bits(options: LSPTrainOptions, tmp_path: Path) -> None:
    train_lsp(tmp_path / "whole", options)
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "parts", options, log=stopping_at(10))
    assert (tmp_path / "parts" / STATE_FILE).exists()
    assert not (tmp_path / "parts" / "config.json").exists()
    lines: list[str] = []
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "parts", options, log=stopping_at(15))
    train_lsp(tmp_path / "parts", options, log=lines.append)
    assert f"going on after step {15 // options.save_every * options.save_every}" in lines
    for name in (WEIGHTS, "training.csv", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert not (tmp_path / "parts" / STATE_FILE).exists()


def test_a_state_of_other_options_is_refused_with_their_names(tmp_path: Path) -> None:
    options = changed(save_every=4)
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "tiny", options, log=stopping_at(5))
    state = (tmp_path / "tiny" / STATE_FILE).read_bytes()
    with pytest.raises(ConfigError, match=r"seed 0 \(now 1\), beta 0\.25 \(now 0\.5\); give the same ones"):
        train_lsp(tmp_path / "tiny", changed(options, seed=1, beta=0.5))
    assert (tmp_path / "tiny" / STATE_FILE).read_bytes() == state
    lines: list[str] = []
    train_lsp(tmp_path / "tiny", changed(options, save_every=9), log=lines.append)  # how often is free
    assert "going on after step 4" in lines


def test_a_state_of_other_images_or_weights_is_refused_with_both_digests(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for index, scene in enumerate(Scenes(0, 48).render(range(24))):
        Image.fromarray(scene.permute(1, 2, 0).numpy()).save(tmp_path / "images" / f"{index}.png")
    train_lsp(tmp_path / "first", changed(kind="light", steps=2))
    options = changed(
        kind="light", save_every=4, data=str(tmp_path / "images"), init_from=str(tmp_path / "first"), num_held_out=1
    )
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "tiny", options, log=stopping_at(5))
    before = torch.load(tmp_path / "tiny" / STATE_FILE, weights_only=True)["inputs"]
    for index in range(2):  # one of them is trained on, since one image is held out
        Image.new("RGB", (48, 48), "red").save(tmp_path / "images" / f"{index}.png")
    train_lsp(tmp_path / "first", changed(kind="light", steps=3), force=True)
    with pytest.raises(ConfigError) as refused:
        train_lsp(tmp_path / "tiny", options)
    for name in ("data", "init_from"):
        assert re.search(rf"{name} {before[name]} \(now (?!{before[name]})[0-9a-f]{{16}}\)", str(refused.value))
    assert "perceptual" not in str(refused.value)
    assert (tmp_path / "tiny" / STATE_FILE).exists()


def test_a_training_that_fails_after_its_last_step_is_ended_by_the_same_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_lsp(tmp_path / "whole", TINY)

    def no_memory(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(TrainData, "sample", no_memory)
        with pytest.raises(MemoryError):
            train_lsp(tmp_path / "parts", TINY)
    lines: list[str] = []
    train_lsp(tmp_path / "parts", TINY, log=lines.append)
    assert "going on after step 24" in lines
    for name in (WEIGHTS, "training.csv", "config.json"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_a_damaged_state_is_refused(tmp_path: Path) -> None:
    (tmp_path / STATE_FILE).write_bytes(b"not a state")
    with pytest.raises(ConfigError, match=r"training-state\.pt cannot be read .*; remove it to start anew"):
        train_lsp(tmp_path, TINY)


# -- what is said -----------------------------------------------------------------------------------------------------


def test_options_without_effect_are_named_in_one_line(tmp_path: Path) -> None:
    lines: list[str] = []
    options = changed(kind="kl", steps=1, beta=0.5, light_wavelet="cdf97", revive_every=7)
    train_lsp(tmp_path / "kl", options, log=lines.append)
    (told,) = [line for line in lines if "without effect" in line]
    named = told.removeprefix("without effect in this training: ").split(", ")
    assert {"beta", "light_wavelet", "revive_every", "num_codes", "light_factor", "disc_layers"} <= set(named)
    assert not {"kl_weight", "block_out_channels", "steps", "seed", "num_images"} & set(named)
    assert unused_options(LSPTrainOptions()) == []
    assert unused_options(LSPTrainOptions(kind="light", disc_layers=2)) == ["disc_layers"]
    assert unused_options(LSPTrainOptions(kind="kl", disc_weight=0.5, disc_layers=2)) == []


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "vqgan"}, "kind 'vqgan' must be one of vq, kl, light"),
        ({"disc_loss": "wgan"}, "disc_loss 'wgan' must be one of hinge, logistic"),
        ({"block_out_channels": (8, 16)}, "with layers_per_block 0 they must be equal"),
        ({"norm_num_groups": 5}, "must be multiples of norm_num_groups 5"),
        ({"image_size": 33}, "image_size 33 is not divisible by the factor 2"),
        ({"crop_size": 64}, "crop_size 64 must be from 1 to image_size"),
        ({"batch_size": 65}, "batch_size 65 must be from 1 to num_images 32"),
        ({"steps": 0}, "steps 0 must be at least 1"),
        ({"seed": -1}, "seed -1 must be at least 0"),
        ({"image_size": 8192}, "image_size 8192 must be from 8 to 4096 px"),
        ({"data_seed": -1}, "data_seed -1 must be at least 0"),
        ({"disc_weight": 1.0, "disc_start": 24}, "disc_start 24 leaves no step to the discriminator"),
        ({"num_codes": 1}, "num_codes 1 must be at least 2"),
        ({"beta": -0.1}, "beta -0.1 must be a number from 0 on"),
        ({"disc_weight": float("nan")}, "disc_weight nan must be a number from 0 on"),
        ({"lr": 0.0}, "lr 0.0 must be a number above 0"),
        ({"quantised_share": 1.5}, "quantised_share 1.5 must be from 0 to 1"),
        ({"l1_weight": 0.0, "l2_weight": 0.0}, "nothing to reconstruct for"),
        ({"codebook_init": "data"}, "codebook_init_step 500 must come before steps 24"),
        ({"disc_weight": 1.0, "disc_layers": 4}, "crop_size 16 is too small for a discriminator of 4 layers; use 48"),
        ({"perceptual_weight": 1.0, "crop_size": 16}, "crop_size 16 is too small for LPIPS"),
        ({"kind": "light", "light_factor": 6}, "light_factor 6 must be a power of two"),
        ({"kind": "light", "light_decoder_blocks": (1, 1)}, "need one number per level each"),
    ],
)
def test_options_that_do_not_fit_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        dataclasses.replace(TINY, **changes)  # type: ignore[arg-type]


def test_a_loss_that_is_not_finite_stops_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"loss is (nan|inf) at step 2; use a smaller --lr$"):
        train_lsp(tmp_path / "tiny", changed(kind="kl", lr=1e30, lr_warmup_steps=0))
    assert not (tmp_path / "tiny" / "config.json").exists()


def test_no_state_is_kept_of_weights_that_are_not_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_step = train._Training.take_step

    def spoiled(self: Any, images: Tensor) -> None:
        take_step(self, images)
        if self.step == 8:
            with torch.no_grad():
                self.projector.last_layer[0] = torch.nan

    monkeypatch.setattr(train._Training, "take_step", spoiled)
    options = changed(kind="light", save_every=4, log_every=50)
    with pytest.raises(
        TrainingError, match=r"weight of the projector is not finite after step 8; .* remove .*state\.pt"
    ):
        train_lsp(tmp_path / "tiny", options)
    assert torch.load(tmp_path / "tiny" / STATE_FILE, weights_only=True)["step"] == 4


def test_an_unwritable_folder_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cannot write to .*; choose another --out"):
        train_lsp(tmp_path / "file" / "out", TINY)
