"""What frozen features are worth for classification: a linear probe, nearest neighbours, and accuracy itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from lmd_bench.errors import DataError

_TOP = (1, 5)
_GRADIENT_TOLERANCE = 1e-8
CONVERGED_GRADIENT = 1e-6
"""Where no entry of the gradient is above this, the solver counts as converged; it aims at less."""
_MAX_ITERATIONS = 2000
_FLOAT32_RESOLUTION = 1e-6


def top_k_accuracy(logits: Tensor, labels: Tensor, ks: Sequence[int] = _TOP) -> tuple[float, ...]:
    """Share of images, in percent, whose label is among the k highest of `logits` (N, K), for each of `ks`.

    `labels` (N,) int64. Raises DataError where there is no image or the two do not fit.
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or not len(labels):
        raise DataError(
            f"accuracy: logits {tuple(logits.shape)} and labels {tuple(labels.shape)} do not fit: wanted (N, classes) "
            "and (N,), N at least 1"
        )
    counts: list[int] = top_k_hits(logits, labels, ks).tolist()
    return tuple(100.0 * count / len(labels) for count in counts)


def top_k_hits(logits: Tensor, labels: Tensor, ks: Sequence[int] = _TOP) -> Tensor:
    """How many images have their label among the k highest of `logits` (N, K): int64 (len(ks),), on their device.

    Of equal logits the lower class counts as the higher, and a logit that is no number beats every other: a collapsed
    network is not right by accident.
    """
    own = logits.gather(1, labels.unsqueeze(1))
    before = torch.arange(logits.shape[1], device=logits.device) < labels.unsqueeze(1)
    ahead = ~(logits <= own) | ((logits == own) & before)
    ranks = ahead.sum(dim=1)
    return torch.stack([(ranks < k).sum() for k in ks])


# -- the linear probe -------------------------------------------------------------------------------------------------


class LinearProbe(NamedTuple):
    """Accuracies in percent, and how well the classifier was solved for."""

    top1: float
    top5: float
    gradient: float
    """The largest entry left of the gradient (`fit_logistic`)."""


class LogisticFit(NamedTuple):
    """A multinomial logistic regression, float64."""

    weight: Tensor
    """(K, D)."""
    bias: Tensor
    """(K,)."""
    gradient: float
    """The largest entry of the objective's gradient there, without its sign: 0 at the minimum."""


def linear_probe(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    *,
    l2: float = 1e-2,
) -> LinearProbe:
    """Top-1 and top-5 accuracy, in percent, of a linear classifier on features (N, D) of a frozen encoder.

    Features are standardised by the training side's mean and deviation; the classifier is a multinomial logistic
    regression solved to convergence (`fit_logistic`). Raises DataError for features or labels that do not fit, and
    where a class has no training image: it could never be found.
    """
    _check_sides(train_features, train_labels, val_features, val_labels, num_classes)
    counts = torch.bincount(train_labels, minlength=num_classes)
    if missing := (counts == 0).nonzero().flatten().tolist():
        raise DataError(
            f"linear probe: {len(missing)} of {num_classes} classes have none of the {len(train_labels)} training "
            f"images ({', '.join(map(str, missing[:5]))}{', ...' if len(missing) > 5 else ''}); give more images "
            "(finetune.probe_images), at least one of every class"
        )
    train, val = standardized(train_features, val_features)
    fit = fit_logistic(train, train_labels, num_classes, l2=l2)
    top1, top5 = top_k_accuracy(val @ fit.weight.T + fit.bias, val_labels)
    return LinearProbe(top1, top5, fit.gradient)


