"""`check_method`: the contract of a method as a test, for authors of their own methods.

In a test file::

    from lmd_bench.method import DataSpec
    from lmd_bench.testing import check_method

    def test_my_method_keeps_the_contract():
        check_method(MyMethod, MyMethod.Config(depth=2), DataSpec(image_size=32))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lmd_bench.method import Batch, DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.classifier import ImageClassifier, Pool

_TOTAL_STEPS = 100
_FIRST_STEPS = 3
_NUM_CLASSES = 3
_CLASSIFIER_STEPS = 8
_DROP_PATH = 0.5


@dataclass(frozen=True)
class _Case:
    """What every check needs: how to make the method, and one fixed batch."""

    method_cls: type[Method]
    config: MethodConfig
    data: DataSpec
    batch: Batch
    mask: Tensor
    device: torch.device
    seed: int

    def build(self, seed: int) -> Method:
        with _seeded(seed):
            method = self.method_cls(self.config, self.data)
        return method.to(self.device)

    def build_trained(self) -> Method:
        """A method after a few steps: networks whose last layer starts at zero say nothing before."""
        method = self.build(self.seed)
        if not self.method_cls.is_trained:
            return method
        optimizer = torch.optim.AdamW(method.param_groups(0.0), lr=1e-3)
        for _ in range(_FIRST_STEPS):
            optimizer.zero_grad()
            self.step(method).loss.backward()
            optimizer.step()
        return method

    def step(self, method: Method, step: int = _TOTAL_STEPS) -> StepOutput:
        with _seeded(self.seed):
            inputs = method.prepare(self._collated(method))
            return method.training_step(inputs, step=step, total_steps=_TOTAL_STEPS)

    def _collated(self, method: Method) -> Batch:
        labels = [None] * len(self.batch.images) if self.batch.labels is None else self.batch.labels.tolist()
        pixels = (self.batch.images.cpu() * 255).round().to(torch.uint8)
        extra = method.collate(list(zip(pixels, labels, strict=True)), torch.Generator().manual_seed(self.seed))
        moved = {name: tensor.to(self.device) for name, tensor in extra.items()}
        return dataclasses.replace(self.batch, extra=moved)

    def reconstruct(self, method: Method, images: Tensor) -> Tensor:
        with _seeded(self.seed), torch.no_grad():
            return method.reconstruct(images, method.own_masks(self.mask))


def check_method(
    method_cls: type[Method],
    config: MethodConfig,
    data: DataSpec,
    *,
    batch_size: int = 4,
    mask_units: int = 4,
    overfit_steps: int = 30,
    overfit_share: float = 0.5,
    learning_rate: float = 1e-3,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Assert that a method keeps its contract with the harness.

    Checked, in this order: options are accepted; the loss is one finite number; the same seed gives the same loss bit
    for bit, and another seed other weights; the optimizer's groups hold every trainable parameter exactly once; weights
    survive a state dict; mask ratios and token counts make sense; gradients reach every trainable and no frozen
    parameter while one batch is overfitted; a reconstruction has the right shape and range and does not depend on
    hidden pixels; where the method has a `classifier`, it keeps its contract under every pooling that it offers: one
    vector an image, logits from it, a layer for every trained parameter, gradients for all of them and for nothing
    else, and stochastic depth that leaves the method's own forward pass alone.

    `batch_size` random smooth images of `data.image_size` are used, with `mask_units` x `mask_units` mask units of
    which a quarter stays visible. `overfit_share` is the share of its first value to which the loss on one batch
    under one seed must fall within `overfit_steps` AdamW steps at `learning_rate`. Raises AssertionError saying what
    does not hold; the yardstick part is left out where `yardstick_obstacle` says why.

    Of a method that comes trained (`is_trained` is False) checked are: options are accepted; nothing asks for
    gradients or leaves evaluation mode, and two seeds give the same weights; the reconstruction.
    """
    case = _make_case(method_cls, config, data, batch_size, mask_units, torch.device(device), seed)
    method_cls.check(config, data)
    if method_cls.is_trained:
        _check_learning(case, overfit_steps, overfit_share, learning_rate)
    else:
        _check_frozen(case)
    if method_cls.yardstick_obstacle(config) is None:
        _check_reconstruction(case)
    pools: tuple[Pool, ...] = ("mean", "cls")
    for pool in pools:
        if method_cls.classifier_obstacle(config, pool) is None:
            _check_classifier(case, pool, learning_rate)


