"""Loads lmd_bench before any test module imports diffusers: it makes torchvision importable beside a CPU torch."""

import lmd_bench  # noqa: F401
