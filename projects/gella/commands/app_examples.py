"""Pictures to click on the web page, from a folder with ``captions.jsonl``."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Example:
    """A picture to click.

    Attributes:
        picture: its file.
        masks: the file of its entity masks.
        caption: of it.
    """

    picture: Path
    masks: Path
    caption: str


def read_examples(folder: Path) -> list[Example]:
    """The examples of ``captions.jsonl`` in a folder; none if there is no such file.

    Raises ValueError for a line of another form, with its number.
    """
    listed = folder / "captions.jsonl"
    if not listed.is_file():
        return []
    examples = []
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            parts = [str(entry[key]) for key in ("image", "masks", "caption")]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f'{listed}, line {number}: expected {{"image", "masks", "caption"}} ({error})'
            ) from error
        examples.append(Example(folder / parts[0], folder / parts[1], parts[2]))
    return examples


def copied(examples: list[Example], folder: Path) -> list[Example]:
    """Copy the files of examples to a folder of their own each, and return the copies.

    Gradio serves files of its temporary folder only.

    Raises FileNotFoundError for a file that ``captions.jsonl`` names and that is not there.
    """
    copies = []
    for place, example in enumerate(examples):
        target = folder / f"example_{place}"
        target.mkdir(parents=True)
        for path in (example.picture, example.masks):
            if not path.is_file():
                raise FileNotFoundError(f"example {path} does not exist; correct captions.jsonl")
            shutil.copyfile(path, target / path.name)
        copies.append(
            Example(target / example.picture.name, target / example.masks.name, example.caption)
        )
    return copies
