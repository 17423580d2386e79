"""The command line of `lsp train` offers every option of the training, with its default, and repeats it."""

from __future__ import annotations

import inspect
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from lmd_bench.cli import app
from lmd_bench.cli.lsp import lsp_train
from lmd_bench.projector import train
from lmd_bench.projector.train_config import LSPTrainOptions, option_texts, resolve


def called_with(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> tuple[Path, LSPTrainOptions]:
    """What the command hands to the training."""
    seen: list[Any] = []
    monkeypatch.setattr(train, "train_lsp", lambda out, options, **_: seen.append((out, options)))
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    (call,) = seen
    return call  # type: ignore[no-any-return]


def test_the_commands_defaults_are_the_trainings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    parameters = inspect.signature(lsp_train).parameters
    for field in fields(LSPTrainOptions):
        default = field.default
        wanted = ",".join(map(str, default)) if isinstance(default, tuple) else default
        assert parameters[field.name].default == wanted, field.name
    assert called_with(["lsp", "train", "--out", str(tmp_path)], monkeypatch) == (tmp_path, LSPTrainOptions())


def test_every_option_has_a_sentence_of_its_own() -> None:
    texts = [field.metadata["help"] for field in fields(LSPTrainOptions)]
    assert len(set(texts)) == len(texts)
    assert all(text.endswith(".") for text in texts)


@pytest.mark.parametrize(
    "options",
    [
        LSPTrainOptions(),
        LSPTrainOptions(
            kind="light",
            seed=3,
            light_decoder_widths=(32, 16),
            light_decoder_blocks=(1, 3),
            turn=False,
            half=True,
            normalise_latents=False,
            data="a folder/of images",
            latent_weight=1e-4,
        ),
        LSPTrainOptions(legacy_beta=True, revive_dead_codes=True, perceptual_trunk="vgg.pth", disc_loss="logistic"),
    ],
)
@pytest.mark.parametrize("resolved", [False, True])
def test_the_command_of_a_training_means_the_same_options(
    options: LSPTrainOptions, resolved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = resolve(options, perceptual=True) if resolved else options
    words = shlex.split(options.command(Path("some/where")))
    assert words[0] == "lmd-bench"
    assert called_with(words[1:], monkeypatch) == (Path("some/where"), options)


def test_resolved_options_leave_nothing_to_the_machine() -> None:
    for kind in ("vq", "kl", "light"):
        texts = option_texts(resolve(LSPTrainOptions(kind=kind), perceptual=False))
        assert {name for name, text in texts.items() if text is None} == {"data", "init_from", "perceptual_trunk"}
        assert texts["optimizer"] == ("adam" if kind == "vq" else "adamw")
        assert texts["perceptual_weight"] == "0.0"


def test_numbers_that_are_none_are_told_from_numbers(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["lsp", "train", "--out", str(tmp_path), "--block-out-channels", "8,x"])
    assert "--block-out-channels 8,x: whole numbers separated by commas" in str(done.exception)


def test_scenes_by_name_are_the_default(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _, options = called_with(["lsp", "train", "--out", str(tmp_path), "--data", "scenes"], monkeypatch)
    assert options == LSPTrainOptions()


@pytest.mark.parametrize(("words", "wanted"), [([], False), (["--force"], True)])
def test_replacing_a_projector_must_be_asked_for(
    words: list[str], wanted: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []
    monkeypatch.setattr(train, "train_lsp", lambda out, options, *, force, **_: seen.append(force))
    done = CliRunner().invoke(app, ["lsp", "train", "--out", str(tmp_path), *words])
    assert done.exit_code == 0, done.output
    assert seen == [wanted]


@pytest.mark.parametrize("saved", [False, True])
def test_an_interrupted_training_says_how_to_go_on(
    saved: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(out: Path, options: LSPTrainOptions, **_: Any) -> None:
        if saved:
            (out / train.STATE_FILE).write_bytes(b"")
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_lsp", interrupted)
    done = CliRunner().invoke(app, ["lsp", "train", "--out", str(tmp_path)])
    assert done.exit_code == 130
    assert ("The last saved state is kept" in done.output) == saved
    assert ("No state was saved yet" in done.output) != saved
