"""How good images are: two folders compared, or what the methods of finished cells fill."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from lmd_bench.cli.options import AddOption, DeviceOption, OfflineOption, WeightsOption, added_methods
from lmd_bench.cli.planning import open_weights
from lmd_bench.cli.terminal import complain, new_console, report_on, say
from lmd_bench.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from lmd_bench.config import ImageQualityConfig
    from lmd_bench.pretrained import WeightsStore
    from lmd_bench.records import ImageQuality

_OF_FOLDERS = ("--fake", "--captions", "--image-size", "--grey-to-rgb", "--statistics", "--out", "--seed")
_OF_RUNS = ("--data", "--force", "--add")


def evaluate(
    run: Annotated[
        Path | None,
        typer.Argument(help="A finished cell (OUT/<suite>/<row>/seed-<n>), OUT/<suite>, or an imported checkpoint."),
    ] = None,
    real: Annotated[Path | None, typer.Option("--real", help="Folder of real images, flat or nested.")] = None,
    fake: Annotated[Path | None, typer.Option("--fake", help="Folder of images to be measured against them.")] = None,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="CSV or JSONL file with a caption for each fake image.")
    ] = None,
    evaluators: Annotated[
        str | None,
        typer.Option("--evaluators", help="real: Inception, CLIP, AlexNet; scenes: the small ones that ship."),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Separated by commas: fid, kid, precision_recall, clip_score, lpips, psnr, ssim. Default: all.",
        ),
    ] = None,
    clip_model: Annotated[
        str | None, typer.Option("--clip-model", help="open_clip's name of the model behind CLIP-score.")
    ] = None,
    clip_pretrained: Annotated[
        str | None, typer.Option("--clip-pretrained", help="open_clip's tag of its weights.")
    ] = None,
    image_size: Annotated[
        int | None, typer.Option("--image-size", min=8, help="Resize and crop all images to so many px.")
    ] = None,
    num_images: Annotated[
        int | None,
        typer.Option("--num-images", min=1, help="Folders: the first so many by name. Runs: of the held-out images."),
    ] = None,
    grey_to_rgb: Annotated[
        bool, typer.Option("--grey-to-rgb", help="Take grey images among coloured ones as coloured.")
    ] = False,
    statistics: Annotated[
        Path | None,
        typer.Option("--statistics", help="File for the real side's statistics: written, and used the next time."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Write the figures to this file, .json.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Images at a time. What a method draws while it fills depends on it."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of KID's subsets.")] = None,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of images, for an imported checkpoint or a run's that moved.")
    ] = None,
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Measure again what is measured. Figures of other images or settings are replaced, all others stay.",
        ),
    ] = False,
    weights: WeightsOption = None,
    offline: OfflineOption = False,
    device: DeviceOption = "auto",
    add: AddOption = None,
) -> None:
    """Measure images: FID, KID, precision and recall, CLIP-score, LPIPS, PSNR, SSIM."""
    given = {
        "--fake": fake,
        "--captions": captions,
        "--image-size": image_size,
        "--grey-to-rgb": grey_to_rgb or None,
        "--statistics": statistics,
        "--out": out,
        "--seed": seed,
        "--data": data,
        "--force": force or None,
        "--add": add,
    }
    _require_one_kind(run, real, {option for option, value in given.items() if value is not None})
    changes = _changes(
        evaluators=evaluators,
        metrics=metrics,
        num_images=num_images,
        batch_size=batch_size,
        clip_model=clip_model,
        clip_pretrained=clip_pretrained,
    )
    if out is not None:
        _require_json_file(out)
    if statistics is not None:
        _require_statistics_file(statistics)
    import torch

    from lmd_bench.evaluation.runs import RunsRequest, merged_settings
    from lmd_bench.harness.plan import resolve_device

    place = torch.device(resolve_device(device))
    store = open_weights(weights, offline)
    if run is not None:
        _evaluate_runs(RunsRequest(run, changes, data, force, added_methods(add)), store, place)
        return
    assert real is not None
    assert fake is not None
    from lmd_bench.evaluation.folders import FolderRequest

    request = FolderRequest(real, fake, image_size, num_images, grey_to_rgb, captions, statistics, seed or 0)
    _evaluate_folders(
        request, merged_settings({}, {k: v for k, v in changes.items() if k != "num_images"}), store, place, out
    )


def _require_one_kind(run: Path | None, real: Path | None, given: set[str]) -> None:
    """Either cells or two folders, and no options of the other kind."""
    if run is None and real is None:
        raise ConfigError("give a run (OUT/<suite> or a cell's folder), or two folders with --real DIR --fake DIR")
    if run is not None and real is not None:
        raise ConfigError("--real: give either a run or two folders")
    if run is None and "--fake" not in given:
        raise ConfigError("--real: name the other folder with --fake DIR")
    strange = [option for option in (_OF_FOLDERS if run is not None else _OF_RUNS) if option in given]
    if strange:
        kind = "two folders" if run is not None else "a run"
        raise ConfigError(f"{', '.join(strange)}: for {kind} only; leave it out")


def _changes(*, metrics: str | None, **values: Any) -> dict[str, Any]:
    """The settings that were given, by their names in a suite."""
    from lmd_bench.config import ImageMetricName, near

    changes = {name: value for name, value in values.items() if value is not None}
    if metrics is not None:
        names = list(dict.fromkeys(part.strip() for part in metrics.split(",") if part.strip()))
        known = get_args(ImageMetricName)
        for name in names:
            if name not in known:
                raise ConfigError(f"--metrics: no metric {name!r}{near(name, known)}")
        if not names:
            raise ConfigError("--metrics names no metric")
        changes["metrics"] = names
    return changes


def _require_json_file(out: Path) -> None:
    if out.suffix != ".json":
        raise ConfigError(f"--out {out}: the figures are written as JSON; give the file that ending")
    if out.is_dir() or not out.parent.is_dir():
        raise ConfigError(f"--out {out}: {'a folder' if out.is_dir() else f'no folder {out.parent}'}; name a file")


def _require_statistics_file(path: Path) -> None:
    if path.is_dir():
        raise ConfigError(f"--statistics {path}: a folder; name a file, such as real.safetensors in it")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        why = "cannot be written to" if parent.is_dir() else "is no folder"
        raise ConfigError(f"--statistics {path}: {parent} {why}; name a file elsewhere")


def _evaluate_folders(
    request: Any, config: ImageQualityConfig, store: WeightsStore, place: torch.device, out: Path | None
) -> None:
    from lmd_bench.evaluation.folders import evaluate_folders
    from lmd_bench.records import write_json

    quality = evaluate_folders(request, config, store, place)
    _show(quality)
    if out is not None:
        write_json(out, quality)
        say(f"written: {out}")


def _show(quality: ImageQuality) -> None:
    """One small table, what is not measured, and what the networks did to the images."""
    from rich.table import Table

    from lmd_bench.evaluation.result import missing_lines, table_rows

    table = Table(title=f"{quality.what}, {quality.image_size} px", title_justify="left")
    for column in ("figure", "value", "evaluator", "N"):
        table.add_column(column, overflow="fold")
    for row in table_rows(quality):
        table.add_row(*row)
    if quality.values:
        new_console().print(table, markup=False)
    for line in [*missing_lines(quality), *quality.notes]:
        say(line)
    for facts in quality.evaluators.values():
        say(f"{facts.name}: {facts.weights}, SHA-256 {facts.sha256[:16]}; resized {facts.resize}")


def _evaluate_runs(request: Any, store: WeightsStore, place: torch.device) -> None:
    from lmd_bench.evaluation.result import missing_lines, short_text
    from lmd_bench.evaluation.runs import evaluate_runs, suites_of

    failed = 0
    missing: dict[str, None] = {}
    for outcome in evaluate_runs(request, store, place):
        if outcome.quality is None:
            failed += outcome.failed
            say(f"  {outcome.name}: {'not measured: ' if outcome.failed else ''}{outcome.reason}")
            continue
        say(f"  {outcome.name}: {short_text(outcome.quality)}; N = {outcome.quality.num_images}")
        if outcome.note is not None:
            say(f"  {outcome.name}: {outcome.note}")
        missing |= dict.fromkeys([*missing_lines(outcome.quality), *outcome.quality.notes])
    for line in missing:
        say(f"  {line}")
    for folder, suite in suites_of(request.path):
        report_on(folder, suite)
    if failed:
        count = f"{failed} cell{'s' if failed > 1 else ''}"
        complain(f"{count} could not be measured; the reasons stand above", red=True)
        sys.exit(1)
