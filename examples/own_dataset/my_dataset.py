"""Your pictures, id masks and captions as datasets of Detectron2's catalog."""

import json
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from gella.data.register import root_from_environment
from gella.text.spans import locate_phrases

ROOT = Path(root_from_environment()) / "own_dataset"


def load(split):
    records = json.loads((ROOT / f"{split}.json").read_text(encoding="utf-8"))
    for number, record in enumerate(records):
        texts, ids = zip(*record.pop("nouns"))
        spans = [span or (-1, -1) for span in locate_phrases(record["caption"], texts)]
        record["phrases"] = [
            dict(text=t, start=a, end=b, segment_ids=i, is_plural=len(i) > 1, is_thing=True)
            for t, i, (a, b) in zip(texts, ids, spans)
        ]
        record["image_id"] = f"{split}{number}"
        record["file_name"] = str(ROOT / record.pop("image"))
        record["entities"] = {"format": "gray_png", "file_name": str(ROOT / record.pop("masks"))}
        record["tasks"] = ("describe", "extract", "ground")
    return records


for name in ("own_train", "own_val"):
    DatasetCatalog.register(name, lambda split=name[4:]: load(split))
    MetadataCatalog.get(name).set(evaluator_type="png")
