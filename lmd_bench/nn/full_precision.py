"""Products in full single precision, whatever the process allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """No TF32 inside the block; afterwards everything is as it was.

    CUDA's convolutions use TF32 unless they are told not to. Its 10 bits of mantissa would move figures away from those
    of a CPU and of other programs. It is for the code of one thread: the settings are the process's.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    matmul_tf32, cudnn_tf32 = matmul.allow_tf32, cudnn.allow_tf32
    try:
        _allow(matmul_tf32=False, cudnn_tf32=False)
        yield
    finally:
        _allow(matmul_tf32=matmul_tf32, cudnn_tf32=cudnn_tf32)


def _allow(*, matmul_tf32: bool, cudnn_tf32: bool) -> None:
    """Sets what is not so already: setting a default marks it as chosen, and torch complains of mixed choices."""
    if torch.backends.cuda.matmul.allow_tf32 != matmul_tf32:
        torch.backends.cuda.matmul.allow_tf32 = matmul_tf32
    if torch.backends.cudnn.allow_tf32 != cudnn_tf32:
        torch.backends.cudnn.allow_tf32 = cudnn_tf32
