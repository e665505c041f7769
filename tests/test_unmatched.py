"""Phrases that match no input entity are counted in training and in evaluation."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase, SimpleTrainer
from torch import nn

from gella import add_gella_config
from gella.data.unmatched import CountedLoader, UnmatchedPhrases
from gella.engine.trainer import GellaTrainer

# (grounded, unmatched) of the samples of each batch
BATCHES = [[(0, 0)], [(3, 1), (1, 0)], [(2, 2)], [(2, 0), (0, 0)]]


def batches() -> list[list[dict[str, int]]]:
    return [[{"num_grounded": g, "num_unmatched": u} for g, u in batch] for batch in BATCHES]


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Any) -> Any:
        return {"loss": self.weight.sum()} if self.training else batch


class Reader(HookBase):
    """Notes what the storage holds after every step, and evaluates in between."""

    def __init__(self) -> None:
        self.shares: list[float | None] = []

    def after_step(self) -> None:
        latest = self.trainer.storage.latest()
        self.shares.append(latest.get("unmatched_phrases", (None, 0))[0])
        self.trainer.model.eval()
        self.trainer.model([{"num_grounded": 100, "num_unmatched": 100}])  # is no training batch
        self.trainer.model.train()


def test_the_running_share_is_in_the_storage(caplog: pytest.LogCaptureFixture) -> None:
    model = Toy()
    trainer = SimpleTrainer(model, batches(), torch.optim.SGD(model.parameters(), lr=0.1))
    reader = Reader()
    trainer.register_hooks([UnmatchedPhrases(), reader])
    with caplog.at_level(logging.INFO, logger="gella"):
        trainer.train(0, 4)
    assert reader.shares == [None, 1 / 4, 3 / 6, 3 / 8]
    assert "Training: 3 of 8 phrases with segments (37.50 %)" in caplog.text
    assert not model._forward_pre_hooks
    assert caplog.records[-1].levelname == "WARNING"


def test_a_test_loader_logs_once_at_its_end(caplog: pytest.LogCaptureFixture) -> None:
    loader = CountedLoader(batches(), "gella_some_val")
    assert len(loader) == 4
    with caplog.at_level(logging.INFO, logger="gella"):
        for seen, batch in enumerate(loader, start=1):
            assert batch == batches()[seen - 1] and not caplog.text
        assert "gella_some_val: 3 of 8 phrases" in caplog.text
        caplog.clear()
        list(CountedLoader([[{"num_grounded": 2, "num_unmatched": 0}]], "b"))
        assert caplog.records[-1].levelname == "INFO" and "0 of 2" in caplog.text
        caplog.clear()
        list(CountedLoader([[{"text": "no phrases here"}]], "c"))
        assert not caplog.text
    from_torch = CountedLoader(torch.utils.data.DataLoader([1, 2, 3], batch_size=2), "d")
    assert from_torch.batch_size == 2 and len(from_torch) == 2


def test_the_trainer_counts_and_leads_records_to_their_source(
    tmp_path: Any, tokenizer_dir: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """A dataset whose masks come from a file that has merged two of three segments."""
    import numpy as np
    from PIL import Image

    ids = np.zeros((20, 30), np.uint8)
    ids[:8], ids[8:14, :15], ids[8:14, 15:] = 1, 2, 3
    Image.fromarray(ids).save(tmp_path / "ids.png")
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "masks").mkdir()
    np.savez(tmp_path / "masks" / "a.npz", ids=np.minimum(ids, 2).astype(np.int32))
    caption = "a top over one and two"
    phrases = [
        {"text": text, "start": caption.find(text), "end": -1, "segment_ids": list(segment_ids)}
        for text, segment_ids in (("a top", (1,)), ("one", (2,)), ("two", (3,)))
    ]
    record = {
        "file_name": str(tmp_path / "a.png"),
        "image_id": 1,
        "height": 20,
        "width": 30,
        "entities": {"format": "gray_png", "file_name": str(tmp_path / "ids.png")},
        "caption": caption,
        "phrases": phrases,
        "tasks": ("ground",),
    }
    name = "gella_unmatched_test"
    DatasetCatalog.register(name, lambda: [record])
    MetadataCatalog.get(name).evaluator_type = "png"
    cfg = get_cfg()
    add_gella_config(cfg)
    cfg.MODEL.LANGUAGE.TOKENIZER = str(tokenizer_dir)
    cfg.DATASETS.TEST, cfg.DATALOADER.NUM_WORKERS = (name,), 0
    cfg.INPUT.GELLA.TARGET_IOU = 0.6
    cfg.INPUT.GELLA.ENTITY_SOURCES = [[name, "auto", str(tmp_path / "masks")]]
    try:
        with caplog.at_level(logging.INFO, logger="gella"):
            ((mapped,),) = list(GellaTrainer.build_test_loader(cfg, name))
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
    assert [p["entity_indices"] for p in mapped["phrases"]] == [[0], [], []]
    assert f"{name}: 2 of 3 phrases with segments (66.67 %)" in caplog.text
