"""The suites that take LMD apart: every row differs from its base in exactly what it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmd_bench.config import RowConfig
from lmd_bench.data.yardstick import yardstick_masks
from lmd_bench.method import Batch, DataSpec, Method
from lmd_bench.nn.masking import pixel_mask, token_mask
from lmd_bench.registry import load_method
from lmd_bench.suite_files import load_suite

LABELS = {"label", "published", "note", "base"}

ABLATIONS = {
    "wo-lsp": {"options.projector.kind", "options.projector.path", "options.patch_size"},
    "wo-mae": {"options.network"},
    "wo-mds": {"options.mask_schedule"},
}
CONFOUNDS = {
    "mae-p32": ("mae", {"options.patch_size"}),
    "mae-p32-half": ("mae-p32", {"options.pixel_stats"}),
    "mae-adan": ("mae", {"recipe"}),
    "lmd-p2": ("lmd", {"options.patch_size"}),
    "lmd-constant": ("lmd", {"options.mask_schedule"}),
    "lmd-pos": ("lmd", {"options.decoder_pos_sign"}),
    "lmd-adan": ("lmd", {"recipe"}),
    "lmd-pixels": ("lmd", {"options.projector.kind", "options.projector.path", "options.patch_size"}),
    "lmd-bf16": ("lmd", {"options.projector.precision"}),
    "lmd-cached": ("lmd", {"options.projector.cache"}),
    "lmd-light": ("lmd", {"options.projector.kind", "options.projector.path"}),
}


def resolved(row: RowConfig) -> dict[str, Any]:
    """Every value of a row, the method's defaults filled in, by dotted name."""
    options = load_method(row.method, {}).Config.model_validate(row.options)
    return flat({**row.model_dump(exclude={"options", *LABELS}), "options": options.model_dump(mode="json")})


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        found.update(flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value})
    return found


def changed(base: RowConfig, row: RowConfig) -> set[str]:
    before, after = resolved(base), resolved(row)
    return {name for name in {*before, *after} if before.get(name) != after.get(name)}


@pytest.mark.parametrize("row", ABLATIONS)
def test_an_ablation_takes_away_one_part_and_changes_nothing_else(row: str) -> None:
    suite = load_suite("ablation")
    assert set(suite.methods) == {"lmd-cs", *ABLATIONS}
    assert changed(suite.methods["lmd-cs"], suite.methods[row]) == ABLATIONS[row]
    assert suite.methods[row].base == "lmd-cs"


@pytest.mark.parametrize("row", ABLATIONS)
def test_the_demo_takes_away_the_same_parts(row: str) -> None:
    suite = load_suite("demo")
    found = changed(suite.methods["lmd-cs"], suite.methods[row])
    assert {name for name in found if not name.startswith("options.unet.")} == ABLATIONS[row]
    assert suite.methods[row].base == "lmd-cs"


def test_every_ablation_is_built() -> None:
    assert [name for name, row in load_suite("ablation").methods.items() if row.listed_only is not None] == []


@pytest.mark.parametrize("row", CONFOUNDS)
def test_a_confound_differs_from_the_row_its_note_names_in_one_factor(row: str) -> None:
    suite = load_suite("confounds")
    base, fields = CONFOUNDS[row]
    assert changed(suite.methods[base], suite.methods[row]) == fields
    assert suite.methods[row].base == base
    assert suite.methods[row].note.startswith(f"{row} differs from {base} in ")


def test_the_confounds_are_complete_and_start_from_two_rows() -> None:
    suite = load_suite("confounds")
    assert set(suite.methods) == {"mae", "lmd", "lmd-bridge", *CONFOUNDS}
    assert [name for name, row in suite.methods.items() if row.base is None] == ["mae", "lmd"]
    assert suite.reference == "mae"
    assert all(row.listed_only is None for row in suite.methods.values())


def test_the_bridge_is_reached_from_lmd_by_schedule_and_positions() -> None:
    rows = load_suite("confounds").methods
    both = {"options.mask_schedule", "options.decoder_pos_sign"}
    assert changed(rows["lmd"], rows["lmd-bridge"]) == both
    assert changed(rows["lmd-constant"], rows["lmd-bridge"]) == {"options.decoder_pos_sign"}
    assert changed(rows["lmd-pos"], rows["lmd-bridge"]) == {"options.mask_schedule"}


