"""Masks as SVG path data along the edges of their pixels: exact, and short where edges are long."""

from __future__ import annotations

import numpy as np

__all__ = ["corner_count", "mask_box", "mean_width", "svg_path"]


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Return (left, top, right, bottom) of the pixels set in a bool (H, W) mask, right and bottom
    excluded; None for an empty mask."""
    rows = np.flatnonzero(mask.any(axis=1))
    if not len(rows):
        return None
    top, bottom = int(rows[0]), int(rows[-1]) + 1
    columns = np.flatnonzero(mask[top:bottom].any(axis=0))
    return int(columns[0]), top, int(columns[-1]) + 1, bottom


def corner_count(mask: np.ndarray) -> int:
    """Return how many points :func:`svg_path` has for a bool (H, W) mask."""
    box = mask_box(mask)
    return 0 if box is None else len(_corners(mask[box[1] : box[3], box[0] : box[2]])[0])


def mean_width(mask: np.ndarray) -> float:
    """Return twice the area over the length of the boundary of a bool (H, W) mask, in pixels: about
    the width of a line, half the side of a square; 0 for an empty mask."""
    cells = np.pad(mask, 1)
    across = np.count_nonzero(cells[1:] != cells[:-1])
    length = across + np.count_nonzero(cells[:, 1:] != cells[:, :-1])
    return 2 * np.count_nonzero(mask) / length if length else 0.0


def svg_path(mask: np.ndarray, origin: tuple[int, int] = (0, 0)) -> str:
    """Return the path data of a mask's boundary, to be filled by the rule ``evenodd``.

    A pixel (x, y) is the square from (x, y) to (x + 1, y + 1): the path covers exactly the mask's
    pixels, with its parts and holes as subpaths, so neighbouring masks share an edge and no point.

    Args:
        mask: bool (H, W).
        origin: (x, y) of the mask's first pixel in the frame of the path.

    Returns:
        Relative horizontal and vertical lines, ``"M3 4h5v2h-5z"``; "" for an empty mask.
    """
    box = mask_box(mask)
    if box is None:
        return ""
    left, top, right, bottom = box
    xs, ys = _corners(mask[top:bottom, left:right])
    # Along a line of the pixel grid the boundary's corners are the ends of its edges in turn: in
    # row order corners 2k and 2k + 1 share a horizontal edge, in column order a vertical one.
    columns = np.lexsort((ys, xs))
    below = np.empty(len(xs), dtype=np.intp)
    below[columns[0::2]], below[columns[1::2]] = columns[1::2], columns[0::2]
    return _walk((xs + left + origin[0]).tolist(), (ys + top + origin[1]).tolist(), below.tolist())


def _corners(crop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of the boundary's corners in row order; where two pixels touch by a corner only,
    that corner is there twice."""
    cells = np.pad(crop, 1).view(np.int8)
    turns = cells[1:, 1:] ^ cells[1:, :-1] ^ cells[:-1, 1:] ^ cells[:-1, :-1]
    # A diagonal pair has an even number of pixels, and is a corner all the same.
    crossing = (cells[1:, 1:] == cells[:-1, :-1]) & (cells[1:, :-1] == cells[:-1, 1:])
    crossing &= cells[1:, 1:] != cells[1:, :-1]
    ys, xs = np.nonzero((turns != 0) | crossing)
    twice = 1 + crossing[ys, xs].astype(np.intp)
    return np.repeat(xs, twice), np.repeat(ys, twice)


def _walk(xs: list[int], ys: list[int], below: list[int]) -> str:
    """Follow horizontal and vertical edges in turn until every corner has been met."""
    seen = [False] * len(xs)
    parts: list[str] = []
    for start in range(len(xs)):
        if seen[start]:
            continue
        parts.append(f"M{xs[start]} {ys[start]}")
        here = start
        while True:
            across = here ^ 1
            seen[here] = seen[across] = True
            following = below[across]
            parts.append(f"h{xs[across] - xs[here]}")
            if following == start:  # "z" draws the last edge
                parts.append("z")
                break
            parts.append(f"v{ys[following] - ys[across]}")
            here = following
    return "".join(parts)
