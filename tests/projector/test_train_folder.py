"""Where a training may write, and what it leaves where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lmd_bench.errors import ConfigError, DataError, TrainingError, WeightsError
from lmd_bench.projector import train
from lmd_bench.projector.config import WEIGHTS_FILE
from lmd_bench.projector.train import STATE_FILE, LSPTrainOptions, train_lsp
from lmd_bench.projector.train_folder import check_out, write_model
from lmd_bench.projector.train_kinds import TRAINABLE
from tests.projector.test_train import TINY, StoppedError, changed, stopping_at

LIGHT = changed(kind="light", steps=4, log_every=2, eval_every=4)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "light"
    train_lsp(folder, LIGHT)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    target.mkdir()
    for name, data in contents(folder).items():
        (target / name).write_bytes(data)
    return target


def test_a_projector_that_is_there_is_kept_unless_it_is_to_be_replaced(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "light")
    before = contents(folder)
    other = changed(LIGHT, seed=1)
    with pytest.raises(ConfigError, match=r"light holds a projector already; choose another --out, or .* --force"):
        train_lsp(folder, other)
    assert contents(folder) == before
    train_lsp(folder, other, force=True)
    after = contents(folder)
    assert after.keys() == before.keys()
    assert after[WEIGHTS_FILE] != before[WEIGHTS_FILE]


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("notes.txt",), r"holds notes\.txt, which no training wrote"),
        (("a.png", "b.png", "README.md"), r"holds a\.png and 1 more, which no training wrote"),
        (("README.md",), r"is not empty \(README\.md\) and no projector's folder"),
        (("training.csv", "config.json"), r"is not empty \(config\.json\) and no projector's folder"),
    ],
)
def test_other_peoples_files_are_never_written_among(
    names: tuple[str, ...], message: str, force: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in names:
        (tmp_path / name).write_text("mine")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        train_lsp(Path("."), LIGHT, force=force)
    assert contents(tmp_path) == dict.fromkeys(names, b"mine")


def test_foreign_files_beside_a_projector_are_safe_from_force(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "light")
    (folder / "thesis.txt").write_text("years")
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"holds thesis\.txt, which no training wrote"):
        train_lsp(folder, LIGHT, force=True)
    assert contents(folder) == before


def test_what_it_starts_from_is_not_what_it_writes_to(trained: Path, tmp_path: Path) -> None:
    folder = copy_of(trained, tmp_path / "light")
    before = contents(folder)
    with pytest.raises(ConfigError, match=r"--init-from .* is --out itself"):
        train_lsp(tmp_path / "x" / ".." / "light", changed(LIGHT, init_from=str(folder)), force=True)
    assert contents(folder) == before


def test_an_interrupted_training_without_a_state_starts_anew(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        train_lsp(tmp_path / "light", LIGHT, log=stopping_at(2))
    assert sorted(contents(tmp_path / "light")) == ["training-data.json", "training.csv"]
    train_lsp(tmp_path / "light", LIGHT)
    assert (tmp_path / "light" / WEIGHTS_FILE).exists()


def test_an_interrupted_write_leaves_no_old_projector_beside_a_new_log(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copy_of(trained, tmp_path / "light")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    other = changed(LIGHT, seed=1)
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_model", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train_lsp(folder, other, force=True)
    left = contents(folder)
    assert sorted(left) == ["training-data.json", STATE_FILE, "training.csv"]
    lines: list[str] = []
    train_lsp(folder, other, log=lines.append)
    assert "going on after step 4" in lines


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"data": "/no/such/folder"}, "no such folder"),
        ({"init_from": "/no/such/projector"}, "no such folder"),
        ({"perceptual_weight": 1.0, "crop_size": 32, "perceptual_trunk": "/no/such/file"}, "/no/such/file"),
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(values: dict[str, Any], error: str, tmp_path: Path) -> None:
    with pytest.raises((DataError, WeightsError), match=error):
        train_lsp(tmp_path / "deep" / "light", changed(LIGHT, **values))
    assert list(tmp_path.iterdir()) == []


def test_the_check_touches_nothing(tmp_path: Path) -> None:
    check_out(tmp_path / "a" / "b", TINY, force=False)
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_not_finite_are_not_written(tmp_path: Path) -> None:
    projector = TRAINABLE["light"].build(LIGHT)
    with torch.no_grad():
        projector.last_layer[0, 0] = 1e6
    write_model(tmp_path, projector, half=False)
    for file in tmp_path.iterdir():
        file.unlink()
    with pytest.raises(TrainingError, match=r"and 0 more tensors are not finite; .* --no-half"):
        write_model(tmp_path, projector, half=True)
    assert list(tmp_path.iterdir()) == []


def test_a_constant_channel_stays_finite_when_latents_are_normalised() -> None:
    for kind in TRAINABLE:
        projector = TRAINABLE[kind].build(LSPTrainOptions(kind=kind, image_size=32, block_out_channels=(8, 8)))
        outer: nn.Conv2d = projector.model.quant_conv
        with torch.no_grad():
            outer.weight[0] = 0.0
            if kind == "vq":
                outer.weight.zero_()
        images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        before = projector.decode_all(projector.encode_all(images))
        projector.normalise(images)
        assert all(tensor.isfinite().all() for tensor in projector.model.state_dict().values())
        latents = projector.encode_all(images)
        assert latents[:, 0].abs().max() < 1e-4
        torch.testing.assert_close(projector.decode_all(latents), before, rtol=1e-3, atol=1e-4)


def test_the_split_stands_in_the_folder(trained: Path) -> None:
    split = json.loads((trained / "training-data.json").read_text())
    assert (split["data"], split["data_seed"], split["num_train"], split["num_held_out"]) == ("scenes", 0, 32, 16)
    assert len(split["digest"]) == 16
