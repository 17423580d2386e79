"""Fine-tuning of a trained encoder for classification (MAT), and probes of its frozen features before.

The loop and the timer are those of pre-training: a classifier is wrapped as a method, and accuracy is measured at fixed
points off the clock.
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lmd_bench.config import FinetuneRecipeConfig, FinetuneRunConfig, RunConfig
from lmd_bench.config.finetune import ProbeName
from lmd_bench.data.labelled import LabelledImages
from lmd_bench.data.source import BatchSource
from lmd_bench.errors import BenchError
from lmd_bench.harness.evaluate import check_steps, evaluating
from lmd_bench.harness.instrument import measure_instrument
from lmd_bench.harness.loop import Trainer, TrainOptions, TrainResult, autocast
from lmd_bench.harness.mixing import RandomErasing, mix_pairs, one_hot
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import Clock, clock_for
from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.metrics.intervals import Missing
from lmd_bench.metrics.probes import CONVERGED_GRADIENT, knn_probe, linear_probe, top_k_hits
from lmd_bench.metrics.quality import mean_accuracy_increase_time
from lmd_bench.nn.classifier import ImageClassifier
from lmd_bench.records import AccuracyCheck, Finetune, Probe, RunRecord, Timing
from lmd_bench.seeding import derive_seed

FIGURES = ("finetune", "probe_linear", "probe_knn", "mat_at_1", "mat_at_5")
"""What fine-tuning measures, as `not_measured` names it."""
OnTuned = Callable[[int, int, float], None]
"""Told of every look at accuracy: step, total steps, top-1 in percent."""


class FineTuning(Method):
    """A classifier as a method, so that the one training loop trains it.

    The classifier shares the trained encoder, which changes with it. A frozen projector in it stays frozen.
    """

    Config = MethodConfig

    def __init__(self, classifier: ImageClassifier, data: DataSpec, recipe: FinetuneRecipeConfig) -> None:
        """`data.num_classes` is that of the classifier's head."""
        super().__init__(MethodConfig(), data)
        self.network = classifier
        self.recipe = recipe
        self.erasing = RandomErasing(recipe.random_erasing)

    def prepare(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images (B, 3, S, S), erased and mixed as the recipe says, and targets: labels (B,), or shares (B, K)."""
        assert batch.labels is not None  # held by `BatchSource.labelled`
        assert self.data.num_classes is not None  # held by `label_obstacle`
        images, recipe = self.erasing(batch.images), self.recipe
        if not recipe.mixup_alpha and not recipe.cutmix_alpha:
            return images, batch.labels
        targets = one_hot(batch.labels, self.data.num_classes)
        return mix_pairs(images, targets, mixup_alpha=recipe.mixup_alpha, cutmix_alpha=recipe.cutmix_alpha)

    def training_step(self, inputs: Any, *, step: int, total_steps: int) -> StepOutput:
        """Cross entropy of smoothed targets."""
        images, targets = inputs
        logits = self.network(images).float()
        return StepOutput(functional.cross_entropy(logits, targets, label_smoothing=self.recipe.label_smoothing))

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) in [0, 1] -> logits (B, num_classes)."""
        logits: Tensor = self.network(images)
        return logits

    def compiled_modules(self) -> list[nn.Module]:
        return [self.network]

    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """Groups by layer and by whether weight decay acts, each with its `lr_scale`: decay ** (layers above it).

        The head, and what else belongs to the last layer, learns at the full rate (BEiT, and MAE's fine-tuning).
        """
        classifier = self.network
        groups: dict[tuple[int, bool], dict[str, Any]] = {}
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                layer, decayed = classifier.layer_of(name), classifier.is_decayed(name, parameter)
                scale = self.recipe.layer_decay ** (classifier.num_layers - layer)
                fresh = {"params": [], "weight_decay": weight_decay if decayed else 0.0, "lr_scale": scale}
                groups.setdefault((layer, decayed), fresh)["params"].append(parameter)
        return list(groups.values())

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        raise TypeError("a classifier does not reconstruct images")


@dataclass(frozen=True)
class FinetuneJob:
    """What is done to one encoder, and where."""

    settings: FinetuneRunConfig
    seed: int
    """Of the pre-training; what fine-tuning draws is unrelated to it."""
    device: torch.device
    precision: str = "fp32"
    compile: bool = False
    untimed_steps: int = 0
    log_every_steps: int = 50

    @classmethod
    def from_config(cls, config: RunConfig) -> FinetuneJob:
        """The fine-tuning that a cell's settings ask for."""
        assert config.finetune is not None
        return cls(
            config.finetune,
            config.seed,
            torch.device(config.device),
            config.precision,
            config.compile,
            min(config.untimed_steps, config.finetune.steps),
            config.log_every_steps,
        )

    @property
    def train_options(self) -> TrainOptions:
        """Those of the loop."""
        settings = self.settings
        return TrainOptions(
            recipe=settings.recipe,
            steps=settings.steps,
            lr_warmup_steps=settings.lr_warmup_steps,
            untimed_steps=self.untimed_steps,
            seed=derive_seed("finetune", self.seed),
            device=self.device,
            precision=self.precision,
            compile=self.compile,
            log_every_steps=self.log_every_steps,
            check_steps=frozenset(check_steps(settings, settings.steps)),
        )


@dataclass
class FinetuneOutcome:
    """What came of it. A part that failed is missing, with its reason."""

    finetune: Finetune | None = None
    probes: list[Probe] = field(default_factory=list)
    not_measured: dict[str, str] = field(default_factory=dict)
    """One of `FIGURES` -> why."""
    details: dict[str, str] = field(default_factory=dict)
    """One of `FIGURES` -> the traceback, where another thing than a user's error stopped it."""

    def attempt(self, action: Callable[[], None], *figures: str) -> None:
        """Do a part; what fails becomes the reason of its figures and takes nothing else with it."""
        try:
            action()
        except Exception as error:  # the encoder's own record must not be lost to its fine-tuning
            self.not_measured.update(dict.fromkeys(figures, named(error)))
            if not isinstance(error, BenchError):
                self.details.update(dict.fromkeys(figures, traceback.format_exc()))

    def write_details(self, folder: Path) -> None:
        """Put tracebacks into `error.txt` of the encoder's folder, to which the reasons then point."""
        if not self.details:
            return
        path = folder / "error.txt"
        path.write_text("\n".join(dict.fromkeys(self.details.values())), encoding="utf-8")
        for figure in self.details:
            self.not_measured[figure] += f" (details: {path.name})"


def label_obstacle(num_classes: int | None, why_no_classes: str) -> str | None:
    """Why images cannot be classified; None where they can. `why_no_classes` is told where they have no classes."""
    if num_classes is None:
        return f"no labels: {why_no_classes}"
    return "no labels: the images are all of one class" if num_classes < 2 else None


def fine_tune(
    method: Method, source: BatchSource, job: FinetuneJob, on_tuned: OnTuned, clock: Clock | None = None
) -> FinetuneOutcome:
    """Probe a method's encoder as it is, then fine-tune it: its weights change.

    source: images, not cached latents, of the method's size. clock: None takes the device's. Raises nothing: what fails
    becomes a reason in the outcome.
    """
    outcome = FinetuneOutcome()
    obstacle = label_obstacle(source.num_classes, source.why_no_classes)
    if obstacle is not None:
        outcome.not_measured["finetune"] = obstacle
        return outcome
    clock = clock or clock_for(job.device)

    def everything() -> None:
        assert source.num_classes is not None  # held by `label_obstacle`
        reseed(job.device, job.seed, "classifier")
        recipe = job.settings.recipe
        classifier = method.classifier(source.num_classes, pool=recipe.pool, drop_path=recipe.drop_path)
        validation = source.validation(job.settings.num_val, job.settings.val_crop)
        if job.settings.probes:
            probes = [f"probe_{name}" for name in job.settings.probes]
            outcome.attempt(partial(_probe, outcome, classifier, source, validation, job, clock), *probes)
        tuned = FineTuning(classifier, DataSpec(method.data.image_size, source.num_classes), recipe).to(job.device)
        outcome.attempt(partial(_train, outcome, tuned, source, validation, job, on_tuned, clock), "finetune")

    outcome.attempt(everything, "finetune")
    return outcome


def with_finetune(record: RunRecord, outcome: FinetuneOutcome) -> RunRecord:
    """The record with what came of fine-tuning in the place of what came of an earlier one."""
    kept = {name: reason for name, reason in record.not_measured.items() if name not in FIGURES}
    return record.model_copy(
        update={
            "finetune": outcome.finetune,
            "probes": outcome.probes,
            "not_measured": {**kept, **outcome.not_measured},
        }
    )


# -- training ---------------------------------------------------------------------------------------------------------


class AccuracyRunner:
    """Measures top-1 and top-5 accuracy on the same images at every look."""

    def __init__(self, images: LabelledImages, batch_size: int, precision: str) -> None:
        self.checks: list[AccuracyCheck] = []
        self._images = images
        self._batch_size = batch_size
        self._precision = precision

    @torch.no_grad()
    def check(self, method: FineTuning, step: int, train_s: float) -> AccuracyCheck:
        """Measure now; the result is kept in `checks`."""
        hits, count = torch.zeros(2, dtype=torch.int64), 0
        with evaluating(method):
            for images, labels in self._images.batches(self._batch_size):
                with autocast(images.device, self._precision):
                    logits = method(images.float() / 255)
                hits, count = hits.to(labels.device) + top_k_hits(logits.float(), labels), count + len(labels)
        top1, top5 = (100.0 * number / count for number in hits.tolist())
        result = AccuracyCheck(step=step, train_s=train_s, top1=top1, top5=top5, num_images=count)
        self.checks.append(result)
        return result


def _train(
    outcome: FinetuneOutcome,
    tuned: FineTuning,
    source: BatchSource,
    validation: LabelledImages,
    job: FinetuneJob,
    on_tuned: OnTuned,
    clock: Clock,
) -> None:
    settings = job.settings
    assert tuned.data.num_classes is not None
    images = source.labelled(settings.recipe.augmentation, settings.num_train)
    accuracy = AccuracyRunner(validation, settings.batch_size_val, job.precision)

    def on_check(step: int, train_s: float) -> None:
        on_tuned(step, settings.steps, accuracy.check(tuned, step, train_s).top1)

    try:
        tuned.train()
        trainer = Trainer(tuned, images, job.train_options, clock)
        result = trainer.run(lambda _: None, on_check, lambda *_: None)
    except Exception as error:
        if accuracy.checks and (last := accuracy.checks[-1]).step:  # a late end has a value still: how far it came
            error.add_note(f"top-1 was {last.top1:.1f} % at step {last.step}")
        raise
    finally:
        images.close()
    mats = {name: _mat(accuracy.checks, name, outcome.not_measured) for name in ("mat_at_1", "mat_at_5")}
    outcome.finetune = Finetune(
        num_steps=settings.steps,
        num_train=images.num_train,
        num_val=accuracy.checks[-1].num_images,
        num_classes=tuned.data.num_classes,
        parameters=sum(p.numel() for p in tuned.parameters() if p.requires_grad),
        timing=_timing(result, job),
        checks=accuracy.checks,
        mit_ms=sum(step.period_ms for step in result.times) / len(result.times),
        mat_at_1=mats["mat_at_1"],
        mat_at_5=mats["mat_at_5"],
        losses=result.losses,
        settings=settings.model_dump(mode="json"),
        notes=_notes(result, images, validation, accuracy.checks),
    )


def _mat(checks: Sequence[AccuracyCheck], name: str, not_measured: dict[str, str]) -> float | None:
    """MAT, or None and why there is none."""
    top = {"mat_at_1": "top1", "mat_at_5": "top5"}[name]
    found = mean_accuracy_increase_time([(check.train_s, getattr(check, top)) for check in checks])
    if isinstance(found, Missing):
        not_measured[name] = found.reason
        return None
    return found


def _timing(result: TrainResult, job: FinetuneJob) -> Timing:
    return Timing(
        train_s=result.wall.train_s,
        pauses_s=result.wall.pauses_s,
        wall_s=result.wall.wall_s,
        residual_share=result.wall.residual_share,
        valid=result.wall.valid,
        untimed_s=result.untimed_s,
        compile_s=result.compile_s,
        instrument_us_per_step=measure_instrument(job.device, job.log_every_steps),
    )


def _notes(
    result: TrainResult, images: BatchSource, validation: LabelledImages, checks: Sequence[AccuracyCheck]
) -> list[str]:
    notes = [] if result.wall.valid else [f"invalid: {result.wall.residual_share:.2%} of the wall time is missing"]
    notes += [note for top in (1, 5) if (note := _chance_note(checks, top)) is not None]
    left_out = validation.num_images - checks[-1].num_images
    if left_out:
        notes.append(f"{left_out} of {validation.num_images} validation images could not be used")
    unreadable = images.describe().get("num_unreadable_in_training", 0)
    return notes + ([f"{unreadable} training images could not be used"] if unreadable else [])


def _chance_note(checks: Sequence[AccuracyCheck], top: int) -> str | None:
    """Says of a small gain that two draws of as many images differ by as much: its MAT then means nothing."""
    shares = [(check.top1 if top == 1 else check.top5) / 100 for check in checks]
    first, best = shares[0], max(shares)
    error = math.sqrt((first * (1 - first) + best * (1 - best)) / checks[0].num_images)
    if not 0 < best - first < 2 * error:
        return None
    return (
        f"MAT@{top} says little: the gain of {100 * (best - first):.1f} points is within two standard errors "
        f"({200 * error:.1f} points among {checks[0].num_images} images)"
    )


# -- probes -----------------------------------------------------------------------------------------------------------


def _probe(
    outcome: FinetuneOutcome,
    classifier: ImageClassifier,
    source: BatchSource,
    validation: LabelledImages,
    job: FinetuneJob,
    clock: Clock,
) -> None:
    """Fit the probes that the settings name to the frozen features of training images, measure them on validation."""
    settings = job.settings
    clock.drain()
    begin = clock.host_s()
    sample = source.labelled_sample(settings.probe_images)
    train = pooled_features(classifier, sample, settings.batch_size_val, job.precision)
    val = pooled_features(classifier, validation, settings.batch_size_val, job.precision)
    clock.drain()
    features_s = clock.host_s() - begin

    def fit(name: ProbeName) -> None:
        assert source.num_classes is not None  # held by `label_obstacle`
        begin = clock.host_s()
        if name == "knn":
            neighbors = min(settings.knn_neighbors, len(train[0]))
            setting = f"votes of the {neighbors} nearest by cosine"
            if neighbors < settings.knn_neighbors:
                setting += f" ({settings.knn_neighbors} asked for, {len(train[0])} images could be used)"
            top1, top5 = knn_probe(*train, *val, source.num_classes, neighbors=neighbors)
        else:
            setting = "logistic regression on standardised features"
            top1, top5, gradient = linear_probe(*train, *val, source.num_classes)
            if gradient > CONVERGED_GRADIENT:
                setting += f" (not converged: the gradient is {gradient:.1e})"
        clock.drain()
        outcome.probes.append(
            Probe(
                name=name,
                top1=top1,
                top5=top5,
                setting=setting,
                num_train=len(train[0]),
                num_val=len(val[0]),
                num_features=train[0].shape[1],
                seconds=features_s + clock.host_s() - begin,
            )
        )

    for name in settings.probes:
        outcome.attempt(partial(fit, name), f"probe_{name}")


@torch.no_grad()
def pooled_features(
    classifier: ImageClassifier, images: LabelledImages, batch_size: int, precision: str
) -> tuple[Tensor, Tensor]:
    """(features (N, D) float32, labels (N,) int64): what the head's norm reads, in evaluation mode."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with evaluating(classifier):
        for batch, numbers in images.batches(batch_size):
            with autocast(batch.device, precision):
                pooled = classifier.pooled(batch.float() / 255)
            features.append(pooled.float())
            labels.append(numbers)
    return torch.cat(features), torch.cat(labels)


def named(error: Exception) -> str:
    """An error in one line, with its kind where it is no user's error."""
    text = (" ".join(str(error).split()) or type(error).__name__)[:500]
    text = "; ".join([text, *getattr(error, "__notes__", ())])
    return text if isinstance(error, BenchError) else f"{type(error).__name__}: {text}"
