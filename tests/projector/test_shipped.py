"""The projectors that come with the package, each as good as its README says."""

from __future__ import annotations

import re

import pytest
import torch

from lmd_bench.data.scenes import Scenes
from lmd_bench.projector.codebook import codebook_use, count_codes
from lmd_bench.projector.config import config_of_path, projector_folder, shipped_names
from lmd_bench.projector.losses import quantise
from lmd_bench.projector.open import open_projector
from lmd_bench.projector.train_data import HELD_OUT_START, patch_pca_psnr

NUM_IMAGES, IMAGE_PX = 256, 64  # what their READMEs measured
FEW = 48  # decoded where all would take long


def stated_psnr_db(readme: str, figure: str) -> float:
    found = re.search(rf"{figure} \| ([\d.]+) dB", readme)
    assert found is not None, figure
    return float(found[1])


def test_all_shipped_weights_together_are_under_four_mebibytes() -> None:
    folders = [projector_folder(config_of_path(f"shipped:{name}")) for name in shipped_names()]
    assert folders
    assert sum(file.stat().st_size for folder in folders for file in folder.rglob("*")) < 4 * 2**20


@pytest.mark.parametrize("name", shipped_names())
@pytest.mark.parametrize(("decoded", "tolerance"), [(FEW, 0.4), pytest.param(NUM_IMAGES, 0.02, marks=pytest.mark.slow)])
def test_shipped_weights_reconstruct_held_out_scenes_as_their_readme_says(
    name: str, decoded: int, tolerance: float
) -> None:
    config = config_of_path(f"shipped:{name}")
    readme = (projector_folder(config) / "README.md").read_text()
    scenes, projector = Scenes(0, IMAGE_PX), open_projector(config)
    images = scenes.render(torch.arange(NUM_IMAGES) + HELD_OUT_START)
    wanted = images.float() / 255.0

    def psnr_db(latents: torch.Tensor, *, quantize: bool) -> float:
        with torch.no_grad():
            rebuilt = [projector.decode(part, quantize=quantize) for part in latents[:decoded].split(16)]
        return -10 * torch.log10((torch.cat(rebuilt) - wanted[:decoded]).square().mean()).item()

    latents = torch.cat([projector.encode(part) for part in wanted.split(16)])
    assert latents.shape == (NUM_IMAGES, 4, IMAGE_PX // 8, IMAGE_PX // 8)
    continuous = psnr_db(latents, quantize=False)
    assert continuous == pytest.approx(stated_psnr_db(readme, "PSNR of encode and decode"), abs=tolerance)
    pca = patch_pca_psnr(scenes.render(range(512)), images[:decoded], patch_size=8, num_components=4)
    assert continuous >= pca + 1.5
    assert ((latents.std((0, 2, 3)) > 0.3) & (latents.std((0, 2, 3)) < 3.0)).all()
    if projector.codebook is not None:
        stated = stated_psnr_db(readme, "PSNR with quantisation between")
        assert psnr_db(latents, quantize=True) == pytest.approx(stated, abs=tolerance)
        counts = count_codes(quantise(latents, projector.codebook).indices, len(projector.codebook))
        assert codebook_use(counts).usage >= 0.5
