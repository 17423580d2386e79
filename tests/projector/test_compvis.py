"""Import of CompVis checkpoints. Layouts come from the authors' own manifests, at a quarter of their widths."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from lmd_bench.cli import app
from lmd_bench.errors import WeightsError
from lmd_bench.projector.compvis import (
    discriminator_from_compvis,
    import_checkpoint,
    kl_from_compvis,
    vq_from_compvis,
)
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.projector.open import open_projector
from tests.parity.fill import load_reference

SMALLER = {64: 16, 128: 32, 256: 64, 512: 128, 8192: 24, 16384: 24}


def small_checkpoint(name: str) -> dict[str, Tensor]:
    """A checkpoint with the keys of a manifest and narrower tensors, each filled with numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for entry in load_reference(f"{name}.manifest")["keys"]:
        shape = [SMALLER.get(size, size) for size in entry["shape"]]
        scale = 1.0 / math.sqrt(max(1, math.prod(shape[1:])))
        found[entry["key"]] = torch.randn(shape, generator=generator) * scale
    return found


@pytest.fixture(scope="module")
def vq() -> dict[str, Tensor]:
    return small_checkpoint("ldm_vqmodel_f8")


@pytest.fixture(scope="module")
def kl() -> dict[str, Tensor]:
    return small_checkpoint("ldm_kl_f8")


