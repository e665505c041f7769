"""Predicted groundings in the on-disk form of Panoptic Narrative Grounding (docs/FORMATS.md 2)."""

from __future__ import annotations

from typing import Any


def png_form(row: dict[str, Any]) -> dict[str, Any]:
    """A narrative as the benchmark writes it, with the predicted entities in ``segment_ids``.

    Args:
        row: ``image_id``, ``caption`` and ``nouns``; a noun has ``text``, ``start``, ``end`` (-1
            where it is not in the caption as written), ``is_plural`` and, where something was
            predicted, ``entity_ids``.

    Returns:
        ``{image_id: str, caption, segments: [{utterance, segment_ids: [str], plural, noun}]}``. The
        segments partition the caption in order; nouns without a place of their own come last.
    """
    segments: list[dict[str, Any]] = []
    cursor = 0
    caption, nouns = row["caption"], row["nouns"]
    last = [noun for noun in nouns if noun["start"] < 0]
    for noun in sorted((n for n in nouns if n["start"] >= 0), key=lambda n: n["start"]):
        if noun["start"] < cursor:  # overlaps the noun before it
            last.append(noun)
            continue
        segments += _between(caption[cursor : noun["start"]])
        segments.append(_noun(noun))
        cursor = noun["end"]
    segments += _between(caption[cursor:])
    segments += [_noun(noun) for noun in last]
    return {"image_id": str(row["image_id"]), "caption": caption, "segments": segments}


def _noun(noun: dict[str, Any]) -> dict[str, Any]:
    ids = [str(i) for i in noun.get("entity_ids", [])]
    plural = bool(noun["is_plural"])
    return {"utterance": noun["text"], "segment_ids": ids, "plural": plural, "noun": True}


def _between(text: str) -> list[dict[str, Any]]:
    words = text.strip()
    if not words:
        return []
    return [{"utterance": words, "segment_ids": [], "plural": False, "noun": False}]
