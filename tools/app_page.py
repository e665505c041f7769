"""The page itself: Gradio's components and which function answers which button.

`build` only lays it out; what the buttons do is in `app_tasks.Desk`, what is let in in
`app_uploads`.
"""

from __future__ import annotations

import functools
import hashlib
import html
import inspect
import itertools
import json
import logging
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from app_examples import Example
from app_sessions import Held
from app_tasks import Desk, for_download, unasked
from app_uploads import MASK_SUFFIXES, PICTURE_FORMATS, message_of
from gradio.data_classes import ImageData

from gella.checkpoint import write_atomically
from gella.grounding import Grounding, PanopticResult
from gella.interactive import SCRIPT, STYLE, grounding_html, panoptic_html

TITLE = "GELLA: ground a caption in a picture"
BUSY = "Something went wrong; the server's log says what. It still runs: try again."
_OWN_STYLE = """
.gella-note { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.gella-warn { border-left: 3px solid #b45309; padding-left: .6em; }
footer { display: none !important; }
"""
HEAD = f"<style>{STYLE}{_OWN_STYLE}</style><script>{SCRIPT}</script>"
# All questions share one queue and are answered one after the other, in order.
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}
_logger = logging.getLogger(__name__)
_numbers = itertools.count(1)  # figures of all visitors: their keys never meet on a page


def _told(error: Exception) -> str:
    message = message_of(error)
    if message is None:
        _logger.error("a question failed", exc_info=error)
    return message or BUSY


def guarded(answer: Callable[..., Any]) -> Callable[..., Any]:
    """A function or generator whose errors become messages of the page; the server lives on."""

    def told(error: Exception) -> gr.Error:
        # Gradio shows messages as HTML, and they repeat what the visitor wrote.
        return gr.Error(html.escape(_told(error)), duration=20, print_exception=False)

    if inspect.isgeneratorfunction(answer):

        @functools.wraps(answer)
        def generate(*args: Any, **kwargs: Any) -> Iterator[Any]:
            try:
                yield from answer(*args, **kwargs)
            except Exception as error:
                raise told(error) from None

        return generate

    @functools.wraps(answer)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return answer(*args, **kwargs)
        except Exception as error:
            raise told(error) from None

    return call


