"""The analysis as one HTML file: no script, no server, nothing from elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from gella.commands.analysis.figures import bar_figure, curve_figure, histogram_figure
from gella.commands.analysis.report import Analysis, Example
from gella.commands.analysis.scenes import COLOUR_DISTANCE, ERRORS, TAKEN
from gella.evaluation.metrics import PROTOCOLS

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2328; background: #fff; margin: 0 auto;
  max-width: 1120px; padding: 16px 24px 64px; }
h1 { font-size: 26px; margin: 8px 0; } h2 { font-size: 21px; margin: 40px 0 8px;
  border-bottom: 1px solid #d8dee4; padding-bottom: 4px; }
h3 { font-size: 16px; margin: 24px 0 4px; }
p { margin: 4px 0 10px; max-width: 80ch; } .note, figcaption { color: #656d76; font-size: 13px; }
.row { display: flex; flex-wrap: wrap; gap: 12px 36px; align-items: flex-start; }
table { border-collapse: collapse; margin: 6px 0 12px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 12px 3px 0; text-align: left; border-bottom: 1px solid #eaeef2; }
td.number, th.number { text-align: right; } svg { max-width: 100%; height: auto; }
.case { border: 1px solid #d8dee4; border-radius: 6px; padding: 10px 12px; margin: 12px 0;
  break-inside: avoid; } .case .row { gap: 8px 12px; }
.case p { margin: 2px 0; } mark { background: #fff3b0; padding: 0 2px; }
figure { margin: 6px 0 0; } figure img { display: block; max-width: 100%; image-rendering: auto; }
.key { display: inline-block; width: 11px; height: 11px; margin: 0 4px 0 10px; }
nav a { margin-right: 16px; }
"""


def render(analyses: Sequence[Analysis]) -> str:
    """The page of one or several analyses.

    Text of datasets and predictions is escaped; pictures and figures are in the file itself.
    """
    links = [
        f'<a href="#{_anchor(place)}">{escape(_title(item))}</a>'
        for place, item in enumerate(analyses)
    ]
    body = [_section(place, item) for place, item in enumerate(analyses)]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>GELLA: error analysis</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>Error analysis</h1>\n<nav>{''.join(links)}</nav>\n{''.join(body)}</body>\n</html>\n"
    )


def _title(item: Analysis) -> str:
    what = {"png": "narrative grounding", "refer": "referring expressions"}
    return f"{item.predictions.label}, {what[item.predictions.task]}"


def _anchor(place: int) -> str:
    return f"part-{place + 1}"


def _section(place: int, item: Analysis) -> str:
    return "\n".join(
        [
            f'<section id="{_anchor(place)}">\n<h2>{escape(_title(item))}</h2>',
            _overview(item),
            _distributions(item),
            _breakdowns(item),
            _errors(item),
            _gallery("Worst cases", item.worst, "lowest IoU first; among equal ones the surest"),
            _gallery("Best cases", item.best, "highest IoU first; among equal ones the hardest"),
            "</section>\n",
        ]
    )


def _overview(item: Analysis) -> str:
    results, overall = item.predictions.results, item.overall
    rule = next((name for name in PROTOCOLS if results.get(f"protocol_{name}")), None)
    rows = [
        ["average recall (mean IoU)", f"{100 * overall.recall:.2f}"],
        ["share of IoUs above 0.5", f"{100 * overall.accuracy:.2f}"],
        ["phrases", str(overall.n)],
        ["images", str(len({str(case.image_id) for case in item.predictions.cases}))],
    ]
    if overall.oracle is not None:
        rows.insert(1, ["oracle: best union of the given entities", f"{100 * overall.oracle:.2f}"])
    if item.predictions.task == "refer" and results.get("cIoU") is not None:
        rows.insert(1, ["cIoU", f"{results['cIoU']:.2f}"])
    rules = f"Protocol {rule}. " if rule else ""
    read = f'<p class="note">{rules}Read from {escape(item.predictions.file.name)}.</p>'
    return _table(["", "percent or count"], rows) + read


def _distributions(item: Analysis) -> str:
    curves = item.curves
    names = list(curves)
    rows = [
        [f"{threshold / 100:.1f}", *(f"{100 * curves[name][threshold]:.1f}" for name in names)]
        for threshold in (30, 50, 70, 90)
    ]
    bars = histogram_figure(item.histograms, "Histogram of IoU")
    lines = curve_figure(curves, "Recall over the IoU threshold")
    return (
        '<h3>IoU and recall</h3><div class="row">'
        f"<figure>{bars}<figcaption>Phrases by IoU</figcaption></figure>"
        f"<figure>{lines}<figcaption>Share of phrases with at least that IoU; the area below is "
        f"the average recall</figcaption></figure></div>{_table(['recall at', *names], rows)}"
    )


