"""Before any test module imports torchvision, its guard has to be in place."""

import lmd_bench  # noqa: F401
