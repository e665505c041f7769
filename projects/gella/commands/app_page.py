"""The page: what a visitor sends, asks and sees.

Gradio keeps what is a visitor's (`State`), queues the questions and deletes old files. Files are
strangers': the library reads them, within `Limits`. Every message says in one line what is wrong
and what is allowed, and none of them names a folder of the server.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import html
import itertools
import json
import logging
import queue
import re
import secrets
import shutil
import threading
import time
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image

from gella.captions import describe, load_picture
from gella.captions.captioner import AnswerError, EndpointError, RequestError
from gella.commands.demo_inputs import Entry
from gella.commands.inputs import SUFFIXES, refuse_video
from gella.entities.entity_map import EntityMap
from gella.entities.files import entries_by_image, forget_files
from gella.entities.sources import load_entities
from gella.entities.view import read_image, read_with_entities
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html import SCRIPT, STYLE, grounding_html, panoptic_html
from gella.predictor.scene import image_id_of
from gella.segmenters.from_transformers import how_to_find
from gella.utils.io import write_atomically
from gella.weights.files import made_for

MASK_SUFFIXES = (".png", ".npz", ".npy", ".json")
BYTES_PER_PIXEL = 32  # that an .npz may unpack to, for each pixel that a picture may have
IDLE = 1800.0  # seconds after its last question that a visitor's encoded picture stays
PACE = 0.1  # seconds between two texts of a description: a slow browser falls behind otherwise
MAX_AGE = 6 * 3600  # seconds that an upload stays
TITLE = "GELLA: ground a caption in a picture"
_PHOTOGRAPH = (
    "{} is a photograph or a drawing, not masks: upload it as the picture. A PNG of masks has one "
    "colour for each entity."
)
BUSY = "Something went wrong; the server's log says what. It still runs: try again."
_OWN_STYLE = """
#figure .view, #figure figcaption { flex-basis: 100%; }
.gella-note { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.gella-warn { border-left: 3px solid #b45309; padding-left: .6em; }
footer { display: none !important; }
#threshold .head { column-gap: 1em; }
@media (max-width: 1024px), (pointer: coarse) {
  .gradio-container button, #threshold input[type=range] { min-height: 44px; min-width: 44px; }
  #exclusive label { min-height: 44px; }
  #masks button button { height: 44px !important; }
  #masks .file-preview { margin-top: 18px; } /* the buttons over it are higher then */
}
"""
_NAMES = """
new MutationObserver(() => { // Gradio leaves these buttons without a name of their own
  document.querySelectorAll("#examples button").forEach((button, place) => {
    button.ariaLabel ??= `Example ${place + 1}`;
  });
  document.querySelectorAll("#masks [aria-label='common.upload']").forEach((button) => {
    button.ariaLabel = "Upload other masks";
  });
}).observe(document, { childList: true, subtree: true });
"""
HEAD = f"<style>{STYLE}{_OWN_STYLE}</style><script>{SCRIPT}{_NAMES}</script>"
# All questions share one queue and are answered one after the other, in order.
_MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_LAST = {**_MODEL, "trigger_mode": "always_last"}  # a click meanwhile is not lost
_OUTSIDE: dict[str, Any] = {"queue": False, "api_visibility": "private"}
# Through the queue: behind the last text in it of a caption that was still being written.
_AFTER: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
_OFF: dict[str, Any] = gr.update(interactive=False)
# What only the server's owner can do: "shorten it or raise MODEL.KEY", "at most 5 (MODEL.KEY)".
_SETTINGS = re.compile(
    r",? (?:or|and) (?:raise|lower|set) (?:max_\w+|[A-Z]+\.[\w.]*\w)|,? \([A-Z]+\.[\w.]+\)"
)
_FOLDERS = re.compile(r"(?<![\w.:/<])(?:~|\.{0,2})/(?:[^\s/'\"<>|:]+/)*(?=[^\s/'\"<>|:])")
_logger = logging.getLogger(__name__)
_numbers = itertools.count(1)  # figures of all visitors: their keys never meet on a page


@dataclass(frozen=True)
class Limits:
    """What a visitor may send."""

    max_upload: int = 20_000_000  # bytes of one file
    max_pixels: int = 16_000_000  # of a picture, width times height
    max_caption: int = 2000  # characters of a caption, an expression, a list of nouns or categories
    max_entities: int = 1000  # masks of one picture
    max_phrases: int = 200  # nouns of one caption, and categories

    def check_text(self, what: str, text: str | None) -> str:
        """The text without blanks around it; ValueError for an empty or too long one."""
        text = (text or "").strip()
        if not text:
            raise ValueError(f"The {what} is empty: write one that names what to find.")
        if len(text) > self.max_caption:
            raise ValueError(
                f"The {what} has {len(text):,} characters; at most {self.max_caption:,} are "
                "allowed."
            )
        return text

    def split(self, what: str, text: str | None) -> list[str]:
        """The parts of a list, at commas, semicolons or line ends; ValueError for too many."""
        if not (text or "").strip():
            return []
        text = self.check_text(f"list of {what}", text)
        parts = [part.strip() for part in re.split(r"[,;\n]", text) if part.strip()]
        if len(parts) > self.max_phrases:
            raise ValueError(
                f"There are {len(parts)} {what}; at most {self.max_phrases} are allowed."
            )
        return parts


def read_masks(
    paths: Sequence[Path], size: tuple[int, int], image_id: int | str, limits: Limits
) -> EntityMap:
    """Read the entities of a picture of (H, W) ``size`` from one file, or a panoptic PNG and JSON.

    What the files declare is checked before anything is decoded.

    Raises ValueError: another suffix, files that do not go together, an archive that unpacks to
    too much; and what `load_entities` raises.
    """
    suffixes = sorted(path.suffix.lower() for path in paths)
    names, segments, chosen = ", ".join(path.name for path in paths), None, paths[0]
    if not {*suffixes} <= {*MASK_SUFFIXES}:
        if {*suffixes} & {*SUFFIXES} - {*MASK_SUFFIXES}:
            raise ValueError(_PHOTOGRAPH.format(names))
        raise ValueError(f"masks are {', '.join(MASK_SUFFIXES)} files, not {', '.join(suffixes)}.")
    if len(paths) > 1:
        if suffixes != [".json", ".png"]:
            raise ValueError(
                f"There are {len(paths)} mask files ({names}); give one file, or a COCO panoptic "
                "PNG together with its JSON."
            )
        listed, chosen = sorted(paths, key=lambda path: path.suffix.lower())
        segments = _segments_of(listed, chosen.name)
    elif suffixes == [".json"] and entries_by_image(chosen)[0] == "coco_panoptic":
        # Its PNGs are named by the file itself: a stranger's JSON must not choose what is read.
        raise ValueError(
            f"{names} is a COCO panoptic JSON, whose masks are in PNG files: upload this "
            "picture's PNG together with it, or alone."
        )
    elif suffixes == [".npz"] and zipfile.is_zipfile(chosen):
        # The library lets one archive have gigabytes; here strangers send one after the other.
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(chosen) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
            if unpacked > (allowed := BYTES_PER_PIXEL * limits.max_pixels):
                raise ValueError(
                    f"{names} unpacks to {unpacked:,} bytes; at most {allowed:,} are allowed."
                )
    try:
        return load_entities(
            chosen,
            *size,
            segments_info=segments,
            image_id=image_id,
            max_pixels=limits.max_pixels,
            max_entities=limits.max_entities,
            max_bytes=limits.max_upload,
        )
    except ValueError:
        photograph = False
        with contextlib.suppress(Exception), Image.open(chosen) as opened:
            if opened.width * opened.height <= limits.max_pixels:
                photograph = opened.convert("RGB").getcolors(limits.max_entities) is None
        if photograph:
            raise ValueError(_PHOTOGRAPH.format(names)) from None
        raise
    finally:
        forget_files()


def _segments_of(panoptic_json: Path, png: str) -> list[dict[str, Any]]:
    """``segments_info`` of the annotation whose PNG has this name."""
    kind, groups = entries_by_image(panoptic_json)
    if kind != "coco_panoptic":
        raise ValueError(f"{panoptic_json.name} is no COCO panoptic JSON; upload one mask file.")
    for entries in groups.values():
        for entry in entries:
            segments = entry.get("segments_info")
            if Path(str(entry.get("file_name"))).name == png and isinstance(segments, list):
                return segments
    raise ValueError(f"{panoptic_json.name} has no segments of a picture named {png}.")


def message_of(error: BaseException) -> str | None:
    """What the visitor is told of an error; None for one that only the server's log should hold."""
    if isinstance(error, MemoryError):
        return "There is not enough memory for this; try a smaller picture or fewer masks."
    if isinstance(error, RecursionError):
        return "The file is nested too deeply to be read; write it again."
    if isinstance(error, ValueError | FileNotFoundError):
        text = _SETTINGS.sub("", _FOLDERS.sub("", str(error)))
        return " ".join(text.split()) or None
    return None


def _told(error: Exception) -> str:
    message = message_of(error)
    if message is None:
        _logger.error("a question failed", exc_info=error)
    return message or BUSY


@dataclass
class Visitor:
    """What is kept for one visitor: a picture, encoded once."""

    # Of picture and masks. Gradio's hold the content's hash: another path is another file, and the
    # same file uploaded again is the same.
    paths: tuple[str, ...] = ()
    scene: Any = None  # the predictor's `Scene`
    shown: bool = False  # whether the page has shown it
    extracted: tuple[str, str] = ("", "")  # a caption and the list of its nouns that a model made
    # What models wrote as a caption, word by word: the page may show any part of a description.
    written: deque[str] = field(default_factory=lambda: deque(maxlen=1000))
    writing: bool = False  # a model writes a caption
    unwanted: bool = False  # that caption, or the one that a model will write
    handing_over: bool = False  # a text of it is on its way to the page
    again: Any = None  # asks the last question, of a threshold
    folder: Path = Path()  # of the last result's files

    @property
    def summary(self) -> str:
        """The picture in a line."""
        height, width = self.scene.image.shape[:2]
        count, name = self.scene.entities.num_entities, Path(self.paths[0]).stem
        return note(f"{name}: {width} x {height} pixels, {count} entities; encoded.")

    def write(self, texts: Iterable[tuple[str, str]]) -> Iterator[tuple[Visitor, Any, Any]]:
        """Yield the visitor with captions and their nouns, each in place of the last, until
        `end_writing`."""
        self.writing = True
        try:
            for caption, nouns in texts:
                self.handing_over = True
                if self.unwanted:
                    yield self, gr.skip(), gr.skip()  # at its end Gradio sends the last one again
                    return
                self.written.append(caption)
                yield self, caption, nouns
                self.handing_over = False
        finally:
            self.writing = self.handing_over = False

    def end_writing(self) -> None:
        """End what `write` yields; returns when the page has been sent all of it.

        Not by ``cancels``: Gradio's page may then show "Error" over the caption, for good.
        """
        self.unwanted = True
        while self.handing_over:
            time.sleep(0.01)

    def own_caption(self, caption: str, kept: str) -> str:
        """The caption to go back to: what stands there, or ``kept`` if a model wrote that."""
        return caption if caption.strip() and caption not in self.written else kept

    def keep_nouns(self, caption: str, nouns: Sequence[str]) -> str:
        """Remember nouns that a model found in a caption; return them as a list to be typed."""
        self.extracted = (caption.strip(), ", ".join(nouns))
        return self.extracted[1]

    def nouns_for(self, caption: str, typed: str) -> str:
        """The typed list of nouns; "" if a model found them in a caption that was edited since."""
        of, nouns = self.extracted
        return "" if typed == nouns and (caption or "").strip() != of else typed

    def draw(self, result: Grounding | PanopticResult) -> str:
        """The figure of a result."""
        self.shown = True
        draw: Any = grounding_html if isinstance(result, Grounding) else panoptic_html
        return draw(result, key=f"r{next(_numbers)}")

    def bare(self, line: str = "") -> tuple[Any, ...]:
        """Visitor, figure, note, picture, JSON without a result: the figure is the picture with its
        masks or, with a ``line`` that says why, nothing."""
        self.again, self.shown = None, False
        if line:
            return self, "", line, _OFF, _OFF
        scene = self.scene
        # Weights, whatever they are called, keep the figure from warning of an untrained model.
        unasked = Grounding(scene.image, "", scene.entities, [], scene.colormap, weights="none yet")
        return self, self.draw(unasked), self.summary, _OFF, _OFF

    def show(
        self, result: Grounding | PanopticResult, again: Callable[..., Any]
    ) -> Iterator[tuple[Any, ...]]:
        """Yield what `bare` names: the figure comes first, the downloads follow."""
        self.again, shown = again, (self, self.draw(result), self.summary)
        yield *shown, _OFF, _OFF
        shutil.rmtree(self.folder, ignore_errors=True)  # no button leads to the last result now
        folder = self.folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        stem = f"{Path(self.paths[0]).stem}_{getattr(result, 'task', 'panoptic')}"
        png, listed = folder / f"{stem}.png", folder / f"{stem}.json"
        content = dict(result.to_json())
        for name in ("config", "weights"):
            content[name] = content.get(name) and Path(content[name]).name
        picture, text = result.plot(), json.dumps(content, ensure_ascii=False).encode("utf-8")
        write_atomically(str(png), lambda stream: picture.save(stream, format="PNG"))
        write_atomically(str(listed), lambda stream: stream.write(text))
        yield *shown, *(gr.update(value=str(path), interactive=True) for path in (png, listed))


@dataclass
class Desk:
    """Answers the page's questions about the picture that a visitor has.

    Questions are generators: they get the visitor and texts as typed, and yield what is shown, the
    visitor first, so that Gradio counts the time from the last question.
    """

    predictor: Any  # a `GellaPredictor`
    limits: Limits
    folder: Path  # where downloads are written; in Gradio's own, which serves no other
    finder: Any = None  # has `segment(image)`, for pictures without masks; None: they are needed
    captioner: Any = None  # writes captions besides the model

    def look(
        self, visitor: Visitor, picture: str | None, masks: Sequence[str] | None, blind: bool
    ) -> None:
        """Encode the picture with its masks, if they are not what the visitor's scene is of.

        Without masks they are found; ``blind``: if that cannot be, the whole picture is one entity.
        """
        if not picture:
            raise ValueError("There is no picture yet: upload one or click an example.")
        if not masks and self.finder is None and not blind:
            raise ValueError(f"There are no masks yet: {self.lacking}")
        paths = (picture, *(masks or ()))
        if visitor.paths == paths:
            return
        for path in map(Path, paths):
            if not path.is_file():
                raise ValueError(f"{path.name} is no longer here; upload it again.")
        image_id = image_id_of(picture)
        if masks:
            refuse_video(Path(picture))

            def load(image: np.ndarray) -> EntityMap:
                return read_masks(list(map(Path, masks)), image.shape[:2], image_id, self.limits)

            image, entities = read_with_entities(picture, load, max_pixels=self.limits.max_pixels)
        elif self.finder is None:
            image = self.read(picture)
            entities = EntityMap(np.ones(image.shape[:2], np.int32))
        else:
            image = self.read(picture)
            entities = self.finder.segment(image)
            if not 0 < entities.num_entities <= self.limits.max_entities:
                raise ValueError(
                    f"The segmenter found {entities.num_entities or 'no'} entities in this picture;"
                    f" at most {self.limits.max_entities:,} are allowed. Upload masks."
                )
        visitor.scene = self.predictor.encode(image, entities, image_id=image_id)
        visitor.paths, visitor.shown, visitor.extracted = paths, False, ("", "")

    @property
    def lacking(self) -> str:
        """What to do about a picture without masks."""
        return (
            "upload the picture's entity masks, made by any segmenter. Whoever runs this page can "
            f"have them found: python tools/app.py {how_to_find()}"
        )

    def read(self, picture: str) -> np.ndarray:
        """The picture's pixels, uint8 (H, W, 3); ValueError if they cannot be read whole."""
        refuse_video(Path(picture))
        return read_image(picture, max_pixels=self.limits.max_pixels)

    def event(
        self, question: Callable[..., Iterator[Any]], blind: bool = False, outputs: int = 0
    ) -> Callable[..., Iterator[Any]]:
        """What Gradio calls: the scene is made sure of, errors become messages of the page.

        ``outputs``: how many there are, the first five those of `Visitor.bare`; an error leaves no
        figure of an earlier question. 0: the figure stays.
        """

        def answer(
            visitor: Visitor, picture: Any, masks: Any, request: gr.Request, *texts: str
        ) -> Iterator[Any]:
            try:
                self.look(visitor, picture, masks, blind)
                visitor.folder = self.folder_of(request)
                yield from question(visitor, *texts)
            except Exception as error:
                told = _told(error)
                if outputs:
                    warning = note(told, "gella-note gella-warn")
                    yield *visitor.bare(warning), *[gr.skip()] * (outputs - 5)
                # Gradio shows messages as HTML, and they repeat what the visitor wrote.
                raise gr.Error(html.escape(told), duration=20, print_exception=False) from None

        return answer

    def folder_of(self, request: gr.Request) -> Path:
        """Where a visitor's downloads lie; a call that names no session is a visitor of its own."""
        session = request.session_hash or secrets.token_hex(16)
        # The session's name comes from the visitor's browser: it must not become a path.
        return self.folder / hashlib.sha256(session.encode()).hexdigest()[:32]

    def prepare(
        self, visitor: Visitor, picture: str | None, masks: list[str] | None
    ) -> tuple[Any, ...]:
        """Encode as soon as there are a picture and masks; show them, or say what is wrong.

        Returns what `Visitor.bare` does.

        A picture and its masks come one after the other, so what does not go together yet is said
        quietly; a question says it aloud.
        """
        try:
            if picture and masks:
                self.look(visitor, picture, masks, blind=False)
            elif picture:  # a broken one is not kept until its masks are there
                self.read(picture)
        except Exception as error:
            return visitor.bare(note(_told(error), "gella-note gella-warn"))
        if picture and masks:
            unchanged = visitor, gr.skip(), visitor.summary, gr.skip(), gr.skip()
            return unchanged if visitor.shown else visitor.bare()
        if not picture:
            return visitor.bare(note("Still to come: a picture."))
        if self.finder is not None:
            return visitor.bare(note("No masks: they are found at the first question."))
        return visitor.bare(note(f"Still to come: the picture's masks; {self.lacking}"))

    def turn(self, task: str, visitor: Visitor) -> tuple[Any, ...]:
        """Another task: no answer to the last one stays, and the threshold is the task's own."""
        defaults = self.predictor.cfg.MODEL.GELLA
        name = "PANOPTIC_THRESHOLD" if task == "Panoptic" else "ASSOCIATION_THRESHOLD"
        nothing = visitor, gr.skip(), gr.skip(), gr.skip(), gr.skip()
        return *(visitor.bare() if visitor.shown else nothing), defaults[name]

    def keep(self, visitor: Visitor, caption: str, kept: str) -> tuple[str, Any]:
        """Before a model writes: the caption to go back to, and whether there is one."""
        # While one is written a click asks for no other, and may come here after it was ended.
        visitor.unwanted &= visitor.writing
        kept = visitor.own_caption(caption, kept)
        return kept, gr.update(interactive=bool(kept))

    def restore(self, visitor: Visitor, caption: str, kept: str) -> tuple[str, str]:
        """The caption to go back to, and the next one."""
        visitor.end_writing()
        return kept or caption, visitor.own_caption(caption, kept)

    def ground(
        self,
        visitor: Visitor,
        caption: str,
        nouns: str,
        threshold: float | None = None,
        exclusive: bool = False,
    ) -> Iterator[tuple[Any, ...]]:
        """Ground the caption.

        Nouns that the model extracted from the caption before it was edited count no more.
        """
        nouns = visitor.nouns_for(caption, nouns)
        text, typed = self.limits.check_text("caption", caption), self.limits.split("nouns", nouns)
        ask = functools.partial(self.predictor.ground, text, scene=visitor.scene)
        result = ask(typed or None, threshold=threshold, exclusive=exclusive)
        if result.cut_nouns:
            left = ", ".join(result.cut_nouns)
            gr.Warning(html.escape(f"The caption is too long for the model; left out: {left}"))
        again = functools.partial(ask, [phrase["phrase"] for phrase in result.phrases])
        for shown in visitor.show(result, again):
            yield *shown, nouns

    def again(
        self, visitor: Visitor, threshold: float, exclusive: bool = False
    ) -> Iterator[tuple[Any, ...]]:
        """The last question with another threshold or switch; nothing where none was asked."""
        if (ask := visitor.again) is not None:
            several = ask.func == self.predictor.ground  # other questions know no such switch
            more = {"exclusive": exclusive} if several else {}
            yield from visitor.show(ask(threshold=threshold, **more), ask)

    def refer(
        self, visitor: Visitor, expression: str, threshold: float | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Find what the expression names."""
        text = self.limits.check_text("expression", expression)
        ask = functools.partial(self.predictor.refer, text, scene=visitor.scene)
        yield from visitor.show(ask(threshold=threshold), ask)

    def panoptic(
        self, visitor: Visitor, categories: str, threshold: float | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """Give every entity a category."""
        names = list(dict.fromkeys(self.limits.split("categories", categories)))
        if not names:
            raise ValueError("There are no categories: write some, separated by commas.")
        ask = functools.partial(self.predictor.panoptic, names, scene=visitor.scene)
        yield from visitor.show(ask(threshold=threshold), ask)

    def describe(self, visitor: Visitor) -> Iterator[tuple[Visitor, str, str]]:
        """The model's description, while it is written; nouns of a former caption go."""
        describe = functools.partial(self.predictor.describe, scene=visitor.scene)
        texts = streamed(lambda on_text: describe(on_text=on_text))
        yield from visitor.write((text, "") for text in texts)

    def ask(self, visitor: Visitor) -> Iterator[tuple[Visitor, str, str]]:
        """The captioner's description with its nouns.

        What it says when it fails is in the server's log only, for it may name an address.
        """
        failure = "does not answer now; write a caption."
        try:
            answer = describe(self.captioner, load_picture(visitor.scene.image))
        except (AnswerError, RequestError, EndpointError) as error:
            _logger.warning("captioner: %s", error)
            if isinstance(error, AnswerError):
                failure = "gave no answer that can be used; again?"
            raise ValueError(f"The caption model {failure}") from None
        caption = answer.description[: self.limits.max_caption]
        yield from visitor.write([(caption, visitor.keep_nouns(caption, answer.nouns))])

    def extract(self, visitor: Visitor, caption: str) -> Iterator[tuple[Visitor, str]]:
        """The caption's nouns as the model finds them."""
        text = self.limits.check_text("caption", caption)
        nouns = self.predictor.extract_nouns(text, scene=visitor.scene)
        if not nouns:
            gr.Info("The model finds no noun in this caption.")
        yield visitor, visitor.keep_nouns(caption, nouns)


def note(text: str, classes: str = "gella-note") -> str:
    """A line of the page that says how things are; the text is escaped."""
    return f'<p class="{classes}" role="status">{html.escape(text)}</p>'


def streamed(generate: Callable[[Callable[[str], None]], str]) -> Iterator[str]:
    """Run ``generate(on_text)`` in a thread; yield what ``on_text`` gets, and its result last.

    Text that comes faster than it is taken, or than `PACE`, is skipped: only the newest counts. A
    consumer that stops early ends the generation at its next text. Raises what ``generate`` raises.
    """
    texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    stop, last = threading.Event(), None

    def on_text(text: str) -> None:
        if stop.is_set():
            raise CancelledError  # nobody waits for the text any more
        texts.put(text)

    with ThreadPoolExecutor(1, "describe") as pool:
        answer = pool.submit(generate, on_text)
        answer.add_done_callback(lambda _: texts.put(None))
        try:
            while (text := texts.get()) is not None:
                if texts.empty() and text != last:
                    yield text
                    last = text
                    wait([answer], PACE)
            if answer.result() != last:
                yield answer.result()
        finally:
            stop.set()


def build(desk: Desk, examples: Sequence[Entry], untrained: bool) -> gr.Blocks:
    """Lay out the page.

    Args:
        desk: answers.
        examples: pictures to click, with absolute paths; `launch` allows them.
        untrained: say that the answers mean nothing.
    """
    # delete_cache: seconds between two looks for uploads that are too old.
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(600, MAX_AGE), fill_width=True
    ) as blocks:
        gr.HTML(_head(made_for(desk.predictor.cfg.MODEL.WEIGHTS), untrained))
        visitor = gr.State(Visitor(), time_to_live=IDLE)
        # Made before their places, since the buttons refer to them.
        caption, expression, categories = _texts(desk, examples)
        figure, choices = gr.HTML(elem_id="figure", render=False), _choices(desk)
        threshold = choices[0]
        hidden: dict[str, Any] = {"interactive": False, "size": "sm", "render": False}
        png = gr.DownloadButton("Picture (PNG)", elem_id="get-png", **hidden)
        masks_json = gr.DownloadButton("Masks (JSON)", elem_id="get-json", **hidden)
        places = gr.Row(), gr.Row(equal_height=False)
        with places[1]:
            with gr.Column(scale=2, min_width=300):
                shown: list[Any] = [visitor, figure, None, png, masks_json]
                picture, masks, shown[2] = _inputs(desk, shown)
            with gr.Column(scale=3, min_width=300):
                given = [visitor, picture, masks]
                with gr.Tab("Caption") as captions:
                    _caption_tab(desk, given, caption, shown, choices)
                with gr.Tab("Referring") as referring:
                    _line_tab(desk, given, shown, expression, threshold, desk.refer)
                with gr.Tab("Panoptic") as panoptic:
                    _line_tab(desk, given, shown, categories, threshold, desk.panoptic)
                figure.render()
                threshold.render()
                with gr.Row():
                    png.render()
                    masks_json.render()
        quiet: dict[str, Any] = {"show_progress": "hidden"}
        in_turn = {**_LAST, "api_visibility": "private"}  # else an answer under way would come back
        for tab in (captions, referring, panoptic):
            turn = functools.partial(desk.turn, tab.label)
            tab.select(turn, [visitor], [*shown, threshold], **quiet, **in_turn)
        again = desk.event(desk.again, outputs=len(shown))
        for choice, name in zip(choices, ("again", None)):
            choice.input(again, [*given, *choices], shown, api_name=name, **quiet, **_LAST)
        if examples:
            with places[0]:
                filled = [picture, masks, caption, expression, categories]
                _gallery(examples, visitor, filled)

        def forget(request: gr.Request) -> None:
            # Gradio itself keeps the state of a closed tab for an hour.
            blocks.state_holder.session_data.pop(request.session_hash, None)
            shutil.rmtree(desk.folder_of(request), ignore_errors=True)

        blocks.unload(forget)
    return blocks


def _head(purpose: str, untrained: bool) -> str:
    """What stands above all; ``purpose``: of the weights, as their card says it."""
    warning = "<strong>Untrained weights: the answers mean nothing.</strong>"
    return (
        "<h1>GELLA</h1><p>Give a picture, its entity masks and a caption: every noun is joined to "
        "the masks that it names. Point at a noun or a mask to see what belongs together, click to "
        "keep it.</p>"
        + f'<p class="gella-warn">{warning}</p>' * untrained
        + note(f"The weights: {purpose}", "gella-note gella-warn") * bool(purpose)
    )


def _texts(desk: Desk, examples: Sequence[Entry]) -> list[gr.Textbox]:
    """Caption, expression and categories, with those of the first example as hints."""
    first = examples[0] if examples else Entry(None, "A sentence that names what to find.", "")
    hints = {"Caption": first.text, "Expression": first.expression}
    hints["Categories"] = ", ".join(first.categories)
    return [
        _line(desk, label, hint, label.lower(), lines=4 if label == "Caption" else 1, render=False)
        for label, hint in hints.items()
    ]


def _choices(desk: Desk) -> tuple[Any, Any]:
    """The threshold, and the switch that keeps nouns from sharing a mask."""
    threshold = gr.Slider(
        *(0, 1, desk.predictor.cfg.MODEL.GELLA.ASSOCIATION_THRESHOLD),
        step=0.01,
        label="Threshold: masks that score higher are taken",
        elem_id="threshold",
        buttons=[],
        render=False,
    )
    alone = "Each mask for one noun only"
    hidden: dict[str, Any] = {"container": False, "render": False}
    return threshold, gr.Checkbox(label=alone, elem_id="exclusive", **hidden)


def _line(desk: Desk, label: str, hint: str, name: str, **options: Any) -> gr.Textbox:
    limit = desk.limits.max_caption
    return gr.Textbox(label=label, placeholder=hint, elem_id=name, max_length=limit, **options)


def _inputs(desk: Desk, shown: list[Any]) -> tuple[Any, Any, Any]:
    """Picture, masks, and the line that says how things are, the third of what is ``shown``."""
    limits = desk.limits
    sources: Any = ["upload", "clipboard"]
    picture: Any = gr.Image(
        label="Picture", type="filepath", sources=sources, height=320, buttons=[], elem_id="picture"
    )
    # Gradio would open the file, whatever it is, before anything here could look at its size. (A
    # subclass would make it write a .pyi file beside this one.)
    picture.preprocess = lambda file: file and file.path
    label = "Entity masks" + " (none: they are found)" * (desk.finder is not None)
    kinds = [*MASK_SUFFIXES, *SUFFIXES]  # a photograph is told what it is
    masks = gr.File(
        label=label, file_count="multiple", file_types=kinds, height=130, elem_id="masks"
    )
    line = gr.HTML(note("Still to come: a picture."), elem_id="note")
    gr.HTML(
        note(
            "Pictures: PNG, JPEG, WEBP, BMP, TIFF, GIF, at most "
            f"{limits.max_upload / 1e6:g} MB and {limits.max_pixels / 1e6:g} megapixels. Masks of "
            "the same size: PNG of ids (grey, palette or COCO panoptic, its JSON beside it if "
            "there is one), .npz, COCO results or instances."
        )
    )
    gr.on(
        [picture.change, masks.change],
        desk.prepare,
        [shown[0], picture, masks],
        [*shown[:2], line, *shown[3:]],
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="prepare",
        **_MODEL,
    )
    return picture, masks, line


def _gallery(examples: Sequence[Entry], visitor: Any, filled: list[Any]) -> None:
    images = [[example.image] for example in examples]
    rows = [
        (e.image, [str(e.masks)], e.text, e.expression, ", ".join(e.categories)) for e in examples
    ]
    gallery = gr.Dataset(
        label="Examples: click one, then Ground",
        components=filled[:1],  # what is not on the page loses its files to `delete_cache`
        samples=images,
        type="index",
        layout="gallery",
        samples_per_page=24,
        elem_id="examples",
    )

    def fill(visitor: Visitor, index: int) -> tuple[Any, ...]:
        visitor.end_writing()
        return rows[index]

    gallery.click(fill, [visitor, gallery], filled, **_AFTER)


def _caption_tab(
    desk: Desk, given: list[Any], caption: Any, shown: list[Any], choices: tuple[Any, Any]
) -> None:
    """The three tasks of the paper's Figure 3: describe, extract nouns, ground."""
    caption.render()
    ask, kept = None, gr.State("")
    with gr.Row():
        describe = gr.Button("Describe the picture", size="sm", elem_id="describe")
        if desk.captioner is not None:  # its name says that the picture leaves this server
            ask = gr.Button(f"Ask {Path(desk.captioner.model).name}", size="sm", elem_id="ask")
        stop = gr.Button("Stop", size="sm", elem_id="stop")
        back = gr.Button("Your caption again", size="sm", elem_id="back", interactive=False)
    nouns = _line(desk, "Nouns, separated by commas", "empty: the model finds them", "nouns")
    extract = gr.Button("Extract nouns", size="sm", elem_id="extract")
    choices[1].render()
    ground = gr.Button("Ground", variant="primary", elem_id="ground")
    texts = [given[0], caption, nouns]
    describing = desk.event(desk.describe, blind=True)
    for writer in filter(None, (describe, ask)):  # first: Gradio calls what a click calls in turn
        writer.click(desk.keep, [given[0], caption, kept], [kept, back], **_OUTSIDE)
    # "minimal": the caption stays in sight while others' questions are answered, stopped or not.
    writing: dict[str, Any] = {"show_progress": "minimal", **_MODEL}
    describe.click(describing, given, texts, api_name="describe", **writing)
    stop.click(Visitor.end_writing, given[:1], None, **_OUTSIDE)
    if ask is not None:
        asking = desk.event(desk.ask, blind=True)
        ask.click(asking, given, texts, api_name="ask", **writing)
    back.click(desk.restore, [given[0], caption, kept], [caption, kept], **_AFTER)
    extract.click(
        desk.event(desk.extract, blind=True),
        [*given, caption],
        [given[0], nouns],
        api_name="extract",
        **_MODEL,
    )
    ground.click(
        desk.event(desk.ground, outputs=len(shown) + 1),
        [*given, caption, nouns, *choices],
        [*shown, nouns],
        api_name="ground",
        show_progress_on=shown[1],
        **_LAST,
    )


def _line_tab(
    desk: Desk, given: list[Any], shown: list[Any], line: Any, threshold: Any, question: Any
) -> None:
    """A line of text and a button."""
    line.render()
    button = gr.Button("Find", variant="primary", elem_id=f"find-{line.elem_id}")
    for trigger in (button.click, line.submit):
        trigger(
            desk.event(question, outputs=len(shown)),
            [*given, line, threshold],
            shown,
            api_name=question.__name__ if trigger == button.click else None,
            show_progress_on=shown[1],
            **_LAST,
        )


def launch(desk: Desk, args: Any, examples: Sequence[Entry], guard: Any) -> tuple[gr.Blocks, str]:
    """Open the page; return Gradio's blocks, to be closed, and the address.

    Args:
        desk: answers.
        args: ``host``, ``port``, ``queue`` and ``sessions`` of the command line.
        examples: pictures to click, with absolute paths.
        guard: Starlette's ``Middleware`` before Gradio.
    """
    blocks = build(desk, examples, untrained=not desk.predictor.cfg.MODEL.WEIGHTS)
    blocks.queue(max_size=args.queue, default_concurrency_limit=1)
    fonts: Any = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = blocks.launch(
        server_name=args.host,
        server_port=args.port,
        prevent_thread_lock=True,
        quiet=True,
        # What a visitor may read by its path, besides uploads and results.
        allowed_paths=[str(path) for e in examples for path in (e.image, e.masks)],
        max_file_size=desk.limits.max_upload,
        state_session_capacity=args.sessions,
        enable_monitoring=False,
        footer_links=[],
        theme=gr.themes.Default(**fonts),
        head=HEAD,
        app_kwargs={"middleware": [guard]},
    )
    return blocks, address
