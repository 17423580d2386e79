"""lmd-bench: what it costs to train models that reconstruct images, measured side by side."""

from lmd_bench._torchvision import install_guard

__version__ = "0.1.0"

install_guard()
