"""The suites at published size hold the authors' models: numbers of parameters, counted without making any."""

from __future__ import annotations

import warnings

import pytest
import torch

from lmd_bench.method import DataSpec, Method
from lmd_bench.registry import load_method
from lmd_bench.suite_files import load_suite

# the authors' models as counted from their code, but for MAE's larger ones (layer by layer in test_mae) and LDM, whose
# published 274,056,163 belong to 3 latent channels: a fourth one adds 2 x 224 x 9 weights and a bias
COUNTS = {
    "baselines": {
        "mae": 111_907_840,
        "mae-l": 329_541_888,
        "mae-h": 657_074_508,
        "simmim-swin-b": 89_874_104,
        "simmim-vit-b": 86_256_720,
        "greenmim-swin-b": 92_022_968,
        "um-mae-vit-b": 92_994_304,
        "um-mae-vit-b-d8": 111_908_608,
        "um-mae-swin-t": 35_905_418,
        "um-mae-pvt-s": 28_915_776,
        "ddim-cifar": 35_746_307,
        "iddpm-cifar": 52_546_438,
        "iddpm-in64": 121_063_942,
        "ddpm-256": 113_673_219,
        "ddim-256": 113_673_219,
        "iddpm-256": 113_676_678,
        "ldm-bedrooms": 274_056_163 + 2 * 224 * 9 + 1,
    },
    "in1k": {
        "mae": 111_907_840,
        "simmim": 89_874_104,
        "simmim-vit-b": 86_256_720,
        "greenmim": 92_022_968,
        "um-mae-vit-b": 92_994_304,
        "um-mae-pvt-s": 28_915_776,
        "um-mae-swin-t": 35_905_418,
    },
    "lsun-bedrooms": {
        "ddpm": 113_673_219,
        "iddpm": 113_676_678,
        "ddim": 113_673_219,
        "ldm": 274_056_163 + 2 * 224 * 9 + 1,
    },
}


@pytest.mark.parametrize(("suite", "row"), [(suite, row) for suite, rows in COUNTS.items() for row in rows])
def test_a_row_at_published_size_has_the_authors_number_of_parameters(suite: str, row: str) -> None:
    method = on_meta(suite, row)
    frozen = {id(p) for name, p in method.named_parameters() if name.startswith("projector.")}
    assert sum(p.numel() for p in method.parameters() if id(p) not in frozen) == COUNTS[suite][row]


def test_every_row_of_the_baselines_suite_is_counted() -> None:
    assert set(load_suite("baselines").methods) == set(COUNTS["baselines"])


def on_meta(suite_name: str, row_name: str) -> Method:
    suite = load_suite(suite_name)
    row = suite.methods[row_name]
    method_class = load_method(row.method, {})
    options, data = method_class.Config.model_validate(row.options), DataSpec(row.image_size or suite.data.image_size)
    method_class.check(options, data)
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a projector's weights have nowhere to go on this device
        return method_class(options, data)
