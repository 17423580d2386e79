"""Words that `list`, `show` and `doctor` print. No torch."""

from __future__ import annotations

from importlib import resources
from typing import Any

from pydantic import BaseModel

DATASETS = {
    "scenes": "generated images with labels and captions, any size, nothing to download",
    "folder": "your own images: --data DIR (class folders, train/ and val/, or flat)",
}
METRICS = {
    "MIT": "mean iteration time, ms: whole run, and the window up to t90",
    "MLT": "mean loss-decrease time, s per valid decrease = MIT x MLI",
    "MLI": "mean loss-decrease iterations per valid decrease (relative, fraction, grid, slope)",
    "TTQ": "training time until the common yardstick reaches a target and holds it",
    "PSNR": "dB over hidden pixels of held-out images",
    "SSIM": "of the composite image",
    "step cost": "phases, projector share, FLOPs, memory, ratio to the calibrator (lmd-bench profile)",
    "MAT": "mean accuracy-increase time: not built yet",
    "FID, KID": "not built yet",
    "CLIP-score": "not built yet",
    "LPIPS": "not built yet",
}


def describe_options(model: type[BaseModel], prefix: str = "") -> list[str]:
    """`name: type = default` for every option of a method, nested ones with dotted names."""
    lines = []
    for name, info in model.model_fields.items():
        annotation: Any = info.annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            lines.extend(describe_options(annotation, f"{prefix}{name}."))
            continue
        kind = annotation.__name__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")
        default = "required" if info.is_required() else f"= {info.get_default(call_default_factory=True)!r}"
        lines.append(f"{prefix}{name}: {kind} {default}")
    return lines


def shipped_weights() -> dict[str, str]:
    """Weights inside the package -> their size, or that they are missing."""
    folder = resources.files("lmd_bench") / "projector" / "weights"
    found = {}
    for entry in sorted(folder.iterdir(), key=lambda item: item.name) if folder.is_dir() else []:
        file = entry / "diffusion_pytorch_model.safetensors"
        if entry.is_dir():
            there = file.is_file()
            state = f"found, {len(file.read_bytes()) / 2**20:.1f} MiB" if there else "missing: reinstall lmd-bench"
            found[f"shipped:{entry.name}"] = state
    return found