class Page:
    """The functions behind the buttons.

    Args:
        desk: answers.
        folder: where downloads are written; Gradio copies them to its own folder.
    """

    def __init__(self, desk: Desk, folder: Path) -> None:
        self.desk, self.folder = desk, folder

    def prepare(
        self, picture: str | None, masks: list[str] | None, request: gr.Request
    ) -> tuple[Any, str]:
        """Encode as soon as there are a picture and masks; show them, or say what is wrong.

        A picture and its masks come one after the other, so what does not go together yet is said
        quietly; a question says it aloud.
        """
        if not picture:
            return gr.skip(), _note("Still to come: a picture.")
        if not masks and self.desk.finder is not None:
            return gr.skip(), _note("No masks: they are found at the first question.")
        if not masks:
            return gr.skip(), _note("Still to come: the picture's masks.")
        try:
            held = self.desk.scene(request.session_hash or "", picture, masks)
        except Exception as error:
            return "", _note(_told(error), "gella-note gella-warn")
        if held.shown:
            return gr.skip(), _note(_summary(held))
        return self._draw(held, unasked(held.scene)), _note(_summary(held))

    def ground(
        self,
        picture: str | None,
        masks: list[str] | None,
        caption: str,
        nouns: str,
        request: gr.Request,
    ) -> Iterator[tuple[Any, ...]]:
        """Ground the caption; the figure comes first, the downloads follow.

        Nouns that the model extracted from the caption before it was edited count no more.
        """
        session = request.session_hash or ""
        held = self.desk.scene(session, picture, masks)
        nouns = held.nouns_for(caption, nouns)
        result = self.desk.ground(held, caption, nouns)
        if result.cut_nouns:
            left = ", ".join(result.cut_nouns)
            gr.Warning(html.escape(f"The caption is too long for the model; left out: {left}"))
        for shown in self._show(session, held, result):
            yield *shown, nouns

    def refer(
        self, picture: str | None, masks: list[str] | None, expression: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Find what the expression names."""
        session = request.session_hash or ""
        held = self.desk.scene(session, picture, masks)
        yield from self._show(session, held, self.desk.refer(held, expression))

    def panoptic(
        self, picture: str | None, masks: list[str] | None, categories: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Give every entity a category."""
        session = request.session_hash or ""
        held = self.desk.scene(session, picture, masks)
        yield from self._show(session, held, self.desk.panoptic(held, categories))

    def describe(
        self, picture: str | None, masks: list[str] | None, request: gr.Request
    ) -> Iterator[tuple[str, str]]:
        """The model's description, while it is written; nouns of a former caption go."""
        held = self.desk.scene(request.session_hash or "", picture, masks)
        for text in self.desk.describe(held):
            yield text, ""

    def ask(
        self, picture: str | None, masks: list[str] | None, request: gr.Request
    ) -> tuple[str, str]:
        """The captioner's description with its nouns."""
        held = self.desk.scene(request.session_hash or "", picture, masks)
        caption, nouns = self.desk.ask(held)
        return caption, held.keep_nouns(caption, nouns)

    def extract(
        self, picture: str | None, masks: list[str] | None, caption: str, request: gr.Request
    ) -> str:
        """The caption's nouns as the model finds them."""
        held = self.desk.scene(request.session_hash or "", picture, masks)
        nouns = self.desk.extract(held, caption)
        if not nouns:
            gr.Info("The model finds no noun in this caption.")
        return held.keep_nouns(caption, nouns)

    def forget(self, request: gr.Request) -> None:
        """The visitor left: picture and results go."""
        session = request.session_hash or ""
        self.desk.sessions.drop(session)
        shutil.rmtree(self._folder_of(session), ignore_errors=True)

    def _folder_of(self, session: str) -> Path:
        # The session's name comes from the visitor's browser: it must not become a path.
        return self.folder / hashlib.sha256(session.encode()).hexdigest()[:32]

    def _draw(self, held: Held, result: Grounding | PanopticResult) -> str:
        held.shown = True
        draw: Any = grounding_html if isinstance(result, Grounding) else panoptic_html
        return draw(result, key=f"r{next(_numbers)}", image_src=held.preview)

    def _show(
        self, session: str, held: Held, result: Grounding | PanopticResult
    ) -> Iterator[tuple[Any, ...]]:
        waiting = gr.update(interactive=False)
        yield self._draw(held, result), _note(_summary(held)), waiting, waiting
        kind = getattr(result, "task", "panoptic")
        folder = self._folder_of(session)
        shutil.rmtree(folder, ignore_errors=True)  # the buttons no longer lead to the last result
        folder = folder / secrets.token_hex(16)
        folder.mkdir(parents=True)
        paths = [folder / f"{held.name}_{kind}{suffix}" for suffix in (".png", ".json")]
        text = json.dumps(for_download(result), ensure_ascii=False).encode("utf-8")
        picture = result.plot()
        write_atomically(str(paths[0]), lambda stream: picture.save(stream, format="PNG"))
        write_atomically(str(paths[1]), lambda stream: stream.write(text))
        ready = [gr.update(value=str(path), interactive=True) for path in paths]
        yield gr.skip(), gr.skip(), *ready


def _note(text: str, classes: str = "gella-note") -> str:
    return f'<p class="{classes}" role="status">{html.escape(text)}</p>'


def _summary(held: Held) -> str:
    height, width = held.scene.image.shape[:2]
    count = held.scene.entities.num_entities
    return f"{held.name}: {width} x {height} pixels, {count} entities; encoded."


def build(desk: Desk, folder: Path, examples: Sequence[Example], untrained: bool) -> gr.Blocks:
    """Lay out the page.

    Args:
        desk: answers.
        folder: for files on their way to a download; in Gradio's temporary folder.
        examples: pictures to click.
        untrained: say that the answers mean nothing.
    """
    page, limits = Page(desk, folder), desk.limits
    # Made before their places, since the buttons refer to them.
    caption = gr.Textbox(
        label="Caption",
        lines=4,
        max_length=limits.max_caption,
        placeholder="Two zebras graze beside a tall tree.",
        elem_id="caption",
        render=False,
    )
    outputs = _outputs()
    with gr.Blocks(
        title=TITLE, analytics_enabled=False, delete_cache=(600, 6 * 3600), fill_width=True
    ) as blocks:
        gr.HTML(_intro(untrained))
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                given = _inputs(page, caption, examples, outputs)
            with gr.Column(scale=3, min_width=300):
                with gr.Tab("Caption"):
                    _caption_tab(page, given, caption, outputs)
                with gr.Tab("Referring"):
                    _line_tab(page.refer, given, outputs, "Expression", "the zebra on the left")
                with gr.Tab("Panoptic"):
                    _line_tab(page.panoptic, given, outputs, "Categories", "zebra, tree, grass")
                outputs[0].render()
                with gr.Row():
                    for part in outputs[2:]:
                        part.render()
        blocks.unload(page.forget)
    return blocks


def _path_of(payload: ImageData | None) -> str | None:
    return None if payload is None else payload.path


def _intro(untrained: bool) -> str:
    warning = (
        '<p class="gella-warn"><strong>Untrained weights: the answers mean nothing.</strong></p>'
        if untrained
        else ""
    )
    return (
        "<h1>GELLA</h1><p>Give a picture, its entity masks and a caption: every noun is joined to "
        "the masks that it names. Point at a noun or a mask to see what belongs together, click to "
        f"keep it.</p>{warning}"
    )


def _outputs() -> tuple[Any, ...]:
    """Figure, note, picture and JSON, to be rendered later."""
    return (
        gr.HTML(elem_id="figure", render=False),
        gr.HTML(_note("Still to come: a picture."), elem_id="note", render=False),
        gr.DownloadButton(
            "Picture (PNG)", interactive=False, size="sm", elem_id="get-png", render=False
        ),
        gr.DownloadButton(
            "Masks (JSON)", interactive=False, size="sm", elem_id="get-json", render=False
        ),
    )


def _inputs(page: Page, caption: Any, examples: Sequence[Example], outputs: Any) -> tuple[Any, Any]:
    """Picture and masks, with the examples below them."""
    limits = page.desk.limits
    picture = gr.Image(
        label="Picture",
        type="filepath",
        sources=["upload", "clipboard"],
        height=320,
        buttons=[],
        elem_id="picture",
    )
    # Gradio would open the file, whatever it is, before anything here could look at its size. (A
    # subclass would make it write a .pyi file beside this one.)
    picture.preprocess = _path_of
    found = "" if page.desk.finder is None else " (none: they are found)"
    masks = gr.File(
        label=f"Entity masks{found}",
        file_count="multiple",
        file_types=list(MASK_SUFFIXES),
        height=110,
        elem_id="masks",
    )
    outputs[1].render()
    gr.HTML(
        _note(
            f"Pictures: {', '.join(PICTURE_FORMATS)}, at most {limits.max_upload / 1e6:g} MB and "
            f"{limits.max_pixels / 1e6:g} megapixels. Masks of the same size: PNG of ids (grey, "
            "palette or COCO panoptic, its JSON beside it if there is one), .npz, COCO results or "
            "instances."
        )
    )
    gr.on(
        [picture.change, masks.change],
        guarded(page.prepare),
        [picture, masks],
        outputs[:2],
        show_progress="hidden",
        trigger_mode="always_last",
        api_name="prepare",
        **MODEL,
    )
    if examples:
        shown = gr.Dataset(
            label="Examples: click one, then Ground",
            components=[gr.Image(render=False)],
            samples=[[str(example.picture)] for example in examples],
            type="index",
            layout="gallery",
            samples_per_page=24,
            elem_id="examples",
        )
        shown.click(
            lambda place: _filled(examples[place]),
            shown,
            [picture, masks, caption],
            queue=False,
            api_visibility="private",
            show_progress="hidden",
        )
    return picture, masks


def _filled(example: Example) -> tuple[str, list[str], str]:
    return str(example.picture), [str(example.masks)], example.caption


def _caption_tab(page: Page, given: tuple[Any, Any], caption: Any, outputs: Any) -> None:
    """The three tasks of the paper's Figure 3: describe, extract nouns, ground."""
    caption.render()
    with gr.Row():
        describe = gr.Button("Describe the picture", size="sm", elem_id="describe")
        ask = _ask_button(page.desk)
        stop = gr.Button("Stop", size="sm", elem_id="stop")
    nouns = gr.Textbox(
        label="Nouns, separated by commas",
        lines=1,
        max_length=page.desk.limits.max_caption,
        placeholder="empty: the model finds them",
        elem_id="nouns",
    )
    extract = gr.Button("Extract nouns", size="sm", elem_id="extract")
    ground = gr.Button("Ground", variant="primary", elem_id="ground")
    texts = [caption, nouns]
    running = describe.click(guarded(page.describe), [*given], texts, api_name="describe", **MODEL)
    stop.click(None, cancels=[running], queue=False, api_visibility="private")
    if ask is not None:
        ask.click(guarded(page.ask), [*given], texts, api_name="ask", **MODEL)
    extract.click(guarded(page.extract), [*given, caption], nouns, api_name="extract", **MODEL)
    ground.click(
        guarded(page.ground),
        [*given, caption, nouns],
        [*outputs, nouns],
        show_progress_on=outputs[0],
        api_name="ground",
        **MODEL,
    )


def _ask_button(desk: Desk) -> Any:
    """A button that says that the picture leaves this server, if it does."""
    if desk.captioner is None:
        return None
    return gr.Button(f"Ask {Path(desk.captioner.model).name}", size="sm", elem_id="ask")


def _line_tab(
    answer: Callable[..., Any], given: tuple[Any, Any], outputs: Any, label: str, example: str
) -> None:
    """A line of text and a button."""
    name = label.lower()
    line = gr.Textbox(label=label, placeholder=example, elem_id=name)
    button = gr.Button("Find", variant="primary", elem_id=f"find-{name}")
    for trigger in (button.click, line.submit):
        trigger(
            guarded(answer),
            [*given, line],
            [*outputs],
            show_progress_on=outputs[0],
            api_name=answer.__name__ if trigger == button.click else None,
            **MODEL,
        )
