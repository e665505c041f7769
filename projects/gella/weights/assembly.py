"""One set of weights from several files: which part comes from where, and what is left to fill."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from gella.weights.layout import matches_any

#: Parts that no public file has: they are GELLA's own and always start fresh.
OWN_PARTS = ("resoblend.*", "association.*", "criterion.*")
# Keys that an error message lists per kind and part.
_LISTED = 5
_GIVEN_BY = {
    "language_decoder": "--llava",
    "image_encoder": "--clip (or a --llava with a vision tower)",
    "mask_decoder": "--mask2former",
    "colormap_encoder": "--colormap-encoder (or a --mask2former with a Swin backbone)",
}

__all__ = ["OWN_PARTS", "Assembly", "Piece", "assemble", "cover"]


@dataclass
class Piece:
    """What one file gives.

    Attributes:
        source: the file or folder, for messages.
        format: name of its layout.
        state: tensors by GELLA's key.
        fresh: shell patterns of keys of its parts that its format does not have.
        dropped: its keys that GELLA has no use for.
    """

    source: str
    format: str
    state: dict[str, Tensor]
    fresh: tuple[str, ...] = ()
    dropped: list[str] = field(default_factory=list)


@dataclass
class Assembly:
    """The result of :func:`assemble`.

    Attributes:
        state: all given tensors, by GELLA's key.
        origin: the piece of each part, by the part's name.
        fresh: expected keys that are known to be in no file; to be initialised.
        absent: expected keys that the config allows to be missing; in no file either.
        notes: lines for the report.
    """

    state: dict[str, Tensor]
    origin: dict[str, Piece]
    fresh: list[str]
    absent: list[str]
    notes: list[str]


def assemble(
    expected: Mapping[str, Tensor],
    pieces: Sequence[Piece],
    *,
    allow_missing: Iterable[str] = (),
    allow_unexpected: Iterable[str] = (),
) -> Assembly:
    """Join pieces and hold them against a model, part by part.

    Args:
        expected: the model's tensors by key; only shapes are read, so it may be on meta.
        pieces: where two give the same part (first word of a key), the later one counts.
        allow_missing: shell patterns of expected keys that may be given by nobody.
        allow_unexpected: shell patterns of given keys that the model need not have.

    Raises:
        ValueError: all that is missing, unexpected or of another shape, by part.
    """
    notes: list[str] = []
    state, origin = _join(pieces, notes)
    allow_missing, allow_unexpected = tuple(allow_missing), tuple(allow_unexpected)
    extra = [k for k in state if k not in expected]
    for key in [k for k in extra if matches_any(k, allow_unexpected)]:
        del state[key]
        notes.append(f"{key} left out: named in MODEL.WEIGHTS_ALLOW_UNEXPECTED")
    missing = [k for k in expected if k not in state]
    # A format's own gaps count only where it gave the rest of the part: a part that nobody gave is
    # forgotten, not fresh.
    gaps = {part: piece.fresh for part, piece in origin.items()}
    fresh = [k for k in missing if matches_any(k, (*OWN_PARTS, *gaps.get(_part(k), ())))]
    left = [k for k in missing if k not in set(fresh)]
    absent = [k for k in left if matches_any(k, allow_missing)]
    problems = _problems(
        expected,
        state,
        [k for k in left if k not in set(absent)],
        [k for k in extra if k in state],
        origin,
    )
    if problems:
        raise ValueError(
            f"the weights do not fit the model of the config: {'; '.join(problems)}. Take the"
            " config of these weights' sizes, or name keys (shell patterns) in"
            " MODEL.WEIGHTS_ALLOW_MISSING / MODEL.WEIGHTS_ALLOW_UNEXPECTED"
        )
    return Assembly(state, origin, fresh, absent, notes)


def cover(keys: Iterable[str], among: Iterable[str]) -> list[str]:
    """Name keys by the largest modules that hold nothing else: ``["association.* (6)", ...]``.

    Args:
        keys: to be named; in the order of the result.
        among: all keys of the model, these included.
    """
    chosen = dict.fromkeys(keys)
    others = {start for key in among if key not in chosen for start in _starts(key)}
    counts: dict[str, int] = {}
    for key in chosen:
        start = next((s for s in _starts(key) if s not in others), None)
        name = key if start is None else f"{start}.*"
        counts[name] = counts.get(name, 0) + 1
    return [f"{name} ({n})" if name.endswith(".*") else name for name, n in counts.items()]


def _starts(key: str) -> list[str]:
    # "a.b.c" -> ["a", "a.b"]
    words = key.split(".")
    return [".".join(words[:n]) for n in range(1, len(words))]


def _part(key: str) -> str:
    return key.split(".", 1)[0]


def _join(pieces: Sequence[Piece], notes: list[str]) -> tuple[dict[str, Tensor], dict[str, Piece]]:
    state: dict[str, Tensor] = {}
    origin: dict[str, Piece] = {}
    for piece in pieces:
        for part in sorted({_part(key) for key in piece.state}):
            replaced = [k for k in state if _part(k) == part]
            for key in replaced:
                del state[key]
            if replaced:
                notes.append(
                    f"{part}: from {piece.source}; {len(replaced)} tensors of it in"
                    f" {origin[part].source} left out"
                )
            origin[part] = piece
        state.update(piece.state)
    return state, origin


def _problems(
    expected: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: Sequence[str],
    unexpected: Sequence[str],
    origin: Mapping[str, Piece],
) -> list[str]:
    problems = []
    for part, keys in _by_part(missing).items():
        if part in origin:
            problems.append(f"{len(keys)} missing in {origin[part].source}: {_some(keys)}")
        else:
            advice = f"; give {_GIVEN_BY[part]}" if part in _GIVEN_BY else ""
            problems.append(f"{len(keys)} missing, all of {part}{advice}")
    for part, keys in _by_part(unexpected).items():
        problems.append(f"{len(keys)} unexpected in {origin[part].source}: {_some(keys)}")
    reshaped = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    for part, keys in _by_part(reshaped).items():
        shapes = [
            f"{k} {tuple(state[k].shape)} in the file, {tuple(expected[k].shape)} in the model"
            for k in keys
        ]
        problems.append(f"{len(keys)} of another shape in {origin[part].source}: {_some(shapes)}")
    return problems


def _by_part(keys: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for key in sorted(keys):
        parts.setdefault(_part(key), []).append(key)
    return parts


def _some(texts: Sequence[str]) -> str:
    rest = len(texts) - _LISTED
    return ", ".join(texts[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
