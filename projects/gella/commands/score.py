"""Score saved predictions again, without the model.

    python tools/score.py output/gella_tiny_shapes
    python tools/score.py output/gella_tiny_shapes TEST.PNG_PROTOCOL official

Reads OUTPUT_DIR/config.yaml and the predictions in OUTPUT_DIR/inference/<dataset>/ that
tools/train_net.py left there, and the datasets' annotations. Without KEY VALUE changes the scores
are compared with OUTPUT_DIR/results.json: they are equal bit for bit, or the status is 1.
"""

from __future__ import annotations

import argparse
import functools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from torch.utils.data import DataLoader
from tqdm import tqdm

from gella import load_config
from gella.commands.console import Parser, exit_status, tools
from gella.data.mapper import expression_phrase, record_fields
from gella.data.register import import_modules
from gella.engine.trainer import load_records
from gella.entities.files import read_id_png
from gella.entities.rle import decode_segmentation
from gella.entities.sources import load_from_record
from gella.evaluation import build_evaluator, format_results, load_results, merge_datasets
from gella.evaluation.results import refuse_nothing, save_results
from gella.evaluation.truth import TruthReader
from gella.utils.io import few, image_key, read_json

PREDICTION_FILES: dict[str, tuple[str, tuple[str, ...]]] = {
    "png_predictions.json": ("predictions", ("image_id", "caption")),
    "panoptic_predictions.json": ("annotations", ("image_id",)),
    "entity_predictions.json": ("", ("image_id",)),
    "noun_predictions.json": ("predictions", ("image_id", "caption")),
    "referring_predictions.json": ("predictions", ("image_id", "phrase", "ref_id", "sent_id")),
}
"""What the evaluators write into ``inference/<dataset>/``, of which a folder has those of its type:
under which key its rows are ("": the file is the list), and what tells whose a row is."""


def sample_of(record: dict[str, Any], evaluator_type: str) -> dict[str, Any]:
    """The part of a mapped test input that the evaluators look at, from a dataset dict.

    Args:
        record: a dataset dict (docs/FORMATS.md 7).
        evaluator_type: of the dataset; entities and truth are decoded for those that need them.
    """
    sample = record_fields(record)
    sample["caption"], sample["phrases"] = record.get("caption", ""), record.get("phrases") or []
    if evaluator_type == "refcoco":
        sample["phrases"] = [expression_phrase(e) for e in record.get("expressions") or []]
        sample["caption"] = " ".join(phrase["text"] for phrase in sample["phrases"])
    if evaluator_type == "png":
        sample["entities_full"] = load_from_record(record).canonical()
    if evaluator_type in ("png", "coco_panoptic_seg"):
        sample["truth"] = TruthReader()(sample)
    return sample


class SavedPredictions:
    """The outputs that a folder of predictions holds; call it with a sample of `sample_of`."""

    def __init__(self, folder: str | Path) -> None:
        """Read a folder ``inference/<dataset>``.

        Raises:
            FileNotFoundError: it has none of ``PREDICTION_FILES``.
            ValueError: a file is damaged.
        """
        self._folder = Path(folder)
        self._waiting: dict[str, dict[tuple[str, ...], list[dict[str, Any]]]] = {}
        for name, (field, keys) in PREDICTION_FILES.items():
            path = self._folder / name
            if not path.is_file():
                continue
            # A list per key: several captions of an image may be the same text.
            waiting = self._waiting[name] = defaultdict(list)
            try:
                content = read_json(path)
                for row in content[field] if field else content:
                    waiting[_key(row, keys)].append(row)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} is no file of predictions ({error!r}); evaluate again"
                ) from error
        if not self._waiting:
            raise FileNotFoundError(
                f"{folder} holds no predictions ({', '.join(PREDICTION_FILES)}): evaluate first, "
                "with tools/train_net.py --eval-only"
            )

    def __call__(self, sample: dict[str, Any]) -> dict[str, Any]:
        """What the model answered for a sample; samples of one key are answered in turn.

        Raises:
            KeyError: nothing was predicted for it; the message names file and image.
            ValueError: a predicted PNG is damaged, or a mask is of another size than the image.
        """
        output: dict[str, Any] = {}
        for name in self._waiting:
            output.update(self._answer(name, sample))
        return output

    def _answer(self, name: str, sample: dict[str, Any]) -> dict[str, Any]:
        """What one file says of a sample."""
        if name == "entity_predictions.json":  # an image without entities has no entry
            entries = self._waiting[name][_key(sample, ("image_id",))]
            masks = [_mask(entry, sample) for entry in entries]
            scores = [entry["score"] for entry in entries]
            return {"instances": SimpleNamespace(pred_masks=masks, scores=scores)}
        if name == "referring_predictions.json":
            phrase = sample["phrases"][0]
            image_id = sample["image_id"]
            row = self._take(name, {**phrase, "image_id": image_id, "phrase": phrase["text"]})
            return {"grounding": [_entry({**row, "answer": row["phrase"]}, sample)]}
        row = self._take(name, sample)
        if name == "panoptic_predictions.json":
            path = self._folder / "panoptic_predictions" / row["file_name"]
            try:
                return {"panoptic_seg": (read_id_png(path), row["segments_info"])}
            except (OSError, ValueError) as error:
                raise ValueError(f"{path} cannot be read ({error}); evaluate again") from error
        if name == "png_predictions.json":
            # Nouns without a place were not answered; the places restore the answer's order.
            said = [noun for noun in (*row["nouns"], *row["others"]) if "place" in noun]
            said.sort(key=lambda noun: noun["place"])
            return {"grounding": [_entry(noun, sample) for noun in said], "text": row["text"]}
        if "png_predictions.json" in self._waiting:  # it has the same nouns, with their masks
            return {"text": row["text"]}
        return {"text": row["text"], "grounding": [{"phrase": noun} for noun in row["found"]]}

    def _take(self, name: str, values: dict[str, Any]) -> dict[str, Any]:
        key, waiting = _key(values, PREDICTION_FILES[name][1]), self._waiting[name]
        if not waiting.get(key):
            raise KeyError(
                f"{self._folder / name}: no prediction of image {values['image_id']} for "
                f"{[text[:60] for text in key[1:]]}: it is of another dataset, or the evaluation "
                f"was cut short (ids there: {few(dict.fromkeys(image for image, *_ in waiting))})"
            )
        return waiting[key].pop(0)


