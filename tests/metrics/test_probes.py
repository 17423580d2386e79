"""The linear probe, nearest neighbours and accuracy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from lmd_bench.errors import DataError
from lmd_bench.metrics import probes
from lmd_bench.metrics.probes import (
    fit_logistic,
    knn_probe,
    linear_probe,
    standardized,
    top_k_accuracy,
    top_k_hits,
)

NUM_CLASSES = 6


def clusters(count: int, seed: int, *, dim: int = 12, spread: float = 1.4) -> tuple[Tensor, Tensor]:
    """Features around a center for each class, so wide that they overlap; of very different sizes, and one constant."""
    centers = torch.randn(NUM_CLASSES, dim, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % NUM_CLASSES
    features = centers[labels] + spread * torch.randn(count, dim, generator=generator)
    features = features * torch.logspace(-2, 2, dim) + 3.0
    features[:, 3] = 7.0
    return features, labels


# -- accuracy ---------------------------------------------------------------------------------------------------------


def test_accuracy_counts_labels_among_the_highest_logits() -> None:
    logits = torch.tensor([[0.1, 0.9, 0.5], [0.7, 0.2, 0.6], [0.3, 0.2, 0.1], [0.0, 0.5, 0.9]])
    labels = torch.tensor([1, 2, 2, 2])
    assert top_k_accuracy(logits, labels, ks=(1, 2, 3, 5)) == (50.0, 75.0, 100.0, 100.0)
    assert top_k_hits(logits, labels).tolist() == [2, 4]


def test_accuracy_is_that_of_topk_where_logits_differ() -> None:
    logits, labels = torch.randn(200, 20), torch.randint(20, (200,))
    wanted = [100.0 * (logits.topk(k).indices == labels[:, None]).any(dim=1).double().mean().item() for k in (1, 5)]
    assert top_k_accuracy(logits, labels) == pytest.approx(wanted)


def test_a_collapsed_network_is_not_right_by_accident() -> None:
    labels = torch.arange(10)
    assert top_k_accuracy(torch.zeros(10, 10), labels) == (10.0, 50.0)
    assert top_k_accuracy(torch.full((10, 10), float("nan")), labels) == (0.0, 0.0)


@pytest.mark.parametrize(("logits", "labels"), [((0, 3), (0,)), ((4, 3), (3,)), ((4,), (4,))])
def test_logits_and_labels_that_do_not_fit_are_refused(logits: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match="do not fit"):
        top_k_accuracy(torch.zeros(logits), torch.zeros(labels, dtype=torch.int64))


# -- the linear probe -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("l2", [1e-3, 1e-2, 1.0])
def test_the_linear_probe_is_scikit_learns_logistic_regression(l2: float) -> None:
    (train, labels), (val, val_labels) = clusters(300, 1), clusters(150, 2)
    reference = make_pipeline(StandardScaler(), LogisticRegression(C=1 / (l2 * 300), tol=1e-10, max_iter=10_000))
    reference.fit(train.double().numpy(), labels.numpy())
    standard, others = standardized(train, val)
    weight, bias, gradient = fit_logistic(standard, labels, NUM_CLASSES, l2=l2)
    assert gradient <= 1e-8
    probabilities = (others @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities, reference.predict_proba(val.double().numpy()), atol=2e-6)
    np.testing.assert_allclose(weight, reference[-1].coef_, atol=2e-5)
    top1, top5, left = linear_probe(train, labels, val, val_labels, NUM_CLASSES, l2=l2)
    assert left == gradient
    assert top1 == pytest.approx(100.0 * reference.score(val.double().numpy(), val_labels.numpy()))
    assert 40.0 < top1 < 100.0
    assert top1 < top5 <= 100.0


def test_the_solution_is_one_and_the_gradient_there_is_zero() -> None:
    features, labels = clusters(200, 1, dim=40)
    standard, _ = standardized(features, features)
    weight, bias, _ = fit_logistic(standard, labels, NUM_CLASSES, l2=1e-2)
    again = fit_logistic(standard, labels, NUM_CLASSES, l2=1e-2)
    assert torch.equal(weight, again[0])
    weight.requires_grad_(), bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, labels) + 0.5 * 1e-2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert max(gradient.abs().max().item() for gradient in gradients) <= 1e-8


def test_a_solver_that_stops_early_tells_the_gradient_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels = clusters(200, 1, dim=40)
    standard, _ = standardized(features, features)
    monkeypatch.setattr(probes, "_MAX_ITERATIONS", 3)
    weight, bias, left = fit_logistic(standard, labels, NUM_CLASSES, l2=1e-2)
    weight.requires_grad_(), bias.requires_grad_()
    loss = torch.nn.functional.cross_entropy(standard @ weight.T + bias, labels) + 0.5 * 1e-2 * weight.square().sum()
    gradients = torch.autograd.grad(loss, (weight, bias))
    assert left == pytest.approx(max(gradient.abs().max().item() for gradient in gradients))
    assert left > probes.CONVERGED_GRADIENT


def test_constant_features_are_centred_and_left_at_that() -> None:
    train = torch.tensor([[1.0, 1e4], [3.0, 1e4], [5.0, 1e4]])
    ours, others = standardized(train, torch.tensor([[3.0, 1e4 + 1.0]]))
    assert ours[:, 0].tolist() == pytest.approx([-(1.5**0.5), 0.0, 1.5**0.5])
    assert ours[:, 1].tolist() == [0.0, 0.0, 0.0]
    assert others.tolist() == [[0.0, 1.0]]


def test_a_class_without_training_images_is_named() -> None:
    features, labels = clusters(60, 1)
    seen = (labels != 2) & (labels != 4)
    with pytest.raises(DataError, match=r"2 of 6 classes have none of the 40 training images \(2, 4\).*probe_images"):
        linear_probe(features[seen], labels[seen], features, labels, NUM_CLASSES)


# -- nearest neighbours -----------------------------------------------------------------------------------------------


def test_nearest_neighbours_vote_as_scikit_learns_with_these_weights() -> None:
    (train, labels), (val, val_labels) = clusters(240, 1), clusters(120, 2)
    reference = KNeighborsClassifier(
        n_neighbors=9, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    reference.fit(train.double().numpy(), labels.numpy())
    top1, top5 = knn_probe(train, labels, val, val_labels, NUM_CLASSES, neighbors=9)
    assert top1 == pytest.approx(100.0 * reference.score(val.double().numpy(), val_labels.numpy()))
    assert 20.0 < top1 < top5 <= 100.0


@pytest.mark.parametrize("chunk", [1, 7, 50, 1000])
def test_chunks_do_not_change_the_votes(chunk: int) -> None:
    (train, labels), (val, val_labels) = clusters(100, 1), clusters(60, 2)
    whole = knn_probe(train, labels, val, val_labels, NUM_CLASSES, neighbors=8, chunk=4096)
    assert knn_probe(train, labels, val, val_labels, NUM_CLASSES, neighbors=8, chunk=chunk) == whole


def test_an_images_own_feature_is_its_nearest() -> None:
    features, labels = clusters(50, 1)
    assert knn_probe(features, labels, features * 5.0, labels, NUM_CLASSES, neighbors=1)[0] == 100.0


def test_more_neighbours_than_images_are_refused() -> None:
    features, labels = clusters(12, 1)
    with pytest.raises(DataError, match=r"13 neighbours of 12 training images: lower finetune\.knn_neighbors"):
        knn_probe(features, labels, features, labels, NUM_CLASSES, neighbors=13)


# -- what neither takes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("probe", [linear_probe, knn_probe])
def test_features_that_do_not_fit_are_refused(probe: object) -> None:
    assert callable(probe)
    features, labels = clusters(60, 1)
    spoilt = features.clone()
    spoilt[7, 2] = float("inf")
    cases = [
        ((features[:0], labels[:0], features, labels), "training features .* do not fit"),
        ((features, labels, features, labels[:-1]), "validation features .* do not fit"),
        ((spoilt, labels, features, labels), "training features hold values that are not finite"),
        ((features, labels, features, labels + 1), "validation labels are 1 to 6, wanted 0 to 5"),
        ((features, labels, features[:, 1:], labels), "12 training and 11 validation features"),
    ]
    for arguments, message in cases:
        with pytest.raises(DataError, match=message):
            probe(*arguments, NUM_CLASSES)
