"""Look into the errors of an evaluation: one HTML file of figures and cases.

    python tools/analyze.py output/gella_tiny_shapes/inference
    python tools/analyze.py output/gella_tiny_shapes/inference --output e.html --json e.json
    python tools/analyze.py my_run/inference/my_dataset --config-file my_config.yaml

Reads all predictions of phrases (png_predictions.json, referring_predictions.json) below the
folder, which may be that of a table's runs, and the datasets themselves for pictures, sizes and
confusions. The file opens in any browser, without a server: histograms of IoU, recall curves,
average recall by phrase length, number of entities, size, thing and stuff, singular and plural,
words of position; which entities were taken instead; the worst and the best cases with their masks.
"""

from __future__ import annotations

import argparse
import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from detectron2.data import DatasetCatalog, MetadataCatalog
from matplotlib.figure import Figure
from PIL import Image, ImageOps

from gella import load_config
from gella.commands.analyze_cases import (
    ERRORS,
    TAKEN,
    Predictions,
    Scene,
    compare,
    find_predictions,
    scenes,
)
from gella.commands.console import Parser, exit_status
from gella.data.register import dataset_records, import_modules
from gella.entities.view import encoded
from gella.evaluation import metrics
from gella.pictures.panels import MASK_OPACITY
from gella.utils.io import write_json, write_text

# By part, one for all figures; of Okabe and Ito, safe for colour-blind readers.
COLOURS = {"all": "#1f2328", "thing": "#0072b2", "stuff": "#d55e00", "oracle": "#8c959f"}
# RGB of the truth's mask, and of the predicted pixels inside and outside of it.
COLOURS_OF_MASKS = {"truth": (0, 114, 178), "predicted, right": (0, 158, 115)}
COLOURS_OF_MASKS["predicted, wrong"] = (213, 94, 0)
SIDE = 340  # pixels of a picture's longer side on the page
# By which a phrase says where something is.
POSITION_WORDS = (
    r"(?i)\b(?:left|right|top|bottom|upper|lower|above|below|under|over|behind|front|beside|between|"
    r"near|nearest|next|middle|cent(?:er|re)|corner|far|farthest|closest|side|edge|foreground|"
    r"background|inside|outside|around|opposite)\b"
)
# Ways to sort cases, in the order of the page, and how a group is told.
NOTES = {
    "words of the phrase": "words between blanks, articles among them",
    "entities that the phrase names": "segments of the annotation",
    "size of what is named": "share of the image that the annotated segments cover together",
    "other entities of the same category": "segments in the image that are of a named one's "
    "category but not meant",
    "thing or stuff": "category of the phrase's last segment",
    "singular or plural": "as the dataset flags the phrase",
    "words of position": "such as left, behind, near, corner",
}


def _named(cases: pd.DataFrame) -> pd.Series:
    """How many segments each phrase names; NaN where the file does not tell."""
    counts = cases.segment_ids.map(lambda ids: len(set(ids)), na_action="ignore")
    return counts.astype(float)


def labels_of(cases: pd.DataFrame) -> dict[str, pd.Series]:
    """The group of each case by each way of ``NOTES``, as categoricals in the order of the page.

    NaN where it is not known; size and rivals are left out where the dataset was not looked at.
    """

    def counted(numbers: pd.Series, least: int, most: int) -> pd.Series:
        labels = [*map(str, range(least, most)), f"{most} or more"]
        return pd.cut(numbers, [*range(least, most + 1), math.inf], right=False, labels=labels)

    def flagged(flags: pd.Series, labels: dict[Any, str]) -> pd.Series:
        return flags.map(labels).astype(pd.CategoricalDtype(list(labels.values())))

    ways = {
        "words of the phrase": counted(cases.text.str.split().str.len().clip(lower=1), 1, 6),
        "entities that the phrase names": counted(_named(cases), 0, 5),
        "thing or stuff": flagged(cases.is_thing, {True: "thing", False: "stuff"}),
        "singular or plural": flagged(cases.is_plural, {False: "singular", True: "plural"}),
        "words of position": flagged(
            cases.text.str.contains(POSITION_WORDS), {False: "none", True: "some"}
        ),
    }
    if "error" in cases:
        sizes = ["under 0.5 %", "0.5 to 2 %", "2 to 8 %", "8 to 32 %", "32 % or more"]
        shares = cases.area_share.where(cases.meant.str.len() > 0)
        edges = [0, 0.005, 0.02, 0.08, 0.32, math.inf]
        ways["size of what is named"] = pd.cut(shares, edges, right=False, labels=sizes)
        ways["other entities of the same category"] = counted(cases.rivals, 0, 3)
    return {title: ways[title] for title in NOTES if title in ways}


