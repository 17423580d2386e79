"""What a run leaves behind: `record.json` and `steps.csv` for each cell, `profile.json` for speed runs. No torch.

A cell's folder is `OUT/<suite>/<row>/seed-<n>/`. `steps.csv` grows while the run goes on (whole lines, flushed to
disk); `record.json` appears in one piece when the cell has ended, so its presence says that the cell is complete.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmd_bench.errors import RecordError

SCHEMA = 1
YARDSTICK_BOUNDS = "yardstick_bounds"
"""In a record's `not_measured`: all of the yardstick but its checks."""
PICTURES = "pictures"
"""Folder in a cell with what the report shows of it: strips of square tiles side by side, as PNG: `original.png`,
`masked.png`, `filled.png`, and `samples.png` where the method generates."""
QUALITY_BOUNDS = "quality-bounds.json"
"""In a suite's folder: `QualityBounds`."""
FINETUNE_FILE = "finetune.json"
"""Beside imported weights: `FinetuneRecord`."""
TUNED_ELSEWHERE = "fine-tuned on another machine than trained on: "
"""Begins a note in `Finetune.notes`; the machine's short name follows."""
TUNED_ON_OTHERS = "fine-tuned on other images than trained on: "
"""As `TUNED_ELSEWHERE`; the images' folder follows."""
STATISTICS = "statistics"
"""Folder of a suite with the real side's features, measured once."""
RECONSTRUCTIONS = "reconstructions"
"""Folder beside a cell's weights that `lmd-bench reconstruct` writes to by default."""
PHASES = ("data", "projector", "forward", "backward", "optimizer")
"""The five parts of a step, in order; their times add up to the period."""
STEP_COLUMNS = (
    "step",
    "timed",
    "loss",
    "mask_ratio",
    "tokens",
    "lr",
    "period_ms",
    *(f"{phase}_ms" for phase in PHASES),
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Timing(_Part):
    """Where the wall time of a cell's training went. Seconds."""

    train_s: float
    """Sum of the periods of all measured steps."""
    pauses_s: dict[str, float]
    """Time off the clock by purpose: evaluation, log."""
    wall_s: float
    """From the first boundary to the end of the last step or pause, on the host's clock."""
    residual_share: float
    """|wall - train - pauses| / wall."""
    valid: bool
    """False where the residual is above 0.5 %."""
    untimed_s: float
    """The untimed steps before the first real one, compilation included."""
    compile_s: float | None
    """What untimed steps that met a new shape took beyond those that met none, where torch.compile was on."""
    instrument_us_per_step: float | None
    """Cost of marks, buffers and rows for one step, timed in isolation on this machine."""


class Phases(_Part):
    """Mean milliseconds a measured step spends in each phase."""

    data_ms: float
    projector_ms: float
    forward_ms: float
    backward_ms: float
    optimizer_ms: float
    stall_share: float
    """(period - projector - forward - backward - optimizer) / period: waiting for data and everything between."""
    projector_share: float


class Cost(_Part):
    """What a step costs apart from time."""

    parameters: int
    trainable_parameters: int
    projector_parameters: int
    flops_per_step: int | None
    """Forward and backward of the real step, projector included, 2 x MAC, mean over the mask schedule."""
    peak_memory_bytes: int | None
    peak_memory_kind: str
    """"allocated on the GPU" or "resident set of the process"."""
    compiled_graphs: int | None = None
    """Graphs that torch.compile made of the method, where it was on: more than a few say that shapes keep changing."""


class SavedWeights(_Part):
    """The trained weights that a cell has left in its folder."""

    file: str
    sha256: str
    """Of the whole file, hexadecimal."""
    num_bytes: int


class Check(_Part):
    """One look at the yardstick."""

    step: int
    train_s: float
    """Training time so far, pauses left out."""
    psnr_db: float
    """Mean over images of the PSNR over hidden pixels."""
    ssim: float
    """Mean SSIM of the composite image."""
    lpips: float | None = None
    """Mean LPIPS (AlexNet) of the composite and the true image; None where its weights are not there."""
    num_images: int


class Progressive(_Part):
    """One way to unveil the hidden tokens over several predictions, at the end of a run."""

    levels: int | None
    """Predictions asked for; 1 is one shot, None every level of the mask schedule."""
    order: str
    """Which tokens are unveiled first; "none" for one shot."""
    function_evaluations: int
    """Forward passes of the network for each image, at most."""
    psnr_db: float
    """Mean over images of the PSNR over hidden pixels."""
    num_images: int


class Yardstick(_Part):
    """The common yardstick for one cell."""

    image_size: int
    unit_px: int
    checks: list[Check]
    own_mask: str | None = None
    function_evaluations: int = 1
    projector: str | None = None
    ceiling_psnr_db: float | None = None
    """PSNR over the same hidden pixels of projector encode + decode without any mask."""
    ceiling_lpips: float | None = None
    """LPIPS of the composite with those pixels; None where it was not measured."""
    latent_leak_db: float | None = None
    """PSNR gained when the projector sees the whole image before latents are masked."""
    mean_colour_psnr_db: float | None = None
    """PSNR of filling hidden pixels with the mean colour of the visible ones: what no learning reaches."""
    nearest_unit_psnr_db: float | None = None
    """PSNR of filling every hidden unit with a copy of the nearest visible one: a second floor."""
    progressive: list[Progressive] = []
    """One shot and several levels on the same images, for methods that have levels."""


class AccuracyCheck(_Part):
    """One look at the validation images during fine-tuning."""

    step: int
    train_s: float
    """Training time of the fine-tuning so far, pauses left out."""
    top1: float
    """Percent of the validation images."""
    top5: float
    """Percent; with fewer than five classes the same as 100 times the share among all."""
    num_images: int


class Probe(_Part):
    """A cheap classifier on the frozen encoder's features, before fine-tuning."""

    name: str
    """linear or knn."""
    top1: float
    """Percent of the validation images."""
    top5: float
    setting: str
    """What was fitted and how, in words."""
    num_train: int
    num_val: int
    num_features: int
    seconds: float
    """Features and fit together."""


class Finetune(_Part):
    """Fine-tuning of one cell's encoder for classification."""

    num_steps: int
    num_train: int
    num_val: int
    num_classes: int
    parameters: int
    """Trained ones, the head included."""
    timing: Timing
    checks: list[AccuracyCheck]
    """The first is before any step."""
    mit_ms: float
    """Mean period of a fine-tuning step."""
    mat_at_1: float | None
    """Training seconds per percentage point of top-1 accuracy; None where `not_measured` says why."""
    mat_at_5: float | None
    losses: list[float]
    """Of every step."""
    settings: dict[str, Any]
    """`FinetuneRunConfig`."""
    notes: list[str] = []


class EvaluatorFacts(_Part):
    """A network that images were measured with."""

    name: str
    """As columns name it: Inception v3 (torch-fidelity), scenes features, ..."""
    weights: str
    """File or tag."""
    sha256: str
    """Of the weights as they lie on disk, hexadecimal."""
    resize: str
    """How images come to its input size, in words."""
    num_features: int | None = None


class ImageQuality(_Part):
    """Metrics over filled images of one cell, or over two folders."""

    num_images: int
    image_size: int
    what: str
    """What was compared, in words: "filled against real, 75 % hidden in units of 32 px", or two folders."""
    values: dict[str, float]
    """Figure -> value: fid, kid, kid_std, precision, recall, clip_score, lpips, psnr_db (hidden pixels where there is a
    mask), ssim. `fid_scenes`, `kid_scenes`, ... where the small evaluators measured it."""
    evaluators: dict[str, EvaluatorFacts]
    """By the kind of figure: features, clip, lpips."""
    real_digest: str
    """SHA-256 over the real images' pixels, 16 hex digits."""
    captions_digest: str | None = None
    """SHA-256 over the captions, 16 hex digits; None where the images have none."""
    seed: int
    """Of KID's subsets, and of what a method draws while it fills `settings.batch_size` images at a time."""
    fill_s: float | None = None
    """Seconds that filling took; not a figure of any table."""
    settings: dict[str, Any] = {}
    """`ImageQualityConfig` as it was measured with; empty for two folders."""
    not_measured: dict[str, str] = {}
    """Figure -> why it is missing; `pictures` and `samples` too, where they could not be made or saved."""
    notes: list[str] = []
    """What a reader of the figures should know."""


class QualityBounds(_Part):
    """What the columns of image quality can be at most and at least, over the same images: once for a suite."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    truth: ImageQuality
    """The real images in place of filled ones."""
    grey: ImageQuality
    """Hidden pixels filled with mid-grey."""


class RunRecord(_Part):
    """One finished or failed cell."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    suite: str
    row: str
    label: str
    method: str
    seed: int
    status: Literal["finished", "failed"]
    error: str | None = None
    config: dict[str, Any]
    config_hash: str
    command: str
    started_at: str
    environment: dict[str, Any]
    gpu_at_end: dict[str, Any] | None = None
    """The GPU's state when the cell ended: clocks under load, temperature, other processes."""
    num_steps: int
    data: dict[str, Any] = {}
    """What was trained on: counts, digest, files that could not be used."""
    timing: Timing | None = None
    phases: Phases | None = None
    cost: Cost | None = None
    efficiency: dict[str, Any] | None = None
    """`lmd_bench.metrics.efficiency.RunEfficiency.to_dict()`."""
    yardstick: Yardstick | None = None
    finetune: Finetune | None = None
    probes: list[Probe] = []
    image_quality: ImageQuality | None = None
    weights: SavedWeights | None = None
    """None where the run was told not to keep them."""
    not_measured: dict[str, str] = {}
    """Figure -> why it is missing."""
    notes: list[str] = []


class FinetuneRecord(_Part):
    """Fine-tuning of an imported encoder, which has no record of a training: `finetune.json` beside its weights."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    method: str
    config: dict[str, Any]
    """`ImportedConfig`."""
    data: dict[str, Any]
    command: str
    started_at: str
    environment: dict[str, Any]
    finetune: Finetune | None = None
    probes: list[Probe] = []
    not_measured: dict[str, str] = {}


class ProfileRound(_Part):
    """One fresh process of a speed run: a few steps of one row."""

    round: int
    row: str
    period_ms: list[float]
    phases_ms: dict[str, list[float]]
    mask_ratio: list[float | None]
    unmarked_period_ms: float | None = None
    """Mean period of the same steps with the inner marks off, in the same process."""
    peak_memory_bytes: int | None = None


class ProfileRow(_Part):
    """What a profiled row is, apart from its times."""

    label: str
    method: str
    optimizer: str
    parameters: int
    """Without those of a frozen projector."""
    batch_size: int
    flops_per_step: int | None
    projector: str | None = None
    projector_parameters: int = 0


class ProfileRecord(_Part):
    """A speed run: interleaved rounds in fresh processes."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    suite: str
    command: str
    started_at: str
    environment: dict[str, Any]
    reference: str | None
    precision: str
    compile: bool
    progress: str
    """Which part of the mask schedule the steps stand for, in words."""
    rows: dict[str, ProfileRow]
    rounds: list[ProfileRound]
    instrument_us_per_step: float
    """Marks, buffers and rows of one step timed in isolation."""
    not_measured: dict[str, str] = {}

    @property
    def batch_text(self) -> str:
        """The batch in words: one for all rows, or each row's own. The calibrator has its own in any case."""
        sizes = {row.batch_size for name, row in self.rows.items() if name != CALIBRATOR}
        return f"batch {sizes.pop()}" if len(sizes) == 1 else "each row at its own batch"


class InferenceRound(_Part):
    """One task of one row at one batch size, in one fresh process."""

    round: int
    row: str
    task: str
    """"reconstruct", "reconstruct, <levels> levels, <order>" or "sample"."""
    batch_size: int
    calls_ms: list[float]
    """Whole calls: images or nothing in, images out, projector included."""
    encode_ms: float | None
    """Mean of encoding one such batch by the projector; None in pixel space."""
    decode_ms: float | None
    """Mean of encoding and decoding one, less `encode_ms`; None in pixel space."""
    function_evaluations: int | None
    """Passes through the trained network in one call, counted; None where no trained layer was called."""
    peak_memory_bytes: int | None


class InferenceRow(_Part):
    """What a row of the inference table is, apart from its times."""

    label: str
    method: str
    parameters: int
    image_size: int
    projector: str | None = None
    own_mask: str | None = None
    """Set where the method cannot take the yardstick's masks."""


class NotMeasured(_Part):
    """A task that could not be done, and why."""

    row: str
    task: str | None
    """None: nothing of the row."""
    batch_size: int | None
    """None: at no batch size."""
    reason: str


class InferenceRecord(_Part):
    """What a reconstructed and a sampled image cost: interleaved rounds in fresh processes.

    Weights are random, but of rows that come trained.
    """

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    suite: str
    command: str
    started_at: str
    environment: dict[str, Any]
    reference: str | None
    precision: str
    batch_sizes: list[int]
    unit_px: int
    keep: float
    """The yardstick's masks: side of a unit, and the share of units that stay visible."""
    peak_memory_kind: str
    rows: dict[str, InferenceRow]
    rounds: list[InferenceRound]
    not_measured: list[NotMeasured] = []


class OptimizerCostRound(_Part):
    """One optimizer's turn in one fresh process."""

    round: int
    optimizer: str
    step_ms: list[float]
    untimed_ms: list[float]
    """The steps before, with first touch of memory and, where there is any, compilation."""
    compiled_graphs: int
    peak_memory_bytes: int | None


class OptimizerCostRecord(_Part):
    """Steps of optimizers alone, over the tensors of one model."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    command: str
    started_at: str
    environment: dict[str, Any]
    model: str
    num_tensors: int
    num_parameters: int
    untimed_steps: int
    rounds: list[OptimizerCostRound]
    not_measured: dict[str, str] = {}


CACHED_LATENTS = "cached latents"
"""Ends a ProfileRow's projector where its steps read latents that were encoded before."""
CALIBRATOR = "calibrator"
"""Row name of the calibrator in a ProfileRecord: timm vit_base_patch16_224, batch 4, fp32, torch.optim.AdamW."""


# -- files ------------------------------------------------------------------------------------------------------------


def cell_folder(out: Path, suite: str, row: str, seed: int) -> Path:
    """OUT/<suite>/<row>/seed-<n>."""
    return out / suite / row / f"seed-{seed}"


def write_json(path: Path, record: BaseModel) -> None:
    """Write a record in one piece: it is there complete or not at all, also after a crash."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".json.tmp")
    text = json.dumps(record.model_dump(by_alias=True), indent=1, allow_nan=False)
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read_run(path: Path) -> RunRecord:
    """A cell's `record.json`."""
    return _read(path, RunRecord)


def read_finetune(path: Path) -> FinetuneRecord:
    """The `finetune.json` beside imported weights."""
    return _read(path, FinetuneRecord)


def read_bounds(path: Path) -> QualityBounds:
    """A suite's `quality-bounds.json`."""
    return _read(path, QualityBounds)


def read_profile(path: Path) -> ProfileRecord:
    """A `profile.json`."""
    return _read(path, ProfileRecord)


def read_inference(path: Path) -> InferenceRecord:
    """An `inference*.json`."""
    return _read(path, InferenceRecord)


_Record = TypeVar("_Record", bound=BaseModel)


def _read(path: Path, model: type[_Record]) -> _Record:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise RecordError(f"{path}: not a readable record ({error}); delete it to run the cell again") from error
    schema = values.get("schema") if isinstance(values, dict) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{path}: a record of schema {schema}, this version reads schema {SCHEMA}: "
            "read it with the version that wrote it, or run the cell again with --force"
        )
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecordError(
            f"{path}: damaged record: {place}: {first['msg']}; delete it to run the cell again"
        ) from error


