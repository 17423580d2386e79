"""Gaussian diffusion in closed form, shared by the diffusion baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ForwardProcess(nn.Module):
    """q(x_t | x_0) = N(sqrt(a_t) x_0, (1 - a_t) I), a_t the cumulative product of 1 - beta (Ho et al. 2020, eq. 4).

    The two factors are buffers, so they move with the model and a training step copies nothing to the device.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, alphas_cumprod: Tensor) -> None:
        super().__init__()
        for name, table in {"signal": alphas_cumprod, "noise": 1 - alphas_cumprod}.items():
            # empty + copy_: the buffer then lies on the device that modules are being made on (meta, for FLOPs)
            self.register_buffer(name, torch.empty(table.shape).copy_(table.sqrt()), persistent=False)

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """x_t (B, C, H, W) from x_0, standard normal noise of that shape and `timesteps` (B,) int64."""
        signal, scale = (table[timesteps].view(-1, 1, 1, 1) for table in (self.signal, self.noise))
        return torch.addcmul(signal * clean, scale, noise)
