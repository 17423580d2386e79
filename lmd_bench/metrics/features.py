"""Networks whose features FID, KID, precision and recall compare."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from lmd_bench.checkpoints.files import one_line, read_checkpoint
from lmd_bench.errors import WeightsError
from lmd_bench.harness.weights import file_sha256
from lmd_bench.records import EvaluatorFacts

INCEPTION_LAYER = "2048"
"""torch-fidelity's own choice of a layer of Inception for FID, KID, precision and recall: the last average pooling."""
_KEYS_SHOWN = 3


class FeatureExtractor(nn.Module, ABC):
    """A frozen network that turns images into one vector each.

    A subclass sets the attributes, is in evaluation mode and asks for no gradients.
    """

    name: str
    """As columns name it."""
    facts: EvaluatorFacts
    num_features: int
    """Length D of a vector."""
    suffix: str = ""
    """Ends the names of figures measured with it: "_scenes" for the small evaluators, so that nobody takes them for
    the published ones."""
    resizes: bool = False
    """Whether images are resized on the host before the network looks at them."""

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 -> features (B, D) float32. Resizing to the network's input is part of it.

        Images lie on the network's device, or anywhere for an extractor that `resizes`.
        """


class InceptionFeatures(FeatureExtractor):
    """Inception v3 as torch-fidelity ports it from TensorFlow (Szegedy et al. 2015, weights of 2015-12-05).

    D is 2048 for the layer that FID is published with. The network resizes images to 299 px itself, bilinear without
    antialiasing as TensorFlow 1 did: part of the metric's definition, not a choice of ours. Precision and recall use
    the same features here; Kynkäänniemi et al. (arXiv 1904.06991) use VGG-16's.
    """

    suffix = ""

    def __init__(self, network: Any, facts: EvaluatorFacts) -> None:
        """`network` is torch-fidelity's FeatureExtractorInceptionV3, asked for one layer. Use `open`."""
        super().__init__()
        self.network = network
        self.facts = facts
        self.name = facts.name
        self.num_features = facts.num_features or 0
        self.eval().requires_grad_(False)

    @classmethod
    def open(
        cls, path: Path, device: torch.device | str = "cpu", *, layer: str = INCEPTION_LAYER, sha256: str | None = None
    ) -> Self:
        """The extractor with weights from a file: a state dict of torch-fidelity's network (566 tensors).

        `layer` is one of torch-fidelity's names; `sha256` the file's where it is known already. Nothing that the file
        holds is run. Raises WeightsError for a file that is missing, unreadable, or of another network.
        """
        network = _inception(path, read_checkpoint(path).tensors, layer)
        facts = EvaluatorFacts(
            name="Inception v3 (torch-fidelity)",
            weights=path.name,
            sha256=sha256 or file_sha256(path),
            resize="to 299 px inside the network, bilinear without antialiasing, as TensorFlow 1 did",
            num_features=_width(layer),
        )
        return cls(network, facts).to(device)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images)[0]
        return features


def _inception(path: Path, tensors: Mapping[str, Tensor], layer: str) -> Any:
    """torch-fidelity's network with these weights, frozen."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Network(FeatureExtractorInceptionV3):  # type: ignore[misc]
        def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
            _require_keys(path, self.state_dict(), state_dict)
            return super().load_state_dict(state_dict, strict, assign)

    # The network opens its file as one that may hold anything. It is handed tensors alone, written anew in memory.
    buffer = io.BytesIO()
    torch.save(dict(tensors), buffer)
    buffer.seek(0)
    try:
        return Network("inception-v3-compat", [layer], feature_extractor_weights_path=buffer)
    except RuntimeError as error:
        raise WeightsError(f"{path}: not torch-fidelity's Inception v3 ({one_line(error)})") from None


def _require_keys(path: Path, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    missing, unexpected = sorted(own.keys() - found.keys()), sorted(found.keys() - own.keys())
    if not missing and not unexpected:
        return
    parts = [f"{kind} {_named(keys)}" for kind, keys in (("missing", missing), ("unexpected", unexpected)) if keys]
    raise WeightsError(
        f"{path}: not torch-fidelity's Inception v3: {'; '.join(parts)}; "
        "the file is weights-inception-2015-12-05-6726825d.pth (lmd-bench doctor lists it)"
    )


def _named(keys: list[str]) -> str:
    shown = ", ".join(keys[:_KEYS_SHOWN])
    return shown if len(keys) <= _KEYS_SHOWN else f"{shown} and {len(keys) - _KEYS_SHOWN} more"


def _width(layer: str) -> int:
    """Features of a layer: its name says it, but for the logits."""
    return int(layer) if layer.isdigit() else 1008
