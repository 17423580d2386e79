"""One self-contained HTML page: what was run, the tables, the figures, and where every number comes from."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from lmd_bench.config import Suite
from lmd_bench.report.cells import Table
from lmd_bench.report.figures import Figure
from lmd_bench.report.load import Results
from lmd_bench.report.origin import Origin, commit_text
from lmd_bench.report.rows import RowResult


def write_page(
    path: Path,
    suite: Suite,
    results: Results,
    rows: Mapping[str, RowResult],
    tables: Sequence[Table],
    figures: Sequence[Figure],
    source: Origin,
) -> Path:
    """Write the page to `path`, figures embedded. Returns `path`."""
    import jinja2

    loader = jinja2.PackageLoader("lmd_bench", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.html").render(
        suite=suite,
        source=source,
        results=results,
        status=_status(rows, {row for profile in results.profiles for row in profile.record.rows}),
        missing_figures=_missing_figures(rows),
        tables=tables,
        figures=[{"figure": figure, "data": _embedded(figure.png)} for figure in figures],
        definitions=definitions(suite, {table.stem for table in tables}),
        runs=_runs(results),
        recipes=_recipes(suite),
    )
    path.write_text(text, encoding="utf-8")
    return path


def _recipes(suite: Suite) -> list[tuple[str, str]]:
    """Name and source of every recipe that a row names."""
    named = {row.recipe for row in suite.methods.values()}
    tuned = {row.finetune for row in suite.methods.values()}
    found = [(name, recipe.source) for name, recipe in suite.recipes.items() if name in named and recipe.source]
    return found + [
        (f"{name} (fine-tuning)", recipe.source)
        for name, recipe in suite.finetune_recipes.items()
        if name in tuned and recipe.source
    ]


def _embedded(png: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(png.read_bytes()).decode("ascii")


def _status(rows: Mapping[str, RowResult], profiled: Set[str]) -> list[dict[str, str]]:
    """Each row with what became of it; `profiled` are those that a speed run timed."""
    status = []
    for found in rows.values():
        text = found.why_nothing_in_full or "; ".join([f"measured, {found.seeds_text}", *found.marks])
        timed_only = not found.runs and found.row in profiled
        status.append(
            {
                "label": found.label,
                "row": found.row,
                "state": "measured" if found.finished or timed_only else "missing",
                "text": "timed in speed runs, not trained" if timed_only else text,
            }
        )
    return status


_FIGURE_NAMES = {"mat_at_1": "MAT@1", "mat_at_5": "MAT@5", "finetune": "fine-tuning", "lpips": "LPIPS"}


def _missing_figures(rows: Mapping[str, RowResult]) -> list[str]:
    """What the records say was not measured, each reason once with its rows."""
    by_reason: dict[str, list[str]] = {}
    for found in rows.values():
        for run in found.finished:
            for name, reason in run.record.not_measured.items():
                named = _FIGURE_NAMES.get(name, name.replace("_", " "))
                labels = by_reason.setdefault(f"{named}: {reason}", [])
                if found.label not in labels:
                    labels.append(found.label)
    return [f"{text} ({', '.join(labels)})" for text, labels in by_reason.items()]


def _runs(results: Results) -> list[dict[str, Any]]:
    """One line of provenance for each record and speed run."""
    lines: list[dict[str, Any]] = [
        {
            "label": run.record.label,
            "seed": run.record.seed,
            "status": run.record.status,
            "path": run.path.as_posix(),
            "hash": run.record.config_hash,
            "started": run.record.started_at,
            "commit": commit_text(run.record.environment),
            "notes": "; ".join([*run.record.notes, *([run.record.error] if run.record.error else [])]) or "none",
        }
        for run in results.all_runs
    ]
    lines += [
        {
            "label": "speed run",
            "seed": "none",
            "status": "finished",
            "path": profile.path.as_posix(),
            "hash": "none",
            "started": profile.record.started_at,
            "commit": commit_text(profile.record.environment),
            "notes": profile.record.progress,
        }
        for profile in results.profiles
    ]
    lines += [
        {
            "label": "inference run",
            "seed": "none",
            "status": "finished",
            "path": inference.path.as_posix(),
            "hash": "none",
            "started": inference.record.started_at,
            "commit": commit_text(inference.record.environment),
            "notes": "random weights, but of rows that come trained",
        }
        for inference in results.inferences
    ]
    return lines


def definitions(suite: Suite, tables: Set[str] = frozenset()) -> list[tuple[str, str]]:
    """What each number means, with the suite's own constants. `tables`: stems of the tables that are there."""
    values = suite.estimator
    counting = {
        "relative": f"the smoothed loss is {100 * values.delta:g} % below its value at the last decrease",
        "fraction": f"the smoothed loss has crossed the next 1/{values.levels} of the run's own drop",
        "grid": f"the smoothed loss has crossed the next multiple of {values.grid_step:g}",
        "slope": "not counted: N is the percentage of the first smoothed loss that was lost",
    }[values.headline]
    percent_text = f"{100 * values.confidence:g} %"
    return [
        (
            "Iteration",
            "From the end of one optimizer step to the end of the next: batch, projector, forward, backward, "
            "optimizer, reseeding. Evaluation and logging are off the clock; training and pauses must add up to the "
            "wall time within 0.5 %, or the run is marked invalid.",
        ),
        (
            "Smoothed loss",
            f"Exponential moving average with bias correction, half-life {values.half_life_steps:g} steps; its first "
            "value is taken after one half-life.",
        ),
        (
            "t90",
            "The first step at which the smoothed loss has made 90 % of the drop from its first to its best value. "
            "MIT, MLI and MLT are all counted from the first step to t90.",
        ),
        ("MIT", "Mean iteration time, milliseconds per iteration."),
        (
            "Valid decrease, N",
            f"Estimator {values.headline!r}: {counting}. N is their number up to t90; without any the cell reads "
            '"no valid decrease".',
        ),
        ("MLI", "Mean loss-decrease iterations: iterations up to t90 over N."),
        ("MLT", "Mean loss-decrease time, seconds: MIT x MLI, exactly."),
        (
            "Still falling: lower bound",
            "The best smoothed loss lies in the last 5 % of the run: a longer run would move t90, and with it these "
            "figures.",
        ),
        (
            "Interval within this run",
            f"{percent_text}, residuals of loss and of step times resampled in blocks, up to {values.num_resamples} "
            "times. It says nothing of other seeds.",
        ),
        (
            "Interval over seeds",
            f"Three seeds or more: {percent_text}, Student's t on the logs around the geometric mean. Two: the points "
            "only, no interval. Shares, costs and PSNR: plain means over seeds.",
        ),
        ("Verdict", "Faster or slower where the interval of the ratio leaves out 1, otherwise not distinguishable."),
        (
            "Projector, stall",
            "Shares of the mean iteration: the frozen projector's encoding; waiting for data and what lies between "
            "phases.",
        ),
        (
            "MAT@1, MAT@5",
            "Mean accuracy-increase time, seconds per percentage point: training time of the whole fine-tuning over "
            "the points of top-1 (top-5) accuracy that its best check has gained over the check before any step. "
            'Without a gain the cell reads "no increase".',
        ),
        *(_FINETUNING if "fine-tuning" in tables else ()),
        *(_OVERALL if "table5" in tables else ()),
        *(_IMAGE_QUALITY if tables & {"table4", "image-quality"} else ()),
        (
            "Published numbers",
            "From arXiv:2312.07971, in columns of their own. The paper states no units and its definitions are not "
            "public: compare the ratios to a reference row, not the values.",
        ),
    ]


