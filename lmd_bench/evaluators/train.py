"""Trains the scenes evaluators: the classifier by cross-entropy, the CLIP by open_clip's contrastive loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.data.augment import flip_where
from lmd_bench.data.source import scenes_digest
from lmd_bench.errors import ConfigError, TrainingError
from lmd_bench.evaluators.check import classifier_accuracy, ranked_first, require_candidates
from lmd_bench.evaluators.classifier import open_classifier
from lmd_bench.evaluators.clip import open_scenes_clip
from lmd_bench.evaluators.clip_network import caption_tokenizer, fresh_clip, normalised, write_config
from lmd_bench.evaluators.files import CLASSIFIER_FILE, CLIP_CONFIG, CLIP_FILE, note_files, prepare_folder, save_half
from lmd_bench.evaluators.resnet import IMAGE_SIZE, NUM_FEATURES, ScenesClassifier
from lmd_bench.evaluators.training_scenes import (
    FACTS,
    SCENES_SEED,
    ScenesSet,
    held_out_captions,
    held_out_scenes,
    mirrored_caption,
    training_scenes,
)
from lmd_bench.seeding import derive_seed

EvaluatorKind = Literal["classifier", "clip"]
Log = Callable[[str], None]
_LOG_EVERY = 100
_MAX_LOGIT_SCALE = math.log(100.0)  # CLIP's own bound (Radford et al. 2021, section 2.5)


@dataclass(frozen=True)
class EvaluatorTraining:
    """How an evaluator is trained: AdamW, its learning rate rising for a tenth of the steps, then falling to zero."""

    steps: int
    batch_size: int
    lr: float
    """At its highest."""
    weight_decay: float = 0.05
    num_scenes: int = 20_480
    """Drawn once, then seen in epochs, mirrored one time in two."""
    seed: int = 0
    """Of initial weights, order and mirroring."""
    num_held_out: int = 1000
    """Scenes of a suite's held-out range that the result is measured on."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the forward and backward passes; weights are kept in single precision."""


DEFAULTS: dict[EvaluatorKind, EvaluatorTraining] = {
    "classifier": EvaluatorTraining(steps=2400, batch_size=128, lr=4e-3),
    "clip": EvaluatorTraining(steps=1500, batch_size=192, lr=2e-3),
}


def train_evaluator(
    kind: EvaluatorKind,
    out: Path,
    training: EvaluatorTraining,
    *,
    device: torch.device,
    command: str,
    log: Log = lambda line: None,
) -> dict[str, str]:
    """Trains one evaluator, writes it into the folder `out` with its hash, and returns its file's metadata.

    The other evaluator in `out`, if there is one, stays. The same call on the same kind of machine gives the same
    weights. `command` is noted in the file. Raises ConfigError for a batch that the scenes do not fill, DataError for
    held-out scenes with too few captions to rank, TrainingError for a loss that is not finite, WeightsError for a
    damaged manifest in `out`, OSError where it cannot be written.
    """
    if training.batch_size > training.num_scenes:
        raise ConfigError(f"--batch-size {training.batch_size}: more than the {training.num_scenes} scenes to train on")
    if kind == "clip":
        require_candidates(held_out_captions(training.num_held_out))  # after the training it would be too late
    prepare_folder(out)
    log(f"drawing {training.num_scenes} scenes of {IMAGE_SIZE} px")
    scenes = training_scenes(training.num_scenes, IMAGE_SIZE, device)
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derive_seed("evaluator", kind, training.seed))
        model = (_train_classifier if kind == "classifier" else _train_clip)(scenes, training, log)
        metadata = _metadata(training, command)
        _write(kind, model, out, metadata)
        metadata |= measure_evaluator(kind, out, device, training.num_held_out)  # as it was written, in half precision
        _write(kind, model, out, metadata)
    return metadata


def measure_evaluator(kind: EvaluatorKind, folder: Path, device: torch.device, num_scenes: int) -> dict[str, str]:
    """What the evaluator in `folder` reaches on held-out scenes: {figure: share in [0, 1]}. Raises WeightsError."""
    held_out = held_out_scenes(num_scenes, IMAGE_SIZE, device)
    if kind == "classifier":
        return {"accuracy": f"{classifier_accuracy(open_classifier(device, folder)[0], held_out):.4f}"}
    return {"ranked_first": f"{ranked_first(open_scenes_clip(device, folder), held_out):.4f}"}


def _write(kind: EvaluatorKind, model: nn.Module, out: Path, metadata: dict[str, str]) -> None:
    if kind == "clip":
        write_config(out)
        note_files(out, [CLIP_CONFIG])
    save_half(model, out, CLASSIFIER_FILE if kind == "classifier" else CLIP_FILE, metadata)


def _metadata(training: EvaluatorTraining, command: str) -> dict[str, str]:
    values: dict[str, Any] = {
        "command": command,
        **{name: getattr(training, name) for name in EvaluatorTraining.__dataclass_fields__},
        "scenes_seed": SCENES_SEED,
        "scenes_digest": scenes_digest(SCENES_SEED, IMAGE_SIZE),
        "torch": torch.__version__,
    }
    return {name: str(value) for name, value in values.items()}


