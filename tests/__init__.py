"""The tests, mirroring the source."""

import lmd_bench  # noqa: F401  (its torchvision guard has to stand before a test imports timm or diffusers)
