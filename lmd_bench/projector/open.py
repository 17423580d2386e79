"""From a projector's configuration to the projector."""

from __future__ import annotations

from lmd_bench.projector.base import LatentProjector
from lmd_bench.projector.config import ProjectorConfig, check_projector, projector_folder


def open_projector(config: ProjectorConfig) -> LatentProjector:
    """Loads the projector that `config` names, frozen, on CPU; move it with `.to(device)`.

    Raises WeightsError where `check_projector` does, and for weights that do not fit their config.json.
    """
    info = check_projector(config, image_size=0)  # zero: divisible by every factor; the caller checks its own size
    if config.kind == "pixels":
        from lmd_bench.projector.pixels import PixelProjector

        return PixelProjector(name=info.name, scale=config.scale)
    # Here, because diffusers takes seconds to import and pixels do not need it.
    import torch

    from lmd_bench.projector.kl import KLProjector, load_autoencoder

    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    model = load_autoencoder(projector_folder(config), dtype)
    return KLProjector(model, name=info.name, scale=config.scale)
