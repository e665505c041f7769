#!/usr/bin/env python
"""Check the narratives of Panoptic Narrative Grounding; they are used as they are published.

    python datasets/prepare_png.py --check gella_coco_png_val2017 [--allow 20 --json spans.json]

A narrative is cut into utterances without offsets, and this project finds each in the caption (in
spite of case, white space, split contractions and punctuation). Counts them and lists those that
are not in their caption; their phrases are still grounded, but have no place to be coloured at.
Exit status: 0 when all align or no more than --allow do not, 1 otherwise, 2 for a file or a name
that cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from tqdm import tqdm

import gella.data  # noqa: F401  (registers the datasets)
from gella.commands.console import project
from gella.data.narratives import read_narratives
from gella.data.records import Place
from gella.text.spans import align_utterances
from gella.utils.io import write_json

SHOWN = 20  # unaligned utterances on the screen; --json has all


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    args = _parser().parse_args(arguments)
    try:
        path = _narratives_of(args.check)
        report = alignment_report(path)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(_as_text(report))
    if args.json is not None:
        write_json(args.json, report)
        print(f"report: {args.json}")
    lost = len(report["unaligned"])
    if lost > args.allow:
        print(f"{lost} utterances do not align and --allow is {args.allow}; see the list above")
        return 1
    name = args.check if path != args.check else "NAME"
    print(f"next: python {project('datasets/check.py')} {name}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        epilog="example: python datasets/prepare_png.py --check gella_shapes_png_val",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--check",
        required=True,
        metavar="NAME|JSON",
        help="a registered dataset of narratives, or a file of them",
    )
    parser.add_argument("--allow", type=int, default=0, metavar="N", help="so many may not align")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the whole list here")
    return parser


def _narratives_of(name: str) -> str:
    """The file of narratives of a dataset, or the name itself if it is a file's."""
    if name in DatasetCatalog.list():
        metadata = MetadataCatalog.get(name)
        if metadata.get("form") != "png":
            raise ValueError(
                f"{name} holds no narratives in PNG's form but {metadata.get('form', 'others')}; "
                "name a dataset that register_png registered, or a file"
            )
        return metadata.json_file
    if not name.endswith(".json") and not Path(name).is_file():
        known = [n for n in DatasetCatalog.list() if MetadataCatalog.get(n).get("form") == "png"]
        raise ValueError(
            f"{name!r} is no file and no dataset; datasets of narratives: {', '.join(known)}"
        )
    return name


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
    for number, narrative in enumerate(tqdm(narratives, desc="aligning", disable=None)):
        place = Place(png_json, f"narrative {number}")
        caption = place.text(narrative, "caption")
        segments = place.listed(narrative, "segments")
        utterances = [place.text(segment, "utterance") for segment in segments]
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
                        "narrative": number,
                        "image_id": place.key(narrative, "image_id"),
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


def _as_text(report: dict[str, Any]) -> str:
    lines = [
        report["file"],
        f"  narratives   {report['narratives']:>9,}",
        f"  utterances   {report['utterances']:>9,}   aligned {report['aligned']:,}",
        f"  noun phrases {report['nouns']:>9,}   aligned {report['aligned_nouns']:,}",
        f"  unaligned    {len(report['unaligned']):>9,}",
    ]
    for lost in report["unaligned"][:SHOWN]:
        kind = "noun" if lost["is_noun"] else "words"
        lines.append(
            f"    image {lost['image_id']}, narrative {lost['narrative']}, {kind}: "
            f"{lost['utterance']!r} in {lost['caption'][:60]!r}"
        )
    if len(report["unaligned"]) > SHOWN:
        lines.append(f"    and {len(report['unaligned']) - SHOWN:,} more (--json FILE lists all)")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
