"""Scenes features: the classifier's pooled features as an extractor."""

from __future__ import annotations

import torch

from lmd_bench.data.scenes import Scenes
from lmd_bench.evaluators.classifier import ScenesFeatures, open_classifier
from lmd_bench.evaluators.files import CLASSIFIER_FILE

CPU = torch.device("cpu")


def test_features_are_96_numbers_of_single_precision_and_the_same_every_time() -> None:
    extractor = ScenesFeatures.open(CPU)
    images = Scenes(1, 64).render(range(6))
    features = extractor(images)
    assert (features.shape, features.dtype) == ((6, extractor.num_features), torch.float32)
    assert extractor.num_features == 96
    assert not features.requires_grad
    assert features.std() > 0
    assert torch.equal(features, ScenesFeatures.open(CPU)(images))


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    extractor = ScenesFeatures.open(CPU)
    images = Scenes(1, 64).render(range(6))
    torch.testing.assert_close(extractor(images[2:3]), extractor(images)[2:3], rtol=1e-5, atol=1e-5)


def test_opening_draws_nothing_from_global_generators() -> None:
    state = torch.get_rng_state()
    ScenesFeatures.open(CPU)
    assert torch.equal(torch.get_rng_state(), state)


def test_features_are_what_the_head_of_the_classifier_reads() -> None:
    model, file = open_classifier(CPU)
    images = Scenes(1, 64).render(range(6))
    torch.testing.assert_close(model.head(ScenesFeatures(model, file)(images)), model(images.float() / 255))


def test_images_of_another_size_are_resized_first() -> None:
    extractor = ScenesFeatures.open(CPU)
    small, large = (extractor(Scenes(1, size).render(range(20))) for size in (64, 128))
    others = extractor(Scenes(2, 64).render(range(20)))
    assert (small - large).norm(dim=1).mean() < 0.5 * (small - others).norm(dim=1).mean()


def test_facts_name_the_features_as_columns_do() -> None:
    extractor = ScenesFeatures.open(CPU)
    assert (extractor.name, extractor.suffix) == ("scenes features", "_scenes")
    facts = extractor.facts
    assert (facts.name, facts.weights, facts.num_features) == ("scenes features", CLASSIFIER_FILE, 96)
    assert len(facts.sha256) == 64
    assert "bicubic to 64 px" in facts.resize