def summarise(cases: pd.DataFrame, label: str = "all") -> dict[str, Any]:
    """Average recall of some cases, at least one.

    Returns:
        ``label``, ``n``, ``recall`` (the mean IoU, in [0, 1]), ``margin`` (half of the 95 %
        interval of the mean, taking cases for independent; NaN for n < 2), ``accuracy`` (share of
        IoUs above 0.5) and ``oracle`` (of the best union of the given entities, or None).
    """
    # NumPy's sums, whose last digit pandas does not promise.
    ious, oracle = cases.iou.to_numpy(), cases.oracle.to_numpy(float)
    margin = 1.96 * float(ious.std(ddof=1)) / math.sqrt(len(ious)) if len(ious) > 1 else math.nan
    return {
        "label": label,
        "n": len(cases),
        "recall": metrics.average_recall(ious),
        "margin": margin,
        "accuracy": float((ious > 0.5).mean()),
        "oracle": None if np.isnan(oracle).any() else metrics.average_recall(oracle),
    }


def recall_curve(ious: Sequence[float] | pd.Series, steps: int = 100) -> list[float]:
    """Share of IoUs at or above each of ``steps`` + 1 thresholds 0 ... 1; an IoU of 0 is a miss.

    As in average recall, which is the area under the curve.
    """
    values = np.sort(np.asarray(ious, dtype=np.float64))
    # Thresholds as quotients, so that 0.3 meets the IoU 0.3.
    below = np.searchsorted(values, np.arange(steps + 1) / steps, side="left")
    below[0] = np.count_nonzero(values == 0)
    return ((len(values) - below) / len(values)).tolist()


def figures_of(predictions: Predictions, cases: pd.DataFrame) -> dict[str, Any]:
    """All numbers of the page, in values that JSON takes; shares are in [0, 1].

    ``cases`` come with the columns of `case_facts`, or without where there is no dataset.
    """
    parts = {"all": cases}
    if cases.is_thing.notna().all():
        thing = cases.is_thing.astype(bool)
        parts = {"thing": cases[thing], "stuff": cases[~thing]}
        parts = {name: part for name, part in parts.items() if len(part)}
    curves = {name: part.iou for name, part in {"all": cases, **parts}.items()}
    if cases.oracle.notna().all():
        curves["oracle"] = cases.oracle
    groups = {
        title: [summarise(part, str(label)) for label, part in cases.groupby(ways, observed=True)]
        for title, ways in labels_of(cases).items()
    }
    figures: dict[str, Any] = {
        "label": predictions.label,
        "dataset": predictions.dataset,
        "task": predictions.task,
        "overall": summarise(cases),
        # Edges as quotients, so that 0.3 opens the bin that starts at 0.3.
        "histograms": {
            name: np.histogram(part.iou, np.arange(21) / 20)[0].tolist()
            for name, part in parts.items()
        },
        "recall_curves": {name: recall_curve(ious) for name, ious in curves.items()},
        "groups": {title: items for title, items in groups.items() if items},
        "errors": {},
        "confusions": [],
    }
    if "error" in cases:
        counts = cases.error.value_counts()
        figures["errors"] = {ERRORS[k]: int(counts[k]) for k in ERRORS if k in counts}
        pairs = Counter(pair for confused in cases.confused for pair in confused)
        most = sorted(pairs.items(), key=lambda item: (-item[1], item[0]))[:15]
        figures["confusions"] = [{"wanted": a, "taken": b, "cases": n} for (a, b), n in most]
    return figures


