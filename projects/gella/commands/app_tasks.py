"""What the web page does for its visitors, without the page: encode once, then answer.

Errors that a visitor can cure are ValueErrors whose message `app_uploads.message_of` makes fit to
be shown.
"""

from __future__ import annotations

import base64
import io
import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from gella.captions.ask import caption_picture
from gella.captions.captioner import AnswerError, Captioner, EndpointError, RequestError
from gella.commands.app_sessions import Held, Sessions
from gella.commands.app_uploads import Limits, fingerprint, read_scene
from gella.entities.entity_map import EntityMap
from gella.pictures.grounding import Grounding, PanopticResult

PREVIEW_SIDE = 1600  # longest side of the picture that the page shows, pixels
LOSSLESS = 256 * 256  # pictures of at most so many pixels are shown without loss

_logger = logging.getLogger(__name__)


class Finder(Protocol):
    """What finds masks where none were uploaded, such as `gella.segmenters.Segmenter`."""

    def segment(self, image: np.ndarray) -> EntityMap:
        """The entities of a uint8 RGB picture (H, W, 3)."""
        ...


class Desk:
    """Answers the page's questions about uploaded pictures.

    Args:
        predictor: a ``GellaPredictor``.
        limits: what a visitor may send.
        sessions: keeps the encoded pictures.
        finder: makes masks where none were uploaded; None: they are needed.
        captioner: writes captions besides the model; None: there is none.
    """

    def __init__(
        self,
        predictor: Any,
        limits: Limits,
        sessions: Sessions,
        *,
        finder: Finder | None = None,
        captioner: Captioner | None = None,
    ) -> None:
        self.predictor, self.limits, self.sessions = predictor, limits, sessions
        self.finder, self.captioner = finder, captioner

    def scene(
        self,
        session: str,
        picture: str | None,
        masks: Sequence[str] | None,
        *,
        needs_masks: bool = True,
    ) -> Held:
        """The session's encoded picture; it is read and encoded only if it is another one.

        Args:
            session: whose.
            picture: path of the uploaded picture.
            masks: paths of the uploaded masks; none: the finder makes them.
            needs_masks: False: without masks and finder, the whole picture is one entity.

        Raises ValueError: there is no picture or no mask, and what `read_scene` and the predictor
        raise.
        """
        if not picture:
            raise ValueError("There is no picture yet: upload one or click an example.")
        if not masks and self.finder is None and needs_masks:
            raise ValueError("There are no masks yet: upload the picture's entity masks.")
        paths = [Path(picture), *(Path(path) for path in masks or ())]
        key = tuple(fingerprint(path, self.limits) for path in paths)
        held = self.sessions.get(session, key)
        if held is None:
            image, entities, image_id = read_scene(paths[0], paths[1:], self.limits)
            if entities is None and self.finder is None:
                entities = EntityMap(np.ones(image.shape[:2], np.int32))
            elif entities is None:
                entities = self._find(image)
            scene = self.predictor.encode(image, entities, image_id=image_id)
            held = Held(key, scene, paths[0].stem, preview(image))
            self.sessions.put(session, held)
        return held

    def _find(self, image: np.ndarray) -> EntityMap:
        assert self.finder is not None
        entities = self.finder.segment(image)
        if entities.num_entities == 0:
            raise ValueError("The segmenter found no entity in this picture; upload masks.")
        if entities.num_entities > self.limits.max_entities:
            raise ValueError(
                f"The segmenter found {entities.num_entities:,} entities; at most "
                f"{self.limits.max_entities:,} are allowed. Upload masks."
            )
        return entities

    def ground(self, held: Held, caption: str | None, nouns: str | None) -> Grounding:
        """Ground a caption; nouns is their list as typed, empty for the model's own."""
        text = self.limits.check_text("caption", caption)
        return self.predictor.ground(
            text, self.limits.split("nouns", nouns) or None, scene=held.scene
        )

    def refer(self, held: Held, expression: str | None) -> Grounding:
        """Find what a referring expression names."""
        return self.predictor.refer(
            self.limits.check_text("expression", expression), scene=held.scene
        )

    def panoptic(self, held: Held, categories: str | None) -> PanopticResult:
        """Give every entity one of the categories, typed as a list."""
        names = self.limits.split("categories", categories)
        if not names:
            raise ValueError("There are no categories: write some, separated by commas.")
        names = list(dict.fromkeys(names))
        return self.predictor.panoptic(names, scene=held.scene)

    def describe(self, held: Held) -> Iterator[str]:
        """The model's description so far, again and again while it grows."""
        return streamed(lambda on_text: self.predictor.describe(scene=held.scene, on_text=on_text))

    def extract(self, held: Held, caption: str | None) -> list[str]:
        """The nouns of a caption as the model finds them."""
        text = self.limits.check_text("caption", caption)
        return self.predictor.extract_nouns(text, scene=held.scene)

    def ask(self, held: Held) -> tuple[str, list[str]]:
        """A caption and its nouns by the captioner.

        Raises ValueError: it gave none. What it said is in the server's log only, for it may name
        an address.
        """
        assert self.captioner is not None
        try:
            found = caption_picture(self.captioner, held.scene.image)
        except AnswerError as error:
            _logger.warning("captioner: %s", error)
            raise ValueError("The caption model gave no answer that can be used; again?") from None
        except (RequestError, EndpointError) as error:
            _logger.warning("captioner: %s", error)
            raise ValueError("The caption model does not answer now; write a caption.") from None
        return found.description[: self.limits.max_caption], found.nouns


def unasked(scene: Any) -> Grounding:
    """A scene as the grounding of no caption: its entities, with no noun."""
    # Weights, whatever they are called, keep the figure from warning of an untrained model.
    return Grounding(scene.image, "", scene.entities, [], scene.colormap, weights="none asked")


def preview(image: np.ndarray) -> str:
    """A picture uint8 (H, W, 3) as a data URI: PNG if it is small, else JPEG, scaled down."""
    picture, stream = Image.fromarray(image), io.BytesIO()
    if image.shape[0] * image.shape[1] <= LOSSLESS:
        kind = "png"
        picture.save(stream, format="PNG")
    else:
        kind = "jpeg"
        picture.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
        picture.save(stream, format="JPEG", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"


class _StopError(Exception):
    """Nobody waits for the text any more."""


def streamed(generate: Callable[[Callable[[str], None]], str]) -> Iterator[str]:
    """Run ``generate(on_text)`` in a thread; yield what ``on_text`` gets, and its result last.

    Text that comes faster than it is taken is skipped: only the newest counts. A consumer that
    stops early ends the generation at its next text.

    Raises what ``generate`` raises.
    """
    texts: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
    stop = threading.Event()

    def on_text(text: str) -> None:
        if stop.is_set():
            raise _StopError
        texts.put(("text", text))

    def work() -> None:
        try:
            texts.put(("end", generate(on_text)))
        except BaseException as error:
            texts.put(("error", error))

    thread = threading.Thread(target=work, name="describe", daemon=True)
    thread.start()
    last = None
    try:
        while True:
            kind, value = texts.get()
            while kind == "text" and not texts.empty():
                kind, value = texts.get()
            if kind == "error":
                raise value
            if value != last:
                yield value
                last = value
            if kind == "end":
                return
    finally:
        stop.set()
        thread.join()


def for_download(result: Grounding | PanopticResult) -> dict[str, Any]:
    """``to_json()`` of a result, with the names of the server's files without their folders."""
    content = dict(result.to_json())
    for name in ("config", "weights"):
        if content.get(name):
            content[name] = Path(content[name]).name
    return content
