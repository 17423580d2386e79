"""Seconds that features take here and by torch-fidelity's entry point, on the same network. Not a test.

Run it from the repository on a quiet machine: `python tests/metrics/bench_features.py [--images 500] [--layer 64]
[--rounds 5]`. The network is torch-fidelity's Inception with random weights; rounds alternate between the two sides.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

import lmd_bench  # noqa: F401 - makes torchvision importable beside a CPU torch
from lmd_bench.metrics.features import InceptionFeatures
from lmd_bench.metrics.image_metrics import DistributionMetrics, DistributionOptions


class _Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> Tensor:
        return self._images[index]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=500, help="on each side")
    parser.add_argument("--size", type=int, default=64, help="of an image, px")
    parser.add_argument("--layer", default="64", help="of Inception: 64, 192, 768 or 2048")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args()


def main() -> None:
    options = _parse()
    from test_features import he_initialised_inception
    from torch_fidelity import calculate_metrics

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = (options.images, 3, options.size, options.size)
    real, fake = (torch.randint(0, 256, shape, dtype=torch.uint8) for _ in range(2))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "inception.pth"
        he_initialised_inception(path)

        def theirs() -> None:
            calculate_metrics(
                input1=_Images(fake), input2=_Images(real), fid=True, feature_layer_fid=options.layer,
                feature_extractor="inception-v3-compat", feature_extractor_weights_path=str(path),
                cuda=device.type == "cuda", batch_size=options.batch, cache=False, save_cpu_ram=True, verbose=False,
            )  # fmt: skip

        def ours() -> None:
            extractor = InceptionFeatures.open(path, device, layer=options.layer)
            metric = DistributionMetrics(extractor, DistributionOptions(metrics=("fid",)))
            for a, b in zip(real.split(options.batch), fake.split(options.batch), strict=True):
                metric.update(a.to(device), b.to(device))
            metric.compute()

        sides = {"torch-fidelity's entry point": theirs, "here": ours}
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(options.rounds + 1):  # the first round warms up
            for name, work in sides.items():
                begin = time.perf_counter()
                work()
                seconds[name].append(time.perf_counter() - begin)
    for name, values in seconds.items():
        kept = values[1:]
        print(f"{name}: median {statistics.median(kept):.3f} s, least {min(kept):.3f} s of {len(kept)}")  # noqa: T201


if __name__ == "__main__":
    main()
