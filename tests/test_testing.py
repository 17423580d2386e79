"""check_method passes methods that keep the contract (their own tests) and fails each way of breaking it."""

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lmd_bench.errors import ConfigError
from lmd_bench.method import DataSpec, Method, MethodConfig, StepOutput
from lmd_bench.nn.masking import fill_with_visible_mean, pixel_mask
from lmd_bench.testing import check_method


class Filler(Method):
    """A small honest method: a convolution that fills a hidden square from what surrounds it."""

    Config: ClassVar[type[MethodConfig]] = MethodConfig

    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.net = nn.Sequential(nn.Conv2d(3, 16, 5, padding=2), nn.GELU(), nn.Conv2d(16, 3, 5, padding=2))
        self.offset = nn.Parameter(torch.zeros(3, 1, 1), requires_grad=False)

    def predict(self, images: Tensor) -> Tensor:
        out: Tensor = self.net(images) + self.offset
        return out

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        hidden = pixel_mask(torch.rand(len(inputs), 4, 4) < 0.5, self.data.image_size)
        predicted = self.predict(inputs.masked_fill(hidden, 0.0))
        return StepOutput(((predicted - inputs) ** 2).mean(), {"share": hidden.float().mean()})

    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        hidden = pixel_mask(mask, self.data.image_size)
        filled = fill_with_visible_mean(images, hidden)
        return torch.where(hidden, self.predict(filled).clamp(0, 1), images)


class Leaks(Filler):
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        hidden = pixel_mask(mask, self.data.image_size)
        return torch.where(hidden, images.mean(dim=(2, 3), keepdim=True), images)


class OutOfRange(Filler):
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return super().reconstruct(images, mask) * 2 - 1


class WrongShape(Filler):
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        return super().reconstruct(images, mask)[..., :-1]


class ChangesItsInput(Filler):
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        result = super().reconstruct(images, mask)
        images.zero_()
        return result


class RandomReconstruction(Filler):
    def reconstruct(self, images: Tensor, mask: Tensor) -> Tensor:
        noise = torch.rand(images.shape, generator=torch.Generator().manual_seed(torch.seed()))
        return (super().reconstruct(images, mask) + noise) / 2


class UnusedParameter(Filler):
    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.unused = nn.Parameter(torch.randn(3, 3))


class OwnGenerator(Filler):
    generator = torch.Generator()

    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        scale = 1 + torch.rand((), generator=self.generator)
        return StepOutput(super().training_step(inputs, step=step, total_steps=total_steps).loss * scale)


class Detached(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        return StepOutput(super().training_step(inputs, step=step, total_steps=total_steps).loss.detach())


class NotFinite(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        return StepOutput(super().training_step(inputs, step=step, total_steps=total_steps).loss / 0)


class PerSample(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        return StepOutput(((self.predict(inputs) - inputs) ** 2).mean(dim=(1, 2, 3)))


class AttachedScalar(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        loss = super().training_step(inputs, step=step, total_steps=total_steps).loss
        return StepOutput(loss, {"loss": loss})


class CannotLearn(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        return StepOutput(1 + 1e-3 * super().training_step(inputs, step=step, total_steps=total_steps).loss)


class HiddenState(Filler):
    def __init__(self, config: MethodConfig, data: DataSpec) -> None:
        super().__init__(config, data)
        self.weights = torch.rand(3, 1, 1)

    def predict(self, images: Tensor) -> Tensor:
        return super().predict(images) * self.weights


class MovesFrozenWeights(Filler):
    def training_step(self, inputs: Tensor, *, step: int, total_steps: int) -> StepOutput:
        self.offset.data += 1e-3
        return super().training_step(inputs, step=step, total_steps=total_steps)


class GroupsTwice(Filler):
    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [*super().param_groups(weight_decay), {"params": [self.net[0].weight]}]


class GroupsTooFew(Filler):
    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": [self.net[0].weight]}]


class GroupsFrozen(Filler):
    def param_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [{"params": list(self.parameters())}]


class RatioOfOne(Filler):
    def mask_ratio_at(self, step: int, total_steps: int) -> float:
        return step / total_steps


class NoTokens(Filler):
    def num_tokens_at(self, step: int, total_steps: int) -> int:
        return 0


class Refuses(Filler):
    @classmethod
    def check(cls, config: Any, data: DataSpec) -> None:
        raise ConfigError("no")


def check(method_cls: type[Method]) -> None:
    check_method(method_cls, MethodConfig(), DataSpec(16), learning_rate=1e-2)


def test_an_honest_method_passes() -> None:
    check(Filler)


def test_the_yardstick_part_is_left_out_where_there_is_an_obstacle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Leaks, "yardstick_obstacle", classmethod(lambda cls, config: "own mask"))
    check(Leaks)


def test_global_random_state_is_left_as_it_was() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    check(Filler)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_refused_options_are_reported_as_they_are() -> None:
    with pytest.raises(ConfigError):
        check(Refuses)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (Leaks, "hidden pixels leak"),
        (OutOfRange, r"the reconstruction must lie in \[0, 1\]"),
        (WrongShape, "reconstruct returned"),
        (ChangesItsInput, "reconstruct changes the images it is given"),
        (RandomReconstruction, "the same seed gave two reconstructions"),
        (UnusedParameter, r"no gradient reached trainable parameters in 30 steps: \['unused'\]"),
        (OwnGenerator, "the same seed gave two losses"),
        (Detached, "the loss is not attached to the graph"),
        (NotFinite, "the loss of a fresh model is inf"),
        (PerSample, r"the loss must be one number, got shape \(4,\)"),
        (AttachedScalar, "scalar 'loss' must be detached"),
        (CannotLearn, "one batch cannot be overfitted"),
        (HiddenState, "after loading a state dict the loss is"),
        (MovesFrozenWeights, r"frozen parameters changed in training: \['offset'\]"),
        (GroupsTwice, r"param_groups holds parameters more than once: \['net.0.weight'\]"),
        (GroupsTooFew, "param_groups leaves out trainable parameters"),
        (GroupsFrozen, "param_groups holds frozen parameters"),
        (RatioOfOne, r"mask_ratio_at\(100\) is 1.0"),
        (NoTokens, r"num_tokens_at\(1\) is 0"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_each_way_of_breaking_the_contract_is_found(broken: type[Method], message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(broken)