# -- the checks -------------------------------------------------------------------------------------------------------


def _check_learning(case: _Case, overfit_steps: int, overfit_share: float, learning_rate: float) -> None:
    _check_loss(case)
    _check_determinism(case)
    _check_param_groups(case)
    _check_state_dict(case)
    _check_mask_figures(case)
    _check_training(case, overfit_steps, overfit_share, learning_rate)


def _check_frozen(case: _Case) -> None:
    method, other = case.build(case.seed).train(), case.build(case.seed + 1)
    asking = [name for name, parameter in method.named_parameters() if parameter.requires_grad]
    assert not asking, f"a method that comes trained has trainable parameters: {asking[:5]}"
    training = [name for name, module in method.named_modules() if module.training]
    assert not training, f"train() takes a method that comes trained out of evaluation mode: {training[:5]}"
    pairs = zip(method.state_dict().items(), other.state_dict().values(), strict=True)
    drawn = [name for (name, value), again in pairs if not _same(value, again)]
    assert not drawn, f"weights that come trained were drawn at random: {drawn[:5]}"


def _check_loss(case: _Case) -> None:
    output = case.step(case.build(case.seed))
    assert isinstance(output, StepOutput), f"training_step must return a StepOutput, got {type(output).__name__}"
    assert output.loss.shape == (), f"the loss must be one number, got shape {tuple(output.loss.shape)}"
    assert output.loss.requires_grad, "the loss is not attached to the graph: was it detached?"
    assert output.loss.isfinite(), f"the loss of a fresh model is {output.loss.item()}"
    for name, value in output.scalars.items():
        if isinstance(value, Tensor):
            assert value.shape == (), f"scalar {name!r} must be one number, got shape {tuple(value.shape)}"
            assert not value.requires_grad, f"scalar {name!r} must be detached"


def _check_determinism(case: _Case) -> None:
    first, again = (case.step(case.build(case.seed)).loss for _ in range(2))
    assert _same(first, again), (
        f"the same seed gave two losses, {first.item()} and {again.item()}: draw from torch's global generators only"
    )
    weights, others = (case.build(seed).state_dict().values() for seed in (case.seed, case.seed + 1))
    differ = any(not _same(a, b) for a, b in zip(weights, others, strict=True))
    assert differ, "two seeds gave the same weights: are they initialised at random?"


def _check_state_dict(case: _Case) -> None:
    method, copy = case.build_trained(), case.build(case.seed + 1)
    try:
        copy.load_state_dict(method.state_dict())
    except RuntimeError as error:
        raise AssertionError(f"the state dict does not load into a fresh instance: {error}") from error
    before, after = case.step(method).loss, case.step(copy).loss
    assert _same(before, after), (
        f"after loading a state dict the loss is {after.item()} instead of {before.item()}: something that the loss "
        f"depends on is not in it"
    )


def _check_param_groups(case: _Case) -> None:
    method = case.build(case.seed)
    names = {id(parameter): name for name, parameter in method.named_parameters() if parameter.requires_grad}
    assert names, "the method has no trainable parameter"
    grouped = [id(parameter) for group in method.param_groups(0.05) for parameter in group["params"]]
    missing = [name for key, name in names.items() if key not in grouped]
    assert not missing, f"param_groups leaves out trainable parameters: {missing[:5]}"
    repeated = [name for key, name in names.items() if grouped.count(key) > 1]
    assert not repeated, f"param_groups holds parameters more than once: {repeated[:5]}"
    assert set(grouped) <= set(names), "param_groups holds frozen parameters"


