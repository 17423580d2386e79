"""What fine-tuning and probes say of a row's encoder: accuracies, their cost, and the settings in words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import fmean
from typing import Any, Final

from lmd_bench.config import Suite
from lmd_bench.metrics.intervals import Figure, Missing
from lmd_bench.records import AccuracyCheck, Finetune, Probe
from lmd_bench.report.cells import Cell, Column, Number, Section, Table, missing, number
from lmd_bench.report.load import Run
from lmd_bench.report.row_cells import NAME_COLUMN, figure_lines, seeds_line, tuning_name_cell
from lmd_bench.report.rows import ONE_SEED, RowResult
from lmd_bench.report.tuning import other_conditions

Rows = Mapping[str, RowResult]
_PROBES: Final = {"linear": "Linear probe", "knn": "k-NN"}


def has_finetuning(rows: Rows) -> bool:
    """Whether any row was fine-tuned or probed."""
    return any(found.finetunes or _all_probes(found) for found in rows.values())


def finetune_table(suite: Suite, rows: Rows) -> Table:
    """Accuracy of every row's encoder: fine-tuned, with its cost, and probed while frozen."""
    columns = [
        NAME_COLUMN,
        *(Column(f"Top-{k}", _accuracy_parts(k), "%, best check", "Accuracy") for k in (1, 5)),
        Column("MIT", ("finetune_mit_ms", "finetune_mit_ms_low", "finetune_mit_ms_high"), "ms per iteration", "Cost"),
        *(
            Column(f"MAT@{k}", tuple(f"mat_at_{k}_s{end}" for end in ("", "_low", "_high")), "s per point", "Cost")
            for k in (1, 5)
        ),
        *(Column(head, _probe_parts(name), "top-1, %", "Frozen features") for name, head in _PROBES.items()),
        Column("Images", ("num_train", "num_val", "num_classes")),
        Column("Recipe", ("finetune_setup",)),
    ]
    concerned = [found for found in rows.values() if _is_concerned(found)]
    body = tuple(_row(found) for found in concerned)
    return Table(
        "fine-tuning",
        f"Fine-tuning and frozen features ({suite.title})",
        tuple(columns),
        (Section(None, body),),
        tuple(_notes(rows)),
    )


def _is_concerned(found: RowResult) -> bool:
    """Whether the row was fine-tuned or probed, or was to be."""
    recorded = any("finetune" in run.record.not_measured for run in found.finished)
    asked = found.config is not None and found.config.finetune is not None
    return asked or recorded or bool(found.finetunes or _all_probes(found))


def _row(found: RowResult) -> tuple[Cell, ...]:
    mat = found.seed_figure(lambda run: found.mat(run, 1))
    return (
        tuning_name_cell(found, mat),
        *(_accuracy_cell(found, k) for k in (1, 5)),
        _figure_cell(found.seed_figure(lambda run: _mit(found, run)), "finetune_mit_ms"),
        _figure_cell(mat, "mat_at_1_s"),
        _figure_cell(found.seed_figure(lambda run: found.mat(run, 5)), "mat_at_5_s"),
        *(_probe_cell(found, name) for name in _PROBES),
        _images_cell(found),
        tuning_setup(found),
    )


def _mit(found: RowResult, run: Run) -> float | Missing:
    finetune = run.record.finetune
    return Missing(found.no_finetune) if finetune is None else finetune.mit_ms


def _figure_cell(figure: Figure, name: str) -> Cell:
    if isinstance(figure, Missing):
        return missing(figure.reason)
    lines, parts = figure_lines(figure, name)
    return Cell(tuple(lines[:1] if figure.kind == ONE_SEED else lines), "value", parts)


def _accuracies(finetune: Finetune, k: int) -> list[float]:
    def of(check: AccuracyCheck) -> float:
        return check.top1 if k == 1 else check.top5

    return [of(check) for check in finetune.checks]


def _accuracy_parts(k: int) -> tuple[str, ...]:
    return (*(f"top{k}_{when}_percent" for when in ("best", "first", "last")), f"top{k}_seeds")


def _accuracy_cell(found: RowResult, k: int) -> Cell:
    """The best check, over seeds mean and range, and the means of the first and the last."""
    checked = [_accuracies(one, k) for one in found.finetunes if one.checks]
    if not checked:
        return missing("not measured: no accuracy was measured" if found.finetunes else found.no_finetune)
    best = [max(values) for values in checked]
    first, last = fmean(values[0] for values in checked), fmean(values[-1] for values in checked)
    lines = [f"{fmean(best):.1f}"]
    if len(best) > 1:
        lines.append(f"{min(best):.1f} to {max(best):.1f}")
    lines += [f"{first:.1f} at the start", f"{last:.1f} at the end", *seeds_line(len(best), found)]
    values = (fmean(best), first, last, len(best))
    return Cell(tuple(lines), "value", dict(zip(_accuracy_parts(k), values, strict=True)))