def _train_classifier(scenes: ScenesSet, training: EvaluatorTraining, log: Log) -> nn.Module:
    """The class is what is kept; colour, ground and tone are told by heads of their own that are dropped.

    With the class alone the features would be blind to most of what an image shows, and so would be FID.
    """
    device = scenes.images.device
    model = ScenesClassifier().to(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    others = nn.ModuleDict({name: nn.Linear(NUM_FEATURES, FACTS[name]) for name in FACTS if name != "class"}).to(device)

    def loss_of(batch: Tensor, mirrored: Tensor) -> Tensor:
        features = model.features(_flipped(scenes.images, batch, mirrored).float() / 255.0)
        logits = {"class": model.head(features)} | {name: head(features) for name, head in others.items()}
        losses = [functional.cross_entropy(logits[name].float(), scenes.facts[name][batch]) for name in FACTS]
        return torch.stack(losses).sum()

    batches = _shuffled_batches(len(scenes), training, device)
    _optimise(nn.ModuleList([model, others]), loss_of, batches, training, log)
    return model


def _train_clip(scenes: ScenesSet, training: EvaluatorTraining, log: Log) -> nn.Module:
    from open_clip.loss import ClipLoss

    device = scenes.images.device
    tokenizer = caption_tokenizer()
    both = (scenes.captions, [mirrored_caption(caption) for caption in scenes.captions])
    tokens = torch.stack([tokenizer(captions) for captions in both]).to(device)
    model = fresh_clip(device)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    scale: nn.Parameter = model.logit_scale  # type: ignore[assignment]
    contrastive = ClipLoss()

    def loss_of(batch: Tensor, mirrored: Tensor) -> Tensor:
        images = normalised(_flipped(scenes.images, batch, mirrored))
        found_images, found_texts, factor = model(images, tokens[mirrored.long(), batch])
        loss: Tensor = contrastive(found_images.float(), found_texts.float(), factor.float())
        return loss

    def bound_scale() -> None:
        scale.data.clamp_(0.0, _MAX_LOGIT_SCALE)

    batches = _distinct_batches(both, training, device)
    _optimise(model, loss_of, batches, training, log, after_step=bound_scale)
    return model


def _flipped(images: Tensor, batch: Tensor, mirrored: Tensor) -> Tensor:
    return flip_where(images.index_select(0, batch), mirrored)


def _shuffled_batches(
    num_scenes: int, training: EvaluatorTraining, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (indices, mirrored or not), each epoch in an order of its own; the incomplete last batch is dropped."""
    generator = torch.Generator().manual_seed(derive_seed("evaluator batches", training.seed))
    while True:
        order = torch.randperm(num_scenes, generator=generator)
        mirrored = torch.rand(num_scenes, generator=generator) < 0.5
        for start in range(0, num_scenes - training.batch_size + 1, training.batch_size):
            chosen = slice(start, start + training.batch_size)
            yield order[chosen].to(device), mirrored[chosen].to(device)


def _distinct_batches(
    captions: tuple[list[str], list[str]], training: EvaluatorTraining, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """As `_shuffled_batches`, but no caption twice in a batch: the contrastive loss would call a right one wrong.

    captions: of every scene, and of every scene in a mirror. A scene whose caption is taken waits for a later batch.
    Raises ConfigError where an epoch may not hold enough different captions for one batch.
    """
    different = len({min(pair) for pair in zip(*captions, strict=True)})
    if different < training.batch_size:
        raise ConfigError(
            f"--batch-size {training.batch_size}: the {len(captions[0])} scenes have {different} captions that differ "
            "in a mirror too; lower it, or raise --num-scenes"
        )
    generator = torch.Generator().manual_seed(derive_seed("evaluator batches", training.seed))
    waiting: list[tuple[int, bool]] = []
    while True:
        order = torch.randperm(len(captions[0]), generator=generator).tolist()
        mirrored = (torch.rand(len(order), generator=generator) < 0.5).tolist()
        waiting += zip(order, mirrored, strict=True)
        while True:
            batch, left = _take_distinct(waiting, captions, training.batch_size)
            if len(batch) < training.batch_size:
                break  # the next epoch brings others
            waiting = left
            chosen, sides = zip(*batch, strict=True)
            yield torch.tensor(chosen, device=device), torch.tensor(sides, device=device)


def _take_distinct(
    waiting: list[tuple[int, bool]], captions: tuple[list[str], list[str]], batch_size: int
) -> tuple[list[tuple[int, bool]], list[tuple[int, bool]]]:
    """(the first `batch_size` with different captions, all others in their order)."""
    seen: set[str] = set()
    batch: list[tuple[int, bool]] = []
    passed_over: list[tuple[int, bool]] = []
    for position, (index, side) in enumerate(waiting):
        if len(batch) == batch_size:
            return batch, passed_over + waiting[position:]
        caption = captions[side][index]
        (passed_over if caption in seen else batch).append((index, side))
        seen.add(caption)
    return batch, passed_over


def _lr_factor(step: int, steps: int) -> float:
    """What the learning rate of step `step`, from 0 on, is of its highest."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _optimise(
    model: nn.Module,
    loss_of: Callable[[Tensor, Tensor], Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    training: EvaluatorTraining,
    log: Log,
    after_step: Callable[[], None] = lambda: None,
) -> None:
    """Takes `training.steps` steps down the loss of a batch (indices, mirrored or not)."""
    device = next(model.parameters()).device
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr, weight_decay=training.weight_decay, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _lr_factor(step, training.steps))
    model.train()
    total = torch.zeros((), device=device)
    for step in range(1, training.steps + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=training.precision == "bf16"):
            loss = loss_of(*next(batches))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        after_step()
        total += loss.detach()
        if step % _LOG_EVERY == 0 or step == training.steps:
            mean = float(total) / (step % _LOG_EVERY or _LOG_EVERY)
            if not math.isfinite(mean):
                raise TrainingError(f"evaluators train: the loss is {mean} before step {step}; lower --lr")
            log(f"step {step} of {training.steps}: loss {mean:.4f}")
            total.zero_()
