"""How well the utterances of PNG narratives align with their captions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tqdm import tqdm

from gella.data.narratives import read_narratives
from gella.data.reading import field, listed, text
from gella.text.prompts import align_utterances

__all__ = ["alignment_report"]


def alignment_report(png_json: str | Path) -> dict[str, Any]:
    """Align every utterance of a file of narratives with its caption.

    Args:
        png_json: in the form of Panoptic Narrative Grounding (docs/FORMATS.md 2).

    Returns:
        ``file``; the numbers ``narratives``, ``utterances`` (blank ones are not counted, they say
        nothing), ``aligned``, ``nouns`` and ``aligned_nouns`` (of noun phrases, on which masks
        depend); ``unaligned``: a dict ``narrative`` (place in the file from 0), ``image_id``,
        ``utterance``, ``is_noun``, ``caption`` for each that has no span, in order.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file; the message names the narrative.
    """
    numbers = dict.fromkeys(("utterances", "aligned", "nouns", "aligned_nouns"), 0)
    unaligned = []
    narratives = read_narratives(png_json)
    for place, narrative in enumerate(tqdm(narratives, desc="aligning", disable=None)):
        where = f"narrative {place}"
        caption = text(narrative, "caption", png_json, where)
        segments = listed(narrative, "segments", png_json, where)
        utterances = [text(segment, "utterance", png_json, where) for segment in segments]
        for segment, words, span in zip(
            segments, utterances, align_utterances(caption, utterances)
        ):
            if not words.strip():
                continue
            noun = bool(segment.get("noun") or segment.get("segment_ids"))
            numbers["utterances"] += 1
            numbers["nouns"] += noun
            numbers["aligned"] += span is not None
            numbers["aligned_nouns"] += noun and span is not None
            if span is None:
                unaligned.append(
                    {
                        "narrative": place,
                        "image_id": str(field(narrative, "image_id", png_json, where)),
                        "utterance": words,
                        "is_noun": noun,
                        "caption": caption,
                    }
                )
    return {
        "file": str(png_json),
        "narratives": len(narratives),
        **numbers,
        "unaligned": unaligned,
    }
