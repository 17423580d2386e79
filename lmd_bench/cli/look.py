"""What there is: `list`, `show` and `doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lmd_bench.cli.options import OfflineOption, WeightsOption
from lmd_bench.cli.terminal import say
from lmd_bench.errors import ConfigError

if TYPE_CHECKING:
    from lmd_bench.pretrained import WeightsStore


def list_names() -> None:
    """Suites, methods, datasets and metrics there are."""
    from lmd_bench.registry import installed_methods
    from lmd_bench.suite_files import load_suite, shipped_suites
    from lmd_bench.texts import DATASETS, METRICS

    catalogues = (
        ("methods (a row of a suite is one of them with options)", installed_methods()),
        ("datasets", DATASETS),
        ("metrics", METRICS),
    )
    width = max(len(name) for names in (shipped_suites(), *(entries for _, entries in catalogues)) for name in names)
    say("suites (lmd-bench run --suite NAME)")
    for name in shipped_suites():
        suite = load_suite(name)
        run_here = [row for row, values in suite.methods.items() if values.listed_only is None]
        say(f"  {name:{width}} {suite.title}: {', '.join(run_here)}")
        for row, values in suite.methods.items():
            if values.listed_only is not None:
                say(f"  {'':{width}} {row}: {values.listed_only}")
    for title, entries in catalogues:
        say(title)
        for name, text in entries.items():
            say(f"  {name:{width}} {text}")


def show(
    name: Annotated[str, typer.Argument(help="A suite (name or .yaml path) or an installed method.")],
) -> None:
    """A suite with every value resolved, or a method's options and their defaults."""
    import yaml

    from lmd_bench.config import near
    from lmd_bench.registry import installed_methods, load_method
    from lmd_bench.suite_files import load_suite, shipped_suites

    if name in shipped_suites() or name.endswith((".yaml", ".yml")):
        say(yaml.safe_dump(load_suite(name).model_dump(mode="json"), sort_keys=False, width=110).rstrip())
        return
    if name not in installed_methods():
        raise ConfigError(f"no suite or method {name!r}{near(name, [*shipped_suites(), *installed_methods()])}")
    method = load_method(name, {})
    say(f"{name}: {installed_methods()[name]}")
    say((method.__doc__ or "").strip())
    say("options:")
    from lmd_bench.texts import describe_options

    for line in describe_options(method.Config):
        say(f"  {line}")


def doctor(
    weights: WeightsOption = None,
    offline: OfflineOption = False,
    hash_all: Annotated[bool, typer.Option("--hash", help="Hash large files of weights too.")] = False,
) -> None:
    """This machine, versions, GPU, and which weights are there."""
    import torch

    from lmd_bench.pretrained import WeightsStore

    store = WeightsStore(weights, offline)

    from lmd_bench.harness.environment import environment, machine_name
    from lmd_bench.texts import shipped_weights

    facts = environment("cuda:0" if torch.cuda.is_available() else "cpu")
    say(f"machine: {machine_name(facts)}")
    for key, value in facts.items():
        if isinstance(value, dict):
            say(key)
            for inner, text in value.items():
                say(f"  {inner}: {text}")
        else:
            say(f"{key}: {value}")
    say("weights")
    for name, state in shipped_weights().items():
        say(f"  {name}: {state}")
    _say_weights(store, hash_all)


def _say_weights(store: WeightsStore, hash_all: bool) -> None:
    """The published weights: found, missing or wrong, and how to get what is not there."""
    from lmd_bench.texts import weights_lines

    for line in weights_lines(store.status(hash_all=hash_all)):
        say(f"  {line}")
    if store.is_offline:
        say("  offline: nothing is downloaded")
    else:
        say("  missing ones are downloaded when a suite asks for them and allows it (image_quality.download)")
    say(f"  --weights: {store.folder or 'not given'} (or the environment's LMD_BENCH_WEIGHTS)")
