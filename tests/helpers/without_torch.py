"""Python that runs where torch cannot be imported."""

from __future__ import annotations

import subprocess
import sys

_BLOCKER = """
import sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ImportError("torch is not allowed here")

sys.meta_path.insert(0, NoTorch())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter in which importing torch fails."""
    return subprocess.run([sys.executable, "-c", _BLOCKER + code], capture_output=True, text=True, check=False)