def _breakdowns(item: Analysis) -> str:
    figures = [
        f"<figure>{bar_figure(items, f'Average recall by {grouping.title}', item.overall.recall)}"
        f"<figcaption>By {escape(grouping.title)}: {escape(grouping.note)}</figcaption></figure>"
        for grouping, items in item.breakdowns
    ]
    return (
        "<h3>Average recall by what the phrase is like</h3>"
        '<p class="note">Bar: average recall in percent, with the 95 % interval of the mean if '
        "phrases were independent. Grey line: all phrases. Orange tick: the oracle.</p>"
        f'<div class="row">{"".join(figures)}</div>'
    )


def _errors(item: Analysis) -> str:
    if not item.errors:
        return (
            "<h3>What was taken instead</h3>"
            '<p class="note">Not told: analysed without the dataset.</p>'
        )
    total = sum(count for _, count in item.errors)
    kinds = [[name, str(count), f"{100 * count / total:.1f}"] for name, count in item.errors]
    parts = [
        "<h3>What was taken instead</h3>",
        f'<p class="note">A segment counts as taken when the predicted mask covers more than '
        f"{TAKEN:.0%} of it.</p>",
        _table(["the mask takes", "phrases", "%"], kinds),
    ]
    if item.relations:
        rows = [
            [
                row["name"],
                f"{100 * row['count'] / row['n']:.1f}",
                "" if row["expected"] is None else f"{100 * row['expected'] / row['n']:.1f}",
            ]
            for row in item.relations
        ]
        parts += [
            f"<h3>What the {item.relations[0]['n']} wrongly taken entities have in common with a "
            "right one</h3>",
            '<p class="note">"By chance": the same for an entity drawn blindly among those of the '
            f"image that were not meant. Colours are similar below a CIE Lab distance of "
            f"{COLOUR_DISTANCE:.0f} between the means.</p>",
            _table(["", "% of them", "% by chance"], rows),
        ]
    if item.confusions:
        rows = [[wanted, taken, str(count)] for wanted, taken, count in item.confusions]
        parts += [
            "<h3>Categories most often confused</h3>",
            _table(["meant and missed", "taken instead", "phrases"], rows),
        ]
    return "".join(parts)


def _gallery(title: str, examples: Sequence[Example], order: str) -> str:
    if not examples:
        return ""
    key = (
        '<span class="key" style="background:#0072b2"></span>truth'
        '<span class="key" style="background:#009e73"></span>predicted, right'
        '<span class="key" style="background:#d55e00"></span>predicted, wrong'
    )
    body = "".join(_case(example) for example in examples)
    return f'<h3>{title}</h3><p class="note">{order}, one per image.{key}</p>{body}'


def _case(example: Example) -> str:
    case, facts = example.case, example.facts
    told = f"IoU <b>{case.iou:.3f}</b>, image {escape(str(case.image_id))}"
    if case.score is not None:
        told += f", association {case.score:.2f}"
    if facts is not None:
        told += (
            f"; {escape(ERRORS[facts.error])}. Meant: {escape(_names(facts.wanted_names))}; "
            f"taken: {escape(_names(facts.taken_names))}"
        )
    images = "".join(
        f'<figure><img src="{uri}" alt="{caption} of: {escape(case.text)}">'
        f"<figcaption>{caption}</figcaption></figure>"
        for caption, uri in example.pictures
    )
    return (
        f'<div class="case"><p><b>{escape(case.text)}</b></p><p class="note">{told}</p>'
        f'<p>{_marked(example)}</p><div class="row">{images}</div></div>'
    )


def _marked(example: Example) -> str:
    case = example.case
    if case.start < 0 or case.end <= case.start or case.caption == case.text:
        return escape(case.caption) if case.caption != case.text else ""
    before, inside = case.caption[: case.start], case.caption[case.start : case.end]
    return f"{escape(before)}<mark>{escape(inside)}</mark>{escape(case.caption[case.end :])}"


def _names(names: Sequence[str]) -> str:
    if not names:
        return "nothing"
    counts = {name: names.count(name) for name in names}
    return ", ".join(name if count == 1 else f"{count} x {name}" for name, count in counts.items())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(f"<{tag}{_number(tag, cell)}>{escape(cell)}</{tag}>" for cell in row)

    lines = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table><tr>{cells(head, 'th')}</tr>{lines}</table>"


def _number(tag: str, cell: str) -> str:
    is_number = tag == "td" and cell.replace(".", "", 1).isdigit()
    return ' class="number"' if is_number else ""
