"""The two-way mechanism: a public weight format is a list of key rules, read in either direction.

A template names the variable parts of a key: ``{i}`` (one letter) is a number, a longer name such
as ``{rest}`` is any text. ``("model.layers.{i}.{rest}", "llama.layers.{i}.{rest}")`` renames one
way; with its sides swapped it renames back. :func:`assemble` joins what several files give.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

#: Parts that no public file has: they are GELLA's own and always start fresh.
OWN_PARTS = ("resoblend.*", "association.*", "criterion.*")
_GIVEN_BY = {
    "language_decoder": "--llava",
    "image_encoder": "--clip (or a --llava with a vision tower)",
    "mask_decoder": "--mask2former",
    "colormap_encoder": "--colormap-encoder (or a --mask2former with a Swin backbone)",
}


class Layout:
    """One public weight format; subclasses give the tables.

    ``to_gella``: drop by name, respell, cut and join what is fused on one side only, rename.
    ``from_gella`` does the same backwards. Tensors are passed on, never changed in type or value;
    only a joined tensor is copied.
    """

    #: Name of the format for the command line and for messages, such as "llava-hf".
    name: str = ""
    #: GELLA's keys of this format start with this (or with one of these).
    prefix: str | tuple[str, ...] = ""
    #: Shell patterns, each of which fits a key of every file of this format; it tells them apart.
    signature: Sequence[str] = ()
    #: (foreign template, GELLA template); a whole key must match, and the first fit counts.
    rules: Sequence[tuple[str, str]] = ()
    #: Shell patterns of foreign keys that GELLA has no use for.
    dropped: Sequence[str] = ()
    #: Shell patterns of GELLA's keys under ``prefix`` that the format does not have.
    fresh: Sequence[str] = ()
    #: (other foreign template, the one that ``rules`` know): spellings that are read, not written.
    spellings: Sequence[tuple[str, str]] = ()
    #: Foreign template of a tensor, and of the parts into which GELLA has it cut (first axis) ...
    fused_there: tuple[str, Sequence[str]] | None = None
    #: ... and of one that GELLA has fused, whose parts the files hold.
    fused_here: tuple[str, Sequence[str]] | None = None

    def to_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a foreign state dict, whole, to GELLA's keys; the ``dropped`` ones are left out.

        Raises:
            ValueError: keys that no rule knows (all are named), two that meet in one key, or fused
                tensors that do not divide or are not complete.
        """
        kept = {k: v for k, v in state.items() if not self.drops(k)}
        if self.spellings:
            kept = self._rename(kept, (*self.spellings, ("{key}", "{key}")))
        if self.fused_there:
            kept = unfuse(kept, *self.fused_there)
        if self.fused_here:
            kept = fuse(kept, *self.fused_here)
        return self._rename(kept, self.rules)

    def from_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename GELLA's tensors to the foreign keys; the inverse of ``to_gella``.

        Those outside ``prefix`` and the ``fresh`` ones are left out. ValueError for keys under
        ``prefix`` that no rule knows, or two that meet in one key.
        """
        mine = {
            k: v
            for k, v in state.items()
            if k.startswith(self.prefix) and not matches_any(k, self.fresh)
        }
        foreign = self._rename(mine, [(here, there) for there, here in self.rules])
        if self.fused_here:
            foreign = unfuse(foreign, *self.fused_here)
        return fuse(foreign, *self.fused_there) if self.fused_there else foreign

    @classmethod
    def from_config(cls, cfg: Any) -> Layout:
        """The layout for the model of a config; what depends on it is the subclass's choice."""
        return cls()

    @classmethod
    def recognises(cls, keys: Collection[str]) -> bool:
        """Whether keys look like this format: every pattern of ``signature`` fits one of them."""
        return bool(cls.signature) and all(fnmatch.filter(keys, p) for p in cls.signature)

    def drops(self, key: str) -> bool:
        """Whether a foreign key is one of those that GELLA has no use for."""
        return matches_any(key, self.dropped)

    def _rename(
        self, state: Mapping[str, Tensor], rules: Sequence[tuple[str, str]]
    ) -> dict[str, Tensor]:
        renamed: dict[str, Tensor] = {}
        origin: dict[str, str] = {}
        lost = []
        for key, tensor in state.items():
            new = rename(key, rules)
            if new is None:
                lost.append(key)
            elif new in renamed:
                raise ValueError(f"{self.name}: {origin[new]} and {key} both become {new}")
            else:
                renamed[new], origin[new] = tensor, key
        if lost:
            raise ValueError(
                f"{len(lost)} of {len(state)} keys are not known to the format {self.name}: "
                f"{some(sorted(lost), 20)}"
            )
        return renamed


