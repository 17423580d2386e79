"""From a projector's configuration to the projector."""

from __future__ import annotations

from lmd_bench.projector.base import LatentProjector, NetworkProjector
from lmd_bench.projector.config import ProjectorConfig, ProjectorKind, check_projector, projector_folder


def open_projector(config: ProjectorConfig) -> LatentProjector:
    """Loads the projector that `config` names, frozen, on CPU; move it with `.to(device)`.

    Raises WeightsError where `check_projector` does, and for weights that do not fit their config.json.
    """
    info = check_projector(config, image_size=0)  # zero: divisible by every factor; the caller checks its own size
    if config.kind == "pixels":
        from lmd_bench.projector.pixels import PixelProjector

        return PixelProjector(name=info.name, scale=config.scale)
    import torch

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    network = _network_class(config.kind)
    return network.load(projector_folder(config), name=info.name, scale=config.scale, dtype=dtype)


def _network_class(kind: ProjectorKind) -> type[NetworkProjector]:
    # Imports here, because diffusers takes seconds to import and pixels do not need it; and each kind's alone.
    if kind == "kl":
        from lmd_bench.projector.kl import KLProjector

        return KLProjector
    if kind == "vq":
        from lmd_bench.projector.vq import VQProjector

        return VQProjector
    if kind == "tiny":
        from lmd_bench.projector.tiny import TinyProjector

        return TinyProjector
    from lmd_bench.projector.light import LightProjector

    return LightProjector
