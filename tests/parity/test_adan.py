"""timm's Adan against runs of the authors' Adan (sail-sg/Adan) and of LMD's copy of it."""

import pytest
import torch
from timm.optim import Adan

from tests.parity.fill import load_reference

RUNS = load_reference("adan.reference")["runs"]


def run(foreach: bool, no_prox: bool, dtype: torch.dtype, max_grad_norm: float | None) -> torch.Tensor:
    """The reference's set-up: p0[i] = sin(i / 2), g_t[i] = sin(i + 1 + t), 5 steps; one row per step."""
    i = torch.arange(10, dtype=torch.float64)
    parameter = torch.nn.Parameter(torch.sin(0.5 * i).to(dtype))
    options = {"lr": 1e-3, "betas": (0.98, 0.92, 0.99), "eps": 1e-8, "weight_decay": 0.02}
    optimizer = Adan([parameter], foreach=foreach, no_prox=no_prox, **options)
    rows = [parameter.detach().clone()]
    for t in range(5):
        parameter.grad = torch.sin(i + 1 + t).to(dtype)
        if max_grad_norm is not None:
            torch.nn.utils.clip_grad_norm_([parameter], max_grad_norm)
        optimizer.step()
        rows.append(parameter.detach().clone())
    return torch.stack(rows).double()


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("name", RUNS)
def test_timms_adan_equals_the_authors(name: str, foreach: bool) -> None:
    dtype = torch.float64 if "float64" in name else torch.float32
    clip = 1.0 if "max_grad_norm=1" in name else None
    expected = torch.tensor(RUNS[name]["params_per_step"], dtype=torch.float64)
    actual = run(foreach, "no_prox" in name, dtype, clip)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-7
    if clip is not None:  # torch adds 1e-6 to the norm it divides by, the authors add their eps of 1e-8
        tolerance = max(tolerance, 1e-10)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)
