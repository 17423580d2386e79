"""Suites and records as a real run leaves them, with simulated losses and times and the real figures made of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lmd_bench.config import Suite
from lmd_bench.metrics.efficiency import EstimatorConfig, measure_run
from lmd_bench.records import (
    CALIBRATOR,
    PHASES,
    PICTURES,
    QUALITY_BOUNDS,
    AccuracyCheck,
    Check,
    Cost,
    EvaluatorFacts,
    Finetune,
    ImageQuality,
    Phases,
    Probe,
    ProfileRecord,
    ProfileRound,
    ProfileRow,
    QualityBounds,
    RunRecord,
    StepWriter,
    Timing,
    Yardstick,
    cell_folder,
    write_json,
)
from lmd_bench.suite_files import parse_suite

ENVIRONMENT: dict[str, Any] = {
    "device": "cpu",
    "cpu": {"model": "Test CPU 2.0 GHz", "cores_available": 2},
    "memory_bytes": 8 * 2**30,
    "system": "Linux 6.1",
    "python": "CPython 3.11.7",
    "packages": {"lmd-bench": "0.1.0", "torch": "2.6.0", "timm": "1.0.17", "diffusers": "0.36.0"},
    "git": {"commit": "0123456789abcdef0123456789abcdef01234567", "dirty": False},
    "gpu": None,
    "switches": {"threads": 2},
    "unknown": {},
}
COMMAND = "lmd-bench run --suite demo"

SUITE: dict[str, Any] = {
    "name": "demo",
    "title": "Demo: 64 px scenes",
    "notes": "Small models and short runs.",
    "data": {"name": "scenes", "image_size": 64, "num_train": 4096},
    "steps": 300,
    "recipes": {
        "equal": {"batch_size": 16, "lr": {"base": 1e-3}, "source": "one recipe for all"},
        "adan": {"batch_size": 16, "lr": {"base": 1e-3}, "optimizer": {"name": "adan", "betas": [0.98, 0.92, 0.9]}},
    },
    "methods": {
        "lmd-us": {"label": "LMD-US", "method": "lmd", "recipe": "equal"},
        "lmd-ps": {"label": "LMD-PS", "method": "lmd", "recipe": "equal", "published": "LMD-PS"},
        "lmd-cs": {"label": "LMD-CS", "method": "lmd", "recipe": "equal", "published": "LMD-CS"},
        "lmd-cs-adan": {"label": "LMD-CS (Adan)", "method": "lmd", "recipe": "adan", "note": "with Adan"},
        "mae": {"label": "MAE", "method": "mae", "recipe": "equal", "published": "MAE"},
        "ddpm": {
            "label": "DDPM",
            "method": "ddpm",
            "recipe": "equal",
            "published": "DDPM",
            "options": {"num_train_timesteps": 1000},
        },
    },
    "evaluation": {
        "num_checks": 6,
        "unit_px": 16,
        "targets": [{"fraction": 0.5, "of": "mae"}, {"fraction": 0.9, "of": "mae"}],
    },
    "tables": ["table1", "table3"],
    "reference": "mae",
}

# Row: milliseconds of each phase, decay constant of the loss in steps, its floor, PSNR gained in the run.
SHAPES: dict[str, tuple[tuple[float, ...], float, float, float]] = {
    "lmd-us": ((0.4, 9.0, 8.0, 14.0, 6.0), 60.0, 0.45, 4.0),
    "lmd-ps": ((0.4, 9.0, 8.0, 14.0, 6.0), 55.0, 0.5, 4.2),
    "lmd-cs": ((0.4, 9.0, 7.0, 13.0, 6.0), 50.0, 0.5, 4.6),
    "lmd-cs-adan": ((0.4, 9.0, 7.0, 13.0, 11.0), 50.0, 0.45, 4.4),
    "mae": ((0.4, 0.0, 20.0, 36.0, 6.0), 80.0, 0.3, 5.2),
    "ddpm": ((0.4, 0.0, 55.0, 95.0, 9.0), 25.0, 0.08, 1.8),
}


def mask_ratio_at(row: str, progress: float) -> float | None:
    """Mask ratio of a row at a share of its run."""
    if row == "ddpm":
        return None
    if row == "mae":
        return 0.75
    if row == "lmd-us":
        return 0.15 + 0.6 * progress
    return 0.15 + 0.6 * min(1.0, math.sin(min(1.0, 1.5 * progress) * math.pi / 2) ** 2)


def simulated_steps(row: str, steps: int, seed: int) -> list[tuple[Any, ...]]:
    """Rows of steps.csv, two untimed ones first."""
    rng = np.random.default_rng(1000 * seed + len(row) + ord(row[-1]))
    phases, decay, floor, _ = SHAPES.get(row, SHAPES["mae"])
    rows: list[tuple[Any, ...]] = []
    for step in (-2, -1, *range(1, steps + 1)):
        progress = max(0, step - 1) / steps
        loss = floor + (1 - floor) * math.exp(-max(step, 0) / decay)
        ratio = mask_ratio_at(row, progress)
        tokens = None if ratio is None else int((64 if row == "mae" else 16) * (1 - ratio))
        parts = [part * float(rng.lognormal(0, 0.03)) for part in phases]
        loss *= float(rng.lognormal(0, 0.03))
        rows.append((step, int(step > 0), loss, ratio, tokens, 1e-3, sum(parts), *parts))
    return rows


def write_run(out: Path, suite: Suite, row: str, seed: int = 0, *, steps: int = 300, **changes: Any) -> RunRecord:
    """One finished cell on disk, as `execute` leaves it. `changes` replace fields of the record."""
    folder = cell_folder(out, suite.name, row, seed)
    rows = simulated_steps(row, steps, seed)
    writer = StepWriter(folder / "steps.csv")
    writer.append(rows)
    writer.close()
    measured = [line for line in rows if line[1]]
    periods = [line[6] for line in measured]
    phases = {name: float(np.mean([line[7 + i] for line in measured])) for i, name in enumerate(PHASES)}
    mean = float(np.mean(periods))
    lmd, values = row.startswith("lmd"), suite.estimator
    efficiency = measure_run(
        [line[2] for line in measured],
        periods,
        tokens=None if row in ("ddpm", "mae") else [line[4] for line in measured],
        mask_ratio=None if row == "ddpm" else [line[3] for line in measured],
        config=EstimatorConfig(headline=values.headline, num_resamples=200),
        seed=seed,
    )
    config = suite.methods.get(row)
    record = RunRecord(
        suite=suite.name,
        row=row,
        label=config.label if config else row,
        method=config.method if config else "own",
        seed=seed,
        status="finished",
        config={
            "options": config.options if config else {},
            "image_size": 64,
            "steps": steps,
            "precision": "fp32",
            "recipe": suite.recipes[config.recipe].model_dump(mode="json") if config and config.recipe else {},
        },
        config_hash=f"{abs(hash(row)) % 10**8:016d}",
        command=COMMAND,
        started_at="2026-01-02T03:04:05+00:00",
        environment=copy.deepcopy(ENVIRONMENT),
        num_steps=steps,
        timing=Timing(
            train_s=sum(periods) / 1e3,
            pauses_s={"evaluation": 2.0, "log": 0.1},
            wall_s=sum(periods) / 1e3 + 2.1,
            residual_share=0.0004,
            valid=True,
            untimed_s=0.3,
            compile_s=None,
            instrument_us_per_step=38.0,
        ),
        phases=Phases(
            **{f"{name}_ms": value for name, value in phases.items()},
            stall_share=phases["data"] / mean,
            projector_share=phases["projector"] / mean,
        ),
        cost=Cost(
            parameters=2_600_000,
            trainable_parameters=2_310_000,
            projector_parameters=290_000 if lmd else 0,
            flops_per_step=int(12e9) if row != "ddpm" else None,
            peak_memory_bytes=700 * 2**20,
            peak_memory_kind="resident set of the process",
        ),
        efficiency=efficiency.to_dict(),
        yardstick=simulated_yardstick(row, steps, sum(periods) / 1e3, seed),
        not_measured={"flops_per_step": "the step does not run on the meta device"} if row == "ddpm" else {},
    )
    record = record.model_copy(update=changes)
    write_json(folder / "record.json", record)
    return record


def simulated_yardstick(row: str, steps: int, train_s: float, seed: int) -> Yardstick:
    """Seven checks that rise from untrained towards the row's best."""
    gain = SHAPES.get(row, SHAPES["mae"])[3]
    checks = [
        Check(
            step=round(steps * i / 6),
            train_s=train_s * i / 6,
            psnr_db=11.0 + gain * (1 - math.exp(-3 * i / 6)) + 0.05 * seed,
            ssim=0.3 + 0.05 * i,
            num_images=32,
        )
        for i in range(7)
    ]
    lmd = row.startswith("lmd")
    return Yardstick(
        image_size=64,
        unit_px=16,
        checks=checks,
        function_evaluations=20 if row == "ddpm" else 1,
        projector="kl scenes-kl-f8" if lmd else None,
        ceiling_psnr_db=15.2 if lmd else None,
        latent_leak_db=0.41 if lmd else None,
        mean_colour_psnr_db=13.1,
    )


