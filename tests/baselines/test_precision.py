"""Every method's step in bfloat16 and compiled, against the same step in float32 and eager."""

from __future__ import annotations

import pytest
import torch
from helpers.official import CASES
from torch import Tensor

from lmd_bench.harness.loop import autocast
from lmd_bench.harness.noise import noise_batch
from lmd_bench.method import Method, inputs_of
from lmd_bench.registry import load_method

CPU = torch.device("cpu")


def can_be_compiled(name: str) -> bool:
    method_class = load_method(CASES[name].method, {})
    return method_class.compile_obstacle(method_class.Config.model_validate(CASES[name].options)) is None


COMPILED = [name for name in CASES if can_be_compiled(name)]


def loss_of(method: Method, precision: str = "fp32") -> Tensor:
    """The loss of one step on noise under one seed, as the loop makes it."""
    batch = noise_batch(method, 2, CPU)
    torch.manual_seed(0)
    inputs = inputs_of(method, batch)
    with autocast(CPU, precision):
        return method.training_step(inputs, step=1, total_steps=10).loss


@pytest.mark.parametrize("name", CASES)
def test_a_step_in_bfloat16_is_finite_and_near_that_in_float32(name: str) -> None:
    method = CASES[name].build().train()
    loss = loss_of(method, "bf16")
    loss.backward()
    trained = [parameter for parameter in method.parameters() if parameter.requires_grad]
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in trained)
    assert loss.item() == pytest.approx(loss_of(method).item(), rel=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_network_gives_the_loss_of_an_eager_one(name: str) -> None:
    import torch._dynamo

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    method = CASES[name].build().train()
    wanted = loss_of(method).item()
    for module in method.compiled_modules():
        module.forward = torch.compile(module.forward, backend="aot_eager")
    loss = loss_of(method)
    loss.backward()
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1


def test_only_greenmims_groups_stand_in_the_way_of_compilation() -> None:
    assert set(CASES) - set(COMPILED) == {"greenmim"}
