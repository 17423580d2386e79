"""Adan (Xie et al. 2022, arXiv 2208.06677) with its whole update in one compiled pass over memory.

Per element and step t, with gradient g: d = g - g_prev (0 at the first step), m = b1 m + (1-b1) g,
v = b2 v + (1-b2) d, n = b3 n + (1-b3) (g + b2 d)^2, and the parameter moves by
lr (m / (1-b1^t) + b2 v / (1-b2^t)) / (sqrt(n) / sqrt(1-b3^t) + eps), betas in the convention of the authors' code.

Written out operation by operation, as timm does, this passes over memory about forty times; fused it reads six
tensors and writes five. torch.compile makes the kernel, by C++ on a CPU and by Triton on a GPU. It is compiled for
one dimension of any length, so that one graph serves every tensor of every model, and everything that changes from
step to step or differs between groups (rate, decay, bias corrections) reaches it in one small tensor.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

STATE_NAMES = ("exp_avg", "exp_avg_diff", "exp_avg_sq", "prev_grad")
"""m, v, n and g_prev: what is kept for each parameter, in its shape."""


class CompiledAdan(torch.optim.Optimizer):
    """Adan by compiled kernels; timm's `Adan` to rounding.

    On a CPU one kernel is called for each tensor and updates everything in place. On a GPU a launch for each tensor
    would cost more than the work, so gradients are gathered and the kernel runs once for all tensors of a group.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        no_prox: bool = False,
        gather: bool | None = None,
    ) -> None:
        """`no_prox`: decay as AdamW does, before the update, instead of by the proximal step after it.

        `gather`: one kernel for all tensors of a group; None: on CUDA devices only. Gradients are not clipped here.
        Raises ValueError for constants out of range.
        """
        if lr < 0 or eps < 0 or weight_decay < 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(
                "lr, eps and weight_decay must be >= 0 and betas in [0, 1), "
                f"got {lr}, {eps}, {weight_decay} and {betas}"
            )
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "no_prox": no_prox}
        super().__init__(params, {**defaults, "gather": gather})
        self._make_kernels()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also called by `load_state_dict`: what was gathered belongs to the old state."""
        super().__setstate__(state)
        self._make_kernels()

    def _make_kernels(self) -> None:
        self._update: Callable[..., None] = torch.compile(_update, dynamic=True, fullgraph=True)
        self._replace_by_step: Callable[..., None] = torch.compile(_replace_by_step, dynamic=True, fullgraph=True)
        self._gathered: dict[tuple[int, torch.device, torch.dtype], _Gathered] = {}

    @torch.no_grad()
    def compile_kernels(self) -> None:
        """Compile for every device and dtype there is, so that the first step is no longer than others."""
        for group in self.param_groups:
            for device, dtype in dict.fromkeys((p.device, p.dtype) for p in group["params"]):
                tensors = [torch.zeros(64, device=device, dtype=dtype) for _ in range(6)]
                coefficients = _coefficients({**group, "step": 1}, device, dtype)
                if _gathers(group, device):
                    self._replace_by_step(*tensors[1:], coefficients)
                else:
                    self._update(*tensors, coefficients)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step over all parameters that have a gradient. Returns what `closure` does, else None."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            group["step"] = group.get("step", 0) + 1
            by_kind: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.numel() > 0:
                    self._begin_state(parameter)
                    by_kind.setdefault((parameter.device, parameter.dtype), []).append(parameter)
            for (device, dtype), parameters in by_kind.items():
                if _gathers(group, device):
                    self._step_gathered((index, device, dtype), parameters, group)
                else:
                    self._step_each(parameters, _coefficients(group, device, dtype))
        return loss

    def _begin_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            for name in STATE_NAMES[:3]:
                state[name] = torch.zeros_like(parameter, memory_format=torch.contiguous_format)
            state["prev_grad"] = parameter.grad.clone(memory_format=torch.contiguous_format)  # type: ignore[union-attr]

    def _step_each(self, parameters: Sequence[Tensor], coefficients: Tensor) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            flat = _flattened(parameter)
            self._update(
                flat, _flattened(parameter.grad), *(_flattened(state[name]) for name in STATE_NAMES), coefficients
            )
            if not parameter.is_contiguous():  # then `flat` is a copy
                parameter.copy_(flat.view(parameter.shape))

    def _step_gathered(
        self, key: tuple[int, torch.device, torch.dtype], parameters: list[Tensor], group: dict[str, Any]
    ) -> None:
        gathered = self._gathered.get(key)
        if gathered is None or not gathered.holds(parameters):
            gathered = self._gathered[key] = _Gathered(parameters, self.state)
        steps = gathered.compute_steps(self._replace_by_step, _coefficients(group, *key[1:]))
        keep, shrink = _decay(group)
        if keep != 1:
            torch._foreach_mul_(parameters, keep)
        torch._foreach_sub_(parameters, steps)
        if shrink != 1:
            torch._foreach_mul_(parameters, shrink)


class _Gathered:
    """The state of several parameters end to end; their entries in the optimizer's state are views of it.

    Two buffers take turns as gradient and as previous gradient, so that the gathered gradient need not be copied
    again to be remembered; the step is written over the previous gradient, which is not needed any more.
    """

    def __init__(self, parameters: Sequence[Tensor], state: dict[Tensor, Any]) -> None:
        self._parameters = list(parameters)
        self._state = [state[parameter] for parameter in parameters]
        self._moments = [self._join(name) for name in STATE_NAMES[:3]]
        self._previous = self._join("prev_grad")
        self._grad = torch.empty_like(self._previous)

    def _join(self, name: str) -> Tensor:
        joined = torch.cat([entry[name].reshape(-1) for entry in self._state])
        self._point(name, joined)
        return joined

    def _point(self, name: str, joined: Tensor) -> None:
        for entry, view in zip(self._state, self._views(joined), strict=True):
            entry[name] = view

    def _views(self, joined: Tensor) -> list[Tensor]:
        parts = joined.split([parameter.numel() for parameter in self._parameters])
        return [part.view(parameter.shape) for part, parameter in zip(parts, self._parameters, strict=True)]

    def holds(self, parameters: Sequence[Tensor]) -> bool:
        """Whether it was made for just these; a parameter may be without a gradient at times."""
        return [id(parameter) for parameter in parameters] == [id(parameter) for parameter in self._parameters]

    def compute_steps(self, kernel: Callable[..., None], coefficients: Tensor) -> list[Tensor]:
        """Advance the state by the present gradients. Returns what to subtract from each parameter."""
        torch.cat([p.grad.reshape(-1) for p in self._parameters if p.grad is not None], out=self._grad)
        kernel(self._grad, *self._moments, self._previous, coefficients)
        self._previous, self._grad = self._grad, self._previous
        self._point("prev_grad", self._previous)
        return self._views(self._grad)


# -- the kernels ------------------------------------------------------------------------------------------------------


def _step_of(grad: Tensor, m: Tensor, v: Tensor, n: Tensor, prev_grad: Tensor, coefficients: Tensor) -> Tensor:
    """Advance m, v and n in place; (N,) what to subtract from the parameter before decay."""
    c = coefficients.unbind()
    difference = grad - prev_grad
    m.add_((grad - m) * c[0])
    v.add_((difference - v) * c[1])
    n.add_(((grad + difference * c[2]).square() - n) * c[3])
    return (m * c[4] + v * c[5]) / (n.sqrt() * c[6] + c[7])


def _update(
    parameter: Tensor, grad: Tensor, m: Tensor, v: Tensor, n: Tensor, prev_grad: Tensor, coefficients: Tensor
) -> None:
    """The whole step of one flattened parameter (N,), in place."""
    step = _step_of(grad, m, v, n, prev_grad, coefficients)
    parameter.copy_((parameter * coefficients[8] - step) * coefficients[9])
    prev_grad.copy_(grad)


def _replace_by_step(grad: Tensor, m: Tensor, v: Tensor, n: Tensor, prev_grad: Tensor, coefficients: Tensor) -> None:
    """Advance the state and leave the step where the previous gradient was."""
    prev_grad.copy_(_step_of(grad, m, v, n, prev_grad, coefficients))


def _flattened(tensor: Tensor) -> Tensor:
    """(N,) the same memory, or a copy where it is not contiguous.

    `data`: not a view in autograd's eyes. Of a view torch.compile also checks the base, and would compile anew for
    every number of dimensions.
    """
    return tensor.reshape(-1).data


def _coefficients(group: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(10,) the constants of this step for the kernels, computed in float64.

    One tensor rather than ten: every argument of a compiled function costs a check at every call. In float32 for
    parameters of less: the kernel computes in that.
    """
    beta1, beta2, beta3 = group["betas"]
    count, lr = group["step"], group["lr"]
    values = (
        1 - beta1,
        1 - beta2,
        beta2,
        1 - beta3,
        lr / (1 - beta1**count),
        lr * beta2 / (1 - beta2**count),
        1 / math.sqrt(1 - beta3**count),
        group["eps"],
        *_decay(group),
    )
    made = torch.tensor(values, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return made.to(device, non_blocking=True)  # so small a copy is staged by the driver: the host does not wait


def _gathers(group: dict[str, Any], device: torch.device) -> bool:
    return device.type == "cuda" if group["gather"] is None else bool(group["gather"])


def _decay(group: dict[str, Any]) -> tuple[float, float]:
    """Factors of the parameter before and after the step is subtracted."""
    amount = group["lr"] * group["weight_decay"]
    return (1 - amount, 1.0) if group["no_prox"] else (1.0, 1 / (1 + amount))


def compile_obstacle(device_type: str) -> str | None:
    """Why torch.compile cannot make kernels for "cpu" or "cuda" on this machine, None where it can."""
    if device_type == "cuda":
        return _triton_obstacle()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "there is no C++ compiler (g++ or clang++, or what the variable CXX names)"
    return None


def _triton_obstacle() -> str | None:
    """Triton builds a launcher in C for every kernel, by what CC names, else by gcc or clang."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    named = os.environ.get("CC")
    if named and shutil.which(named) is None:
        return f"Triton needs a C compiler, and there is no {named}, which the variable CC names"
    if not named and shutil.which("gcc") is None and shutil.which("clang") is None:
        return "Triton needs a C compiler, and there is none (gcc or clang, or what the variable CC names)"
    return None
