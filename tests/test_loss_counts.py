"""What losses divide by: told from the data as the forward pass counts it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model

from gella import EntityMap, add_gella_config
from gella.modeling import criterion, language_decoder
from gella.modeling.loss_counts import count_terms, mean_over_parts, planned_counts

CPU = torch.device("cpu")


def sample(task, ids, phrases, answer):
    """A mapped dict of 32 x 32 pixels; 4 image tokens, then a prompt of 2 and the answer."""
    labels = [-100] * 6 + list(range(answer))
    seg = list(range(6, 6 + len(phrases)))
    return {
        "task": task,
        "image": torch.zeros(3, 32, 32, dtype=torch.uint8),
        "colormap": torch.zeros(3, 32, 32, dtype=torch.uint8),
        "entities": EntityMap(np.kron(ids, np.ones((16, 16), np.int32)), segment_ids=[1, 2, 3]),
        "input_ids": torch.tensor([-200] * 4 + [1, 2] + list(range(answer))),
        "labels": torch.tensor(labels),
        "seg_positions": torch.tensor(seg, dtype=torch.int64),
        "phrases": [{"entity_indices": indices} for indices in phrases],
    }


def batch(task):
    """Entity 3 of the first image has no pixel; one noun's entities are not known."""
    first = sample(task, [[1, 2], [2, 0]], [[0], None, []], 5)
    return [first, sample(task, [[1, 2], [3, 3]], [[1, 2]], 3)]


def test_counts_by_hand():
    assert count_terms(batch("ground"), None, 0.1) == {
        "answer": 8.0,
        "masks": 5.0,
        "queries": pytest.approx(5.1),  # the one without a pixel counts as no object
        "pairs": 9.0,  # 2 + 1 nouns with 3 entities each
    }
    counts = count_terms(batch("ground"), 2, 0.1)  # fewer queries than entities
    assert (counts["queries"], counts["pairs"]) == (4.0, 6.0)
    describing = count_terms(batch("describe"), None, 0.1)
    assert describing == {"answer": 8.0, "masks": 0.0, "queries": 0.0, "pairs": 0.0}


@pytest.mark.parametrize("task", ["describe", "extract", "ground"])
@pytest.mark.parametrize(("queries", "number"), [("entity", 100), ("learned", 2), ("learned", 7)])
def test_the_model_counts_the_same(monkeypatch, task, queries, number):
    cfg = get_cfg()
    add_gella_config(cfg)
    for key, value in {
        **{"DEVICE": "cpu", "COLORMAP_ENCODER.ARCH": "lcnet_050", "RESOBLEND.DIM": 32},
        **{"IMAGE_ENCODER.IMAGE_SIZE": 32, "IMAGE_ENCODER.PATCH_SIZE": 16},
        **{"IMAGE_ENCODER.WIDTH": 32, "IMAGE_ENCODER.LAYERS": 2, "IMAGE_ENCODER.HEAD_WIDTH": 16},
        **{"MASK_DECODER.HIDDEN_DIM": 32, "MASK_DECODER.MASK_DIM": 32},
        **{"MASK_DECODER.ENCODER_LAYERS": 1, "MASK_DECODER.DECODER_LAYERS": 1},
        **{"MASK_DECODER.QUERIES": queries, "MASK_DECODER.NUM_QUERIES": number},
        **{"MASK_DECODER.TRAIN_NUM_POINTS": 16, "LANGUAGE.VOCAB_SIZE": 16},
        **{"LANGUAGE.HIDDEN_SIZE": 16, "LANGUAGE.INTERMEDIATE_SIZE": 16},
        **{"LANGUAGE.NUM_LAYERS": 1, "LANGUAGE.NUM_HEADS": 2, "LANGUAGE.NUM_KEY_VALUE_HEADS": 2},
        **{"ASSOCIATION.DIM": 16},
    }.items():
        cfg.merge_from_list([f"MODEL.{key}", value])
    model = build_model(cfg).train()
    found = {}

    def note(name, count, device):
        found[name] = float(count)
        return mean_over_parts(name, count, device)

    monkeypatch.setattr(criterion, "mean_over_parts", note)
    monkeypatch.setattr(language_decoder, "mean_over_parts", note)
    inputs = batch(task)
    counts = model.loss_counts(inputs)
    model(inputs)
    assert found == pytest.approx({name: counts[name] for name in found})
    assert set(found) == ({"answer"} if task == "describe" else set(counts))


def test_a_plan_goes_before_the_count():
    assert float(mean_over_parts("masks", 0, CPU)) == 1.0
    assert float(mean_over_parts("masks", 0.5, CPU)) == 0.5
    with planned_counts({"masks": 2.5, "pairs": 0.0}):
        assert float(mean_over_parts("masks", 7.0, CPU)) == 2.5
        assert float(mean_over_parts("pairs", 7.0, CPU)) == 1.0
        with planned_counts(None):
            assert float(mean_over_parts("masks", 7.0, CPU)) == 7.0
    assert float(mean_over_parts("masks", 7.0, CPU)) == 7.0
