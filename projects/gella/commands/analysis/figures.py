"""Figures as inline SVG: histogram, curves and bars, readable without a script or a style sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from gella.commands.analysis.groups import Group

INK, FAINT, GRID = "#1f2328", "#656d76", "#d8dee4"
COLOURS = {"all": INK, "thing": "#0072b2", "stuff": "#d55e00", "oracle": "#8c959f"}
"""By part, one for all figures; of Okabe and Ito, safe for colour-blind readers."""

_LABEL, _BAR, _VALUE, _ROW = 130, 250, 150, 26  # widths and height of a row of bars, pixels


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>'
        f"{''.join(parts)}</svg>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start", fill: str = INK) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{fill}">{escape(text)}</text>'
    )


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str = GRID, width: float = 1) -> str:
    return (
        f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" '
        f'stroke-width="{width}"/>'
    )


def _rect(x: float, y: float, width: float, height: float, fill: str, tip: str = "") -> str:
    inner = f"<title>{escape(tip)}</title>" if tip else ""
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" fill="{fill}">'
        f"{inner}</rect>"
    )


def _legend(x: float, y: float, names: Sequence[str]) -> list[str]:
    parts = []
    for name in names:
        parts += [_rect(x, y - 9, 10, 10, COLOURS[name]), _text(x + 15, y, name)]
        x += 30 + 7 * len(name)
    return parts


def histogram_figure(counts: Mapping[str, Sequence[int]], title: str) -> str:
    """Stacked bars of counts per equal bin of [0, 1].

    Args:
        counts: by the name of a part (a key of ``COLOURS``), all of one length.
        title: what a screen reader says.
    """
    width, height, left, top, bottom = 520, 260, 46, 30, 40
    bins = len(next(iter(counts.values())))
    totals = [sum(part[i] for part in counts.values()) for i in range(bins)]
    highest = max(max(totals), 1)
    step, scale = (width - left - 10) / bins, (height - top - bottom) / highest
    base = height - bottom
    parts = [_line(left, base, width - 10, base, FAINT)]
    for share in (0.5, 1.0):
        y = base - share * highest * scale
        parts += [
            _line(left, y, width - 10, y),
            _text(left - 6, y + 4, _short(share * highest), "end", FAINT),
        ]
    for i in range(bins):
        y = float(base)
        for name, part in counts.items():
            tall = part[i] * scale
            y -= tall
            tip = f"{name}: {part[i]} with an IoU of {i / bins:.2f} to {(i + 1) / bins:.2f}"
            if part[i]:
                parts.append(_rect(left + i * step + 1, y, step - 2, tall, COLOURS[name], tip))
    for tick in range(0, 11, 2):
        parts.append(
            _text(left + tick / 10 * bins * step, base + 16, f"{tick / 10:.1f}", "middle", FAINT)
        )
    parts.append(_text(left + bins * step / 2, height - 6, "IoU", "middle", FAINT))
    return _svg(width, height, title, [*parts, *_legend(left, 16, list(counts))])


def curve_figure(curves: Mapping[str, Sequence[float]], title: str) -> str:
    """Lines of recall (0..1) over equally spaced thresholds 0..1.

    Args:
        curves: by part (a key of ``COLOURS``), all over the same thresholds.
        title: what a screen reader says.
    """
    width, height, left, top, bottom = 520, 260, 46, 30, 40
    wide, tall, base = width - left - 10, height - top - bottom, height - bottom
    parts = []
    for tick in range(0, 11, 2):
        share = tick / 10
        x, y = left + share * wide, base - share * tall
        parts += [
            _line(left, y, width - 10, y),
            _text(left - 6, y + 4, f"{share:.1f}", "end", FAINT),
        ]
        parts += [
            _line(x, base, x, base + 4, FAINT),
            _text(x, base + 16, f"{share:.1f}", "middle", FAINT),
        ]
    # The oracle lies below, dashed: a part that reaches it covers it.
    for name in sorted(curves, key=lambda name: name != "oracle"):
        curve, last = curves[name], len(curves[name]) - 1
        dashes = ' stroke-dasharray="5 4"' if name == "oracle" else ""
        points = " ".join(
            f"{left + i / last * wide:.1f},{base - value * tall:.1f}"
            for i, value in enumerate(curve)
        )
        parts.append(
            f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" '
            f'stroke-width="2"{dashes}>'
            f"<title>{escape(name)}</title></polyline>"
        )
    parts.append(_text(left + wide / 2, height - 6, "IoU threshold", "middle", FAINT))
    return _svg(width, height, title, [*parts, *_legend(left, 16, list(curves))])


def bar_figure(groups: Sequence[Group], title: str, mean: float) -> str:
    """One bar of average recall per group, with its 95 % interval, n, and the oracle as a tick.

    Args:
        groups: at least one.
        title: what a screen reader says.
        mean: average recall of all, drawn as a line.
    """
    width, height = _LABEL + _BAR + _VALUE, _ROW * len(groups) + 10
    parts = []
    for row, item in enumerate(groups):
        y = 5 + row * _ROW
        tip = f"{item.label}: AR {100 * item.recall:.2f}, {item.n} cases"
        parts += [
            _text(_LABEL - 8, y + 15, item.label, "end"),
            _rect(_LABEL, y, _BAR, _ROW - 6, "#f0f2f4"),
            _rect(_LABEL, y, item.recall * _BAR, _ROW - 6, COLOURS["thing"], tip),
        ]
        if math.isfinite(item.margin):
            low, high = (
                _LABEL + min(max(item.recall + sign * item.margin, 0.0), 1.0) * _BAR
                for sign in (-1, 1)
            )
            parts.append(_line(low, y + 10, high, y + 10, INK, 1.5))
        if item.oracle is not None:
            x = _LABEL + item.oracle * _BAR
            parts.append(_line(x, y - 1, x, y + _ROW - 5, COLOURS["stuff"], 2))
        margin = f" ± {100 * item.margin:.1f}" if math.isfinite(item.margin) else ""
        value = f"{100 * item.recall:.1f}{margin}  (n {item.n})"
        parts.append(_text(_LABEL + _BAR + 8, y + 15, value))
    parts.append(_line(_LABEL + mean * _BAR, 0, _LABEL + mean * _BAR, height, FAINT))
    return _svg(width, height, title, parts)


def _short(value: float) -> str:
    return f"{value / 1000:.1f}k" if value >= 10_000 else f"{value:.0f}"
