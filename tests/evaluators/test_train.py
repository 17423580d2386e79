"""The training of evaluators: it learns, it repeats, and no batch holds a caption twice."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch

from lmd_bench.errors import ConfigError, DataError, TrainingError, WeightsError
from lmd_bench.evaluators.files import CLASSIFIER_FILE, CLIP_FILE, MANIFEST, checked_file, read_metadata
from lmd_bench.evaluators.train import (
    EvaluatorKind,
    EvaluatorTraining,
    _distinct_batches,
    _shuffled_batches,
    train_evaluator,
)
from lmd_bench.evaluators.training_scenes import mirrored_caption, training_scenes

CPU = torch.device("cpu")
TINY = EvaluatorTraining(steps=30, batch_size=12, lr=3e-3, num_scenes=48, num_held_out=20, precision="fp32")
FILES: dict[EvaluatorKind, str] = {"classifier": CLASSIFIER_FILE, "clip": CLIP_FILE}


def train(kind: EvaluatorKind, out: Path, training: EvaluatorTraining = TINY) -> tuple[dict[str, str], list[float]]:
    """(metadata, losses told)."""
    lines: list[str] = []
    metadata = train_evaluator(kind, out, training, device=CPU, command="made here", log=lines.append)
    return metadata, [float(found[1]) for line in lines if (found := re.search(r"loss (\S+)", line))]


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_training_learns_and_writes_what_it_measured(tmp_path: Path, kind: EvaluatorKind) -> None:
    metadata, losses = train(kind, tmp_path / "long")
    brief, first = train(kind, tmp_path / "brief", replace(TINY, steps=2))
    assert losses[-1] < first[-1] - 0.1
    written = read_metadata(checked_file(tmp_path / "long", FILES[kind]).path)
    assert written == metadata
    assert written["command"] == "made here"
    assert [figures["steps"] for figures in (metadata, brief)] == ["30", "2"]
    assert 0 <= float(written["accuracy" if kind == "classifier" else "ranked_first"]) <= 1


@pytest.mark.parametrize("kind", ["classifier", "clip"])
def test_training_repeats_and_leaves_global_generators_alone(tmp_path: Path, kind: EvaluatorKind) -> None:
    state = torch.get_rng_state()
    for name in ("a", "b"):
        train(kind, tmp_path / name, replace(TINY, steps=2))
    assert torch.equal(torch.get_rng_state(), state)
    hashes = {checked_file(tmp_path / name, FILES[kind]).sha256 for name in ("a", "b")}
    assert len(hashes) == 1


def test_both_evaluators_share_a_folder(tmp_path: Path) -> None:
    brief = replace(TINY, steps=1)
    for kind in FILES:
        train(kind, tmp_path, brief)
    for name in FILES.values():
        checked_file(tmp_path, name)


def test_a_training_that_cannot_end_well_is_refused_before_scenes_are_drawn(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--batch-size 49: more than the 48 scenes to train on"):
        train("clip", tmp_path, replace(TINY, batch_size=49))
    with pytest.raises(DataError, match="different captions, ranking takes 10; take more scenes"):
        train("clip", tmp_path, replace(TINY, num_held_out=9))
    assert not list(tmp_path.iterdir())
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(WeightsError, match="not a manifest"):
        train("clip", tmp_path)


def test_a_loss_that_is_not_finite_ends_training(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is \S+ before step 30; lower --lr"):
        train("classifier", tmp_path, replace(TINY, lr=1e30))


def captions_of(count: int) -> tuple[list[str], list[str]]:
    captions = training_scenes(count, 16, CPU).captions
    return captions, [mirrored_caption(text) for text in captions]


def test_no_caption_is_twice_in_a_batch_though_scenes_share_captions() -> None:
    captions = captions_of(40)
    doubled = (captions[0] * 3, captions[1] * 3)
    training = replace(TINY, batch_size=30, num_scenes=120)
    batches: Iterator[tuple[torch.Tensor, torch.Tensor]] = _distinct_batches(doubled, training, CPU)
    seen: list[int] = []
    for indices, mirrored in islice(batches, 12):
        texts = [doubled[side][index] for index, side in zip(indices.tolist(), mirrored.tolist(), strict=True)]
        assert len(set(texts)) == len(texts) == 30
        seen += indices.tolist()
    assert len(set(seen)) == 120  # nobody is left waiting for ever
    again = islice(_distinct_batches(doubled, training, CPU), 12)
    assert [index for indices, _ in again for index in indices.tolist()] == seen


def test_captions_that_cannot_fill_a_batch_are_refused() -> None:
    captions = captions_of(10)
    training = replace(TINY, batch_size=16, num_scenes=20)
    with pytest.raises(ConfigError, match=r"the 20 scenes have 10 captions that differ in a mirror too; lower it"):
        next(_distinct_batches((captions[0] * 2, captions[1] * 2), training, CPU))


def test_an_epoch_brings_every_scene_once_in_an_order_of_its_own() -> None:
    batches = _shuffled_batches(48, TINY, CPU)
    epochs = [torch.cat([indices for indices, _ in islice(batches, 4)]) for _ in range(2)]
    assert all(sorted(epoch.tolist()) == list(range(48)) for epoch in epochs)
    assert not torch.equal(*epochs)
