"""The small evaluators of generated scenes: `evaluators train` and `evaluators test`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from lmd_bench.cli.options import DeviceOption
from lmd_bench.cli.terminal import say
from lmd_bench.errors import ConfigError

evaluators_app = typer.Typer(
    help="Small evaluators of generated scenes: a classifier for FID, a CLIP for CLIP-score.", no_args_is_help=True
)
_KINDS = ("classifier", "clip")
_PRECISIONS = ("bf16", "fp32")
_WORDS = {
    "accuracy": "class named for {:.1%} of {} held-out scenes",
    "ranked_first": "true caption first among 10 for {:.1%} of {} held-out scenes",
}


@evaluators_app.command("train")
def train(
    kind: Annotated[str, typer.Argument(help="classifier or clip.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; the other evaluator in it stays.")],
    steps: Annotated[
        int | None, typer.Option("--steps", min=10, help="Default: 2400 (classifier), 1500 (clip).")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option("--batch-size", min=2, help="Default: 128 (classifier), 192 (clip).")
    ] = None,
    lr: Annotated[
        float | None, typer.Option("--lr", min=0.0, help="At its highest. Default: 0.004 (classifier), 0.002 (clip).")
    ] = None,
    num_scenes: Annotated[
        int | None, typer.Option("--num-scenes", min=10, help="Drawn once and seen in epochs. Default: 20480.")
    ] = None,
    num_held_out: Annotated[
        int | None, typer.Option("--num-held-out", min=10, help="Scenes to measure the result on. Default: 1000.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Default: 0.")] = None,
    precision: Annotated[str | None, typer.Option("--precision", help="bf16 (default) or fp32.")] = None,
    device: DeviceOption = "auto",
) -> None:
    """Train an evaluator on scenes and write it in half precision; minutes on one core."""
    if kind not in _KINDS:
        raise ConfigError(f"evaluators train {kind}: train {' or '.join(_KINDS)}")
    if precision not in (None, *_PRECISIONS):
        raise ConfigError(f"--precision {precision}: use {' or '.join(_PRECISIONS)}")
    import torch

    from lmd_bench.evaluators.train import DEFAULTS, train_evaluator
    from lmd_bench.harness.plan import resolve_device

    given = {
        "steps": steps,
        "batch_size": batch_size,
        "lr": lr,
        "num_scenes": num_scenes,
        "num_held_out": num_held_out,
        "seed": seed,
        "precision": precision,
    }
    changed = {name: value for name, value in given.items() if value is not None}
    training = dataclasses.replace(DEFAULTS[kind], **changed)  # type: ignore[index,arg-type]
    options = "".join(f" --{name.replace('_', '-')} {value}" for name, value in changed.items())
    metadata = train_evaluator(
        kind,  # type: ignore[arg-type]
        out,
        training,
        device=torch.device(resolve_device(device)),
        command=f"lmd-bench evaluators train {kind} --out DIR{options}",
        log=say,
    )
    say(f"written: {kind} in {out}: {_reached(metadata, training.num_held_out)}")


@evaluators_app.command("test")
def measure(
    folder: Annotated[
        Path | None, typer.Option("--folder", help="What `evaluators train` wrote. Default: what ships.")
    ] = None,
    num_scenes: Annotated[int, typer.Option("--num-scenes", min=10, help="Held-out scenes.")] = 1000,
    device: DeviceOption = "auto",
) -> None:
    """Measure the evaluators on held-out scenes: accuracy, and how often the true caption comes first."""
    import torch

    from lmd_bench.evaluators.files import CLASSIFIER_FILE, CLIP_FILE, MANIFEST, SHIPPED, read_metadata
    from lmd_bench.evaluators.train import measure_evaluator
    from lmd_bench.harness.plan import resolve_device

    place, root = torch.device(resolve_device(device)), folder or SHIPPED
    files = {"classifier": root / CLASSIFIER_FILE, "clip": root / CLIP_FILE}
    there = [kind for kind, path in files.items() if path.exists() or folder is None]
    if not there:
        raise ConfigError(f"--folder {root}: no evaluator ({MANIFEST}, {CLASSIFIER_FILE}, {CLIP_FILE}) is there")
    for kind in there:
        figures = measure_evaluator(kind, root, place, num_scenes)  # type: ignore[arg-type]
        size = files[kind].stat().st_size / 2**20
        say(f"{kind}: {_reached(figures, num_scenes)} ({size:.2f} MiB)")
        say(f"    made by: {read_metadata(files[kind]).get('command', 'unknown')}")


def _reached(figures: dict[str, str], num_scenes: int) -> str:
    return ", ".join(
        words.format(float(figures[name]), num_scenes) for name, words in _WORDS.items() if name in figures
    )
