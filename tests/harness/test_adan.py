"""Our compiled Adan as an optimizer: graphs, states, gradients that are missing, machines without a compiler."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch._dynamo
import torch._inductor.config
from helpers.methods import Tiny, TinyConfig
from timm.optim.adan import Adan
from torch import Tensor

from lmd_bench.config import LearningRateConfig, OptimizerConfig, RecipeConfig
from lmd_bench.errors import ConfigError
from lmd_bench.harness.adan import STATE_NAMES, CompiledAdan, compile_obstacle
from lmd_bench.harness.optim import build_optimizer, check_optimizer, set_lr
from lmd_bench.method import DataSpec

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # inductor imports torch.jit

COMPILED = OptimizerConfig(name="adan", betas=(0.98, 0.92, 0.99), weight_decay=0.02, implementation="compiled")
GATHER = pytest.mark.parametrize("gather", [False, True], ids=["one by one", "gathered"])


def parameters(*shapes: tuple[int, ...]) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in shapes]


def fill_gradients(tensors: list[torch.nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors:
        tensor.grad = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)


def take_steps(optimizer: torch.optim.Optimizer, tensors: list[torch.nn.Parameter], steps: range) -> None:
    for step in steps:
        fill_gradients(tensors, step)
        set_lr(optimizer, 1e-3 * (step + 1))
        optimizer.step()


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def assert_equal(found: list[torch.nn.Parameter], expected: list[torch.nn.Parameter]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@GATHER
def test_one_graph_serves_every_shape_rate_and_decay(gather: bool) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    tensors = parameters((3, 5), (7,), (2, 3, 4), (70_000,))
    groups = [{"params": tensors[:2], "weight_decay": 0.1}, {"params": tensors[2:], "weight_decay": 0.0}]
    take_steps(CompiledAdan(groups, gather=gather), tensors, range(4))
    assert compiled_graphs() == 1


@GATHER
def test_a_state_dict_takes_the_run_on_where_it_was(gather: bool) -> None:
    tensors = parameters((3, 5), (7,))
    optimizer = CompiledAdan(tensors, weight_decay=0.1, gather=gather)
    take_steps(optimizer, tensors, range(3))
    saved = copy.deepcopy(optimizer.state_dict())
    assert {name for entry in saved["state"].values() for name in entry} == set(STATE_NAMES)
    resumed = [torch.nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    other = CompiledAdan(resumed, weight_decay=0.5, gather=gather)
    take_steps(other, resumed, range(1))  # what it has gathered by now must not outlive the load
    for old, new in zip(tensors, resumed, strict=True):
        new.data.copy_(old.data)
    other.load_state_dict(saved)
    take_steps(optimizer, tensors, range(3, 6))
    take_steps(other, resumed, range(3, 6))
    for a, b in zip(tensors, resumed, strict=True):
        assert torch.equal(a, b)
        for name in STATE_NAMES:
            assert torch.equal(optimizer.state[a][name], other.state[b][name])


def test_both_ways_of_calling_the_kernel_share_their_states() -> None:
    tensors = parameters((3, 5), (7,))
    optimizer = CompiledAdan(tensors, gather=True)
    take_steps(optimizer, tensors, range(2))
    resumed = [torch.nn.Parameter(tensor.detach().clone()) for tensor in tensors]
    other = CompiledAdan(resumed, gather=False)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0]["gather"] = False
    other.load_state_dict(saved)
    take_steps(optimizer, tensors, range(2, 4))
    take_steps(other, resumed, range(2, 4))
    assert_equal(resumed, tensors)


@GATHER
def test_parameters_without_a_gradient_stay_as_they_are_and_join_later(gather: bool) -> None:
    tensors, expected = (parameters((4,), (2, 3), (5,)) for _ in range(2))
    optimizers = CompiledAdan(tensors, gather=gather), Adan(expected, foreach=False)
    before = tensors[1].detach().clone()
    for own, optimizer in zip((tensors, expected), optimizers, strict=True):
        fill_gradients(own, 0)
        own[1].grad = None
        optimizer.step()
    assert torch.equal(tensors[1], before)
    for own, optimizer in zip((tensors, expected), optimizers, strict=True):
        take_steps(optimizer, own, range(1, 4))
    assert_equal(tensors, expected)


@GATHER
@pytest.mark.parametrize("flip_gradient", [False, True])
def test_transposed_storage_is_updated_in_place(gather: bool, flip_gradient: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    value, grad = (torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    plain, transposed = torch.nn.Parameter(value.clone()), torch.nn.Parameter(value.t().contiguous().t())
    plain.grad = grad.clone()
    transposed.grad = grad.t().contiguous().t() if flip_gradient else grad.clone()
    address = transposed.data_ptr()
    for parameter in (plain, transposed):
        CompiledAdan([parameter], lr=0.1, weight_decay=0.1, gather=gather).step()
    assert transposed.data_ptr() == address
    assert not transposed.is_contiguous()
    assert torch.equal(plain, transposed)


def test_a_closure_is_called_with_gradients_on() -> None:
    (tensor,) = parameters((3,))
    optimizer = CompiledAdan([tensor])

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = tensor.square().sum()
        loss.backward()
        return loss

    first = float(optimizer.step(closure).detach())  # type: ignore[arg-type]
    assert float(tensor.detach().square().sum()) < first


@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"eps": -1e-8}, {"weight_decay": -0.1}, {"betas": (0.98, 1.0, 0.99)}]
)
def test_constants_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must be >= 0"):
        CompiledAdan(parameters((3,)), **options)


def test_a_recipe_can_ask_for_it() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    recipe = RecipeConfig(batch_size=4, optimizer=COMPILED, lr=LearningRateConfig(base=1e-3, per_images=None))
    method = Tiny(TinyConfig(), DataSpec(16))
    optimizer = build_optimizer(method, recipe)
    assert isinstance(optimizer, CompiledAdan)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.02, 0.0]
    assert optimizer.defaults["betas"] == (0.98, 0.92, 0.99)
    assert compiled_graphs() == 1
    for parameter in method.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert compiled_graphs() == 1  # nothing was left for the first step to compile


def test_only_adan_has_a_compiled_form() -> None:
    with pytest.raises(ValueError, match="adamw has no compiled implementation"):
        OptimizerConfig(name="adamw", implementation="compiled")


def test_without_a_compiler_it_is_refused_with_what_to_choose_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert compile_obstacle("cpu") is None
    no_compiler = torch._inductor.config.patch({"cpp.cxx": ("/nonexistent/g++",)})
    with (
        no_compiler,
        pytest.raises(ConfigError, match=r"compiled cannot be used on cpu: there is no C\+\+ compiler.*choose loop"),
    ):
        check_optimizer(COMPILED, "cpu")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"on cuda: the package triton is not installed.*choose foreach"):
        check_optimizer(COMPILED, "cuda:0")
    check_optimizer(OptimizerConfig(), "cpu")


@pytest.mark.parametrize(
    ("there", "named", "words"),
    [
        ((), None, "and there is none"),
        (("gcc",), "icx", "there is no icx, which the variable CC names"),
        (("gcc",), None, None),
        (("clang",), None, None),
        (("icx",), "icx", None),
    ],
)
def test_on_a_gpu_triton_needs_a_c_compiler_too(
    there: tuple[str, ...], named: str | None, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setattr("shutil.which", lambda name: name if name in there else None)
    monkeypatch.delenv("CC", raising=False)
    if named is not None:
        monkeypatch.setenv("CC", named)
    obstacle = compile_obstacle("cuda")
    assert obstacle is None if words is None else words in (obstacle or "")
