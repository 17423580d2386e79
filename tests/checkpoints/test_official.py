"""Authors' checkpoints as methods: what may be said about one, what became of its keys, and what is refused."""

from __future__ import annotations

import argparse
from itertools import permutations
from pathlib import Path

import pytest
import torch
from helpers.official import CASES, PROJECTOR, randomized
from torch import Tensor

from lmd_bench.checkpoints.official import OfficialMethod, OfficialRequest, open_official_method, sizes_text
from lmd_bench.errors import BenchError, ConfigError, WeightsError
from lmd_bench.method import DataSpec
from lmd_bench.registry import installed_methods, load_method

HEADS = ("encoder_heads=2", "decoder_heads=3")
PLAIN = "normalize_targets=false"


@pytest.fixture(scope="module")
def officials() -> dict[str, dict[str, Tensor]]:
    """Every tiny model's weights in its authors' layout."""
    return {name: case.build().to_official() for name, case in CASES.items()}


def save(tensors: dict[str, Tensor], folder: Path, **beside: object) -> Path:
    torch.save({"model": {name: value.clone() for name, value in tensors.items()}, **beside}, folder / "x.pth")
    return folder / "x.pth"


def open_mae(path: Path, *settings: str, ema: bool = False) -> OfficialMethod:
    return open_official_method(OfficialRequest(path, "mae", settings, ema=ema))


