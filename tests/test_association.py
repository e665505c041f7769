"""The association module against eq. 9 written out."""

from __future__ import annotations

import pytest
import torch

from gella.modeling.association import Association


def make_association(structure: str = "fc", calibrated: bool = True) -> Association:
    torch.manual_seed(0)
    return Association(
        noun_dim=6, entity_dim=4, dim=16, structure=structure, calibrated=calibrated, bias_init=-1.5
    )


def test_equals_the_dot_product_of_both_projections():
    association = make_association(calibrated=False)
    nouns, entities = [torch.randn(3, 6)], torch.randn(1, 5, 4)
    logits = association(nouns, entities)[0]
    for p in range(3):
        for q in range(5):
            expected = association.noun_branch(nouns[0][p]) @ association.entity_branch(
                entities[0, q]
            )
            assert float(logits[p, q]) == pytest.approx(float(expected), abs=1e-5)


def test_the_deeper_structure_of_table_10_is_fc_relu_fc_on_both_sides():
    association = make_association("fc_relu_fc", calibrated=False)
    nouns, entities = torch.randn(3, 6), torch.randn(5, 4)

    def literal(name: str, x: torch.Tensor) -> torch.Tensor:
        weights = dict(association.named_parameters())
        first, second = (f"{name}_branch.{layer}" for layer in (0, 2))
        hidden = (x @ weights[f"{first}.weight"].T + weights[f"{first}.bias"]).clamp(min=0)
        return hidden @ weights[f"{second}.weight"].T + weights[f"{second}.bias"]

    expected = literal("noun", nouns) @ literal("entity", entities).T
    logits = association([nouns], entities[None])[0]
    assert torch.allclose(logits, expected, atol=1e-5)
    assert len(list(association.parameters())) == 8


def test_calibration_starts_at_one_over_root_dim_and_the_given_bias():
    plain, calibrated = make_association(calibrated=False), make_association()
    nouns, entities = [torch.randn(2, 6)], torch.randn(1, 3, 4)
    expected = plain(nouns, entities)[0] / 4.0 - 1.5
    assert torch.allclose(calibrated(nouns, entities)[0], expected, atol=1e-6)
    assert {name for name, _ in plain.named_parameters()} == {
        name for name, _ in calibrated.named_parameters() if "branch" in name
    }


@pytest.mark.parametrize("structure", ["fc", "fc_relu_fc"])
def test_images_do_not_mix_and_may_lack_nouns(structure):
    association = make_association(structure)
    nouns = [torch.randn(2, 6), torch.randn(0, 6), torch.randn(4, 6)]
    entities = torch.randn(3, 5, 4)
    logits = association(nouns, entities)
    assert [tuple(x.shape) for x in logits] == [(2, 5), (0, 5), (4, 5)]
    alone = association(nouns[2:], entities[2:])[0]
    assert torch.allclose(logits[2], alone, atol=1e-6)


def test_bfloat16_nouns_meet_float32_entities():
    logits = make_association()([torch.randn(2, 6).bfloat16()], torch.randn(1, 3, 4))[0]
    assert logits.dtype == torch.float32


def test_an_unknown_structure_is_named():
    with pytest.raises(ValueError, match="'fc' or 'fc_relu_fc'"):
        make_association("mlp")
