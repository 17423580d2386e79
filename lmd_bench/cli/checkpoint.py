"""Authors' checkpoints in and out: `checkpoint import` and `checkpoint export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lmd_bench.cli.options import AddOption, EmaOption, MethodSetOption, ProjectorOption, added_methods
from lmd_bench.cli.terminal import say

if TYPE_CHECKING:
    from lmd_bench.checkpoints.official import OfficialMethod

checkpoint_app = typer.Typer(help="Authors' checkpoints: import as a finished cell, export.", no_args_is_help=True)

ForceOption = Annotated[bool, typer.Option("--force", help="Replace what lies in --out.")]


@checkpoint_app.command("import")
def import_(
    method: Annotated[str, typer.Argument(help="An installed method (`lmd-bench list`).")],
    file: Annotated[Path, typer.Argument(help="Its authors' checkpoint: .safetensors, .pth, .pt or .ckpt.")],
    out: Annotated[Path, typer.Option("--out", help="Folder to write; reconstruct and sample take it as a cell.")],
    settings: MethodSetOption = None,
    projector: ProjectorOption = None,
    ema: EmaOption = False,
    force: ForceOption = False,
    add: AddOption = None,
) -> None:
    """Make an authors' checkpoint a finished cell of its method, and say what was used of it and what was not."""
    from lmd_bench.checkpoints.exchange import import_checkpoint
    from lmd_bench.checkpoints.official import OfficialRequest

    request = OfficialRequest(file, method, tuple(settings or ()), projector, ema)
    opened = import_checkpoint(request, out, force=force, added=added_methods(add))
    tell(opened)
    obstacle = type(opened.method).yardstick_obstacle(getattr(opened.method, "config", None))
    if obstacle is not None:
        say(f"note: it cannot reconstruct pixels: {obstacle}")
    say(f"written: {out}; use it as --checkpoint {out}")


@checkpoint_app.command("export")
def export(
    cell: Annotated[Path, typer.Argument(help="A finished or imported cell, or its weights file.")],
    out: Annotated[Path, typer.Option("--out", help="File to write, .safetensors.")],
    force: ForceOption = False,
    add: AddOption = None,
) -> None:
    """Write a cell's weights in the layout of its method's authors."""
    from lmd_bench.checkpoints.exchange import export_checkpoint

    done = export_checkpoint(cell, out, force=force, added=added_methods(add))
    say(f"written: {done.path}: {done.method}, {done.num_tensors} tensors, {done.num_parameters:,} parameters")


def tell(opened: OfficialMethod) -> None:
    """What an authors' checkpoint was taken for, and what of it was used."""
    from lmd_bench.checkpoints.official import sizes_text

    file, size = opened.file, opened.method.data.image_size
    say(f"{file.path}: {sizes_text(opened.method)}, for images of {size} px, {opened.num_parameters:,} parameters")
    say(f"  {len(file.tensors) - len(opened.left_out)} of {len(file.tensors)} keys used, from the {file.place}")
    if opened.left_out:
        say(f"  left out, no part of the method: {opened.left_out_text}")
    if file.beside is not None:
        say(f"  left out beside them: {file.beside}")
    if opened.changed:
        say(f"  changed on the way: {', '.join(opened.changed)}")