def _key(row: dict[str, Any], fields: Sequence[str]) -> tuple[str, ...]:
    """What tells whose a row is; the first field is the image's id."""
    return image_key(row[fields[0]]), *(str(row.get(field, "")) for field in fields[1:])


def _entry(noun: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    entry = {key: noun[key] for key in ("entity_ids", "scores")}
    return {**entry, "phrase": noun["answer"], "mask": _mask(noun, sample)}


def _mask(entry: dict[str, Any], sample: dict[str, Any]) -> np.ndarray:
    return decode_segmentation(entry["segmentation"], (sample["height"], sample["width"]))


def score_dataset(cfg: Any, name: str, folder: Path) -> dict[str, dict[str, float]]:
    """``{task: {metric: score}}`` of the predictions in a folder, by the dataset's evaluators.

    Raises:
        FileNotFoundError, KeyError, ValueError: predictions are missing, damaged or of another
            dataset.
    """
    kind = MetadataCatalog.get(name).get("evaluator_type")
    records = load_records([name], "DATASETS.TEST", cfg)
    saved = SavedPredictions(folder)
    evaluator = build_evaluator(cfg, name, "")
    evaluator.reset()
    # Worker processes decode while this one scores: `sample_of` runs where records are collated.
    samples: Any = DataLoader(
        records,  # type: ignore[arg-type]  # indexable, with a length
        batch_size=None,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        collate_fn=functools.partial(sample_of, evaluator_type=kind),
    )
    for sample in tqdm(samples, name, len(records), unit="sample", disable=None):
        evaluator.process([sample], [saved(sample)])
    return evaluator.evaluate()


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> list[str]:
    """Scores that are not equal bit for bit, or in one of the two only."""
    lines = []
    for task in sorted({*ours, *theirs}):
        first, second = ours.get(task, {}), theirs.get(task, {})
        for key in sorted({*first, *second}):
            a, b = first.get(key), second.get(key)
            undefined = all(v is not None and math.isnan(v) for v in (a, b))
            if a != b and not undefined:
                lines.append(f"{task}/{key}: {a} now, {b} in the file")
    return lines


def run(args: argparse.Namespace) -> int:
    """Score, print one table and compare; 1 where scores differ from results.json."""
    folder = Path(args.folder)
    if not (folder / "inference").is_dir():
        raise FileNotFoundError(
            f"{folder}/inference does not exist: give the OUTPUT_DIR of an evaluation"
        )
    cfg = load_config(args.config_file or folder / "config.yaml", args.opts or [])
    import_modules(cfg)
    cfg.freeze()
    names = cfg.DATASETS.TEST
    outcome = {name: score_dataset(cfg, name, folder / "inference" / name) for name in names}
    results = merge_datasets(outcome)
    file = folder / "results.json"
    comparable = not args.opts and file.is_file()
    different = differences(results, load_results(file)[0]) if comparable else []
    print(f"{format_results(results)}\n")  # before what may fail
    refuse_nothing(outcome)
    if args.output:
        save_results(results, args.output)
        print(f"Written:  {args.output}")
    total = sum(len(metrics) for metrics in results.values())
    if not comparable:
        print("Compared: with nothing (changed settings, or no results.json)")
    elif different:
        print(f"Compared: {len(different)} of {total} scores differ from {file}:")
        print("\n".join(f"  {line}" for line in different[:10]))
        return 1
    else:
        print(f"Compared: all {total} scores equal those of {file} bit for bit")
    print(f"Next:     python {tools()}/analyze.py {args.folder}/inference")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments or files."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", help="OUTPUT_DIR of an evaluation, or a run's folder of --table")
    add("--config-file", default="", metavar="FILE", help="default: FOLDER/config.yaml")
    add("--output", default="", metavar="FILE", help="write the scores there as JSON")
    add("opts", nargs=argparse.REMAINDER, help="config changes: KEY VALUE ...")
    args = parser.parse_args(argv)
    return exit_status(lambda: run(args))
