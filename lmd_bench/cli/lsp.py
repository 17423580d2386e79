"""Latent space projectors: `lsp train`, `lsp import`, `lsp inspect` and `lsp encode`."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from lmd_bench.cli.options import DEFAULT_OUT, DeviceOption
from lmd_bench.cli.terminal import command_line, duration, new_console, say
from lmd_bench.errors import ConfigError

MIN_IMAGE_PX, MAX_IMAGE_PX = 16, 4096
"""Of `lsp inspect`."""

lsp_app = typer.Typer(help="Latent space projectors: train, inspect, import, encode with one.", no_args_is_help=True)


@lsp_app.command("encode")
def lsp_encode(
    projector: Annotated[str, typer.Option("--projector", help="A projector's folder, or shipped:NAME.")],
    data: Annotated[str, typer.Option("--data", help="Folder of training images, or scenes.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; `projector.cache` of a row names it.")],
    views: Annotated[int, typer.Option("--views", help="Augmented views of every image.")] = 4,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="px. Default: 64 for scenes, 224 for a folder.")
    ] = None,
    num_images: Annotated[
        int | None, typer.Option("--num-images", help="Training images. Default: 4096 scenes, all of a folder.")
    ] = None,
    num_held_out: Annotated[
        int, typer.Option("--num-held-out", help="Images kept away from training (data.num_held_out).")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Which scenes, which held-out images (data.seed).")] = 0,
    view_seed: Annotated[
        int, typer.Option("--view-seed", help="View v is what a run of this seed sees in its epoch v.")
    ] = 0,
    crop: Annotated[str, typer.Option("--crop", help="auto, none or random_resized, as in recipes.")] = "auto",
    crop_scale: Annotated[tuple[float, float], typer.Option("--crop-scale", help="Share of the area.")] = (0.2, 1.0),
    crop_ratio: Annotated[tuple[float, float], typer.Option("--crop-ratio", help="Width over height.")] = (0.75, 4 / 3),
    interpolation: Annotated[str, typer.Option("--interpolation", help="bicubic or bilinear.")] = "bicubic",
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror one in two.")] = True,
    scale: Annotated[float, typer.Option("--scale", help="Factor on the latents (projector.scale).")] = 1.0,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16, of the encoder.")] = "fp32",
    dtype: Annotated[str, typer.Option("--dtype", help="float32 or float16, on disk.")] = "float32",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Images encoded at once.")] = 64,
    device: DeviceOption = "auto",
) -> None:
    """Encode training images once, so that rows with `projector.cache: DIR` read latents instead of projecting."""
    from lmd_bench.harness.encode import EncodeOptions, encode_data
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.progress import encoded_line

    folder = None if data == "scenes" else data
    options = EncodeOptions.parse(
        {
            "projector": projector,
            "scale": scale,
            "precision": precision,
            "data": {
                "name": "scenes" if folder is None else "folder",
                "path": folder,
                "image_size": image_size if image_size is not None else (64 if folder is None else 224),
                "num_train": num_images if num_images is not None else (4096 if folder is None else None),
                "num_held_out": num_held_out,
                "seed": seed,
            },
            "augmentation": {
                "crop": crop,
                "scale": crop_scale,
                "ratio": crop_ratio,
                "interpolation": interpolation,
                "flip": flip,
            },
            "views": views,
            "view_seed": view_seed,
            "dtype": dtype,
            "batch_size": batch_size,
        },
        "lsp encode",
    )
    meta = encode_data(
        options,
        out,
        device=resolve_device(device),
        command=command_line(),
        on_progress=lambda *figures: say(encoded_line(*figures)),
        log=say,
    )
    say(
        f"{out}: {meta.views} x {meta.shape[1]} images as latents {'x'.join(map(str, meta.shape[2:]))} {meta.dtype}, "
        f"{meta.num_bytes / 2**20:.1f} MiB, in {duration(meta.seconds)}; use it with "
        f"--set methods.ROW.options.projector.cache={out}"
    )


def _lsp_train(
    out: Annotated[Path, typer.Option("--out", help="Folder to write, readable by diffusers.")],
    device: DeviceOption = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace a projector that lies in --out.")] = False,
    **values: Any,
) -> None:
    """Train a latent space projector (VQGAN, KL or light) and write it as a diffusers folder.

    The same command goes on where an interrupted one stopped.
    """
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.projector.train_config import parse_options

    options = parse_options(values)
    device_name = resolve_device(device)
    from lmd_bench.projector.train import STATE_FILE, train_lsp

    try:
        train_lsp(out, options, device=device_name, force=force, log=say)
    except KeyboardInterrupt:
        kept = "The last saved state is kept" if (out / STATE_FILE).exists() else "No state was saved yet"
        say(f"\nstopped. {kept} in {out}; go on with:\n  {command_line()}")
        sys.exit(130)


@lsp_app.command("import")
def lsp_import(
    checkpoint: Annotated[Path, typer.Argument(help="Of taming-transformers or latent-diffusion (.ckpt, ...).")],
    out: Annotated[Path, typer.Argument(help="Folder to write, readable by diffusers; must not exist yet.")],
) -> None:
    """Turn a CompVis checkpoint (VQGAN, KL or VQ first stage, or a whole latent diffusion model) into a projector."""
    from lmd_bench.projector.compvis import import_checkpoint

    report = import_checkpoint(checkpoint, out)
    say(
        f"{out}: {report.num_parameters:,} parameters, factor {report.factor}, {report.latent_channels} latent "
        f"channels, from {len(report.used)} keys; use it as projector {{kind: {report.kind}, path: {out}}}"
    )
    if report.scaling_factor != 1.0:
        say(
            f"scale_factor of the checkpoint: {report.scaling_factor:.6g}; projector.scale={report.scaling_factor:.6g} "
            "gives latents of unit scale, as its diffusion model sees them (LMD's authors use 1)"
        )
    if report.left_out:
        groups = ", ".join(f"{name} ({count})" for name, count in report.left_out_groups.items())
        say(f"left out, not part of the projector: {len(report.left_out)} keys: {groups}")


@lsp_app.command("inspect")
def lsp_inspect(
    projectors: Annotated[list[str], typer.Argument(help="Folders of projectors, or shipped:NAME.")],
    data: Annotated[str, typer.Option("--data", help="Folder of images, or scenes.")] = "scenes",
    images: Annotated[int, typer.Option("--images", min=1, help="Held-out images to measure on.")] = 256,
    image_size: Annotated[
        int | None, typer.Option("--image-size", help="px. Default: 64 for scenes, 224 for a folder.")
    ] = None,
    data_seed: Annotated[
        int, typer.Option("--data-seed", min=0, help="Which scenes, which held-out images (data.seed of runs).")
    ] = 0,
    shown: Annotated[int, typer.Option("--shown", min=1, help="Images in figure 7.")] = 4,
    precision: Annotated[str, typer.Option("--precision", help="fp32 or bf16, of the projectors.")] = "fp32",
    device: DeviceOption = "auto",
    out: Annotated[Path, typer.Option("--out", help="Folder for the table and figure 7.")] = DEFAULT_OUT / "projectors",
) -> None:
    """Measure projectors: cost, quality, codebook use and leak, with figure 7 (image, latent, reconstruction)."""
    from lmd_bench.harness.plan import resolve_device
    from lmd_bench.projector.config import check_projector, config_of_path

    size = image_size if image_size is not None else (64 if data == "scenes" else 224)
    if not MIN_IMAGE_PX <= size <= MAX_IMAGE_PX:
        raise ConfigError(f"--image-size {size}: must be from {MIN_IMAGE_PX} to {MAX_IMAGE_PX} px")
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"--precision {precision}: must be fp32 or bf16")
    configs = [config_of_path(path, precision) for path in projectors]
    for config in configs:
        check_projector(config, size)
    device_name = resolve_device(device)
    import torch

    from lmd_bench.harness.environment import environment, machine_name
    from lmd_bench.projector.inspect import inspect_projector, open_inspect_data, require_held_out
    from lmd_bench.projector.inspect_report import make_table, require_writable, write_inspections

    found = open_inspect_data(None if data == "scenes" else data, images, size, torch.device(device_name), data_seed)
    if found.index is not None and (warning := found.index.warning()) is not None:
        say(warning)
    require_held_out(configs, found)
    require_writable(out)
    inspections = [inspect_projector(config, found, num_samples=shown) for config in configs]
    provenance = [command_line(), machine_name(environment(device_name))]
    written = write_inspections(out, inspections, found.described, provenance)
    table = make_table(inspections, found.described)
    console = new_console()
    turned = Table("", *(row[0].text for row in table.rows), title=table.title, title_justify="left")
    for place, column in enumerate(table.columns[1:], 1):
        head = f"{column.group}: {column.head}" if column.group else column.head
        turned.add_row(head, *(row[place].text for row in table.rows))
    console.print(turned, markup=False)
    for note in table.notes:
        say(note)
    say(f"written: {', '.join(path.name for path in written)} in {out}")


def _with_train_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with one option for every field of LSPTrainOptions, so that each default and text stands once."""
    from lmd_bench.projector.train_config import command_line_options

    signature = inspect.signature(command, eval_str=True)
    own = [parameter for parameter in signature.parameters.values() if parameter.name != "values"]
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, typer.Option(help=text)]
        )
        for name, kind, default, text in command_line_options()
    ]
    parameters = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own] + options
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


lsp_train = lsp_app.command("train")(_with_train_options(_lsp_train))
