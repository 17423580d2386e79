"""The common yardstick: at fixed points, off the clock, every method fills the same hidden parts of the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lmd_bench.config import EvaluationConfig, FinetuneRunConfig
from lmd_bench.data.yardstick import fill_nearest_unit, hide, paste, yardstick_masks
from lmd_bench.errors import MissingWeightsError, TrainingError, WeightsError
from lmd_bench.harness.loop import autocast
from lmd_bench.harness.seeding import reseed
from lmd_bench.method import Method
from lmd_bench.metrics.image import psnr_hidden, ssim
from lmd_bench.nn.full_precision import full_precision
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask
from lmd_bench.nn.perceptual import PerceptualDistance, perceptual_obstacle
from lmd_bench.pretrained import WeightsStore
from lmd_bench.records import Check, Progressive, Yardstick
from lmd_bench.seeding import derive_seed

Filler = Callable[[Tensor, Tensor], Tensor | None]

PROGRESSIVE_LEVELS: tuple[int | None, ...] = (8, None)
"""Numbers of levels that are compared with one shot at the end of a run; None is the whole mask schedule."""
PROGRESSIVE_IMAGES = 16
"""At most so many of the held-out images: walking all levels takes dozens of forward passes."""


class _Means(NamedTuple):
    """Means over images."""

    psnr_db: float
    ssim: float
    lpips: float | None


def open_lpips(weights: WeightsStore, image_size: int, *, download: bool) -> PerceptualDistance | str:
    """LPIPS with AlexNet on the CPU, or why it cannot be measured, as a cell says it.

    image_size: side of the images in px. download: whether torchvision's file may be fetched. Raises WeightsError for a
    file of another size or hash.
    """
    try:
        trunk = weights.find("alexnet", download=download)
    except MissingWeightsError as error:
        return str(error)
    try:
        return perceptual_obstacle("alex", trunk, image_size=image_size) or PerceptualDistance.open("alex", trunk)
    except WeightsError as error:
        return str(error)


class YardstickRunner:
    """Measures one method on fixed held-out images under fixed masks.

    The runner, not the method, hides pixels (they are zero when the method sees them) and pastes the visible ones
    back. PSNR is over hidden pixels, SSIM and LPIPS over the composite; all are means over images.
    """

    def __init__(
        self,
        images: Tensor,
        config: EvaluationConfig,
        seed: int,
        device: torch.device,
        perceptual: PerceptualDistance | None = None,
        precision: str = "fp32",
    ) -> None:
        """`images` (N, 3, S, S) uint8. `perceptual` measures LPIPS, None leaves it out; it lies on the CPU. `precision`
        is the method's while it fills: fp32, or bf16 for autocast."""
        self._images = images
        self._config = config
        self._seed = seed
        self._device = device
        self._perceptual = perceptual
        self._precision = precision
        self._masks = yardstick_masks(len(images), images.shape[-1], config.unit_px, config.keep)
        self.checks: list[Check] = []

    def check(self, method: Method, step: int, train_s: float) -> Check:
        """Measure now; the result is kept in `checks`."""
        fill = self._in_precision(lambda images, mask: method.reconstruct(hide(images, mask), mask))
        found = self._measure(method, fill, lpips=True)
        result = Check(
            step=step,
            train_s=train_s,
            psnr_db=found.psnr_db,
            ssim=found.ssim,
            lpips=found.lpips,
            num_images=len(self._images),
        )
        self.checks.append(result)
        return result

    def summary(self, method: Method) -> Yardstick:
        """All checks, and beside them the floors, the projector's ceiling, the latent leak and unveiling by levels."""
        floor = self._psnr(method, _fill_mean_colour)
        second_floor = self._psnr(method, fill_nearest_unit)
        ceiling = self._probe(method, self._in_precision(lambda images, mask: method.round_trip(images)), lpips=True)
        leak = self._in_precision(lambda images, mask: method.reconstruct_leaking(images, mask))
        leaking = self._psnr(method, leak)
        return self.checked(method).model_copy(
            update={
                "function_evaluations": self._function_evaluations(method),
                "ceiling_psnr_db": ceiling.psnr_db if ceiling else None,
                "ceiling_lpips": ceiling.lpips if ceiling else None,
                "latent_leak_db": leaking - self.checks[-1].psnr_db if leaking is not None and self.checks else None,
                "mean_colour_psnr_db": floor,
                "nearest_unit_psnr_db": second_floor,
                "progressive": self._progressive(method),
            }
        )

    def checked(self, method: Method) -> Yardstick:
        """What is known without looking again: all checks."""
        return Yardstick(
            image_size=self._images.shape[-1],
            unit_px=self._images.shape[-1] // method.own_masks(self._masks).shape[-1],
            checks=self.checks,
            own_mask=method.mask_pattern,
            function_evaluations=method.num_function_evaluations,
            projector=method.projector_name,
        )

    def _in_precision(self, fill: Filler) -> Filler:
        """The same under the method's precision; floors and figures are always computed in fp32."""

        def filled(images: Tensor, mask: Tensor) -> Tensor | None:
            with autocast(self._device, self._precision):
                found = fill(images, mask)
            return None if found is None else found.float()

        return filled

    def _progressive(self, method: Method) -> list[Progressive]:
        """One shot, then every number of levels in every order, all on the same images; empty without levels."""
        orders = method.progressive_orders
        if not orders:
            return []
        variants = [(1, orders[0]), *((levels, order) for levels in PROGRESSIVE_LEVELS for order in orders)]
        return [self._variant(method, levels, order) for levels, order in variants]

    def _variant(self, method: Method, levels: int | None, order: str) -> Progressive:
        count = min(len(self._images), PROGRESSIVE_IMAGES)
        seeds = [derive_seed("unveil", self._seed, number) for number in range(count)]
        evaluations: list[int] = []

        def fill(images: Tensor, mask: Tensor) -> Tensor:
            own = [seeds.pop(0) for _ in images]
            filled, passes = method.reconstruct_progressively(
                hide(images, mask), mask, levels=levels, order=order, seeds=own
            )
            evaluations.append(passes)
            return filled

        psnr = self._measure(method, self._in_precision(fill), count).psnr_db
        return Progressive(
            levels=levels,
            order=order if levels != 1 else "none",
            function_evaluations=max(evaluations),
            psnr_db=psnr,
            num_images=count,
        )

    def _function_evaluations(self, method: Method) -> int:
        """Forward passes of one `reconstruct` call under the first image's mask."""
        if not method.progressive_orders:
            return method.num_function_evaluations
        images, mask = self._chunk(method, 0, 1)
        with evaluating(method), torch.no_grad(), autocast(self._device, self._precision):
            reseed(self._device, self._seed, "yardstick", 0)
            return counted(method, lambda: method.reconstruct(hide(images, mask), mask))[1]

    def _psnr(self, method: Method, fill: Filler) -> float | None:
        found = self._probe(method, fill)
        return found.psnr_db if found else None

    def _probe(self, method: Method, fill: Filler, *, lpips: bool = False) -> _Means | None:
        """What another way to fill comes to; None where the method does not have it."""
        with evaluating(method), torch.no_grad():  # in training mode the probe would move running statistics
            reseed(self._device, self._seed, "yardstick", 0)
            if fill(*self._chunk(method, 0, 1)) is None:
                return None
        return self._measure(method, fill, lpips=lpips)

    @torch.no_grad()
    def _measure(self, method: Method, fill: Filler, num_images: int | None = None, *, lpips: bool = False) -> _Means:
        """Means over the first `num_images` (None: all); LPIPS only where it is asked for and can be measured."""
        end = len(self._images) if num_images is None else num_images
        psnrs, similarities, distances = [], [], []
        with evaluating(method), _lent(self._perceptual if lpips else None, self._device) as perceptual:
            for start in range(0, end, self._config.batch_size):
                images, mask = self._chunk(method, start, min(end, start + self._config.batch_size))
                reseed(self._device, self._seed, "yardstick", start)
                filled = fill(images, mask)
                if filled is None or filled.shape != images.shape or not bool(torch.isfinite(filled).all()):
                    raise TrainingError("the reconstruction of held-out images is missing, misshapen or not finite")
                composite = paste(filled, images, mask)
                psnrs.append(psnr_hidden(composite, images, mask))
                similarities.append(ssim(composite, images))
                if perceptual is not None:
                    with full_precision():
                        distances.append(perceptual(2 * composite - 1, 2 * images - 1))
        return _Means(
            float(torch.cat(psnrs).mean()),
            float(torch.cat(similarities).mean()),
            float(torch.cat(distances).mean()) if distances else None,
        )

    def _chunk(self, method: Method, start: int, end: int) -> tuple[Tensor, Tensor]:
        images = self._images[start:end].to(self._device).float() / 255
        return images, method.own_masks(self._masks)[start:end].to(self._device)