def _check_mask_figures(case: _Case) -> None:
    method = case.build(case.seed)
    for step in range(1, _TOTAL_STEPS + 1):
        ratio = method.mask_ratio_at(step, _TOTAL_STEPS)
        tokens = method.num_tokens_at(step, _TOTAL_STEPS)
        assert ratio is None or 0 <= ratio < 1, f"mask_ratio_at({step}) is {ratio}, not in [0, 1)"
        assert tokens is None or tokens >= 1, f"num_tokens_at({step}) is {tokens}, not a positive count"


def _check_training(case: _Case, steps: int, share: float, learning_rate: float) -> None:
    """Overfit one batch under one seed, watching gradients and frozen weights on the way."""
    method = case.build(case.seed)
    frozen = {n: p.detach().clone() for n, p in method.named_parameters() if not p.requires_grad}
    untouched = {name for name, parameter in method.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(method.param_groups(0.0), lr=learning_rate)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = case.step(method).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        untouched -= {name for name, parameter in method.named_parameters() if _has_gradient(parameter)}
    assert not untouched, f"no gradient reached trainable parameters in {steps} steps: {sorted(untouched)[:5]}"
    current = dict(method.named_parameters())
    moved = [name for name, before in frozen.items() if not _same(before, current[name])]
    assert not moved, f"frozen parameters changed in training: {moved[:5]}"
    reached = [name for name in frozen if current[name].grad is not None]
    assert not reached, f"gradients reached frozen parameters: {reached[:5]}"
    assert losses[-1] <= share * losses[0], (
        f"one batch cannot be overfitted: the loss went from {losses[0]:.4g} to {losses[-1]:.4g} in {steps} steps, "
        f"wanted {share} of its start"
    )


def _check_reconstruction(case: _Case) -> None:
    method = case.build_trained().eval()
    images = case.batch.images
    before = images.clone()
    result = case.reconstruct(method, images)
    assert _same(images, before), "reconstruct changes the images it is given"
    assert result.shape == images.shape, f"reconstruct returned {tuple(result.shape)} for {tuple(images.shape)}"
    assert result.isfinite().all(), "the reconstruction holds values that are not finite"
    low, high = result.min().item(), result.max().item()
    assert 0 <= low <= high <= 1, f"the reconstruction must lie in [0, 1], got {low} to {high}"
    assert not result.requires_grad, "reconstruct must not build a graph"
    assert _same(result, case.reconstruct(method, images)), "the same seed gave two reconstructions"
    mask = method.own_masks(case.mask)
    assert _same(mask, method.own_masks(case.mask)), "own_masks gave two answers for the same masks"
    hidden = F.interpolate(mask.float().unsqueeze(1), size=images.shape[-2:]).bool()
    with _seeded(case.seed + 2):
        other = torch.where(hidden, torch.rand_like(images), images)
    gap = (result - case.reconstruct(method, other)).abs().max().item()
    assert gap == 0, f"hidden pixels leak: changing them changed the reconstruction by up to {gap:.3g}"


def _check_classifier(case: _Case, pool: Pool, learning_rate: float) -> None:
    method = case.build(case.seed)
    before = case.step(method).loss
    with _seeded(case.seed):
        classifier = method.classifier(_NUM_CLASSES, pool=pool, drop_path=_DROP_PATH)
    assert isinstance(classifier, ImageClassifier), f"classifier must return an ImageClassifier, got {type(classifier)}"
    assert _same(before, case.step(method).loss), "making a classifier changed the method's own loss"
    _check_logits(case, classifier)
    _check_layers(classifier)
    _check_fine_tuning(case, method, classifier, learning_rate)


def _check_logits(case: _Case, classifier: ImageClassifier) -> None:
    images = case.batch.images
    classifier.eval()
    with torch.no_grad():
        pooled, logits = classifier.pooled(images), classifier(images)
        wanted = classifier.head(classifier.fc_norm(pooled))
    shape = (len(images), classifier.num_features)
    assert pooled.shape == shape, f"pooled must be one vector an image, {shape}, got {tuple(pooled.shape)}"
    assert logits.shape == (len(images), _NUM_CLASSES), f"logits have shape {tuple(logits.shape)}"
    assert logits.isfinite().all(), "the logits of a fresh classifier are not finite"
    assert _same(logits, wanted), "the logits are not the head's, of the pooled features"


def _check_layers(classifier: ImageClassifier) -> None:
    trained = [(name, parameter) for name, parameter in classifier.named_parameters() if parameter.requires_grad]
    layers = {name: classifier.layer_of(name) for name, _ in trained}
    wanted = set(range(classifier.num_layers + 1))
    assert set(layers.values()) == wanted, f"layers of parameters are {sorted(set(layers.values()))}, wanted {wanted}"
    assert layers["head.weight"] == classifier.num_layers, "the head is not in the last layer"
    decayed = [name for name, parameter in trained if parameter.ndim < 2 and classifier.is_decayed(name, parameter)]
    assert not decayed, f"1-D parameters of the classifier are decayed: {decayed[:5]}"


def _check_fine_tuning(case: _Case, method: Method, classifier: ImageClassifier, learning_rate: float) -> None:
    """A few steps on one batch, watching gradients, what is not the classifier's, and that branches are dropped."""
    own = {id(parameter) for parameter in classifier.parameters() if parameter.requires_grad}
    others = {n: p.detach().clone() for n, p in method.named_parameters() if id(p) not in own}
    untouched = {name for name, parameter in classifier.named_parameters() if parameter.requires_grad}
    labels = torch.arange(len(case.batch.images), device=case.device) % _NUM_CLASSES
    trained = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    classifier.eval()  # nothing dropped: the loss must fall, and gradients reach every branch
    losses = []
    for _ in range(_CLASSIFIER_STEPS):
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(case.batch.images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        untouched -= {name for name, parameter in classifier.named_parameters() if _has_gradient(parameter)}
    assert not untouched, f"no gradient reached the classifier's parameters: {sorted(untouched)[:5]}"
    assert losses[-1] < losses[0], f"one batch cannot be fine-tuned on: {losses[0]:.4g} to {losses[-1]:.4g}"
    current = dict(method.named_parameters())
    moved = [name for name, value in others.items() if not _same(value, current[name])]
    assert not moved, f"fine-tuning changed what is not the classifier's: {moved[:5]}"
    _check_drop_path(case, classifier)


def _check_drop_path(case: _Case, classifier: ImageClassifier) -> None:
    def pooled(seed: int) -> Tensor:
        with _seeded(seed), torch.no_grad():
            return classifier.pooled(case.batch.images)

    seeds = range(case.seed, case.seed + 8)
    classifier.eval()
    whole = pooled(case.seed)
    assert all(_same(whole, pooled(seed)) for seed in seeds), "features are random in evaluation mode"
    classifier.train()
    if classifier.num_layers > 2:  # of a single block the rate is 0
        assert any(not _same(whole, pooled(seed)) for seed in seeds), "drop_path drops nothing in training mode"
    assert _same(pooled(case.seed), pooled(case.seed)), "the same seed drops different branches"


# -- helpers ----------------------------------------------------------------------------------------------------------


def _make_case(
    method_cls: type[Method],
    config: MethodConfig,
    data: DataSpec,
    batch_size: int,
    mask_units: int,
    device: torch.device,
    seed: int,
) -> _Case:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch_size, 3, 8, 8, generator=generator)
    images = F.interpolate(coarse, size=data.image_size, mode="bilinear", align_corners=False)
    labels = None
    if data.num_classes is not None:
        labels = torch.randint(data.num_classes, (batch_size,), generator=generator).to(device)
    ranks = torch.rand(batch_size, mask_units**2, generator=generator).argsort(dim=1).argsort(dim=1)
    mask = (ranks >= max(1, mask_units**2 // 4)).view(batch_size, mask_units, mask_units)
    batch = Batch(images.to(device), labels)
    return _Case(method_cls, config, data, batch, mask.to(device), device, seed)


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Global generators set to `seed` inside and put back afterwards."""
    devices: list[Any] = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _has_gradient(parameter: Tensor) -> bool:
    return parameter.grad is not None and bool(parameter.grad.count_nonzero())


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.detach(), b.detach())
