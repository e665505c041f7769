"""The functions behind the page's buttons: they take what Gradio hands over and give what it shows.

What they answer comes from `app_tasks.Desk`; errors become messages here.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from gella.commands.app_sessions import Held
from gella.commands.app_tasks import Desk, for_download, unasked
from gella.commands.app_uploads import message_of
from gella.pictures.grounding import Grounding, PanopticResult
from gella.pictures.html import grounding_html, panoptic_html
from gella.utils.io import write_atomically

BUSY = "Something went wrong; the server's log says what. It still runs: try again."
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
            return gr.skip(), note("Still to come: a picture.")
        if not masks and self.desk.finder is not None:
            return gr.skip(), note("No masks: they are found at the first question.")
        if not masks:
            return gr.skip(), note("Still to come: the picture's masks.")
        try:
            held = self.desk.scene(_session(request), picture, masks)
        except Exception as error:
            return "", note(_told(error), "gella-note gella-warn")
        if held.shown:
            return gr.skip(), note(_summary(held))
        return self._draw(held, unasked(held.scene)), note(_summary(held))

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
        session = _session(request)
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
        session = _session(request)
        held = self.desk.scene(session, picture, masks)
        yield from self._show(session, held, self.desk.refer(held, expression))

    def panoptic(
        self, picture: str | None, masks: list[str] | None, categories: str, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        """Give every entity a category."""
        session = _session(request)
        held = self.desk.scene(session, picture, masks)
        yield from self._show(session, held, self.desk.panoptic(held, categories))

    def describe(
        self, picture: str | None, masks: list[str] | None, request: gr.Request
    ) -> Iterator[tuple[str, str]]:
        """The model's description, while it is written; nouns of a former caption go."""
        held = self.desk.scene(_session(request), picture, masks, needs_masks=False)
        for text in self.desk.describe(held):
            yield text, ""

    def ask(
        self, picture: str | None, masks: list[str] | None, request: gr.Request
    ) -> tuple[str, str]:
        """The captioner's description with its nouns."""
        held = self.desk.scene(_session(request), picture, masks, needs_masks=False)
        caption, nouns = self.desk.ask(held)
        return caption, held.keep_nouns(caption, nouns)

    def extract(
        self, picture: str | None, masks: list[str] | None, caption: str, request: gr.Request
    ) -> str:
        """The caption's nouns as the model finds them."""
        held = self.desk.scene(_session(request), picture, masks, needs_masks=False)
        nouns = self.desk.extract(held, caption)
        if not nouns:
            gr.Info("The model finds no noun in this caption.")
        return held.keep_nouns(caption, nouns)

    def forget(self, request: gr.Request) -> None:
        """The visitor left: picture and results go."""
        session = _session(request)
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
        shown = (self._draw(held, result), note(_summary(held)))
        yield *shown, waiting, waiting
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
        yield *shown, *ready


def note(text: str, classes: str = "gella-note") -> str:
    """A line of the page that says how things are; the text is escaped."""
    return f'<p class="{classes}" role="status">{html.escape(text)}</p>'


def _session(request: gr.Request) -> str:
    # A call that names no session is a visitor of its own.
    return request.session_hash or secrets.token_hex(16)


def _summary(held: Held) -> str:
    height, width = held.scene.image.shape[:2]
    count = held.scene.entities.num_entities
    return f"{held.name}: {width} x {height} pixels, {count} entities; encoded."
