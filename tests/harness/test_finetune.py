"""Fine-tuning: what is trained and at which rates, when accuracy is measured, MAT, probes, and what fails alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from helpers.official import CASES
from torch import Tensor

from baselines.greenmim import GreenMIM
from baselines.mae import MAE
from baselines.simmim import SimMIM
from lmd_bench.config import AugmentationConfig, DataConfig, FinetuneRunConfig, LearningRateConfig
from lmd_bench.data.labelled import LabelledImages, LabelledTensors
from lmd_bench.data.source import BatchSource, InMemorySource, open_source
from lmd_bench.harness import finetune as harness
from lmd_bench.harness.finetune import AccuracyRunner, FinetuneJob, FinetuneOutcome, FineTuning, fine_tune
from lmd_bench.harness.loop import Trainer, TrainOptions
from lmd_bench.harness.optim import build_optimizer, set_lr
from lmd_bench.harness.seeding import reseed
from lmd_bench.harness.timer import CudaClock, clock_for
from lmd_bench.lmd.method import LMD
from lmd_bench.method import Batch, DataSpec, Method
from lmd_bench.metrics import probes
from lmd_bench.nn.classifier import ImageClassifier
from tests.harness.test_timer import FakeClock

CPU = torch.device("cpu")
SIZES = {
    "patch_size": 8, "encoder_width": 32, "encoder_depth": 2, "encoder_heads": 2,
    "decoder_width": 32, "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
SWIN = {
    "backbone": {"kind": "swin", "patch_size": 2, "embed_dim": 16, "depths": [1, 2], "num_heads": [1, 2],
                 "window_size": 4}, "mask_unit_px": 8,
}  # fmt: skip


def settings(**changes: Any) -> FinetuneRunConfig:
    recipe: dict[str, Any] = {
        "batch_size": 8,
        "lr": LearningRateConfig(base=1e-3, per_images=None),
        "augmentation": AugmentationConfig(crop="none"),
        **changes.pop("recipe", {}),
    }
    values: dict[str, Any] = {
        "recipe": recipe, "steps": 4, "lr_warmup_steps": 1, "num_train": None, "num_val": 20, "num_checks": 2,
        "batch_size_val": 16, "val_crop": 1.0, "probes": (), "probe_images": 40, "knn_neighbors": 5, **changes,
    }  # fmt: skip
    return FinetuneRunConfig.model_validate(values)


def mae(**options: Any) -> MAE:
    reseed(CPU, 0, "weights")
    return MAE(MAE.Config.model_validate({**SIZES, **options}), DataSpec(32, 10)).train()


def lmd() -> LMD:
    options = {**SIZES, "projector": {"kind": "vq", "path": "shipped:scenes-vq-f8"}, "patch_size": 2}
    return LMD(LMD.Config.model_validate(options), DataSpec(32, 10)).train()


@pytest.fixture(scope="module")
def scenes() -> BatchSource:
    data = DataConfig(image_size=32, num_train=64, num_held_out=8)
    return open_source(data, 32, AugmentationConfig(), CPU)


def tune(
    method: Method, source: BatchSource, clock: FakeClock | None = None, **changes: Any
) -> tuple[FinetuneOutcome, list[tuple[int, int, float]]]:
    told: list[tuple[int, int, float]] = []
    job = FinetuneJob(settings(**changes), seed=3, device=CPU)
    return fine_tune(method, source, job, lambda *looked: told.append(looked), clock), told


def tuning(method: Method, **recipe: Any) -> FineTuning:
    chosen = settings(recipe=recipe).recipe
    classifier = method.classifier(10, pool=chosen.pool, drop_path=chosen.drop_path)
    return FineTuning(classifier, DataSpec(32, 10), chosen)


# -- what is trained, and at which rate -------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [mae, lmd, lambda: SimMIM(SimMIM.Config.model_validate(SWIN), DataSpec(32, 10))])
def test_every_trainable_parameter_is_in_exactly_one_group_with_the_rate_of_its_layer(make: Any) -> None:
    tuned = tuning(make(), layer_decay=0.5)
    groups = tuned.param_groups(0.05)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trained = [id(parameter) for parameter in tuned.parameters() if parameter.requires_grad]
    assert sorted(grouped) == sorted(trained)
    place = {id(parameter): group for group in groups for parameter in group["params"]}
    layers = tuned.network.num_layers
    for name, parameter in tuned.network.named_parameters():
        if parameter.requires_grad:
            assert place[id(parameter)]["lr_scale"] == 0.5 ** (layers - tuned.network.layer_of(name))
            assert place[id(parameter)]["weight_decay"] == (0.05 if tuned.network.is_decayed(name, parameter) else 0.0)
    assert {group["lr_scale"] for group in groups} == {0.5**above for above in range(layers + 1)}


def test_a_vits_embedding_learns_at_the_lowest_rate_its_head_at_the_full_one_and_the_optimizer_is_told() -> None:
    tuned = tuning(mae(), layer_decay=0.65)
    assert tuned.network.num_layers == 3
    optimizer = build_optimizer(tuned, tuned.recipe)
    set_lr(optimizer, 1.0)
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parts = dict(tuned.network.named_parameters())
    assert rate[id(parts["head.weight"])] == 1.0
    assert rate[id(parts["fc_norm.weight"])] == 1.0
    assert rate[id(parts["blocks.1.attn.qkv.weight"])] == pytest.approx(0.65)
    assert rate[id(parts["blocks.0.attn.qkv.weight"])] == pytest.approx(0.65**2)
    assert rate[id(parts["patch_embed.proj.weight"])] == pytest.approx(0.65**3)
    assert rate[id(parts["cls_token"])] == pytest.approx(0.65**3)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(parts["cls_token"])] == 0.0
    assert decay[id(parts["head.bias"])] == 0.0
    assert decay[id(parts["head.weight"])] == 0.05


def test_a_frozen_projector_stays_as_it_is_and_in_evaluation_mode(scenes: BatchSource) -> None:
    method = lmd()
    frozen = {name: value.clone() for name, value in method.projector.state_dict().items()}
    encoder = method.model.blocks[0].attn.qkv.weight.detach().clone()
    outcome, _ = tune(method, scenes)
    assert outcome.finetune is not None, outcome.not_measured
    assert all(torch.equal(value, frozen[name]) for name, value in method.projector.state_dict().items())
    assert not method.projector.training
    assert not torch.equal(encoder, method.model.blocks[0].attn.qkv.weight)  # shared, and trained
    assert outcome.finetune.parameters == sum(
        p.numel() for name, p in method.classifier(10).named_parameters() if p.requires_grad
    )


# -- a step -----------------------------------------------------------------------------------------------------------


def test_a_plain_step_is_cross_entropy_and_a_mixed_one_that_of_shares_that_sum_to_one() -> None:
    batch = Batch(torch.rand(8, 3, 32, 32), torch.arange(8))
    plain = tuning(mae())
    images, labels = plain.prepare(batch)
    assert torch.equal(images, batch.images)
    expected = torch.nn.functional.cross_entropy(plain(images), labels)
    torch.testing.assert_close(plain.training_step((images, labels), step=1, total_steps=2).loss, expected)
    images, targets = tuning(mae(), mixup_alpha=0.8, cutmix_alpha=1.0, random_erasing=0.25).prepare(batch)
    assert targets.shape == (8, 10)
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(8))


def test_label_smoothing_is_that_of_cross_entropy() -> None:
    smooth = tuning(mae(), label_smoothing=0.1)
    with torch.no_grad():
        smooth.network.head.weight.normal_()
    images, labels = torch.rand(8, 3, 32, 32), torch.arange(8)
    log_shares = smooth(images).log_softmax(dim=1)
    target = torch.full((8, 10), 0.01) + 0.9 * torch.eye(10)[:8]
    expected = -(target * log_shares).sum(dim=1).mean()
    torch.testing.assert_close(smooth.training_step((images, labels), step=1, total_steps=2).loss, expected)


def test_the_same_seed_is_the_same_run_bit_for_bit_and_another_is_not(scenes: BatchSource) -> None:
    mixed = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erasing": 0.25, "drop_path": 0.2}

    def run(seed: int) -> tuple[list[float], list[tuple[float, float]], Tensor]:
        method = mae()
        torch.manual_seed(torch.seed())  # whatever the generators' state
        outcome = fine_tune(method, scenes, FinetuneJob(settings(recipe=mixed), seed, CPU), lambda *_: None)
        assert outcome.finetune is not None, outcome.not_measured
        return (
            outcome.finetune.losses,
            [(check.top1, check.top5) for check in outcome.finetune.checks],
            method.model.patch_embed.proj.weight.detach(),
        )

    first, again, other = run(0), run(0), run(1)
    assert first[:2] == again[:2]
    assert torch.equal(first[2], again[2])
    assert first[0] != other[0]


# -- accuracy and its time --------------------------------------------------------------------------------------------


class SlowImages(LabelledImages):
    """Validation images that take half a minute of the clock at every look."""

    def __init__(self, images: LabelledImages, clock: FakeClock) -> None:
        self.num_images, self._images, self._clock = images.num_images, images, clock

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        self._clock.now_ms += 30_000
        return self._images.batches(batch_size)


class TimedSource(InMemorySource):
    """Every training batch takes two seconds of the clock."""

    clock: FakeClock

    def batches(self, *words: Any, **options: Any) -> Any:
        for batch in super().batches(*words, **options):
            self.clock.now_ms += 2_000
            yield batch


def timed(clock: FakeClock, accuracy: list[float]) -> tuple[Method, BatchSource, MAE]:
    """Ten images of ten classes; the classifier answers so that accuracy runs as given."""
    images = torch.randint(0, 256, (20, 3, 32, 32), dtype=torch.uint8)
    labels = torch.arange(20) % 10
    source = TimedSource(images, labels, images, AugmentationConfig(crop="none"), num_classes=10)
    source.clock = clock
    held = LabelledTensors(images[:10], torch.arange(10))
    source.validation = lambda *_: SlowImages(held, clock)  # type: ignore[method-assign]
    method = mae()
    make = method.classifier
    looks = iter(accuracy)

    def classifier(num_classes: int, **options: Any) -> ImageClassifier:
        found = make(num_classes, **options)
        network = found.forward

        def forward(batch: Tensor) -> Tensor:
            if found.training:
                return network(batch)
            right = round(next(looks) / 10)
            answers = torch.where(torch.arange(10) < right, torch.arange(10), (torch.arange(10) + 1) % 10)
            return torch.nn.functional.one_hot(answers, 10).float()

        found.forward = forward  # type: ignore[method-assign]
        return found

    method.classifier = classifier  # type: ignore[method-assign]
    return method, source, method


def test_mat_is_training_seconds_over_points_gained_with_evaluation_off_the_clock() -> None:
    clock = FakeClock()
    method, source, _ = timed(clock, [10.0, 60.0, 50.0])
    outcome, told = tune(method, source, clock, recipe={"batch_size": 4})
    found = outcome.finetune
    assert found is not None, outcome.not_measured
    assert [check.step for check in found.checks] == [0, 2, 4]
    assert [check.top1 for check in found.checks] == [10.0, 60.0, 50.0]
    # the first batch is fetched before the clock starts, the other three on it
    assert [check.train_s for check in found.checks] == [0.0, 2.0, 6.0]
    assert found.mat_at_1 == pytest.approx(6.0 / 50.0)
    assert found.mit_ms == pytest.approx(6_000 / 4)
    assert found.timing.train_s == pytest.approx(6.0)
    assert found.timing.pauses_s["evaluation"] == pytest.approx(90.0)
    assert found.timing.wall_s == pytest.approx(96.0)
    assert found.timing.valid
    assert told == [(0, 4, 10.0), (2, 4, 60.0), (4, 4, 50.0)]
    assert not any("MAT@1" in note for note in found.notes)


def test_a_gain_that_chance_alone_may_give_is_noted() -> None:
    clock = FakeClock()
    method, source, _ = timed(clock, [40.0, 60.0, 50.0])
    outcome, _ = tune(method, source, clock, recipe={"batch_size": 4})
    assert outcome.finetune is not None
    assert outcome.finetune.mat_at_1 == pytest.approx(6.0 / 20.0)
    assert outcome.finetune.notes[0] == (
        "MAT@1 says little: the gain of 20.0 points is within two standard errors (43.8 points among 10 images)"
    )


def test_an_accuracy_that_never_rises_has_no_mat_and_says_so() -> None:
    clock = FakeClock()
    method, source, _ = timed(clock, [50.0, 40.0, 50.0])
    outcome, _ = tune(method, source, clock, recipe={"batch_size": 4})
    assert outcome.finetune is not None
    assert outcome.finetune.mat_at_1 is None
    assert outcome.not_measured["mat_at_1"] == "no increase"
    assert outcome.finetune.checks[-1].top1 == 50.0


def test_accuracy_counts_images_whatever_the_batches_and_leaves_the_training_mode_as_it_was(
    scenes: BatchSource,
) -> None:
    tuned = tuning(mae()).train()
    with torch.no_grad():
        tuned.network.head.weight.normal_()
    images = scenes.validation(21)
    found = [AccuracyRunner(images, size, "fp32").check(tuned, 0, 0.0) for size in (1, 8, 21)]
    assert {(check.top1, check.top5, check.num_images) for check in found} == {(found[0].top1, found[0].top5, 21)}
    assert found[0].top1 <= found[0].top5
    assert tuned.training
    [(pixels, labels)] = list(images.batches(21))
    with torch.no_grad():
        right = tuned.eval()(pixels.float() / 255).argmax(dim=1) == labels
    assert found[0].top1 == pytest.approx(100 * float(right.float().mean()))


# -- probes -----------------------------------------------------------------------------------------------------------


def test_probes_read_the_encoder_as_it_was_before_fine_tuning(scenes: BatchSource) -> None:
    both = {"probes": ("linear", "knn"), "num_val": 30}
    outcome, _ = tune(mae(), scenes, **both, steps=2)
    longer, _ = tune(mae(), scenes, **both, steps=6)
    assert [probe.name for probe in outcome.probes] == ["linear", "knn"]
    for probe, other in zip(outcome.probes, longer.probes, strict=True):
        assert (probe.top1, probe.top5) == (other.top1, other.top5)
        assert (probe.num_train, probe.num_val, probe.num_features) == (40, 30, 32)
        assert probe.seconds > 0
    assert "5 nearest" in outcome.probes[1].setting


def test_a_probe_that_fails_takes_neither_the_other_nor_the_fine_tuning_with_it(scenes: BatchSource) -> None:
    few, _ = tune(mae(), scenes, probes=("linear", "knn"), probe_images=8, knn_neighbors=3)
    assert "classes have none" in few.not_measured["probe_linear"]
    assert "probe_knn" not in few.not_measured
    assert [probe.name for probe in few.probes] == ["knn"]
    assert few.finetune is not None


def test_features_that_fail_are_the_reason_of_every_probe_and_of_nothing_else(
    scenes: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(harness, "pooled_features", broken)
    outcome, _ = tune(mae(), scenes, probes=("linear", "knn"))
    reasons = {f"probe_{name}": "RuntimeError: out of memory" for name in ("linear", "knn")}
    assert {figure: why for figure, why in outcome.not_measured.items() if figure.startswith("probe")} == reasons
    assert outcome.finetune is not None
    assert outcome.details.keys() == reasons.keys()


def test_a_probe_says_what_it_had_to_do_without(scenes: BatchSource, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 1)
    source = open_source(DataConfig(image_size=32, num_train=12, num_held_out=8), 32, AugmentationConfig(), CPU)
    outcome, _ = tune(mae(), source, probes=("linear", "knn"), knn_neighbors=15)
    linear, knn = (probe.setting for probe in outcome.probes)
    assert re.fullmatch(r"logistic regression on .* \(not converged: the gradient is \d\.\de-\d\d\)", linear)
    assert knn == "votes of the 12 nearest by cosine (15 asked for, 12 images could be used)"
    monkeypatch.undo()
    outcome, _ = tune(mae(), scenes, probes=("linear", "knn"))
    assert [probe.setting for probe in outcome.probes] == [
        "logistic regression on standardised features", "votes of the 5 nearest by cosine",
    ]  # fmt: skip


# -- what goes wrong --------------------------------------------------------------------------------------------------


def test_images_without_labels_are_a_reason_not_an_error() -> None:
    images = torch.zeros(20, 3, 32, 32, dtype=torch.uint8)
    outcome, told = tune(mae(), InMemorySource(images, None, images, AugmentationConfig()))
    assert outcome.finetune is None
    assert outcome.not_measured == {"finetune": "no labels: the images do not lie in class folders"}
    assert told == []


def test_a_loss_that_is_not_finite_is_a_reason_and_later_figures_are_missing(scenes: BatchSource) -> None:
    method = mae()
    with torch.no_grad():
        method.model.patch_embed.proj.weight.fill_(float("nan"))
    outcome, _ = tune(method, scenes)
    assert outcome.finetune is None
    assert outcome.not_measured["finetune"].startswith("step 1: the loss is nan")
    assert outcome.details == {}  # a user's error needs no traceback


def test_a_failure_of_another_kind_is_named_with_its_traceback(
    scenes: BatchSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(FineTuning, "training_step", broken)
    outcome, _ = tune(mae(), scenes)
    assert outcome.not_measured["finetune"] == "RuntimeError: out of memory"
    assert "Traceback" in outcome.details["finetune"]


def test_a_late_failure_says_how_far_it_came(scenes: BatchSource, monkeypatch: pytest.MonkeyPatch) -> None:
    step = FineTuning.training_step

    def broken(self: FineTuning, inputs: Any, **words: int) -> Any:
        if words["step"] > 2:
            raise RuntimeError("out of memory")
        return step(self, inputs, step=words["step"], total_steps=words["total_steps"])

    monkeypatch.setattr(FineTuning, "training_step", broken)
    outcome, told = tune(mae(), scenes)
    assert outcome.not_measured["finetune"] == f"RuntimeError: out of memory; top-1 was {told[1][2]:.1f} % at step 2"


# -- waiting for a device ---------------------------------------------------------------------------------------------


def greenmim() -> GreenMIM:
    return GreenMIM(GreenMIM.Config.model_validate(CASES["greenmim"].options), DataSpec(64, 10)).train()


def simmim() -> SimMIM:
    return SimMIM(SimMIM.Config.model_validate(SWIN), DataSpec(32, 10)).train()


MIXED = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0, "random_erasing": 0.25, "drop_path": 0.2, "layer_decay": 0.75}
CROPPED = {"augmentation": AugmentationConfig(crop="random_resized", rand_augment="rand-m9-mstd0.5-inc1")}


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda:0", marks=[pytest.mark.gpu, pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")])],
)  # fmt: skip
@pytest.mark.parametrize(
    ("make", "recipe", "precision"),
    [
        (mae, MIXED, "fp32"),
        (lmd, MIXED, "fp32"),
        (simmim, MIXED, "fp32"),
        (greenmim, MIXED, "bf16"),
        (mae, {**MIXED, "clip_grad_norm": 1.0}, "bf16"),
        (simmim, {**MIXED, **CROPPED, "clip_grad_norm": 1.0, "label_smoothing": 0.1}, "bf16"),
        (mae, CROPPED, "fp32"),
    ],
)
def test_a_step_of_fine_tuning_never_makes_the_host_wait(
    make: Any, recipe: dict[str, Any], precision: str, device: str
) -> None:
    """CUDA raises at the first call that waits, between the marks of a step; on a CPU the same steps merely run."""
    on = torch.device(device)
    tuned = tuning(make().to(on), **recipe).to(on).train()
    size = 64 if make is greenmim else 32
    data = DataConfig(image_size=size, num_train=64, num_held_out=8)
    source = open_source(data, size, AugmentationConfig(), on).labelled(tuned.recipe.augmentation, None)
    steps = 20 if on.type == "cuda" else 3
    options = TrainOptions(
        recipe=tuned.recipe, steps=steps, lr_warmup_steps=2, untimed_steps=0, seed=0, device=on, precision=precision,
        log_every_steps=steps,
    )  # fmt: skip
    trainer = Trainer(tuned, source, options, StrictClock(on) if on.type == "cuda" else clock_for(on))
    trainer.time_steps([1, steps])
    try:
        result = trainer.run(lambda _: None, lambda *_: None, lambda *_: None)
    finally:
        if on.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert len(result.times) == steps
    assert all(math.isfinite(loss) for loss in result.losses)


class StrictClock(CudaClock):
    """From a mark to the next drain nothing may wait for the device."""

    def drain(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        super().drain()

    def mark(self) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        return super().mark()