_FINETUNING = (
    (
        "Linear probe, k-NN",
        "Accuracy of a linear classifier, and of a vote among nearest neighbours, on features of the frozen encoder, "
        "fitted before fine-tuning changes it: what pre-training alone has taught.",
    ),
)
_OVERALL = (
    (
        "Overall mean",
        "Plain mean of MIT (s), MLT (s), MLI, MAT@1 and MAT@5 (s per point), as in the paper's Table 5. Units are "
        "mixed; missing where one of the five is.",
    ),
)
_IMAGE_QUALITY = (
    (
        "FID",
        "Frechet distance between normal distributions fitted to the features of real and of filled images (Heusel et "
        "al. 2017). Biased by N: compare at equal N, and together with KID.",
    ),
    (
        "KID",
        "Squared maximum mean discrepancy of the same features under a cubic kernel, mean over subsets (Binkowski et "
        "al. 2018). Unbiased, so that it may fall below 0; ± is the standard deviation over subsets.",
    ),
    (
        "Precision, recall",
        "Share of filled images inside the manifold of the real ones, and of real ones inside that of the filled "
        "(Kynkaanniemi et al. 2019).",
    ),
    (
        "CLIP-score",
        "Mean cosine between the embeddings of the filled image and of its caption, raw: neither scaled nor clipped.",
    ),
    (
        "LPIPS",
        "Perceptual distance of the filled and the real image (Zhang et al. 2018, AlexNet), mean over images.",
    ),
    (
        "PSNR, SSIM of image quality",
        "PSNR over hidden pixels, SSIM over the whole image, on the images and masks of the other columns.",
    ),
)
