"""The two-way mechanism: a public weight format is a list of key rules, read in either direction.

A template names the variable parts of a key: ``{i}`` (one letter) is a number, a longer name such
as ``{rest}`` is any text. ``("model.layers.{i}.{rest}", "llama.layers.{i}.{rest}")`` renames one
way; with its sides swapped it renames back.
"""

from __future__ import annotations

import fnmatch
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Keys that an error message lists before it only counts.
_LISTED_KEYS = 20

__all__ = ["Composite", "Layout", "fuse", "matches", "matches_any", "rename", "unfuse"]


class Layout:
    """One public weight format; subclasses give the tables, and hooks where renaming is not enough.

    ``to_gella``: drop by name, ``split``, rename. ``from_gella``: rename back, ``join``. Tensors
    are passed on, never changed in type or value; only a fused tensor is copied.
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

    def split(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring foreign tensors to GELLA's cut, under foreign-like names that the rules know.

        Default: as they are. ``unfuse`` and ``fuse`` are the usual bodies.
        """
        return dict(state)

    def join(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of ``split``. Default: as they are."""
        return dict(state)

    def to_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename a foreign state dict to GELLA's keys.

        Args:
            state: tensors by foreign key, of one format, all of them.

        Returns:
            Tensors by GELLA's key, without the ``dropped`` ones.

        Raises:
            ValueError: keys that no rule knows (all are named), or two that meet in one key.
        """
        kept = {k: v for k, v in state.items() if not self.drops(k)}
        return self._rename(self.split(kept), [(there, here) for there, here in self.rules])

    def from_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename GELLA's tensors to the foreign keys; the inverse of ``to_gella``.

        Args:
            state: tensors by GELLA's key; those outside ``prefix`` and the ``fresh`` ones are left
                out.

        Raises:
            ValueError: keys under ``prefix`` that no rule knows, or two that meet in one key.
        """
        mine = {
            k: v
            for k, v in state.items()
            if k.startswith(self.prefix) and not matches_any(k, self.fresh)
        }
        return self.join(self._rename(mine, [(here, there) for there, here in self.rules]))

    @classmethod
    def from_config(cls, cfg: Any) -> Layout:
        """The layout for the model of a config; what depends on it is the subclass's choice."""
        return cls()

    @classmethod
    def recognises(cls, keys: Iterable[str]) -> bool:
        """Whether keys look like this format: every pattern of ``signature`` fits one of them."""
        keys = list(keys)
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
            rest = len(lost) - _LISTED_KEYS
            more = f" and {rest} more" if rest > 0 else ""
            raise ValueError(
                f"{len(lost)} of {len(state)} keys are not known to the format {self.name}: "
                f"{', '.join(sorted(lost)[:_LISTED_KEYS])}{more}"
            )
        return renamed


class Composite(Layout):
    """A format whose files hold several parts, each under a prefix of its own."""

    #: (what foreign keys start with, layout of the rest of the key); the first fit counts, in
    #: either direction, so that a spelling which is read but not written comes after another.
    parts: Sequence[tuple[str, Layout]] = ()

    def to_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`Layout.to_gella`; an error names the part that refuses the keys."""
        result: dict[str, Tensor] = {}
        kept = {k: v for k, v in state.items() if not matches_any(k, self.dropped)}
        for start, layout in self.parts:
            mine = {k[len(start) :]: kept.pop(k) for k in list(kept) if k.startswith(start)}
            try:
                converted = layout.to_gella(mine)
            except ValueError as error:
                where = f"under {start} " if start else ""
                raise ValueError(f"{self.name}: {where}{error}") from error
            both = sorted(converted.keys() & result.keys())
            if both:
                raise ValueError(f"{self.name}: {len(both)} tensors come twice, e.g. {both[0]}")
            result.update(converted)
        return result

    def from_gella(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As :meth:`Layout.from_gella`, by the first part of each prefix."""
        result: dict[str, Tensor] = {}
        rest = dict(state)
        for start, layout in self.parts:
            mine = {k: rest.pop(k) for k in list(rest) if k.startswith(layout.prefix)}
            result.update({start + k: v for k, v in layout.from_gella(mine).items()})
        return result

    def drops(self, key: str) -> bool:
        """As :meth:`Layout.drops`, asking the part that the key belongs to."""
        if super().drops(key):
            return True
        part = next(((s, layout) for s, layout in self.parts if key.startswith(s)), None)
        return part is not None and part[1].drops(key[len(part[0]) :])


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
