"""The command line: the only part that prints, parses or exits. Heavy imports wait until a command needs them.

One module for each group of commands: `run` (run, report), `finetune`, `evaluate`, `look` (list, show, doctor),
`speed` (profile, inference, profile-optimizers), `pictures` (reconstruct, sample), `coverage`, `lsp`, `checkpoint`,
`evaluators`.
What they share is in `options` (words on the command line), `planning` (from words to a plan) and `terminal` (what is
printed, and how).
"""

from __future__ import annotations

import os
import signal
import sys

import typer

from lmd_bench.cli.checkpoint import checkpoint_app
from lmd_bench.cli.coverage import coverage
from lmd_bench.cli.evaluate import evaluate
from lmd_bench.cli.evaluators import evaluators_app
from lmd_bench.cli.finetune import finetune
from lmd_bench.cli.look import doctor, list_names, show
from lmd_bench.cli.lsp import lsp_app
from lmd_bench.cli.pictures import reconstruct, sample
from lmd_bench.cli.run import report, run
from lmd_bench.cli.speed import inference, profile, profile_optimizers
from lmd_bench.cli.terminal import complain
from lmd_bench.errors import BenchError

app = typer.Typer(
    name="lmd-bench",
    help="Measure, side by side, what it costs to train models that reconstruct images.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
app.command("run")(run)
app.command("report")(report)
app.command("finetune")(finetune)
app.command("list")(list_names)
app.command("show")(show)
app.command("doctor")(doctor)
app.command("profile")(profile)
app.command("inference")(inference)
app.command("profile-optimizers")(profile_optimizers)
app.command("reconstruct")(reconstruct)
app.command("sample")(sample)
app.command("evaluate")(evaluate)
app.command("coverage")(coverage)
app.add_typer(lsp_app, name="lsp")
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(evaluators_app, name="evaluators")


def main() -> None:
    """Entry point: runs a command, turns a user's errors into one line each and the exit code 2."""
    if "OMP_WAIT_POLICY" not in os.environ:
        # libgomp's threads spin at barriers without end: beside another busy process steps take 20 times as long.
        # Sleeping at once (passive) makes steps of many small operations twice as slow on an idle machine. A short
        # spin costs neither.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's end is like Ctrl-C: clean, and told
    try:
        app()
    except BenchError as error:
        for line in str(error).splitlines():
            complain(f"error: {line}", red=True)
        sys.exit(2)
    except OSError as error:
        complain(f"error: {error}", red=True)
        sys.exit(2)
    except KeyboardInterrupt:
        complain("interrupted")
        sys.exit(130)
