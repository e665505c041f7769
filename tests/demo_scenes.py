"""What the tests of the demo share: small scenes, a fake predictor, a reader of the page."""

from __future__ import annotations

from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gella.commands import demo
from gella.entities.entity_map import EntityMap, id_to_rgb
from gella.pictures.grounding import Grounding

ROOT = Path(__file__).resolve().parents[1]
TINY = str(ROOT / "configs" / "gella_tiny_shapes.yaml")
CAPTION = "A red circle lies on the sand."


class Page(HTMLParser):
    """Tags with their attributes, and the text outside scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text, self._open = "", ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open = tag

    def handle_endtag(self, tag: str) -> None:
        self._open = ""

    def handle_data(self, data: str) -> None:
        if self._open not in ("script", "style"):
            self.text += data

    def all(self, tag: str, name: str) -> list[str]:
        """The values of an attribute of all tags of a kind that have it."""
        return [a[name] or "" for t, a in self.tags if t == tag and name in a]


class Fake:
    """A predictor that needs no model: every noun, or the word "circle", names entity 1."""

    asked: list[tuple[str, str, tuple[int, ...]]] = []
    during: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, cfg: Any, config_file: str = "") -> None:
        self.cfg = cfg

    def predict_many(self, requests: list[Any], *, batch_size: int = 8) -> list[Any]:
        assert len(requests) <= batch_size
        type(self).during()
        return [self.answer(request) for request in requests]

    def answer(self, request: Any) -> Any:
        size = request.image.shape[:2]
        self.asked.append((request.task, request.text, size))
        if request.text == "raise":
            return ValueError("this caption is not liked")
        if request.task == "describe":
            return CAPTION
        if request.task == "extract":
            return ["A red circle", "the sand"]
        nouns = request.nouns or ["circle"]
        entities: EntityMap = request.entities
        mask = entities.ids == 1
        starts = [request.text.find(noun) for noun in nouns]
        ids = entities.segment_ids[:1]
        phrases = [
            {"phrase": n, "start": s, "end": s + len(n), "entity_ids": ids, "scores": [0.9],
             "mask": mask}
            for n, s in zip(nouns, starts)
        ]  # fmt: skip
        colormap = np.zeros((8, 8, 3), np.uint8)
        return Grounding(
            request.image, request.text, entities, phrases, colormap, request.task, weights="w"
        )


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    """The demo with a fake predictor, whose questions are noted."""
    monkeypatch.setattr(demo, "GellaPredictor", Fake)
    monkeypatch.setattr(Fake, "asked", [])
    return Fake


def scene(folder: Path, name: str, seed: int = 0, masks: bool = True) -> None:
    """A picture of 40 x 30 pixels with two entities, its masks beside it."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    ids = np.ones((30, 40), np.int32)
    ids[5:15, 5:25] = 2
    if masks:
        Image.fromarray(id_to_rgb(ids)).save(path.with_name(f"{path.stem}_masks.png"))


@pytest.fixture
def run(tmp_path: Path, capsys: Any) -> Callable[..., tuple[int, str, str]]:
    """Call the tool on tmp_path/in with output tmp_path/out and more arguments."""

    def call(*more: Any, input: str = "in", opts: tuple[Any, ...] = ()) -> tuple[int, str, str]:
        argv = ["--config-file", TINY, "--weights", "", "--input", tmp_path / input]
        argv += ["--output", tmp_path / "out", *more, "--opts", *opts]
        try:
            code = demo.main([str(part) for part in argv])
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """The folder tmp_path/in with a.png, b.png and sub/c.jpg."""
    for seed, name in enumerate(("a.png", "b.png", "sub/c.png")):
        scene(tmp_path / "in", name, seed)
    return tmp_path / "in"


def tree(folder: Path) -> set[str]:
    """Paths of all files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def tokens(tokenizer_dir: Path) -> tuple[Any, ...]:
    """Overrides that let the tiny config use the tests' tokenizer."""
    sizes = ("MODEL.LANGUAGE.MAX_POSITIONS", 1024, "MODEL.LANGUAGE.MAX_NEW_TOKENS", 8)
    return ("MODEL.LANGUAGE.TOKENIZER", tokenizer_dir, *sizes)
