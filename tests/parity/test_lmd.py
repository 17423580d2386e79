"""LMD ViT-B/4 on 28 x 28 x 4 latents against the authors' code (AnonymousPony/lmd) on formula weights."""

import pytest

from lmd_bench.lmd.method import LMD
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from tests.parity.autoencoder import (
    assert_case_matches,
    assert_layout_matches,
    assert_tables_and_encoder_match,
)
from tests.parity.fill import filled_state_dict, load_reference, reference_input

MANIFEST = load_reference("lmd_vit_base_patch4.manifest")
REFERENCE = load_reference("lmd_vit_base_patch4.strong.reference")
IMAGES = reference_input(2, 4, 28, 28)


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return LMD.from_official(filled_state_dict(MANIFEST)).model


def test_layout_and_counts_equal_the_authors_checkpoint(model: MaskedAutoencoder) -> None:
    assert_layout_matches(model, MANIFEST)


def test_position_tables_and_encoder_output_equal_the_authors(model: MaskedAutoencoder) -> None:
    assert_tables_and_encoder_match(model, IMAGES, REFERENCE)


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_mask_prediction_loss_and_gradient_equal_the_authors(model: MaskedAutoencoder, name: str) -> None:
    assert_case_matches(model, IMAGES, name, REFERENCE["cases"][name])
