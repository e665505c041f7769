"""What the demo writes: pictures, JSON and one page for all, each file whole or not at all."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from PIL import Image

from gella.commands.demo_inputs import Job, plain
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html import grounding_html, page, panoptic_html
from gella.text.spans import locate_phrases
from gella.utils.io import write_atomically

PAGE = "index.html"
FAILURES = "failures.json"
PARTS = "page"  # folder of what the page is made of
_SHOWN_SIDE = 1280  # pixels; pictures on the page are scaled down to this longest side
_EXACT_SIDE = 256  # pixels; up to this side they are PNG
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def shown(text: object) -> str:
    """A name or text in one line for terminals, without control characters and broken letters."""
    return _CONTROL.sub("?", str(text))


def as_json(task: str, result: Any, job: Job) -> dict[str, Any]:
    """A result of any task as values that JSON can hold."""
    if isinstance(result, Grounding | PanopticResult):
        return result.to_json()
    if task == "describe":
        return {"task": task, "text": result}
    caption = job.text or ""
    nouns = [
        {"noun": noun, "start": span[0] if span else -1, "end": span[1] if span else -1}
        for noun, span in zip(result, locate_phrases(caption, list(result)), strict=True)
    ]
    return {"task": task, "caption": caption, "nouns": nouns}


def headline(task: str, result: Any) -> list[str]:
    """What a terminal shows of a result, a line each."""
    if isinstance(result, Grounding):
        return [f"{shown(p['phrase'])}: entities {p['entity_ids']}" for p in result.phrases]
    if isinstance(result, PanopticResult):
        names = {category["id"]: category["name"] for category in result.categories}
        found = [names[segment["category_id"]] for segment in result.segments_info]
        return [f"{shown(name)}: {found.count(name)}" for name in dict.fromkeys(found)]
    return [shown(result)] if task == "describe" else [shown(", ".join(result))]


class Output:
    """The output folder of one run.

    Everything lies directly in it or in its folder ``page``, under names of `output_names`.
    """

    def __init__(self, folder: Path) -> None:
        """Name the folder; it is made when something is written."""
        self.folder = folder

    def finished(self, job: Job, fingerprint: str) -> str | None:
        """The HTML of a job whose files are all there and were made from the same input."""
        try:
            content = json.loads((self.folder / f"{job.name}.json").read_text(encoding="utf-8"))
            if content["fingerprint"] != fingerprint:
                return None
            if all((self.folder / _inside(name)).is_file() for name in content["files"]):
                return (self.folder / PARTS / f"{job.name}.html").read_text(encoding="utf-8")
        except (OSError, ValueError, KeyError, TypeError):
            pass  # damaged or of another tool: made again
        return None

    def write(
        self, task: str, result: Any, job: Job, image: np.ndarray, source: dict[str, Any]
    ) -> tuple[str, list[Path]]:
        """Write a result; return its part of the page and the paths of pictures and JSON.

        Args:
            task: what was asked.
            result: of the predictor.
            job: what it is of.
            image: the job's picture, uint8 RGB (H, W, 3).
            source: what the JSON says about where the input came from, and ``fingerprint``.

        Raises:
            OSError: the files cannot be written.
        """
        pictures: dict[str, Image.Image] = {}
        if isinstance(result, Grounding):
            pictures[f"{job.name}_grounding.png"] = result.plot()
            pictures[f"{job.name}_colormap.png"] = result.plot_colormap()
        elif isinstance(result, PanopticResult):
            pictures[f"{job.name}_panoptic.png"] = result.plot()
        files = list(pictures)
        small, data = _small(image, enlarge=not pictures)
        html = _section(task, result, job, f"{PARTS}/{job.name}.{small}", files)
        parts = {f"{job.name}.{small}": data, f"{job.name}.html": html.encode("utf-8")}
        content = {**source, "files": [*files, *(f"{PARTS}/{name}" for name in parts)]}
        content.update(as_json(task, result, job))
        text = plain(json.dumps(content, indent=2, ensure_ascii=False))
        (self.folder / PARTS).mkdir(parents=True, exist_ok=True)
        for name, picture in pictures.items():
            self._put(name, _png(picture))
        for name, data in parts.items():
            self._put(f"{PARTS}/{name}", data)
        # The JSON comes last: while it is not there, the job is not finished.
        self._put(f"{job.name}.json", text.encode("utf-8"))
        return html, [self.folder / name for name in (*files, f"{job.name}.json")]

    def write_page(self, notes: Sequence[str], sections: Sequence[str]) -> Path:
        """Write the page: notes (plain text), then the parts of the jobs."""
        body = [f"<p>{escape(plain(note))}</p>" for note in notes]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put(PAGE, page("GELLA", [*body, *sections]).encode("utf-8"))
        return self.folder / PAGE

    def write_failures(self, failures: Sequence[dict[str, str]]) -> Path | None:
        """Write the list of failures; without any, remove an older list."""
        path = self.folder / FAILURES
        if not failures:
            path.unlink(missing_ok=True)
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        text = plain(json.dumps(list(failures), indent=2, ensure_ascii=False))
        self._put(FAILURES, text.encode("utf-8"))
        return path

    def _put(self, name: str, data: bytes) -> None:
        write_atomically(str(self.folder / name), lambda stream: stream.write(data))


def failure_section(failures: Sequence[dict[str, str]]) -> str:
    """What could not be done, for the page; "" if all could."""
    if not failures:
        return ""
    items = "".join(
        f"<li><b>{escape(plain(item['image']))}</b>: {escape(plain(item['reason']))}</li>"
        for item in failures
    )
    return f'<section id="failures"><h2>Failed: {len(failures)}</h2><ul>{items}</ul></section>'


def _inside(name: str) -> str:
    """A name of the list ``files`` of a JSON; ValueError if it leads elsewhere."""
    if os.path.isabs(name) or ".." in Path(name).parts:
        raise ValueError(name)
    return name


def _small(image: np.ndarray, *, enlarge: bool) -> tuple[str, bytes]:
    """The picture as the page shows it, and its suffix; a browser would blur a small one."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) <= _EXACT_SIDE:
        if enlarge:
            times = _SHOWN_SIDE // max(picture.size)
            size = (picture.width * times, picture.height * times)
            picture = picture.resize(size, Image.Resampling.NEAREST)
        return "png", _png(picture)
    picture.thumbnail((_SHOWN_SIDE, _SHOWN_SIDE), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="JPEG", quality=88)
    return "jpg", stream.getvalue()


