"""MAE ViT-B/16 against the authors' code (facebookresearch/mae) on formula weights."""

import pytest

from baselines.mae import MAE
from lmd_bench.nn.masked_autoencoder import MaskedAutoencoder
from tests.parity.autoencoder import (
    assert_case_matches,
    assert_layout_matches,
    assert_tables_and_encoder_match,
)
from tests.parity.fill import filled_state_dict, load_reference, reference_input

MANIFEST = load_reference("mae_vit_base_patch16.manifest")
REFERENCE = load_reference("mae_vit_base_patch16.strong.reference")
IMAGES = reference_input(2, 3, 224, 224)


@pytest.fixture(scope="module")
def model() -> MaskedAutoencoder:
    return MAE.from_official(filled_state_dict(MANIFEST)).model


def test_layout_and_counts_equal_the_authors_checkpoint(model: MaskedAutoencoder) -> None:
    assert_layout_matches(model, MANIFEST)


def test_position_tables_and_encoder_output_equal_the_authors(model: MaskedAutoencoder) -> None:
    assert_tables_and_encoder_match(model, IMAGES, REFERENCE)


@pytest.mark.parametrize("name", REFERENCE["cases"])
def test_mask_prediction_loss_and_gradient_equal_the_authors(model: MaskedAutoencoder, name: str) -> None:
    assert_case_matches(model, IMAGES, name, REFERENCE["cases"][name])