# -- probes -----------------------------------------------------------------------------------------------------------


def _all_probes(found: RowResult) -> list[Probe]:
    return [probe for run in found.finished for probe in run.record.probes]


def _probe_parts(name: str) -> tuple[str, ...]:
    return (f"{name}_top1_percent", f"{name}_top5_percent", f"{name}_seeds")


def _probe_cell(found: RowResult, name: str) -> Cell:
    probes = [probe for probe in _all_probes(found) if probe.name == name]
    if not probes:
        if found.why_nothing:
            return missing(found.why_nothing)
        return missing(f"not measured: {found.recorded_reason(f'probe_{name}', otherwise=_not_probed(found))}")
    top1, top5 = fmean(probe.top1 for probe in probes), fmean(probe.top5 for probe in probes)
    lines = [f"{top1:.1f}"]
    if len(probes) > 1:
        lines.append(f"{min(p.top1 for p in probes):.1f} to {max(p.top1 for p in probes):.1f}")
    lines += [f"top-5 {top5:.1f}", *seeds_line(len(probes), found)]
    return Cell(tuple(lines), "value", dict(zip(_probe_parts(name), (top1, top5, len(probes)), strict=True)))


def _not_probed(found: RowResult) -> str:
    if not found.finetunes:
        return found.no_finetune.removeprefix("not measured: ")
    return "not among finetune.probes"


# -- settings in words ------------------------------------------------------------------------------------------------


def tuning_setup(found: RowResult) -> Cell:
    """How a row was fine-tuned: parameters, steps, and its recipe in words."""
    tuned = found.finetunes
    if not tuned:
        return missing(found.no_finetune)
    recipes = " / ".join(dict.fromkeys(map(recipe_text, tuned)))
    lines = (f"{number(tuned[0].parameters / 1e6)} M trained", recipes)
    return Cell(lines, "label", {"setup": ", ".join(lines), "finetune_setup": ", ".join(lines)})


def recipe_text(finetune: Finetune) -> str:
    """A fine-tuning recipe in words; what is off is left out."""
    recipe: Mapping[str, Any] = finetune.settings.get("recipe") or {}
    rate = (recipe.get("lr") or {}).get("base")
    per = (recipe.get("lr") or {}).get("per_images")
    optimizer: Mapping[str, Any] = recipe.get("optimizer") or {}
    augmentation: Mapping[str, Any] = recipe.get("augmentation") or {}
    warmup, scale = finetune.settings.get("lr_warmup_steps"), augmentation.get("scale")
    named = (
        optimizer.get("name"),
        f"lr {rate:g}{f' per {per} images' if per else ''}" if rate else None,
        f"batch {recipe['batch_size']}" if "batch_size" in recipe else None,
        f"{finetune.num_steps} steps" + (f", {warmup} of them warm-up" if warmup else ""),
        f"weight decay {optimizer['weight_decay']:g}" if optimizer.get("weight_decay") else None,
        f"gradients clipped to a norm of {recipe['clip_grad_norm']:g}" if recipe.get("clip_grad_norm") else None,
        f"weights averaged ({recipe['ema_decay']:g})" if recipe.get("ema_decay") else None,
        f"layer decay {recipe['layer_decay']:g}" if recipe.get("layer_decay", 1.0) != 1.0 else None,
        *(
            f"{name} {recipe[key]:g}" if recipe.get(key) else None
            for key, name in (
                ("drop_path", "drop path"),
                ("mixup_alpha", "mixup"),
                ("cutmix_alpha", "cutmix"),
                ("label_smoothing", "label smoothing"),
                ("random_erasing", "random erasing"),
            )
        ),
        f"crops of {100 * scale[0]:g} to {100 * scale[1]:g} %"
        if scale and augmentation.get("crop") == "random_resized"
        else None,
        augmentation.get("rand_augment"),
        f"images seen to {100 * crop:g} % of their side"
        if (crop := finetune.settings.get("val_crop", 1.0)) != 1
        else None,
        {"mean": "mean of tokens", "cls": "class token"}.get(recipe.get("pool", "")),
    )
    return ", ".join(text for text in named if text)


GAIN_COLUMN: Final = Column(
    "Top-1, start to best",
    ("top1_first_percent", "top1_best_percent", "finetune_s", "finetune_seeds"),
    "%; time of fine-tuning",
)