FINETUNE_RECIPE: dict[str, Any] = {
    "batch_size": 32,
    "lr": {"base": 1e-3, "per_images": None},
    "layer_decay": 0.75,
    "drop_path": 0.1,
    "mixup_alpha": 0.8,
    "source": "one recipe to tune all",
}
QUALITY_PART: dict[str, Any] = {"num_images": 200, "evaluators": "scenes"}


def simulated_finetune(
    row: str, seed: int = 0, *, gain: float = 40.0, train_s: float = 2.0, num_val: int = 500
) -> Finetune:
    """Five checks that gain `gain` points of top-1 and half of that in top-5; MAT as it is defined, none without."""
    top1 = [10.0 + 0.1 * seed + gain * share for share in (0.0, 0.4, 0.8, 1.0, 0.9)]
    top5 = [50.0 + (value - top1[0]) / 2 for value in top1]
    rise1, rise5 = max(top1) - top1[0], max(top5) - top5[0]
    return Finetune(
        num_steps=60, num_train=2000, num_val=num_val, num_classes=10, parameters=2_700_000,
        timing=Timing(
            train_s=train_s, pauses_s={"evaluation": 0.4}, wall_s=train_s + 0.4, residual_share=0.0003, valid=True,
            untimed_s=0.1, compile_s=None, instrument_us_per_step=30.0,
        ),
        checks=[
            AccuracyCheck(step=15 * i, train_s=train_s * i / 4, top1=a, top5=b, num_images=num_val)
            for i, (a, b) in enumerate(zip(top1, top5, strict=True))
        ],
        mit_ms=1e3 * train_s / 60,
        mat_at_1=train_s / rise1 if rise1 > 0 else None,
        mat_at_5=train_s / rise5 if rise5 > 0 else None,
        losses=[2.3 - 0.02 * i for i in range(60)],
        settings={"recipe": FINETUNE_RECIPE | {"pool": "mean"}, "steps": 60},
        notes=["3 of 500 validation images could not be used"] if row == "mae" else [],
    )  # fmt: skip