def standardized(train: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Both sides, (N, D) and (M, D), less the mean of `train` and over its deviation, in float64.

    A feature whose deviation is below float32's resolution of its mean is a constant and only centred.
    """
    train, others = train.double(), others.double()
    mean = train.mean(dim=0)
    deviation = train.std(dim=0, correction=0)
    varies = deviation > _FLOAT32_RESOLUTION * mean.abs()
    deviation = torch.where(varies, deviation, torch.ones_like(deviation))
    return (train - mean) / deviation, (others - mean) / deviation


def fit_logistic(features: Tensor, labels: Tensor, num_classes: int, *, l2: float) -> LogisticFit:
    """The weights and biases that minimise mean cross-entropy + l2 / 2 * sum of squared weights, float64.

    `l2` is the penalty per image, so that it means the same for any number of them; scikit-learn's C is 1 / (l2 * N).
    Biases are not penalised. Starts from zero and draws nothing, so the result depends on the arguments alone. L-BFGS
    with line search, until no entry of the gradient is above 1e-8, or 2000 iterations, or none that helps: what is left
    of the gradient is told.
    """
    features = features.double()
    targets = F.one_hot(labels, num_classes).to(features)
    weight = features.new_zeros(num_classes, features.shape[1])
    bias = features.new_zeros(num_classes)
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=_GRADIENT_TOLERANCE,
        tolerance_change=0.0,  # flat stretches are no reason to stop: the gradient is
        line_search_fn="strong_wolfe",
    )

    def objective() -> float:
        """The gradient in closed form: two products of matrices, no graph."""
        log_probabilities = (features @ weight.T + bias).log_softmax(dim=1)
        errors = (log_probabilities.exp() - targets) / len(features)
        weight.grad, bias.grad = errors.T @ features + l2 * weight, errors.sum(dim=0)
        cross_entropy = -(log_probabilities * targets).sum() / len(features)
        return float(cross_entropy + 0.5 * l2 * weight.square().sum())

    solver.step(objective)
    objective()  # the last one tried by the line search need not be the one it chose
    assert weight.grad is not None and bias.grad is not None  # noqa: PT018 - for the type checker
    return LogisticFit(weight, bias, float(torch.cat([weight.grad.flatten(), bias.grad]).abs().max()))


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def knn_probe(
    train_features: Tensor,
    train_labels: Tensor,
    val_features: Tensor,
    val_labels: Tensor,
    num_classes: int,
    *,
    neighbors: int = 20,
    temperature: float = 0.07,
    chunk: int = 4096,
) -> tuple[float, float]:
    """Top-1 and top-5 accuracy, in percent, of votes among the nearest training images, with nothing trained.

    Wu et al. 2018 (arXiv 1805.01978, sec. 3.4): of the `neighbors` training features of highest cosine similarity s
    each votes exp(s / `temperature`) for its class. Similarities are computed for `chunk` x `chunk` images at a time.
    Raises DataError for features or labels that do not fit and for fewer training images than neighbours.
    """
    _check_sides(train_features, train_labels, val_features, val_labels, num_classes)
    if not 1 <= neighbors <= len(train_features):
        raise DataError(
            f"k-NN probe: {neighbors} neighbours of {len(train_features)} training images: lower "
            "finetune.knn_neighbors or give more images (finetune.probe_images)"
        )
    train, val = F.normalize(train_features.float(), dim=1), F.normalize(val_features.float(), dim=1)
    hits = torch.zeros(len(_TOP), dtype=torch.int64, device=val.device)
    for queries, labels in zip(val.split(chunk), val_labels.split(chunk), strict=True):
        similarity, nearest = _nearest(queries, train, neighbors, chunk)
        weights = ((similarity.double() - 1) / temperature).exp()  # a common factor that keeps the sum in range
        votes = weights.new_zeros(len(queries), num_classes)
        hits += top_k_hits(votes.scatter_add_(1, train_labels[nearest], weights), labels)
    top1, top5 = (100.0 * count / len(val_labels) for count in hits.tolist())
    return top1, top5


def _nearest(queries: Tensor, train: Tensor, neighbors: int, chunk: int) -> tuple[Tensor, Tensor]:
    """The highest products (n, k) of `queries` (n, D) with the rows of `train` (N, D), and those rows' numbers."""
    best = queries.new_empty(len(queries), 0)
    rows = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(train), chunk):
        products = queries @ train[start : start + chunk].T
        values, places = products.topk(min(neighbors, products.shape[1]), dim=1)
        best, rows = torch.cat([best, values], dim=1), torch.cat([rows, places + start], dim=1)
        best, kept = best.topk(min(neighbors, best.shape[1]), dim=1)
        rows = rows.gather(1, kept)
    return best, rows


def _check_sides(
    train_features: Tensor, train_labels: Tensor, val_features: Tensor, val_labels: Tensor, num_classes: int
) -> None:
    """Raise DataError unless both sides are (N, D) features of finite numbers with a label for each."""
    for side, features, labels in (
        ("training", train_features, train_labels),
        ("validation", val_features, val_labels),
    ):
        if features.ndim != 2 or not len(features) or labels.shape != features.shape[:1]:
            raise DataError(
                f"probe: {side} features {tuple(features.shape)} and labels {tuple(labels.shape)} do not fit: wanted "
                "(N, D) and (N,), N at least 1"
            )
        if not bool(features.isfinite().all()):
            raise DataError(f"probe: {side} features hold values that are not finite: the encoder has diverged")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= num_classes:
            raise DataError(f"probe: {side} labels are {low} to {high}, wanted 0 to {num_classes - 1}")
    if train_features.shape[1] != val_features.shape[1]:
        raise DataError(
            f"probe: {train_features.shape[1]} training and {val_features.shape[1]} validation features an image: of "
            "two encoders?"
        )
