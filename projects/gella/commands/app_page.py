"""The page itself: Gradio's components and which function answers which button.

`build` only lays it out; the functions are in `app_answers`, what is let in in `app_uploads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.data_classes import ImageData

from gella.commands.app_answers import Page, guarded, note
from gella.commands.app_examples import Example
from gella.commands.app_tasks import Desk
from gella.commands.app_uploads import MASK_SUFFIXES, PICTURE_FORMATS
from gella.pictures.html import SCRIPT, STYLE

TITLE = "GELLA: ground a caption in a picture"
_OWN_STYLE = """
.gella-note { color: var(--body-text-color-subdued); font-size: var(--text-sm); }
.gella-warn { border-left: 3px solid #b45309; padding-left: .6em; }
footer { display: none !important; }
"""
HEAD = f"<style>{STYLE}{_OWN_STYLE}</style><script>{SCRIPT}</script>"
# All questions share one queue and are answered one after the other, in order.
MODEL: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1}


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
        gr.HTML(note("Still to come: a picture."), elem_id="note", render=False),
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
        note(
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
        trigger_mode="always_last",  # a click meanwhile is not lost
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
            trigger_mode="always_last",
            api_name=answer.__name__ if trigger == button.click else None,
            **MODEL,
        )