class StepWriter:
    """Appends rows to `steps.csv`, whole lines at a time, on disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._writer.writerow(STEP_COLUMNS)

    def append(self, rows: Iterable[Sequence[object]]) -> None:
        """Rows in the order of STEP_COLUMNS; None becomes an empty field. Floats are written to be read back equal."""
        self._writer.writerows(["" if value is None else value for value in row] for row in rows)
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_steps(path: Path) -> dict[str, list[float | None]]:
    """Columns of a `steps.csv`, empty fields as None. A last line cut off by a crash is left out."""
    columns: dict[str, list[float | None]] = {name: [] for name in STEP_COLUMNS}
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            header = next(reader, None)
            if header is None or tuple(header) != STEP_COLUMNS:
                raise RecordError(f"{path}: columns {header}, expected {list(STEP_COLUMNS)}")
            for row in reader:
                if len(row) != len(STEP_COLUMNS):
                    break
                for name, text in zip(STEP_COLUMNS, row, strict=True):
                    columns[name].append(float(text) if text else None)
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: not a readable table of steps ({error})") from error
    return columns


def find_runs(folder: Path) -> list[Path]:
    """All `record.json` files of a suite's folder (or of an OUT with several suites), in path order."""
    return sorted(folder.glob("**/seed-*/record.json"))
