"""Weights of finished cells: what is in the file, and what is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lmd_bench.config import ImportedConfig, RunConfig
from lmd_bench.errors import WeightsError
from lmd_bench.harness.weights import WEIGHTS_FILE, expected_bytes, load_method_weights, save_weights
from lmd_bench.method import DataSpec, Method
from lmd_bench.projector.config import ProjectorConfig
from lmd_bench.registry import load_method

SIZES = {
    "encoder_width": 32, "encoder_depth": 1, "encoder_heads": 2, "decoder_width": 32, "decoder_depth": 1,
    "decoder_heads": 2,
}  # fmt: skip
LATENT = {"projector": {"kind": "kl", "path": "shipped:scenes-kl-f8"}, "patch_size": 2, **SIZES}
PIXELS = {"patch_size": 8, **SIZES}
UNET = {
    "block_out_channels": [8, 8], "attention_levels": [1], "num_train_timesteps": 40, "norm_num_groups": 4,
    "layers_per_block": 1, "num_inference_steps": 2,
}  # fmt: skip
CASES = {"lmd": LATENT, "mae": PIXELS, "ddpm": UNET}


def config_for(method: str, options: dict[str, object]) -> RunConfig:
    return RunConfig.model_validate(
        {
            "suite": "small", "row": "row", "label": "Row", "method": method, "options": options, "image_size": 32,
            "data": {"name": "scenes", "image_size": 32, "num_train": 8, "num_held_out": 4},
            "recipe": {"batch_size": 4, "lr": {"base": 1e-3}}, "steps": 6, "lr_warmup_steps": 0, "untimed_steps": 0,
            "precision": "fp32", "compile": False, "seed": 0, "device": "cpu", "log_every_steps": 2,
            "evaluation": {"num_images": 4, "unit_px": 16}, "estimator": {},
        }
    )  # fmt: skip


def build(name: str, seed: int = 0) -> Method:
    method_class = load_method(name, {})
    torch.manual_seed(seed)
    return method_class(method_class.Config.model_validate(CASES[name]), DataSpec(32, 8)).eval()


def reconstruct(method: Method) -> torch.Tensor:
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[True, False], [True, True]]).expand(2, 2, 2)
    torch.manual_seed(2)
    return method.reconstruct(images, mask)


@pytest.mark.parametrize("name", CASES)
def test_a_method_comes_back_as_it_was_saved(name: str, tmp_path: Path) -> None:
    method, config = build(name), config_for(name, CASES[name])
    saved = save_weights(method, tmp_path / WEIGHTS_FILE, config)
    loaded, read = load_method_weights(tmp_path)
    assert read == config
    assert loaded.data == DataSpec(32, 8)
    assert not loaded.training
    assert torch.equal(reconstruct(loaded), reconstruct(method))
    assert saved.num_bytes == (tmp_path / WEIGHTS_FILE).stat().st_size
    assert len(saved.sha256) == 64
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS_FILE]


@pytest.mark.parametrize("name", CASES)
def test_the_size_is_known_before_anything_is_built(name: str, tmp_path: Path) -> None:
    method = build(name)
    saved = save_weights(method, tmp_path / WEIGHTS_FILE, config_for(name, CASES[name]))
    expected = expected_bytes(type(method), type(method).Config.model_validate(CASES[name]), DataSpec(32, 8))
    assert expected is not None
    assert expected <= saved.num_bytes <= expected + 32 * 1024


def test_the_frozen_projector_stays_out_of_the_file(tmp_path: Path) -> None:
    method = build("lmd")
    save_weights(method, tmp_path / WEIGHTS_FILE, config_for("lmd", LATENT))
    keys = set(load_file(tmp_path / WEIGHTS_FILE))
    assert keys
    assert not [key for key in keys if key.startswith("projector.")]
    trained = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert trained <= keys


def rewritten(path: Path, **changes: str) -> None:
    """The file again with other metadata."""
    with safe_open(path, framework="pt") as opened:
        metadata = opened.metadata()
    save_file(load_file(path), path, {**metadata, **changes})


@pytest.fixture
def lmd_file(tmp_path: Path) -> Path:
    file = tmp_path / WEIGHTS_FILE
    save_weights(build("lmd"), file, config_for("lmd", LATENT))
    return file


def test_missing_and_extra_keys_are_named(lmd_file: Path) -> None:
    with safe_open(lmd_file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(lmd_file)
    del tensors["model.cls_token"]
    save_file({**tensors, "model.surplus": torch.zeros(1)}, lmd_file, metadata)
    with pytest.raises(WeightsError, match=r"1 missing: model\.cls_token; 1 unexpected: model\.surplus"):
        load_method_weights(lmd_file)
    save_file({**tensors, "projector.model.x": torch.zeros(1)}, lmd_file, metadata)
    with pytest.raises(WeightsError, match=r"missing: model\.cls_token"):
        load_method_weights(lmd_file)


def test_weights_of_a_projector_inside_the_file_are_refused(lmd_file: Path) -> None:
    with safe_open(lmd_file, framework="pt") as opened:
        metadata = opened.metadata()
    inside = next(name for name in build("lmd").state_dict() if name.startswith("projector."))
    save_file({**load_file(lmd_file), inside: torch.zeros(1)}, lmd_file, metadata)
    with pytest.raises(WeightsError, match="holds weights of the frozen projector"):
        load_method_weights(lmd_file)


def test_another_projector_than_the_runs_is_refused_with_both_digests(lmd_file: Path) -> None:
    rewritten(lmd_file, projector_digest="0123456789abcdef")
    with pytest.raises(WeightsError, match=r"with digest 0123456789abcdef; the one there now has [0-9a-f]{16}"):
        load_method_weights(lmd_file)


def test_a_projector_that_is_gone_is_an_error_that_names_it(lmd_file: Path) -> None:
    gone = {**LATENT, "projector": ProjectorConfig(kind="kl", path="gone").model_dump(mode="json")}
    rewritten(lmd_file, config=config_for("lmd", gone).model_dump_json())
    with pytest.raises(WeightsError, match="projector gone: no such folder"):
        load_method_weights(lmd_file)


def test_files_that_are_no_cells_weights_are_refused(tmp_path: Path, lmd_file: Path) -> None:
    with pytest.raises(WeightsError, match=r"no weights\.safetensors in this folder"):
        load_method_weights(tmp_path.parent / tmp_path.name / "..")
    with pytest.raises(WeightsError, match="no such file"):
        load_method_weights(tmp_path / "absent.safetensors")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(lmd_file.read_bytes()[:5000])
    with pytest.raises(WeightsError, match="cannot be read as safetensors"):
        load_method_weights(broken)
    save_file({"x": torch.zeros(1)}, broken)
    with pytest.raises(WeightsError, match="not weights of a finished cell"):
        load_method_weights(broken)


def test_a_configuration_of_another_version_is_refused_in_words(lmd_file: Path) -> None:
    values = config_for("lmd", LATENT).model_dump(mode="json")
    rewritten(lmd_file, config=json.dumps({**values, "options": {**LATENT, "old_option": 1}}))
    with pytest.raises(WeightsError, match="options of another version of lmd: old_option"):
        load_method_weights(lmd_file)
    rewritten(lmd_file, config=json.dumps({**values, "surplus": 1}))
    with pytest.raises(WeightsError, match="made by another version of lmd-bench"):
        load_method_weights(lmd_file)


def test_nothing_half_written_is_left_where_the_disk_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("lmd_bench.harness.weights.save_file", full)
    with pytest.raises(OSError, match="no space left"):
        save_weights(build("mae"), tmp_path / WEIGHTS_FILE, config_for("mae", PIXELS))
    assert list(tmp_path.iterdir()) == []


def imported(name: str, file: Path) -> ImportedConfig:
    """Save a method's weights as if they had been imported."""
    config = ImportedConfig(
        method=name, options=CASES[name], image_size=32, source="official.pth", source_sha256="0" * 64, place="whole"
    )
    save_weights(build(name), file, config)
    return config