def simulated_probes(seed: int = 0) -> list[Probe]:
    """A linear probe and k-NN."""
    return [
        Probe(
            name=name, top1=top1 + seed, top5=90.0, setting=setting, num_train=1000, num_val=500, num_features=192,
            seconds=0.3,
        )
        for name, top1, setting in (
            ("linear", 41.0, "logistic regression on standardised features"),
            ("knn", 33.0, "votes of the 20 nearest by cosine"),
        )
    ]  # fmt: skip


def evaluator_facts(kind: str, suffix: str) -> EvaluatorFacts:
    """What a record says of a network; the scenes evaluators have facts of their own."""
    name = {"features": "Inception v3 (torch-fidelity)", "clip": "CLIP ViT-L-14", "lpips": "LPIPS AlexNet"}[kind]
    if suffix and kind != "lpips":
        name = f"scenes {kind}"
    return EvaluatorFacts(
        name=name, weights=f"{kind}.safetensors", sha256=f"{kind}{suffix}".encode().hex().ljust(64, "0"),
        resize="antialiased bicubic to 64 px", num_features=2048 if kind == "features" else None,
    )  # fmt: skip


def simulated_quality(
    level: float, seed: int = 0, *, suffix: str = "_scenes", num_images: int = 200, **changes: Any
) -> ImageQuality:
    """Figures that grow with `level` where less is better; `suffix` "" for the published evaluators."""
    level += 0.01 * seed
    values = {
        f"fid{suffix}": 10 * level, f"kid{suffix}": 0.01 * level, f"kid_std{suffix}": 0.001,
        f"precision{suffix}": 1 / (1 + level), f"recall{suffix}": 0.5 / (1 + level),
        f"clip_score{suffix}": 0.3 - 0.01 * level, "psnr_db": 20 - level, "ssim": 0.5,
    }  # fmt: skip
    quality = ImageQuality(
        num_images=num_images, image_size=64, what="filled against real, 75 % hidden in units of 16 px", values=values,
        evaluators={kind: evaluator_facts(kind, suffix) for kind in ("features", "clip")},
        real_digest="0123456789abcdef", seed=seed, fill_s=1.0,
        not_measured={"lpips": "no AlexNet weights: put alexnet-owt-7be5be79.pth into --weights DIR"},
    )  # fmt: skip
    return quality.model_copy(update=changes)


def write_bounds(out: Path, suite: Suite, **changes: Any) -> None:
    """The suite's floor and ceiling."""
    truth, grey = (simulated_quality(level, **changes) for level in (0.0, 9.0))
    write_json(out / suite.name / QUALITY_BOUNDS, QualityBounds(truth=truth, grey=grey))