def choose(cases: pd.DataFrame, count: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The worst and the best cases, at most ``count`` each, no image twice in one of them.

    Worst are the lowest IoUs, and among equal ones those that the model was surest of. Best are
    the highest, and among equal ones those that name most entities, then the smallest.
    """
    keys = pd.DataFrame({"iou": cases.iou, "image": cases.image_id.astype(str)})
    keys["doubt"], keys["right"] = -cases.score.astype(float).fillna(-1.0), -cases.iou
    keys["few"] = -_named(cases).fillna(0)
    keys["area"] = cases.get("area_share", pd.Series(0.0, keys.index))
    # Stable sorts: what is equal in all keys stays in the order of the file.
    worst = keys[keys.iou < 1].sort_values(["iou", "doubt"], kind="stable")
    worst = worst.drop_duplicates("image").head(count)
    # With few cases, none is to be shown as a good and a bad one.
    shown = keys.index.isin(worst.index) & (keys.iou < keys.iou.median())
    best = keys[(keys.iou > 0) & ~shown].sort_values(["right", "few", "area"], kind="stable")
    return cases.loc[worst.index], cases.loc[best.drop_duplicates("image").index[:count]]


def histogram_figure(counts: Mapping[str, Sequence[int]]) -> Figure:
    """Stacked bars of counts per equal bin of [0, 1], by part (a key of ``COLOURS``)."""
    figure, axes = _axes(2.7, xlabel="IoU")
    base: Any = 0
    for name, part in counts.items():
        low, width = np.arange(len(part)) / len(part), 0.9 / len(part)
        axes.bar(low, part, width, base, align="edge", color=COLOURS[name], label=name)
        base = base + np.array(part)
    return _with_legend(figure)


def curve_figure(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Lines of recall (0..1) over equally spaced thresholds 0..1, by part."""
    figure, axes = _axes(2.7, xlabel="IoU threshold", ylim=(0, 1.02))
    # The oracle lies below, dashed: a part that reaches it covers it.
    for name, curve in curves.items():
        style, order = ("--", 1) if name == "oracle" else ("-", 2)
        places = np.linspace(0, 1, len(curve))
        axes.plot(places, curve, style, color=COLOURS[name], label=name, zorder=order)
    return _with_legend(figure)


def bar_figure(groups: Sequence[Mapping[str, Any]], mean: float) -> Figure:
    """One bar of average recall per group (of `summarise`), with its interval, n, and oracle.

    ``mean``: average recall of all, drawn as a line.
    """
    table = pd.DataFrame(groups)[::-1]
    figure, axes = _axes(0.45 + 0.27 * len(table), xlim=(0, 1), xticks=[])
    axes.barh(table.label, table.recall, 0.75, color=COLOURS["thing"])
    ends = np.clip([table.recall - table.margin, table.recall + table.margin], 0, 1)
    axes.hlines(table.label, *ends, color=COLOURS["all"], lw=1.5)
    axes.plot(table.oracle.astype(float), table.label, "|", color=COLOURS["stuff"], ms=14, mew=2)
    axes.axvline(mean, color="#656d76", lw=1)
    axes.spines["bottom"].set_visible(False)
    for place, row in enumerate(table.itertuples()):
        margin = f" ± {100 * row.margin:.1f}" if math.isfinite(row.margin) else ""
        text = f"{100 * row.recall:.1f}{margin}  (n {row.n})"
        axes.text(1.02, place, text, va="center", fontsize=9)
    return figure


def _axes(height: float, **settings: Any) -> tuple[Figure, Any]:
    """A figure without a frame, in small type."""
    figure = Figure(figsize=(5.4, height), layout="constrained")
    axes = figure.add_subplot(**settings)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(labelsize=9, length=0)
    return figure, axes


def _with_legend(figure: Figure) -> Figure:
    (axes,) = figure.axes
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(fontsize=9, frameon=False, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return figure


def _figure(figure: Figure, title: str, caption: str) -> str:
    # As an image, not inline: names inside several SVGs of one page would clash.
    stream = io.BytesIO()
    figure.savefig(stream, format="svg", metadata={"Date": None})
    return _picture("svg+xml", stream.getvalue(), title, caption)


def _picture(kind: str, data: bytes, title: str, caption: str) -> str:
    uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    text = f"<figcaption>{escape(caption)}</figcaption>"
    return f'<figure><img src="{uri}" alt="{escape(title)}">{text}</figure>'


def pictures(case: Any, scene: Scene) -> dict[str, np.ndarray]:
    """The image, the truth over it, and the prediction over it, uint8 RGB of the image's size."""
    truth = scene.regions.union(scene.indices(case.segment_ids))
    mask = scene.predicted(case.segmentation)
    grey = np.asarray(Image.fromarray(scene.image).convert("L").convert("RGB"))

    def over(**masks: np.ndarray) -> np.ndarray:
        tinted = grey.astype(np.float64)
        for name, part in masks.items():
            colour = np.array(COLOURS_OF_MASKS[name])
            tinted[part] = (1 - MASK_OPACITY) * tinted[part] + MASK_OPACITY * colour
        return np.rint(tinted).astype(np.uint8)

    parts = {"predicted, right": mask & truth, "predicted, wrong": mask & ~truth}
    return {"image": scene.image, "truth": over(truth=truth), "prediction": over(**parts)}


def _table(table: pd.DataFrame) -> str:
    return table.to_html(index=False, border=0, na_rep="", float_format="%.1f")


def render(predictions: Predictions, figures: Mapping[str, Any]) -> str:
    """The page's part of one file up to its cases, from the numbers of `figures_of`."""
    overall, results = figures["overall"], predictions.results
    rows = {"average recall (mean IoU)": 100 * overall["recall"], "cIoU": results.get("cIoU")}
    if overall["oracle"] is not None:
        rows["oracle: best union of the given entities"] = 100 * overall["oracle"]
    rows["share of IoUs above 0.5"] = 100 * overall["accuracy"]
    cells = {name: f"{value:.2f}" for name, value in rows.items() if value is not None}
    cells["phrases"] = str(overall["n"])
    cells["images"] = str(predictions.cases.image_id.astype(str).nunique())
    rule = next((f"Protocol {r}. " for r in metrics.PROTOCOLS if results.get(f"protocol_{r}")), "")
    recalls = 100 * pd.DataFrame(figures["recall_curves"]).iloc[[30, 50, 70, 90]]
    recalls.insert(0, "recall at", ["0.3", "0.5", "0.7", "0.9"])
    area = "Share of phrases with at least that IoU; the area below is the average recall"
    bars = [
        _figure(bar_figure(groups, overall["recall"]), f"Average recall by {title}", f"By {told}")
        for title, groups in figures["groups"].items()
        for told in [f"{title}: {NOTES[title]}"]
    ]
    return "\n".join(
        [
            _table(pd.DataFrame(cells.items(), columns=["", "percent or count"])),
            f'<p class="note">{rule}Read from {escape(predictions.file.name)}.</p>',
            '<h3>IoU and recall</h3><div class="row">',
            _figure(histogram_figure(figures["histograms"]), "Histogram of IoU", "Phrases by IoU"),
            _figure(curve_figure(figures["recall_curves"]), "Recall over the IoU threshold", area),
            f"</div>{_table(recalls)}<h3>Average recall by what the phrase is like</h3>",
            '<p class="note">Bar: average recall in percent, with the 95 % interval of the mean if '
            "phrases were independent. Grey line: all phrases. Orange tick: the oracle.</p>",
            f'<div class="row">{"".join(bars)}</div><h3>What was taken instead</h3>',
            _taken_instead(figures),
        ]
    )


def _taken_instead(figures: Mapping[str, Any]) -> str:
    """What masks took that they should not."""
    if not figures["errors"]:
        return '<p class="note">Not told: analysed without the dataset.</p>'
    kinds = pd.DataFrame(figures["errors"].items(), columns=["the mask takes", "phrases"])
    kinds["%"] = 100 * kinds.phrases / figures["overall"]["n"]
    parts = [
        '<p class="note">A segment counts as taken when the predicted mask covers more than '
        f"{TAKEN:.0%} of it.</p>{_table(kinds)}"
    ]
    if figures["confusions"]:
        pairs = pd.DataFrame(figures["confusions"])
        pairs = pairs.set_axis(["meant and missed", "taken instead", "phrases"], axis=1)
        parts.append(f"<h3>Categories most often confused</h3>{_table(pairs)}")
    return "\n".join(parts)


def gallery(title: str, order: str, cases: Iterable[tuple[Any, Scene | None]]) -> str:
    """Cases with their scenes, where there are any, as HTML; ``order`` says how they are sorted."""
    parts = []
    for case, scene in cases:
        told = f"IoU <b>{case.iou:.3f}</b>, image {escape(str(case.image_id))}"
        if math.isfinite(case.score):
            told += f", association {case.score:.2f}"
        before, inside, after = escape(case.caption), "", ""
        if case.caption == case.text:
            before = ""
        elif 0 <= case.start < case.end:
            spans = ((0, case.start), (case.start, case.end), (case.end, None))
            before, inside, after = (escape(case.caption[slice(*span)]) for span in spans)
            inside = f"<mark>{inside}</mark>"
        images = ""
        if scene is not None:
            meant, taken = (
                ", ".join(f"{n} x {name}" if n > 1 else name for name, n in Counter(names).items())
                for names in (case.meant, case.taken)
            )
            told += f"; {ERRORS[case.error]}. Meant: {escape(meant) or 'nothing'}; "
            told += f"taken: {escape(taken) or 'nothing'}"
            for name, image in pictures(case, scene).items():
                # Enlarged pixels stay pixels, so that a border is where the mask has it.
                small = max(image.shape) < SIDE
                way = Image.Resampling.NEAREST if small else Image.Resampling.BICUBIC
                drawn = ImageOps.contain(Image.fromarray(image), (SIDE, SIDE), way)
                data = encoded(drawn, "JPEG", quality=85)
                images += _picture("jpeg", data, f"{name} of: {case.text}", name)
        parts.append(
            f'<div class="case"><p><b>{escape(case.text)}</b></p><p class="note">{told}</p>'
            f'<p>{before}{inside}{after}</p><div class="row">{images}</div></div>'
        )
    key = "".join(
        f'<span class="key" style="background:rgb{colour}"></span>{name}'
        for name, colour in COLOURS_OF_MASKS.items()
    )
    head = f'<h3>{title}</h3><p class="note">{order}, one per image.{key}</p>'
    return head + "".join(parts) if parts else ""


def analyse(predictions: Predictions, dataset: str, examples: int) -> tuple[dict[str, Any], str]:
    """Numbers and HTML of one file of predictions; ``dataset`` "" leaves out what needs one.

    Raises:
        OSError, ValueError: the dataset is not registered, lacks a file, or does not fit.
    """
    cases = predictions.cases
    if dataset:
        if dataset not in DatasetCatalog.list():
            raise ValueError(
                f"{predictions.file}: no dataset {dataset!r} is registered: give its name with "
                "--dataset (and --config-file, if your own code registers it), or --without-images"
            )
        categories = MetadataCatalog.get(dataset).get("categories", None) or []
        data = dataset_records(dataset), {c["id"]: c["name"] for c in categories}
        cases = compare(predictions, *data)
    figures = figures_of(predictions, cases)
    orders = {
        "Worst cases": "lowest IoU first; among equal ones the surest",
        "Best cases": "highest IoU first; among equal ones the hardest",
    }
    parts = [render(predictions, figures)]
    for (title, order), shown in zip(orders.items(), choose(cases, examples), strict=True):
        located = scenes(shown, *data) if dataset else ((case, None) for case in shown.itertuples())
        parts.append(gallery(title, order, located))
    return figures, "\n".join(parts)


def run(args: argparse.Namespace) -> None:
    """Analyse, write, and print one line per file of predictions."""
    if args.examples < 0:
        raise ValueError(f"--examples is {args.examples}; give 0 or more")
    if args.config_file:
        import_modules(load_config(args.config_file, []))
    numbers, links, sections = [], [], []
    for place, predictions in enumerate(find_predictions(args.folder), start=1):
        dataset = "" if args.without_images else args.dataset or predictions.dataset
        figures, body = analyse(predictions, dataset, args.examples)
        what = {"png": "narrative grounding", "refer": "referring expressions"}[predictions.task]
        title = escape(f"{predictions.label}, {what}")
        numbers.append(figures)
        links.append(f'<a href="#part-{place}">{title}</a>')
        sections.append(f'<section id="part-{place}">\n<h2>{title}</h2>\n{body}\n</section>\n')
    output = Path(args.output or Path(args.folder) / "report.html")
    style = Path(__file__).with_suffix(".css").read_text(encoding="utf-8")
    write_text(
        output,
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>GELLA: error analysis</title>\n<style>{style}</style></head>\n<body>\n"
        f"<h1>Error analysis</h1>\n<nav>{''.join(links)}</nav>\n{''.join(sections)}"
        "</body>\n</html>\n",
    )
    if args.json:
        write_json(args.json, numbers)
    for figures in numbers:
        recall, n = 100 * figures["overall"]["recall"], figures["overall"]["n"]
        print(f"{figures['label']} ({figures['task']}): AR {recall:.2f} over {n} phrases")
    print(f"wrote {output}" + (f" and {args.json}" if args.json else ""))
    print(f"\nnext: open {output} in a browser, for instance: python -m webbrowser {output}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status, 2 for wrong arguments."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", help="OUTPUT_DIR/inference, one dataset's folder in it, or a table's folder")
    add("--output", metavar="FILE", help="default: report.html in the folder")
    add("--json", metavar="FILE", help="write the figures there too")
    add("--examples", type=int, default=12, metavar="N", help="worst and best cases (default 12)")
    add("--dataset", metavar="NAME", help="registered dataset; default: the folder's name")
    add("--config-file", metavar="YAML", help="its DATASETS.MODULES register datasets of your own")
    add("--without-images", action="store_true", help="figures from the predictions alone")
    args = parser.parse_args(arguments)
    return exit_status(lambda: run(args))