def test_every_installed_method_is_tried() -> None:
    trained_here = {name for name in installed_methods() if load_method(name, {}).is_trained}
    assert {case.method for case in CASES.values()} == trained_here


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_becomes_its_method_with_every_key_used(
    name: str, officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    case = CASES[name]
    path = save(officials[name], tmp_path)
    opened = open_official_method(OfficialRequest(path, case.method, case.settings, case.projector))
    assert (opened.left_out, opened.changed) == ((), ())
    assert opened.method.data.image_size == case.image_size
    assert not opened.method.training
    assert opened.num_parameters > 10_000
    for key, value in opened.method.to_official().items():
        assert torch.equal(value, officials[name][key]), key


# one layout, by the authors' own design: nothing in the tensors tells these apart
SAME_LAYOUT = {
    ("mae", "lmd"): "LMD's network is MAE's, and latents of a VQ-f4 projector have 3 channels as images have",
    ("ddpm", "ddim"): "DDPM is held to the DDIM repository's port",
    ("ddim", "ddpm"): "DDPM is held to the DDIM repository's port",
}


OTHER_METHODS = [
    (one, other)
    for one, other in permutations(CASES, 2)
    if CASES[one].method != CASES[other].method and (CASES[one].method, CASES[other].method) not in SAME_LAYOUT
]


@pytest.fixture(scope="module")
def saved(officials: dict[str, dict[str, Tensor]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a file of every tiny model's weights."""
    folder = tmp_path_factory.mktemp("officials")
    for name, tensors in officials.items():
        torch.save({"model": {key: value.clone() for key, value in tensors.items()}}, folder / f"{name}.pth")
    return folder


@pytest.mark.parametrize(("given", "taken_for"), OTHER_METHODS)
def test_a_checkpoint_of_another_method_is_refused_in_one_line_that_names_a_key(
    given: str, taken_for: str, officials: dict[str, dict[str, Tensor]], saved: Path
) -> None:
    case = CASES[taken_for]
    request = OfficialRequest(saved / f"{given}.pth", case.method, case.settings, case.projector)
    with pytest.raises(WeightsError) as caught:
        open_official_method(request)
    message = str(caught.value)
    assert message.startswith(f"{saved / given}.pth: ")
    assert "\n" not in message
    one, other = officials[given], officials[taken_for]
    differing = one.keys() ^ other.keys() or {key for key in one if one[key].shape != other[key].shape}
    assert any(key.removeprefix("model.diffusion_model.") in message for key in differing), message


@pytest.mark.parametrize("name", CASES)
def test_keys_too_many_missing_or_of_another_shape_are_refused_by_name(
    name: str, officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    case, official = CASES[name], officials[name]
    last = [key for key, value in official.items() if value.is_floating_point()][-1]
    for tensors, key in (
        ({**official, "surplus.weight": torch.zeros(1)}, "surplus.weight"),
        ({key: value for key, value in official.items() if key != last}, last),
        ({**official, last: torch.zeros(*official[last].shape, 2)}, last),
    ):
        with pytest.raises(WeightsError) as caught:
            open_official_method(OfficialRequest(save(tensors, tmp_path), case.method, case.settings, case.projector))
        assert key.removeprefix("model.diffusion_model.") in str(caught.value)
        assert "\n" not in str(caught.value)


# -- what may be said -------------------------------------------------------------------------------------------------


def test_heads_are_those_of_the_published_model_of_the_width_unless_they_are_given(tmp_path: Path) -> None:
    method_class = load_method("mae", {})
    widths = {"encoder_width": 192, "decoder_width": 512, "encoder_heads": 3, "decoder_heads": 16}
    options = method_class.Config.model_validate({**CASES["mae"].options, **widths})
    path = save(method_class(options, CASES["mae"].build().data).to_official(), tmp_path)
    assert sizes_text(open_mae(path, PLAIN).method) == (
        "encoder of width 192, 1 blocks and 3 heads, decoder of width 512, 1 blocks and 16 heads"
    )
    assert "width 192, 1 blocks and 12 heads" in sizes_text(open_mae(path, PLAIN, "encoder_heads=12").method)


@pytest.mark.parametrize("name", CASES)
def test_every_method_says_its_sizes_in_words(name: str) -> None:
    method = CASES[name].build()
    text = sizes_text(method)
    assert "heads" in text
    assert "\n" not in text
    if name in ("ddpm", "ddim", "iddpm", "ldm"):
        heads = 4 if name in ("iddpm", "ldm") else 1
        assert text == (
            "U-Net of channels [16, 32], 1 blocks a level, attention on levels [1] and in the middle with "
            f"{[heads, heads]} heads"
        )


def test_a_width_of_no_published_model_needs_its_heads(officials: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    path = save(officials["mae"], tmp_path)
    with pytest.raises(WeightsError, match=r"x\.pth: .*no published encoder has the width 32.*--set encoder_heads=N"):
        open_mae(path, PLAIN)


def test_whether_targets_were_normalised_is_read_where_it_stands_and_asked_for_where_not(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"normalised .*pass --norm_pix_loss; MAE's mae_visualize.*: say --set normalize_t"
    ):
        open_mae(save(officials["mae"], tmp_path), *HEADS)
    for stored in (False, True):
        path = save(officials["mae"], tmp_path, args=argparse.Namespace(norm_pix_loss=stored))
        assert open_mae(path, *HEADS).method.config.normalize_targets is stored
    with pytest.raises(ConfigError, match=r"x\.pth says that it was trained with norm_pix_loss True"):
        open_mae(path, *HEADS, PLAIN)


def test_methods_without_normalised_targets_are_not_asked_for_them(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    request = OfficialRequest(save(officials["ddim"], tmp_path), "ddim", CASES["ddim"].settings)
    assert open_official_method(request).method.data.image_size == 16


def test_a_method_on_latents_needs_its_projector_and_one_on_pixels_takes_none(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    case, path = CASES["lmd"], save(officials["lmd"], tmp_path)
    with pytest.raises(ConfigError, match="method lmd: its weights hold no projector: name one with --projector"):
        open_official_method(OfficialRequest(path, "lmd", case.settings))
    scaled = OfficialRequest(path, "lmd", (*case.settings, "projector.scale=0.5"), PROJECTOR)
    assert open_official_method(scaled).method.config.projector.scale == 0.5
    with pytest.raises(ConfigError, match="--projector x: MAE works on pixels, without a projector; leave it out"):
        open_official_method(OfficialRequest(path, "mae", projector="x"))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("encoder_heads", "--set encoder_heads: write it as option=value"),
        ("=3", "--set =3: write it as option=value"),
        ("encoder_haeds=2", "MAE has no option 'encoder_haeds'; did you mean 'encoder_heads'"),
        ("encoder_heads=two", "--set encoder_heads: Input should be a valid integer"),
        ("encoder_heads=0", "--set encoder_heads: Input should be greater than or equal to 1"),
        ("encoder_heads=5", "encoder_heads: 5 heads do not divide"),
        ("encoder_heads=[", "the value is not valid YAML"),
        ("mask_ratio=1.5", "--set mask_ratio: Input should be less than 1"),
        ("patch_size=5", "patch_size: 5 does not cut images of 32 x 32"),
        ("image_size=64", "image_size: Extra inputs are not permitted"),
        ("encoder_width=64", "64"),
    ],
)
def test_settings_that_do_not_fit_are_refused_in_one_line(
    setting: str, message: str, officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(officials["mae"], tmp_path)
    with pytest.raises(BenchError) as caught:
        open_mae(path, *HEADS, PLAIN, setting)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("backbone={kind: vit}", "backbone.depth=2"), "--set backbone and --set backbone.depth: give the whole"),
        (("backbone.depth=2", "backbone=vit"), "--set backbone and --set backbone.depth: give the whole or its parts"),
    ],
)
def test_a_whole_and_a_part_of_it_are_refused_together(
    settings: tuple[str, ...], message: str, officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        open_official_method(OfficialRequest(tmp_path / "absent.pth", "simmim", settings))


@pytest.mark.parametrize("setting", ["projector={kind: pixels}", "projector.path=x", "projector.kind=kl", "ema=false"])
def test_an_option_of_its_own_is_not_said_again_as_a_setting(setting: str, tmp_path: Path) -> None:
    request = OfficialRequest(tmp_path / "absent.pth", "ldm", (setting,), PROJECTOR, ema=True)
    word = "--ema" if setting.startswith("ema") else "--projector"
    with pytest.raises(ConfigError, match=f"{word} and --set {setting.partition('=')[0]}: give one of them"):
        open_official_method(request)


@pytest.mark.parametrize(("size", "bound"), [(4, "greater than or equal to 8"), (8192, "less than or equal to 4096")])
def test_image_sizes_have_bounds(size: int, bound: str, tmp_path: Path) -> None:
    for method in ("mae", "ddim", "ldm"):
        with pytest.raises(ConfigError, match=f"--set image_size: Input should be {bound}"):
            open_official_method(OfficialRequest(tmp_path / "absent.pth", method, (f"image_size={size}",)))


def test_weights_for_images_too_small_to_use_are_refused(tmp_path: Path) -> None:
    case = CASES["mae"]
    method_class = load_method("mae", {})
    method = method_class(method_class.Config.model_validate({**case.options, "patch_size": 2}), DataSpec(4))
    with pytest.raises(WeightsError, match=r"x\.pth: weights for images of 4 px: .*greater than or equal to 8"):
        open_mae(save(method.to_official(), tmp_path), *HEADS, PLAIN)


def test_a_part_of_nested_options_leaves_the_rest_to_the_weights(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    path = save(officials["simmim"], tmp_path)
    settings = (*CASES["simmim"].settings, "backbone.drop_path=0.2")
    backbone = open_official_method(OfficialRequest(path, "simmim", settings)).method.config.backbone
    assert (backbone.drop_path, backbone.embed_dim) == (0.2, 16)


def test_a_method_without_an_official_layout_is_refused_before_the_file_is_read(tmp_path: Path) -> None:
    target = f"{Path(__file__).parents[1] / 'helpers' / 'methods.py'}:Tiny"
    with pytest.raises(ConfigError, match="Tiny has no official checkpoint layout"):
        open_official_method(OfficialRequest(tmp_path / "absent.pth", "tiny"), {"tiny": target})


# -- what became of the keys ------------------------------------------------------------------------------------------


def test_what_is_no_part_of_the_method_is_named(officials: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    beside = {f"first_stage_model.encoder.{i}.weight": torch.ones(i + 1) for i in range(3)}
    path = save({**officials["ldm"], **beside, "lvlb_weights": torch.zeros(1000)}, tmp_path)
    opened = open_official_method(OfficialRequest(path, "ldm", CASES["ldm"].settings, PROJECTOR))
    assert set(opened.left_out) == {*beside, "lvlb_weights"}
    assert opened.left_out_text == "first_stage_model.encoder.N.weight (3), lvlb_weights"


def test_a_moving_average_among_the_tensors_is_used_in_place_of_the_weights(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    prefix = "model.diffusion_model."
    plain, average = randomized(officials["ldm"], 1), randomized(officials["ldm"], 2)
    named = {f"model_ema.diffusion_model{key.removeprefix(prefix).replace('.', '')}": v for key, v in average.items()}
    path = save({**plain, **named}, tmp_path)
    opened = open_official_method(OfficialRequest(path, "ldm", CASES["ldm"].settings, PROJECTOR, ema=True))
    official = opened.method.to_official()
    assert all(torch.equal(official[key], value) for key, value in average.items())
    assert set(opened.left_out) == set(plain)
    assert opened.changed == ()
    without = open_official_method(OfficialRequest(path, "ldm", CASES["ldm"].settings, PROJECTOR))
    assert set(without.left_out) == set(named)


def test_a_moving_average_in_a_list_of_states_is_used_in_place_of_the_weights(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    plain, average = randomized(officials["ddim"], 1), randomized(officials["ddim"], 2)
    torch.save([{f"module.{name}": value for name, value in plain.items()}, {}, 1, 2, average], tmp_path / "x.pth")
    for ema, wanted in ((False, plain), (True, average)):
        opened = open_official_method(OfficialRequest(tmp_path / "x.pth", "ddim", CASES["ddim"].settings, ema=ema))
        assert all(torch.equal(value, wanted[name]) for name, value in opened.method.to_official().items())
        assert (opened.left_out, opened.changed) == ((), ())
    with pytest.raises(WeightsError, match=r"no moving average \(--ema\)"):
        open_mae(save(officials["mae"], tmp_path), *HEADS, PLAIN, ema=True)


def test_weights_of_half_precision_are_taken_as_they_are(
    officials: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    halved = {name: value.half() for name, value in officials["mae"].items()}
    opened = open_mae(save(halved, tmp_path), *HEADS, PLAIN)
    assert (opened.left_out, opened.changed) == ((), ())
    assert opened.method.to_official()["cls_token"].dtype == torch.float32