def _png(picture: Image.Image) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, format="PNG")
    return stream.getvalue()


def _section(task: str, result: Any, job: Job, address: str, files: Sequence[str]) -> str:
    """One job's part of the page."""
    key = hashlib.sha256(job.name.encode("utf-8")).hexdigest()[:16]
    if isinstance(result, Grounding):
        figure = grounding_html(result, key=key, image_src=quote(address))
    elif isinstance(result, PanopticResult):
        figure = panoptic_html(result, key=key, image_src=quote(address))
    else:
        figure = _text_figure(task, result, job, address)
    names = (*files, f"{job.name}.json")
    links = ", ".join(f'<a href="{quote(name)}">{escape(name)}</a>' for name in names)
    title = escape(plain(job.picture.name))
    return f'<section id="{key}"><h2>{title}</h2>{plain(figure)}<p>{links}</p></section>\n'


def _text_figure(task: str, result: Any, job: Job, address: str) -> str:
    """The picture beside the text that the model wrote, in the form of the other figures."""
    if task == "describe":
        texts = [escape(result)]
    else:
        nouns = " ".join(f"<mark>{escape(noun)}</mark>" for noun in result)
        texts = [escape(job.text or ""), nouns or "no nouns"]
    said = "".join(f'<p class="caption" dir="auto">{text}</p>' for text in texts)
    # No <image> of SVG: the figures' style fades what no noun names.
    return (
        f'<figure class="gella"><div class="stage"><img src="{quote(address)}" width="100%" '
        f'alt="" loading="lazy"></div><figcaption>{said}</figcaption></figure>'
    )