def write_pictures(
    out: Path, suite: Suite, row: str, seed: int = 0, *, tile_px: int = 16, count: int = 4, kinds: tuple[str, ...] = ()
) -> None:
    """Strips of tiles in flat colours: the same originals and masks for every row, another fill for each."""
    folder = cell_folder(out, suite.name, row, seed) / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    colours = np.linspace(30, 225, count).astype(np.uint8)
    for kind in kinds or ("original", "masked", "filled"):
        strip = np.repeat(np.repeat(colours, tile_px)[None], tile_px, axis=0)
        pixels = np.stack([strip, strip[:, ::-1], strip], axis=-1)
        if kind != "original":
            pixels[tile_px // 2 :] = 128 if kind == "masked" else sum(map(ord, row)) % 256
        Image.fromarray(pixels).save(folder / f"{kind}.png")


def write_failure(
    out: Path, suite: Suite, row: str, seed: int = 0, error: str = "step 12: the loss is not finite"
) -> None:
    """A cell that failed."""
    config = suite.methods[row]
    record = RunRecord(
        suite=suite.name, row=row, label=config.label, method=config.method, seed=seed, status="failed", error=error,
        config={"image_size": 64}, config_hash="0" * 16, command=COMMAND, started_at="2026-01-02T03:04:05+00:00",
        environment=copy.deepcopy(ENVIRONMENT), num_steps=300,
    )  # fmt: skip
    write_json(cell_folder(out, suite.name, row, seed) / "record.json", record)


def make_profile(suite: Suite, *, rounds: int = 6, batch_size: int = 16, **changes: Any) -> ProfileRecord:
    """A speed run of all rows with the calibrator, its rounds sharing a slowdown of their own."""
    rng = np.random.default_rng(7)
    shapes = {
        **{row: SHAPES[row][0] for row in suite.methods if row in SHAPES},
        CALIBRATOR: (0.1, 0.0, 700.0, 1400.0, 90.0),
    }
    parts = []
    for number in range(rounds):
        slow = float(rng.lognormal(0, 0.1))
        for row, phases in shapes.items():
            steps = [[p * slow * float(rng.lognormal(0, 0.02)) for p in phases] for _ in range(5)]
            periods = [sum(step) for step in steps]
            parts.append(
                ProfileRound(
                    round=number,
                    row=row,
                    period_ms=periods,
                    phases_ms={name: [step[i] for step in steps] for i, name in enumerate(PHASES)},
                    mask_ratio=[mask_ratio_at(row, i / 5) for i in range(5)],
                    unmarked_period_ms=float(np.mean(periods)) * float(rng.lognormal(-0.001, 0.004)),
                    peak_memory_bytes=600 * 2**20,
                )
            )
    about = {
        row: ProfileRow(
            label=suite.methods[row].label if row in suite.methods else "calibrator",
            method=row,
            optimizer="adamw (default)",
            batch_size=batch_size if row != CALIBRATOR else 4,
            parameters=2_600_000 if row != CALIBRATOR else 86_567_656,
            flops_per_step=int(12e9) if row != "ddpm" else None,
            projector="kl scenes-kl-f8" if row.startswith("lmd") else None,
            projector_parameters=1_400_000 if row.startswith("lmd") else 0,
        )
        for row in shapes
    }
    record = ProfileRecord(
        suite=suite.name, command="lmd-bench profile --suite demo", started_at="2026-01-02T04:00:00+00:00",
        environment=copy.deepcopy(ENVIRONMENT), reference="mae", precision="fp32", compile=False,
        progress="mean over the mask schedule (5 midpoints)", rows=about, rounds=parts, instrument_us_per_step=31.0,
    )  # fmt: skip
    return record.model_copy(update=changes)


MakeSuite = Callable[..., Suite]


@pytest.fixture
def make_suite() -> MakeSuite:
    """A demo suite with values replaced at its top level."""

    def make(**changes: Any) -> Suite:
        return parse_suite({**copy.deepcopy(SUITE), **changes}, "suite demo")

    return make


@pytest.fixture
def suite(make_suite: MakeSuite) -> Suite:
    return make_suite()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Suite, Path]:
    """All six rows, one seed, and a speed run. Do not write into it."""
    out = tmp_path_factory.mktemp("out")
    suite = parse_suite(copy.deepcopy(SUITE), "suite demo")
    for row in suite.methods:
        write_run(out, suite, row)
    write_json(out / "demo" / "profile.json", make_profile(suite))
    return suite, out / "demo"
