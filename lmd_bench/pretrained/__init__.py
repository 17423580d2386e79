"""Published weights that figures need: what they are, where they are found, and whether they are the right ones."""

from lmd_bench.pretrained.manifest import Manifest, WeightsEntry, read_manifest
from lmd_bench.pretrained.store import WeightsStatus, WeightsStore

__all__ = ["Manifest", "WeightsEntry", "WeightsStatus", "WeightsStore", "read_manifest"]