def gain_cell(found: RowResult) -> Cell:
    """Top-1 accuracy before any step and at the best check, with the time that MAT divides; means over seeds."""
    checked = [one for one in found.finetunes if one.checks]
    if not checked:
        return missing("not measured: no accuracy was measured" if found.finetunes else found.no_finetune)
    first = fmean(one.checks[0].top1 for one in checked)
    best = fmean(max(_accuracies(one, 1)) for one in checked)
    seconds = fmean(one.timing.train_s for one in checked)
    parts = dict(zip(GAIN_COLUMN.csv, (first, best, seconds, len(checked)), strict=True))
    lines = (f"{first:.1f} to {best:.1f}", f"in {number(seconds)} s", *seeds_line(len(checked), found))
    return Cell(lines, "value", parts)


def _images_cell(found: RowResult) -> Cell:
    tuned = found.finetunes
    if not tuned:
        return missing(found.no_finetune)
    parts: dict[str, Number | str] = {
        "num_train": _one_or_all(one.num_train for one in tuned),
        "num_val": _one_or_all(one.num_val for one in tuned),
        "num_classes": _one_or_all(one.num_classes for one in tuned),
    }
    words = ("to train", "to measure", "classes")
    return Cell(tuple(f"{count} {text}" for count, text in zip(parts.values(), words, strict=True)), "label", parts)


def _one_or_all(counts: Iterable[int]) -> int | str:
    """The number that all seeds share, else all of them in words."""
    found = sorted(set(counts))
    return found[0] if len(found) == 1 else " or ".join(map(str, found))


def _notes(rows: Rows) -> list[str]:
    tuned = [one for found in rows.values() for one in found.finetunes]
    notes = [
        "Fine-tuning: the trained encoder with a new linear head, all of its weights trained, in the same loop and on "
        "the same clock as pre-training; accuracy is measured off the clock, first before any step. The best check is "
        "chosen on the images it is measured on. Several seeds: mean and range.",
        "MAT@k: seconds of the whole fine-tuning per percentage point from the first to the best check; without a rise "
        '"no increase". MIT: mean over all steps of fine-tuning.',
    ]
    left_out = [found.label for found in rows.values() if not _is_concerned(found)]
    if left_out:
        notes.append(f"Rows that name no recipe for fine-tuning are left out: {', '.join(left_out)}.")
    classes = sorted({one.num_classes for one in tuned})
    if classes:
        chance = ", ".join(f"{100 / count:.3g} % of {count} classes" for count in classes)
        notes.append(f"Chance is {chance} (top-1).")
    for name, head in _PROBES.items():
        settings = {
            f"{probe.setting}; {probe.num_train} images to fit, {probe.num_val} to measure"
            for found in rows.values()
            for probe in _all_probes(found)
            if probe.name == name
        }
        if settings:
            notes.append(f"{head}, on the frozen encoder before fine-tuning: {' / '.join(sorted(settings))}.")
    notes += tuning_notes(rows.values())
    sources = dict.fromkeys((one.settings.get("recipe") or {}).get("source") for one in tuned)
    return notes + [f"Recipe of fine-tuning: {source}." for source in sources if source]


def tuning_notes(rows: Iterable[RowResult]) -> list[str]:
    """What a reader of accuracies and MAT must know: how fine-tuning differs between rows, and their own caveats."""
    shown = list(rows)
    runs = [run for found in shown for run in found.finished]
    notes = []
    counts = _differing_counts(runs)
    others = [name for name in other_conditions(runs) if not any(text.startswith(name) for text in counts)]
    if differing := [*counts, *others]:
        notes.append(
            f"Mind: not all were fine-tuned alike: {'; '.join(differing)}. There is no ratio between rows of other "
            "machines, images, labels or numbers of validation images."
        )
    by_text: dict[str, list[str]] = {}
    for found in shown:
        for text in dict.fromkeys(note for one in found.finetunes for note in one.notes):
            by_text.setdefault(text, []).append(found.label)
    return notes + [f"{', '.join(labels)}: {text}" for text, labels in by_text.items()]


def _differing_counts(runs: Iterable[Run]) -> list[str]:
    """Counts of fine-tuning that are not the same in all runs, with their values."""
    tuned = [run.record.finetune for run in runs if run.record.finetune is not None]
    counts = {
        "steps": {one.num_steps for one in tuned},
        "batch": {(one.settings.get("recipe") or {}).get("batch_size", 0) for one in tuned},
        "training images": {one.num_train for one in tuned},
        "validation images": {one.num_val for one in tuned},
        "classes": {one.num_classes for one in tuned},
    }
    return [f"{name} {', '.join(map(str, sorted(found)))}" for name, found in counts.items() if len(found) > 1]
