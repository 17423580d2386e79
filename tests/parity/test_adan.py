"""Adan, timm's and our own, against runs of the authors' Adan (sail-sg/Adan) and of LMD's copy of it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from timm.optim.adan import Adan

from lmd_bench.harness.adan import CompiledAdan
from tests.parity.fill import load_reference

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor imports torch.jit

RUNS = load_reference("adan.reference")["runs"]
Maker = Callable[[Sequence[torch.nn.Parameter], bool], torch.optim.Optimizer]
OPTIONS = {"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.02}
MAKERS: dict[str, Maker] = {
    "timm loop": lambda params, no_prox: Adan(params, foreach=False, no_prox=no_prox, **OPTIONS),
    "timm foreach": lambda params, no_prox: Adan(params, foreach=True, no_prox=no_prox, **OPTIONS),
    "compiled": lambda params, no_prox: CompiledAdan(params, gather=False, no_prox=no_prox, **OPTIONS),
    "compiled, gathered": lambda params, no_prox: CompiledAdan(params, gather=True, no_prox=no_prox, **OPTIONS),
}


def run(make: Maker, no_prox: bool, dtype: torch.dtype, max_grad_norm: float | None) -> torch.Tensor:
    """The reference's set-up: p0[i] = sin(i / 2), g_t[i] = sin(i + 1 + t), 5 steps; one row per step."""
    i = torch.arange(10, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.sin(0.5 * i).to(dtype))
    optimizer = make([parameter], no_prox)
    rows = [parameter.detach().clone()]
    for t in range(5):
        parameter.grad = torch.sin(i + 1 + t).to(dtype)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        optimizer.step()
        rows.append(parameter.detach().clone())
    return torch.stack(rows).double()


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("name", RUNS)
def test_adan_equals_the_authors(name: str, make: Maker) -> None:
    dtype = torch.float64 if "float64" in name else torch.float32
    clip = 1.0 if "max_grad_norm=1" in name else None
    expected = torch.tensor(RUNS[name]["params_per_step"], dtype=torch.float64)
    actual = run(make, "no_prox" in name, dtype, clip)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    if clip is not None:  # torch adds 1e-6 to the norm it divides by, the authors add their eps of 1e-8
        tolerance = max(tolerance, 1e-10)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("no_prox", [False, True])
@pytest.mark.parametrize("name", ["compiled", "compiled, gathered"])
def test_ours_equals_timms_in_float64_over_a_clipped_run_with_changing_rate(name: str, no_prox: bool) -> None:
    shapes = [(8, 5), (5,), (1,), (3, 2, 4)]
    ends = []
    for make in (MAKERS["timm loop"], MAKERS[name]):
        generator = torch.Generator().manual_seed(0)

        def draw(shape: tuple[int, ...], generator: torch.Generator = generator) -> torch.Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        params = [torch.nn.Parameter(draw(shape)) for shape in shapes]
        optimizer = make(params, no_prox)
        for step in range(12):
            for parameter in params:
                parameter.grad = draw(tuple(parameter.shape))
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            for group in optimizer.param_groups:
                group["lr"] = 0.05 * (step + 1) / 12
            optimizer.step()
        ends.append(params)
    for ours, timms in zip(ends[1], ends[0], strict=True):
        torch.testing.assert_close(ours, timms, rtol=1e-12, atol=0)
