"""Lets `import torchvision` succeed beside a CPU-only torch wheel; does nothing anywhere else.

The only Linux wheel of torchvision on some package indexes is built for CUDA. Next to a CPU build of torch its
extension library cannot be loaded, and the import ends with `operator torchvision::nms does not exist`
(pytorch/vision#9077). Everything this project and its dependencies use of torchvision is pure Python, so it is
enough to declare the two missing operators and import again.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MISSING_OPERATOR = "torchvision::nms"
_SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _GuardLoader(importlib.abc.Loader):
    """Runs torchvision's own loader; on the known failure declares the operators and runs it once more."""

    libraries: list[Any]

    def __init__(self, original: importlib.abc.Loader) -> None:
        self.original = original
        self.libraries = []  # torch.library handles: the declarations live as long as they do

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        try:
            self.original.exec_module(module)
        except RuntimeError as error:
            if _MISSING_OPERATOR not in str(error):
                raise
            for name in [n for n in sys.modules if n.startswith("torchvision.")]:
                del sys.modules[name]
            import torch

            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                library.define(operator + _SIGNATURE)
            self.libraries.append(library)
            self.original.exec_module(module)

    def __getattr__(self, name: str) -> Any:
        """Anything else a caller asks of the loader (get_data, get_source, ...) is answered by torchvision's own."""
        return getattr(self.original, name)


class _GuardFinder(importlib.abc.MetaPathFinder):
    """Finds torchvision only, once, and wraps its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _GuardLoader(spec.loader)
        return spec


def install_guard() -> None:
    """Put the guard first on `sys.meta_path`. Imports nothing; acts only when somebody imports torchvision."""
    if "torchvision" in sys.modules or any(isinstance(f, _GuardFinder) for f in sys.meta_path):
        return
    sys.meta_path.insert(0, _GuardFinder())