def counted(method: Method, fill: Callable[[], Tensor]) -> tuple[Tensor, int]:
    """What `fill` gives back for one image, and how many forward passes of the trained network that took.

    They are counted for methods that walk levels, where they depend on the mask; elsewhere the method's word is taken.
    """
    from lmd_bench.harness.inference import counted_evaluations, most_common  # it imports this module in turn

    if not method.progressive_orders:
        return fill(), method.num_function_evaluations
    with counted_evaluations(method) as counts:
        filled = fill()
    return filled, most_common(counts) or method.num_function_evaluations


@contextmanager
def _lent(perceptual: PerceptualDistance | None, device: torch.device) -> Iterator[PerceptualDistance | None]:
    """LPIPS on the device inside the block only, so that it takes no part in the memory that training needs."""
    try:
        yield perceptual.to(device) if perceptual is not None else None
    finally:
        if perceptual is not None:
            perceptual.to("cpu")


@contextmanager
def evaluating(method: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block, whatever it was before afterwards."""
    was_training = method.training
    method.eval()
    try:
        yield
    finally:
        method.train(was_training)


def _fill_mean_colour(images: Tensor, mask: Tensor) -> Tensor:
    return fill_with_visible_mean(images, pixel_mask(mask, images.shape[-1]))


def check_steps(config: EvaluationConfig | FinetuneRunConfig, steps: int) -> list[int]:
    """Steps after which the yardstick, or accuracy, is read: 0 and `num_checks` points evenly over the run.

    The last step is one of them.
    """
    if config.num_checks == 0:
        return []
    return sorted({0, *(round(steps * (i + 1) / config.num_checks) for i in range(config.num_checks))})
