"""`lmd-bench lsp encode`: a latent cache of a data set's training images, made ahead of any run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lmd_bench.config import AugmentationConfig, DataConfig
from lmd_bench.data.folders import scan_folder
from lmd_bench.data.source import open_source
from lmd_bench.errors import ConfigError
from lmd_bench.harness.timer import clock_for
from lmd_bench.projector.cache import CacheMeta, DType, cache_bytes, cache_contents, require_disk
from lmd_bench.projector.cache_encode import BATCH_SIZE, OnProgress, make_cache, require_free_name
from lmd_bench.projector.config import config_of_path
from lmd_bench.projector.open import open_projector
from lmd_bench.suite_files import describe_validation


class EncodeOptions(BaseModel):
    """What to encode, with which projector, and how. Data and augmentation are named as in a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    projector: str
    """A projector's folder or `shipped:NAME`; its kind stands in its config.json."""
    scale: float = Field(default=1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "fp32"
    data: DataConfig
    augmentation: AugmentationConfig = AugmentationConfig()
    views: int = Field(default=4, ge=1)
    """Augmented views of every image."""
    view_seed: int = Field(default=0, ge=0)
    """View v is what a run with this seed sees of an image in its epoch v."""
    dtype: DType = "float32"
    batch_size: int = Field(default=BATCH_SIZE, ge=1)
    """Images encoded at once."""

    @classmethod
    def parse(cls, values: Mapping[str, Any], place: str) -> EncodeOptions:
        """Checked options. Raises ConfigError that begins with `place` and names the value."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(describe_validation(error, cls, place)) from error


def encode_data(
    options: EncodeOptions,
    out: Path,
    *,
    device: str,
    command: str,
    on_progress: OnProgress | None = None,
    log: Callable[[str], None] = lambda line: None,
) -> CacheMeta:
    """Write the cache `out`. Everything a user can get wrong is raised as a BenchError before images are made.

    `log` takes a line about a folder's images that were left out.
    """
    require_free_name(out)
    named = config_of_path(options.projector)
    chosen = named.model_copy(update={"scale": options.scale, "precision": options.precision})
    data = options.data
    index = scan_folder(data.path, data) if data.path is not None else None
    if index is not None and (warning := index.warning()) is not None:
        log(warning)
    contents = cache_contents(chosen, data, options.augmentation, data.image_size, index)
    require_disk(out, cache_bytes(chosen, contents, options.views, options.dtype))
    target = torch.device(device)
    projector = open_projector(chosen).to(target)
    source = open_source(data, data.image_size, options.augmentation, target, index=index)
    try:
        return make_cache(
            out,
            contents,
            projector,
            source,
            views=options.views,
            view_seed=options.view_seed,
            dtype=options.dtype,
            batch_size=options.batch_size,
            device=target,
            clock=clock_for(target),
            command=command,
            on_progress=on_progress,
        )
    finally:
        source.close()
