"""Loads lmd_bench before any test module imports diffusers (it makes torchvision importable beside a CPU torch), and
says on how many threads a test computes."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path

import pytest
import torch

import lmd_bench  # noqa: F401

_FULL_SIZE = Path(__file__).parent / "parity"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Models of published size, in the parity tests and in slow ones, get all threads; tiny ones get a single one.

    Threads that wait for each other at every small operation make tiny models several times slower than one thread.
    """
    threads = torch.get_num_threads()
    if _FULL_SIZE not in item.path.parents and item.get_closest_marker("slow") is None:
        torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(threads)
