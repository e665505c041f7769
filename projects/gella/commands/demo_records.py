"""Training records of the demo's answers, in the form of Panoptic Narrative Grounding."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gella.commands.demo_inputs import Job, Masks, plain
from gella.entities.files import write_id_png
from gella.entities.view import read_image
from gella.evaluation.evaluators import png_form
from gella.pictures.grounding import Grounding
from gella.utils.io import read_json, write_json, write_text
from gella.weights.files import new_folder

MODULE = '''"""Registers the records beside this file under the name of their folder."""
from pathlib import Path
from gella.data.register import register_png

HERE = Path(__file__).resolve().parent
FILES = (HERE / "images", HERE / "panoptic", HERE / "panoptic.json", HERE / "narratives.json")
register_png(HERE.name, *FILES, categories=[], tasks=("describe", "extract", "ground"))
'''


def to_correct(result: Grounding) -> Grounding:
    """The answer for who corrects it: all masks numbered; an untrained model's names nothing."""
    empty = {"entity_ids": [], "scores": [], "mask": np.zeros(result.image.shape[:2], dtype=bool)}
    said = [{**phrase, **(empty if result.untrained else {})} for phrase in result.phrases]
    return replace(result, phrases=said, number_all=True)


def write_records(target: Path, jobs: Sequence[Job], masks: Masks, answers: Path) -> int:
    """Write a new folder of records, whole or not at all; returns how many nouns are to fill in.

    ``narratives.json`` has a noun a line: ``segment_ids`` are the page's numbers of entities, null
    where no trained model has chosen among them. ``records.py`` registers the folder by its name.

    Each of the ``jobs`` has its masks, and its JSON file in the folder ``answers``. Raises OSError
    and ValueError for files that cannot be written, or read any more.
    """
    narratives, copies = [], dict[Path, str]()
    notes: dict[str, list[Any]] = {"images": [], "annotations": []}
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_folder(target) as folder:
        for part in ("images", "panoptic"):
            (folder / part).mkdir()
        for job in jobs:
            path, name = job.picture.path, job.name
            image = read_image(path)
            if path not in copies:
                # Training reads the stored pixels, which EXIF data may turn for viewers and masks.
                stored = np.array_equal(read_image(path, upright=False), image)
                copies[path] = file = f"{name}{path.suffix if stored else '.png'}"
                if stored:
                    shutil.copyfile(path, folder / "images" / file)
                else:
                    Image.fromarray(image).save(folder / "images" / file)
            entities = masks.load(job, image)
            write_id_png(folder / "panoptic" / f"{name}.png", entities.ids)
            # A PNG has one entity a pixel: the smallest there.
            areas = enumerate(np.bincount(entities.ids.ravel()).tolist())
            segments = [{"id": k, "category_id": 1, "area": n} for k, n in areas if k and n]
            sides = dict(zip(("height", "width"), entities.size))
            notes["images"].append({"id": name, "file_name": copies[path], **sides})
            png = {"image_id": name, "file_name": f"{name}.png", "segments_info": segments}
            notes["annotations"].append(png)
            narratives.append(_narrative(name, read_json(answers / f"{name}.json")))
        notes["categories"] = [{"id": 1, "name": "entity", "isthing": 1}]
        write_json(folder / "panoptic.json", notes)
        text = json.dumps(narratives, indent=1, ensure_ascii=False)
        text = re.sub(r"\n {4,}|\n {3}(?=})", " ", text)  # a line per segment, to be edited
        write_text(folder / "narratives.json", plain(text) + "\n")
        write_text(folder / "records.py", MODULE)
    return sum(part["segment_ids"] is None for said in narratives for part in said["segments"])


def _narrative(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    nouns = []
    for noun in answer["nouns"]:
        ids, place = noun["entity_numbers"], {key: noun[key] for key in ("start", "end")}
        chosen = None if answer["weights"] == "untrained" or None in ids else sorted(ids)
        nouns.append({"text": noun["noun"], **place, "is_plural": False, "entity_ids": chosen})
    narrative = png_form({"image_id": name, "caption": answer["caption"], "nouns": nouns})
    for segment in narrative["segments"]:
        del segment["plural"]  # what is filled in decides
    return narrative