def test_sizes_and_attention_levels_are_read_off_the_tensors(vq: dict[str, Tensor]) -> None:
    config = vq_from_compvis(vq).config
    assert config["block_out_channels"] == (32, 64, 64, 128)
    assert config["down_block_types"] == ("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",)
    assert config["up_block_types"] == ("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3
    assert (config["latent_channels"], config["vq_embed_dim"], config["num_vq_embeddings"]) == (4, 4, 24)
    assert (config["layers_per_block"], config["norm_num_groups"]) == (2, 32)


def test_a_model_without_attention_in_its_levels_gets_none(kl: dict[str, Tensor]) -> None:
    config = kl_from_compvis(kl).config
    assert set(config["down_block_types"]) == {"DownEncoderBlock2D"}
    assert set(config["up_block_types"]) == {"UpDecoderBlock2D"}
    assert config["mid_block_add_attention"]
    assert config["scaling_factor"] == 1.0


def test_kl_weights_equal_diffusers_own_conversion(kl: dict[str, Tensor]) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    model = kl_from_compvis(kl)
    theirs = convert_ldm_vae_checkpoint(dict(kl), {key: model.config[key] for key in model.config})
    ours = model.state_dict()
    assert theirs.keys() == ours.keys()
    for key, tensor in ours.items():
        assert tensor.equal(theirs[key].reshape(tensor.shape)), key


def test_every_tensor_of_the_checkpoint_arrives_once(vq: dict[str, Tensor]) -> None:
    arrived = sorted(float(tensor.double().sum()) for tensor in vq_from_compvis(vq).state_dict().values())
    assert arrived == sorted(float(tensor.double().sum()) for tensor in vq.values())


def test_levels_of_the_decoder_count_from_the_other_end(vq: dict[str, Tensor]) -> None:
    decoder = vq_from_compvis(vq).decoder
    assert decoder.up_blocks[0].attentions[2].to_q.weight.equal(vq["decoder.up.3.attn.2.q.weight"][..., 0, 0])
    assert decoder.up_blocks[3].resnets[0].conv_shortcut.bias.equal(vq["decoder.up.0.block.0.nin_shortcut.bias"])


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_an_import_is_a_diffusers_folder_and_tells_what_it_left_out(
    vq: dict[str, Tensor], tmp_path: Path, suffix: str
) -> None:
    extras = {
        "loss.discriminator.main.0.weight": torch.zeros(4, 3, 4, 4),
        "loss.discriminator.main.0.bias": torch.zeros(4),
        "loss.perceptual_loss.lin0.model.1.weight": torch.zeros(1, 64, 1, 1),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.encoderconv_inweight": vq["encoder.conv_in.weight"].clone(),
    }
    path = tmp_path / f"vq{suffix}"
    if suffix == ".ckpt":
        torch.save({"epoch": 3, "state_dict": {**vq, **extras}}, path)
    else:
        save_file({**vq, **extras}, path)
    report = import_checkpoint(path, tmp_path / "new" / "folder")
    assert (report.kind, report.factor, report.latent_channels) == ("vq", 8, 4)
    assert set(report.used) == set(vq)
    assert set(report.left_out) == set(extras)
    assert report.left_out_groups == {
        "loss.discriminator": 2,
        "loss.perceptual_loss": 1,
        "model_ema": 2,
    }
    loaded = VQModel.from_pretrained(report.out, local_files_only=True, low_cpu_mem_usage=False)
    for key, tensor in vq_from_compvis(vq).state_dict().items():
        assert loaded.state_dict()[key].equal(tensor), key
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["folder"]


def test_the_first_stage_of_a_whole_diffusion_checkpoint_is_taken(kl: dict[str, Tensor], tmp_path: Path) -> None:
    whole = {f"first_stage_model.{key}": value for key, value in kl.items()}
    whole |= {name: torch.zeros(4) for name in ("betas", "alphas_cumprod_prev", "sqrt_one_minus_alphas_cumprod")}
    whole |= {name: torch.zeros(4) for name in ("log_one_minus_alphas_cumprod", "sqrt_recipm1_alphas_cumprod")}
    whole |= {name: torch.zeros(4) for name in ("posterior_mean_coef1", "lvlb_weights", "logvar")}
    whole |= {"model.diffusion_model.out.0.weight": torch.zeros(4), "cond_stage_model.x": torch.zeros(1)}
    whole |= {"first_stage_model.loss.logvar": torch.zeros(()), "scale_factor": torch.tensor(0.25)}
    save_file(whole, tmp_path / "sd.safetensors")
    report = import_checkpoint(tmp_path / "sd.safetensors", tmp_path / "out")
    loaded = AutoencoderKL.from_pretrained(report.out, local_files_only=True, low_cpu_mem_usage=False)
    assert loaded.config["scaling_factor"] == 0.25
    assert len(report.used) == len(kl) + 1
    assert len(report.used) + len(report.left_out) == len(whole)
    assert loaded.encoder.conv_in.weight.equal(kl["encoder.conv_in.weight"])


def test_missing_and_unknown_keys_and_shapes_are_listed_in_the_checkpoints_words(vq: dict[str, Tensor]) -> None:
    damaged = {key: value for key, value in vq.items() if not key.startswith("encoder.mid.attn_1.q")}
    damaged |= {f"surprise.{i}": torch.zeros(1) for i in range(8)} | {"post_quant_conv.bias": torch.zeros(7)}
    with pytest.raises(WeightsError) as caught:
        vq_from_compvis(damaged)
    text = str(caught.value)
    assert "missing (2): encoder.mid.attn_1.q.weight, encoder.mid.attn_1.q.bias" in text
    assert "unknown (8): surprise.0, surprise.1" in text
    assert "surprise.5 and 2 more" in text
    assert "of another shape (1): post_quant_conv.bias (7,) instead of (4,)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda d: d.clear() or d.update(a=torch.zeros(1)), "is missing"),
        (lambda d: d.update({"encoder.down.0.block.0.conv1.weight": torch.zeros(33, 33, 3, 3)}), "33 channels"),
        (lambda d: [d.pop(key) for key in list(d) if key.startswith("encoder.down")], "no keys encoder.down.N"),
    ],
)
def test_a_checkpoint_of_something_else_says_what_is_missing(kl: dict[str, Tensor], change: Any, message: str) -> None:
    damaged = dict(kl)
    change(damaged)
    with pytest.raises(WeightsError, match=message):
        kl_from_compvis(damaged)


def test_each_kind_names_the_reader_of_the_other(vq: dict[str, Tensor], kl: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="kl_from_compvis"):
        vq_from_compvis(kl)
    with pytest.raises(WeightsError, match="vq_from_compvis"):
        kl_from_compvis(vq)


def test_a_kl_model_whose_latents_change_width_is_refused(kl: dict[str, Tensor]) -> None:
    with pytest.raises(WeightsError, match="quant_conv takes 8 channels to 6"):
        kl_from_compvis({**kl, "quant_conv.weight": torch.zeros(6, 8, 1, 1)})


class Callback:
    """Something a checkpoint should not hold."""


def _nothing(path: Path) -> None:
    """Leaves no file."""


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_nothing, "no such file"),
        (lambda path: torch.save({"state_dict": {}, "callbacks": Callback()}, path), "holds pickled objects"),
        (lambda path: path.write_bytes(b"no checkpoint"), r"is no checkpoint of torch\.save, or damaged"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (lambda path: torch.save({"epoch": 3}, path), "holds no mapping of names to tensors, .*its entries are epoch"),
        (lambda path: torch.save({"w": torch.zeros(2)}, path), "quant_conv.weight is missing"),
    ],
)
def test_files_that_cannot_serve_are_refused_and_nothing_is_written(tmp_path: Path, write: Any, message: str) -> None:
    path = tmp_path / "file.ckpt"
    write(path)
    with pytest.raises(WeightsError, match=message) as caught:
        import_checkpoint(path, tmp_path / "out")
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert {entry.name for entry in tmp_path.iterdir()} <= {"file.ckpt"}