def test_with_pixels_for_latents_the_bridge_is_the_row_of_mae_that_it_starts_from() -> None:
    """So that the two differ in space alone: same weights, same losses, same reconstructions, same optimizer groups."""
    rows = load_suite("confounds").methods
    bridge, base = rows["lmd-bridge"], rows["mae-p32-half"]
    assert bridge.base == "mae-p32-half"
    assert bridge.recipe == base.recipe
    pixels = {"projector": {"kind": "pixels"}, "patch_size": 32}
    lmd, mae = (
        small_method(row.model_copy(update={"options": row.options | options}))
        for row, options in ((bridge, pixels), (base, {}))
    )
    assert lmd.state_dict().keys() == mae.state_dict().keys()
    assert all(torch.equal(value, mae.state_dict()[name]) for name, value in lmd.state_dict().items())
    groups = [[(len(g["params"]), g["weight_decay"]) for g in method.param_groups(0.05)] for method in (lmd, mae)]
    assert groups[0] == groups[1]
    images = torch.rand(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    mask = yardstick_masks(2, 224, 32, 0.25)
    assert [lmd.num_tokens_at(step, 9) for step in (1, 9)] == [mae.num_tokens_at(step, 9) for step in (1, 9)]
    losses = []
    for method in (lmd, mae):
        torch.manual_seed(2)
        losses.append(method.training_step(method.prepare(Batch(images)), step=1, total_steps=9).loss)
    assert torch.equal(*losses)
    torch.testing.assert_close(lmd.reconstruct(images, mask), mae.reconstruct(images, mask), rtol=0, atol=1e-6)


def small_method(row: RowConfig) -> Method:
    """The row's method with few weights."""
    sizes = {"encoder_width": 16, "encoder_depth": 1, "encoder_heads": 2}
    sizes |= {"decoder_width": 16, "decoder_depth": 1, "decoder_heads": 2}
    method, config = method_and_config(row.model_copy(update={"options": row.options | sizes}))
    torch.manual_seed(0)
    return method(config, DataSpec(224))


def test_the_notes_of_the_confounds_name_every_difference_and_where_the_chains_meet() -> None:
    notes = load_suite("confounds").notes
    for words in (
        "five things at once",
        "positions that are subtracted",
        "normalises pixels",
        "lmd-bridge beside mae-p32",
    ):
        assert words in notes


def test_the_note_of_the_demos_adan_names_all_that_differs() -> None:
    suite = load_suite("demo")
    row = suite.methods["lmd-cs-adan"]
    assert row.base == "lmd-cs"
    assert changed(suite.methods["lmd-cs"], row) == {"recipe", "finetune"}  # Tables 2 and 5 have no such row
    equal, adan = (flat(suite.recipes[name].model_dump()) for name in ("equal", "adan"))
    different = {name for name in equal if equal[name] != adan[name]} - {"source"}
    assert different == {"optimizer.name", "optimizer.betas", "optimizer.implementation", "clip_grad_norm"}
    assert all(words in row.note for words in ("Adan", "clipping of gradients to a norm of 10", "fused"))


def test_the_recipes_of_the_confounds_differ_in_the_optimizer_alone() -> None:
    recipes = {name: recipe.model_dump() for name, recipe in load_suite("confounds").recipes.items()}
    different = {key for key in recipes["equal"] if recipes["equal"][key] != recipes["adan"][key]}
    assert different == {"optimizer", "source"}
    optimizers = [recipe["optimizer"] for recipe in recipes.values()]
    assert {key for key in optimizers[0] if optimizers[0][key] != optimizers[1][key]} == {"name", "betas"}


def test_the_training_images_of_the_confounds_fit_in_a_gigabyte() -> None:
    data = load_suite("confounds").data
    assert data.num_train is not None
    assert (data.num_train + data.num_held_out) * 3 * data.image_size**2 < 2**29


def method_and_config(row: RowConfig) -> tuple[type[Method], Any]:
    method = load_method(row.method, {})
    return method, method.Config.model_validate(row.options)


@pytest.mark.parametrize("suite_name", ["ablation", "confounds"])
def test_every_row_passes_its_methods_check_and_takes_the_yardsticks_masks(suite_name: str) -> None:
    suite = load_suite(suite_name)
    masks = yardstick_masks(4, 224, suite.evaluation.unit_px, suite.evaluation.keep)
    for row in suite.methods.values():
        method, config = method_and_config(row)
        method.check(config, DataSpec(224))
        token_px = method.token_px(config, DataSpec(224))
        assert token_px is not None
        token_mask(pixel_mask(masks, 224), token_px)


def test_the_confounds_have_the_token_counts_they_name() -> None:
    rows = load_suite("confounds").methods
    tokens = {}
    for name in ("mae", "mae-p32", "lmd", "lmd-p2", "lmd-pixels"):
        method, config = method_and_config(rows[name])
        tokens[name] = (224 // (method.token_px(config, DataSpec(224)) or 1)) ** 2
    assert tokens == {"mae": 196, "mae-p32": 49, "lmd": 49, "lmd-p2": 196, "lmd-pixels": 49}
