"""CLIP-score: how well an image fits its caption, as the plain cosine of open_clip's embeddings."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from lmd_bench.checkpoints.files import one_line
from lmd_bench.config import near
from lmd_bench.errors import ConfigError, WeightsError
from lmd_bench.harness.weights import file_sha256
from lmd_bench.metrics.image import map_pictures
from lmd_bench.records import EvaluatorFacts

Tokenizer = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class ClipInput:
    """What a CLIP model does to an image before it looks at it."""

    size: int
    """Side of its input, px."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"

    @property
    def resize_text(self) -> str:
        return f"short side to {self.size} px, antialiased {self.interpolation}, centre crop"


class ClipModel(nn.Module):
    """A CLIP model (Radford et al. 2021, arXiv 2103.00020) of open_clip, with its own preprocessing.

    What `similarity` gives is the cosine itself: times no trained logit scale, times no 100 or 2.5, not clamped at 0.
    """

    def __init__(
        self, network: Any, tokenizer: Tokenizer, clip_input: ClipInput, facts: EvaluatorFacts, *, suffix: str = ""
    ) -> None:
        """`network` is an open_clip CLIP. Use `open`. `suffix` ends the name of the figure."""
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.input = clip_input
        self.facts = facts
        self.suffix = suffix
        self.register_buffer("mean", torch.tensor(clip_input.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(clip_input.std).view(3, 1, 1), persistent=False)
        self._texts: dict[str, Tensor] = {}
        self.eval()

    @classmethod
    def open(
        cls,
        model: str | Path,
        weights: Path,
        device: torch.device | str = "cpu",
        *,
        tag: str | None = None,
        name: str | None = None,
        suffix: str = "",
        sha256: str | None = None,
    ) -> Self:
        """A model with weights from a file (.safetensors, or tensors alone in a .pt).

        model: open_clip's name of the architecture, or a JSON file of its configuration: `embed_dim`, `vision_cfg`
        and `text_cfg`, by themselves or under `model_cfg` beside a `preprocess_cfg`. tag: open_clip's tag of the
        weights, which says how they were trained: OpenAI's want the quick form of GELU and their own mean and
        deviation, and a model without it would give plausible numbers that are wrong. name: as columns name it.

        OpenAI's own .pt files are TorchScript archives, which are programs: they are refused, since the same weights
        lie on the hub as open_clip_model.safetensors. Raises ConfigError for an unknown model or tag, and
        WeightsError for a file that is missing, unsafe or of another model.
        """
        import open_clip

        config, preprocess = _described(model) if isinstance(model, Path) else _known(model, tag)
        network = _build(config, model)
        _load(network, weights, model)
        title = model.stem if isinstance(model, Path) else model
        clip_input = _clip_input(network, preprocess, title)
        facts = EvaluatorFacts(
            name=name or f"CLIP {title}{f' ({tag})' if tag else ''}",
            weights=weights.name,
            sha256=sha256 or file_sha256(weights),
            resize=clip_input.resize_text,
            num_features=int(config["embed_dim"]),
        )
        kwargs = config["text_cfg"].get("tokenizer_kwargs") or {}
        tokenizer = open_clip.SimpleTokenizer(context_length=network.context_length, **kwargs)
        return cls(network, tokenizer, clip_input, facts, suffix=suffix).to(device)

    @torch.inference_mode()
    def similarity(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Images (B, 3, H, W) uint8 and a caption for each -> cosines (B,) float32, on the model's device."""
        return (self.encode_images(images) * self.encode_texts(captions)).sum(dim=1)

    @torch.inference_mode()
    def encode_images(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8, on any device -> embeddings (B, D) float32 of length 1."""
        found: Tensor = self.network.encode_image(self.preprocess(images), normalize=True)
        return found

    @torch.inference_mode()
    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        """Captions -> embeddings (B, D) float32 of length 1. Each caption is encoded once in the model's lifetime."""
        new = [caption for caption in dict.fromkeys(captions) if caption not in self._texts]
        if new:
            tokens = self.tokenizer(new).to(self._device)
            self._texts |= zip(new, self.network.encode_text(tokens, normalize=True), strict=True)
        return torch.stack([self._texts[caption] for caption in captions]).to(self._device)

    def preprocess(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 as the network wants them, (B, 3, S, S) float32: resized, cropped, normalised.

        They are resized where they lie, best on the host, and then moved to the model's device.
        """
        square = self._resized(images).to(self._device)
        return (square.float() / 255 - self.get_buffer("mean")) / self.get_buffer("std")

    def _resized(self, images: Tensor) -> Tensor:
        """As open_clip's own transform: the short side by Pillow, then the centre."""
        from torchvision.transforms import InterpolationMode, functional

        size, mode = self.input.size, InterpolationMode(self.input.interpolation)
        if images.shape[-2:] == (size, size):
            return images
        return map_pictures(
            images, lambda picture: functional.center_crop(functional.resize(picture, [size], mode), [size, size])
        )

    @property
    def _device(self) -> torch.device:
        return self.get_buffer("mean").device


def pretrained_hub(model: str, tag: str) -> str | None:
    """The Hugging Face repository of a model's published weights, None where open_clip names none.

    Raises ConfigError for a model or tag that open_clip does not know.
    """
    hub = _tag_config(model, tag).get("hf_hub") or ""
    return hub.strip("/") or None


# -- configurations ---------------------------------------------------------------------------------------------------


def _known(model: str, tag: str | None) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Configuration and preprocessing of one of open_clip's own architectures, as the tag's weights want them."""
    import open_clip

    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"image_quality.clip_model: open_clip has no model {model!r}{near(model, _model_names())}")
    if tag is None:
        return config, {}
    pretrained = _tag_config(model, tag)
    return {**config, "quick_gelu": bool(pretrained.get("quick_gelu", False))}, pretrained


def _tag_config(model: str, tag: str) -> Mapping[str, Any]:
    import open_clip

    if open_clip.get_model_config(model) is None:
        raise ConfigError(f"image_quality.clip_model: open_clip has no model {model!r}{near(model, _model_names())}")
    found: Mapping[str, Any] = open_clip.get_pretrained_cfg(model, tag)
    if not found:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise ConfigError(f"image_quality.clip_pretrained: {model} has no weights {tag!r}{near(tag, tags)}")
    return found


def _model_names() -> list[str]:
    import open_clip

    return [str(name) for name in open_clip.list_models()]


def _described(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Configuration and preprocessing in a JSON file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise WeightsError(f"{path}: not a readable configuration of open_clip ({one_line(error)})") from None
    config = values.get("model_cfg", values) if isinstance(values, dict) else None
    if not isinstance(config, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= config.keys():
        raise WeightsError(f"{path}: not a configuration of open_clip: it needs embed_dim, vision_cfg and text_cfg")
    return dict(config), values.get("preprocess_cfg", {})


def _build(config: Mapping[str, Any], model: str | Path) -> Any:
    """open_clip's network with random weights.

    Made from its class, not by `create_model`: that would look the configuration up in a list that all of the process
    shares, and can download.
    """
    import open_clip

    values = dict(config)
    custom_text = values.pop("custom_text", False)
    if "multimodal_cfg" in values or {"hf_model_name", "hf_tokenizer_name"} & values["text_cfg"].keys():
        raise ConfigError(f"image_quality.clip_model: {model} is not a plain CLIP; take one such as ViT-L-14")
    try:
        return (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**values)
    except (TypeError, KeyError, ValueError, AssertionError) as error:
        raise WeightsError(f"{model}: open_clip cannot build it ({one_line(error)})") from None


def _clip_input(network: Any, preprocess: Mapping[str, Any], title: str) -> ClipInput:
    from open_clip.transform import PreprocessCfg, merge_preprocess_dict

    values = merge_preprocess_dict(PreprocessCfg(), dict(preprocess))
    sizes = network.visual.image_size
    height, width = sizes if isinstance(sizes, tuple | list) else (sizes, sizes)
    if height != width or values["resize_mode"] != "shortest":
        raise ConfigError(
            f"image_quality.clip_model: {title} takes {height} x {width} px, resize mode {values['resize_mode']}; "
            "square input by the short side is what is measured with"
        )
    return ClipInput(int(height), tuple(values["mean"]), tuple(values["std"]), values["interpolation"])


# -- weights ----------------------------------------------------------------------------------------------------------


def _load(network: Any, weights: Path, model: str | Path) -> None:
    import open_clip

    if not weights.is_file():
        raise WeightsError(f"{weights}: no such file; give the weights of {model} (open_clip_model.safetensors)")
    if _is_torchscript(weights):
        raise WeightsError(
            f"{weights}: is a TorchScript archive, a program, so it is not opened; the same weights lie on the "
            "Hugging Face hub as open_clip_model.safetensors (lmd-bench doctor says where)"
        )
    try:
        open_clip.load_checkpoint(network, str(weights), strict=True, weights_only=True)
    # damaged files end in nearly any error of torch, pickle or safetensors
    except Exception as error:
        raise WeightsError(f"{weights}: not the weights of {model} ({one_line(error)})") from None


def _is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of torch.jit.save: beside its tensors it holds code."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return any("/code/" in name or name.endswith("constants.pkl") for name in archive.namelist())
