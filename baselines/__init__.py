"""Baseline methods, a file each, found by name through the entry points of the group `lmd_bench.methods`."""

import lmd_bench  # noqa: F401  (its torchvision guard has to stand before timm or diffusers is imported)