def test_a_damaged_safetensors_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"12345678 not a header")
    with pytest.raises(WeightsError, match="cannot be read"):
        import_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")


def test_an_unknown_key_beside_the_first_stage_is_refused(kl: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(
        {f"first_stage_model.{k}": v for k, v in kl.items()} | {"adapter.w": torch.zeros(1)}, tmp_path / "x.safetensors"
    )
    with pytest.raises(WeightsError, match=re.escape("keys unknown (1): adapter.w")):
        import_checkpoint(tmp_path / "x.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(WeightsError, match="exists already"):
        import_checkpoint(tmp_path / "never-read.ckpt", tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"


@pytest.mark.parametrize("prefix", ["", "loss.discriminator."])
def test_a_discriminator_is_read_with_its_statistics(prefix: str) -> None:
    weights = small_checkpoint("taming_nlayer_discriminator_n2")
    beside = {"encoder.conv_in.weight": torch.zeros(1)} if prefix else {}
    discriminator = discriminator_from_compvis({**{prefix + k: v for k, v in weights.items()}, **beside})
    assert discriminator.num_layers == 2
    assert not discriminator.training
    for key, tensor in discriminator.state_dict().items():
        assert tensor.equal(weights[key].to(tensor.dtype)), key


def test_a_discriminator_with_other_norms_is_refused() -> None:
    weights = small_checkpoint("taming_nlayer_discriminator_n2")
    weights["main.3.loc"] = weights.pop("main.3.running_mean")
    with pytest.raises(WeightsError, match=re.escape("keys missing (1): main.3.running_mean; unknown (1): main.3.loc")):
        discriminator_from_compvis(weights)
    with pytest.raises(WeightsError, match="fewer than 3 convolutions"):
        discriminator_from_compvis({"main.0.weight": torch.zeros(4, 3, 4, 4)})


def test_the_command_tells_what_it_used_and_left_out(kl: dict[str, Tensor], tmp_path: Path) -> None:
    save_file({**kl, "loss.logvar": torch.zeros(())}, tmp_path / "kl.safetensors")
    words = ["lsp", "import", str(tmp_path / "kl.safetensors"), str(tmp_path / "kl")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert "factor 8, 4 latent channels, from 248 keys" in done.output
    assert f"use it as projector {{kind: kl, path: {tmp_path / 'kl'}}}" in done.output
    assert "left out, not part of the projector: 1 keys: loss.logvar (1)" in done.output
    assert "scale_factor" not in done.output  # it has none
    again = CliRunner().invoke(app, words)
    assert isinstance(again.exception, WeightsError)
    assert "exists already" in str(again.exception)


def test_the_command_tells_the_scale_of_a_diffusion_checkpoint(kl: dict[str, Tensor], tmp_path: Path) -> None:
    whole = {f"first_stage_model.{key}": tensor for key, tensor in kl.items()}
    save_file({**whole, "scale_factor": torch.tensor(0.18215)}, tmp_path / "sd.safetensors")
    done = CliRunner().invoke(app, ["lsp", "import", str(tmp_path / "sd.safetensors"), str(tmp_path / "kl")])
    assert done.exit_code == 0, done.output
    assert "scale_factor of the checkpoint: 0.18215; projector.scale=0.18215" in done.output


@pytest.mark.parametrize("out", [".", ".."])
def test_a_folder_without_a_name_of_its_own_is_refused(
    out: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match="give one that is not there yet"):
        import_checkpoint(tmp_path / "never-read.ckpt", Path(out))


def test_an_import_serves_as_a_projector(vq: dict[str, Tensor], tmp_path: Path) -> None:
    save_file(vq, tmp_path / "vq.safetensors")
    report = import_checkpoint(tmp_path / "vq.safetensors", tmp_path / "vq")
    projector = open_projector(ProjectorConfig(kind=report.kind, path=str(report.out)))
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    latents = projector.encode(images)
    assert latents.shape == (1, 4, 4, 4)
    with torch.no_grad():
        wanted = vq_from_compvis(vq).encode(images * 2 - 1).latents
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-5)
    assert projector.decode(latents, quantize=True).shape == images.shape
