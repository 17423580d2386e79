"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lmd_bench.errors import ConfigError

DEFAULT_OUT = Path("reports/local")

SuiteOption = Annotated[str, typer.Option("--suite", help="A shipped suite by name, or a path ending in .yaml.")]
MethodsOption = Annotated[
    str | None, typer.Option("--methods", help="Rows of the suite, separated by commas. Default: all that it runs.")
]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of images, LSUN's LMDB folders or WebDataset shards, to train on.")
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
PrecisionOption = Annotated[str | None, typer.Option("--precision", help="fp32 or bf16.")]
CompileOption = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Use torch.compile.")]
OutOption = Annotated[Path, typer.Option("--out", help="Where records and reports go.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", help="Change a value: dotted.key=value; * matches. Repeatable.")
]
WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Folder with published weights; `lmd-bench doctor` says which. Default: where the libraries keep theirs.",
    ),
]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never download weights.")]
SpeedWeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="Folder with published weights; `lmd-bench doctor` says which. Speed runs download none. Default: where "
        "the libraries keep theirs.",
    ),
]
AddOption = Annotated[
    list[str] | None, typer.Option("--add", help="A method of your own: file.py:ClassName. Repeatable.")
]

# of the commands that read an authors' checkpoint
MethodSetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="An option of the method (`lmd-bench show METHOD`): option=value. Repeatable."),
]
ProjectorOption = Annotated[
    str | None, typer.Option("--projector", help="Of a method on latents: a folder or shipped:NAME.")
]
EmaOption = Annotated[
    bool,
    typer.Option(
        "--ema",
        help="Take the moving average of the weights: the fifth entry of a list as the DDIM repository writes it, the "
        "model_ema.* keys of a checkpoint of latent-diffusion.",
    ),
]


def levels_of(text: str | None) -> int | None:
    """`--levels`: None is the method's default, 0 stands for all."""
    if text is None or text == "all":
        return None if text is None else 0
    if not text.isdigit() or int(text) < 1:
        raise ConfigError(f"--levels {text}: a whole number from 1 on, or all")
    return int(text)


def added_methods(add: list[str] | None) -> dict[str, str]:
    """`--add` as method name -> file.py:Class, checked."""
    from lmd_bench.registry import check_added, method_name

    for target in add or []:
        check_added(target)
    return {method_name(target): target for target in add or []}
