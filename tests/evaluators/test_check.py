"""How evaluators are measured: which captions compete, and who wins."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lmd_bench.errors import DataError
from lmd_bench.evaluators.check import candidate_captions, classifier_accuracy, ranked_first
from lmd_bench.evaluators.resnet import ScenesClassifier
from lmd_bench.evaluators.training_scenes import ScenesSet, held_out_scenes

CPU = torch.device("cpu")


class FakeClip:
    """Knows images by their first pixel and captions by their first word; `wrong` of them it takes for the next."""

    def __init__(self, wrong: int = 0) -> None:
        self.wrong = wrong

    def encode_images(self, images: Tensor) -> Tensor:
        numbers = images[:, 0, 0, 0].long()
        return torch.nn.functional.one_hot(torch.where(numbers < self.wrong, numbers + 1, numbers), 64).float()

    def encode_texts(self, captions: list[str]) -> Tensor:
        return torch.nn.functional.one_hot(torch.tensor([int(text.split()[0]) for text in captions]), 64).float()


def numbered(count: int) -> ScenesSet:
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    return ScenesSet(images, {}, [f"{number} apples" for number in range(count)])


def test_a_caption_competes_with_nine_of_other_wording() -> None:
    captions = ["one", "two", *[f"caption {number % 9}" for number in range(40)], "one"]
    candidates = candidate_captions(captions, seed=0)
    assert candidates.shape == (43, 10)
    assert candidates[:, 0].tolist() == list(range(43))
    for row in candidates.tolist():
        assert len({captions[index] for index in row}) == 10
    assert torch.equal(candidates, candidate_captions(captions, seed=0))
    assert not torch.equal(candidates, candidate_captions(captions, seed=1))


def test_fewer_than_ten_different_captions_are_too_few() -> None:
    with pytest.raises(DataError, match="9 different captions, ranking takes 10; take more scenes"):
        candidate_captions([str(number % 9) for number in range(40)], seed=0)


def test_every_scene_counts_whose_own_caption_is_nearest() -> None:
    assert ranked_first(FakeClip(), numbered(40)) == 1.0  # type: ignore[arg-type]
    assert ranked_first(FakeClip(wrong=10), numbered(40)) == pytest.approx(0.75)  # type: ignore[arg-type]


def test_a_tie_is_lost() -> None:
    class Undecided(FakeClip):
        def encode_images(self, images: Tensor) -> Tensor:
            return torch.ones(len(images), 64)

    assert ranked_first(Undecided(), numbered(40)) == 0.0  # type: ignore[arg-type]


def test_accuracy_is_the_share_of_classes_named() -> None:
    scenes = held_out_scenes(20, 64, CPU)
    model = ScenesClassifier().eval()
    torch.nn.init.zeros_(model.head.weight)
    with torch.no_grad():
        model.head.bias.copy_(torch.nn.functional.one_hot(torch.tensor(3), 10).float())
    assert classifier_accuracy(model, scenes) == pytest.approx(0.1)  # every class once in ten scenes