def test_the_remedy_for_imported_weights_is_to_import_them_again(tmp_path: Path) -> None:
    file = tmp_path / WEIGHTS_FILE
    config = imported("lmd", file)
    values = config.model_dump(mode="json")
    again = r"import official\.pth again \(`lmd-bench checkpoint import`\)"
    rewritten(file, projector_digest="0123456789abcdef")
    with pytest.raises(WeightsError, match=rf"imported for latents of projector .* old one back, or {again}$"):
        load_method_weights(file)
    rewritten(file, config=json.dumps({**values, "options": {**LATENT, "old_option": 1}}))
    with pytest.raises(WeightsError, match=rf"options of another version of lmd: old_option: .*; {again}$"):
        load_method_weights(file)
    for wrong in ({"surplus": 1}, {"image_size": 0}):
        rewritten(file, config=json.dumps({**values, **wrong}))
        with pytest.raises(WeightsError, match=r"made by another version .*; import the checkpoint again \(`lmd-bench"):
            load_method_weights(file)


def test_the_remedy_for_weights_of_a_run_is_to_run_it_again(lmd_file: Path) -> None:
    for changes in ({"projector_digest": "0123456789abcdef"}, {"config": "{}"}):
        rewritten(lmd_file, **changes)
        with pytest.raises(WeightsError, match=r"run the cell again$"):
            load_method_weights(lmd_file)