def table(text: str, there: str = "", here: str = "") -> list[tuple[str, str]]:
    """Rules of a text with two columns, foreign and GELLA's, each behind a prefix."""
    pairs = (line.split() for line in text.splitlines() if line.strip())
    return [(there + foreign, here + ours) for foreign, ours in pairs]


def some(names: Sequence[str], most: int = 5) -> str:
    """Names for a message: the first ones, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")


def rename(key: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """The new name of a key by the first rule whose left side matches it whole, None if none."""
    for template, target in rules:
        fields = matches(template, key)
        if fields is not None:
            return target.format(**fields)
    return None


def matches(template: str, key: str) -> dict[str, str] | None:
    """The fields of a template in a key that it matches whole; None where it does not match."""
    found = _pattern(template).fullmatch(key)
    return None if found is None else found.groupdict()


def matches_any(key: str, patterns: Iterable[str]) -> bool:
    """Whether one of the shell patterns fits the key."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def unfuse(state: Mapping[str, Tensor], fused: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """Cut tensors into equal pieces along their first axis.

    Args:
        state: tensors by key.
        fused: template of the keys to cut, e.g. ``"{head}.in_proj_{kind}"``.
        parts: templates of the pieces in their order, e.g. ``"{head}.q_proj.{kind}"`` and so on.

    Returns:
        All of ``state`` with the pieces (views) in the place of what was cut.

    Raises:
        ValueError: a first axis that does not divide by the number of pieces.
    """
    result = {}
    for key, tensor in state.items():
        fields = matches(fused, key)
        if fields is None:
            result[key] = tensor
            continue
        if tensor.ndim == 0 or len(tensor) % len(parts):
            raise ValueError(
                f"{key} has the shape {tuple(tensor.shape)}; it must divide into {len(parts)}"
                " parts along its first axis"
            )
        for part, piece in zip(parts, tensor.chunk(len(parts)), strict=True):
            result[part.format(**fields)] = piece
    return result


def fuse(state: Mapping[str, Tensor], fused: str, parts: Sequence[str]) -> dict[str, Tensor]:
    """The inverse of :func:`unfuse`: concatenate the pieces along their first axis.

    Raises:
        ValueError: some pieces of a tensor are there and others are not (they are named).
    """
    result: dict[str, Tensor] = {}
    for key, tensor in state.items():
        fields = next((f for f in (matches(part, key) for part in parts) if f is not None), None)
        if fields is None:
            result[key] = tensor
            continue
        whole = fused.format(**fields)
        if whole in result:
            continue
        names = [part.format(**fields) for part in parts]
        absent = [name for name in names if name not in state]
        if absent:
            raise ValueError(f"{key} is there without {', '.join(absent)}; all belong together")
        result[whole] = torch.cat([state[name] for name in names])
    return result


@functools.cache
def _pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"\{(\w+)\}", template)
    text = ""
    for index, piece in enumerate(pieces):
        if index % 2 == 0:
            text += re.escape(piece)
        else:
            text += f"(?P<{piece}>{r'[0-9]+' if len(piece) == 1 else '.+'})"
    return re.compile(text)


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
    """Name keys by the largest modules that hold nothing else ``among`` all keys of the model:
    ``["association.* (6)", ...]``."""
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
            problems.append(f"{len(keys)} missing in {origin[part].source}: {some(keys)}")
        else:
            advice = f"; give {_GIVEN_BY[part]}" if part in _GIVEN_BY else ""
            problems.append(f"{len(keys)} missing, all of {part}{advice}")
    for part, keys in _by_part(unexpected).items():
        problems.append(f"{len(keys)} unexpected in {origin[part].source}: {some(keys)}")
    reshaped = [k for k in state if k in expected and state[k].shape != expected[k].shape]
    for part, keys in _by_part(reshaped).items():
        shapes = [
            f"{k} {tuple(state[k].shape)} in the file, {tuple(expected[k].shape)} in the model"
            for k in keys
        ]
        problems.append(f"{len(keys)} of another shape in {origin[part].source}: {some(shapes)}")
    return problems


def _by_part(keys: Iterable[str]) -> dict[str, list[str]]:
    parts: dict[str, list[str]] = {}
    for key in sorted(keys):
        parts.setdefault(_part(key), []).append(key)
    return parts
