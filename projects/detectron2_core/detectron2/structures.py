"""Containers for batches of images and for the objects of one image."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["BitMasks", "Boxes", "ImageList", "Instances"]


class _TensorRows:
    """N things in one tensor with N first: length, device, selection of rows."""

    tensor: torch.Tensor

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.tensor.device

    def to(self, *args: Any, **kwargs: Any):
        """Return a copy moved as ``Tensor.to`` does."""
        return type(self)(self.tensor.to(*args, **kwargs))

    def __getitem__(self, item: int | slice | torch.Tensor):
        picked = self.tensor[item]
        return type(self)(picked[None] if isinstance(item, int) else picked)

    def __len__(self) -> int:
        return self.tensor.shape[0]


class Boxes(_TensorRows):
    """N boxes as one float32 tensor (N, 4): x1, y1, x2, y2 in absolute pixels."""

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = torch.as_tensor(tensor).to(torch.float32)
        tensor = tensor.reshape(-1, 4) if tensor.numel() == 0 else tensor
        if tensor.dim() != 2 or tensor.shape[-1] != 4:
            raise AssertionError(f"Boxes needs a tensor (N, 4), got {tuple(tensor.shape)}")
        self.tensor = tensor

    def area(self) -> torch.Tensor:
        """Return (N,) areas in square pixels."""
        return (self.tensor[:, 2:] - self.tensor[:, :2]).prod(dim=1)


class BitMasks(_TensorRows):
    """N masks as one bool tensor (N, H, W) in the frame of their image."""

    def __init__(self, tensor: torch.Tensor) -> None:
        tensor = torch.as_tensor(tensor).to(torch.bool)
        if tensor.dim() != 3:
            raise AssertionError(f"BitMasks needs a tensor (N, H, W), got {tuple(tensor.shape)}")
        self.image_size = tensor.shape[1:]
        self.tensor = tensor

    def nonempty(self) -> torch.Tensor:
        """Return (N,) bool: whether the mask has any pixel."""
        return self.tensor.flatten(1).any(dim=1)

    def get_bounding_boxes(self) -> Boxes:
        """Return tight boxes on the CPU (x2 and y2 one past the last pixel); zeros if empty."""
        boxes = torch.zeros(len(self), 4)
        columns, rows = self.tensor.any(dim=1).cpu(), self.tensor.any(dim=2).cpu()
        for box, column, row in zip(boxes, columns, rows):
            x, y = column.nonzero()[:, 0], row.nonzero()[:, 0]
            if len(x):
                box.copy_(torch.stack([x[0], y[0], x[-1] + 1, y[-1] + 1]))
        return Boxes(boxes)


class ImageList:
    """``tensor`` (N, ..., H, W) and ``image_sizes``, the (height, width) of each before padding."""

    def __init__(self, tensor: torch.Tensor, image_sizes: list[tuple[int, int]]) -> None:
        self.tensor, self.image_sizes = tensor, image_sizes

    @property
    def device(self) -> torch.device:
        """Device of the tensor."""
        return self.tensor.device

    def __len__(self) -> int:
        return len(self.image_sizes)

    def __getitem__(self, idx: int) -> torch.Tensor:
        """Return one image without its padding."""
        height, width = self.image_sizes[idx]
        return self.tensor[idx, ..., :height, :width]

    @staticmethod
    def from_tensors(
        tensors: list[torch.Tensor], size_divisibility: int = 0, pad_value: float = 0.0
    ) -> ImageList:
        """Pad images (..., H_i, W_i) at the right and bottom to one size and stack them.

        ``size_divisibility``: height and width are rounded up to multiples of it (0 or 1: not).
        """
        if not tensors or any(t.shape[:-2] != tensors[0].shape[:-2] for t in tensors):
            shapes = [tuple(t.shape) for t in tensors]
            raise AssertionError(f"images must exist and agree in all but (H, W), got {shapes}")
        sizes = [(t.shape[-2], t.shape[-1]) for t in tensors]
        height, width = max(h for h, _ in sizes), max(w for _, w in sizes)
        step = max(size_divisibility, 1)
        height, width = -(-height // step) * step, -(-width // step) * step
        pads = [(0, width - w, 0, height - h) for h, w in sizes]
        padded = [F.pad(t, pad, value=pad_value) for t, pad in zip(tensors, pads)]
        return ImageList(torch.stack(padded), sizes)


class Instances:
    """Named fields of equal length (tensors, ``Boxes``, ``BitMasks``, lists) of one image.

    ``inst.scores = t`` sets a field, ``inst.scores`` reads it; names with ``_`` in front are
    ordinary attributes. ``image_size``: (height, width) in pixels.
    """

    def __init__(self, image_size: tuple[int, int], **kwargs: Any) -> None:
        self._image_size = image_size
        self._fields: dict[str, Any] = {}
        for name, value in kwargs.items():
            self.set(name, value)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self._image_size

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            self.set(name, value)

    def __getattr__(self, name: str) -> Any:  # called only when ordinary lookup fails
        fields = self.__dict__.get("_fields", {})
        if name not in fields:
            raise AttributeError(f"Instances has no field '{name}'; it has {sorted(fields)}")
        return fields[name]

    def set(self, name: str, value: Any) -> None:
        """Add or replace a field; a length other than the others' is an ``AssertionError``."""
        if self._fields and len(value) != len(self):
            raise AssertionError(f"field '{name}' has length {len(value)}, not {len(self)}")
        self._fields[name] = value

    def has(self, name: str) -> bool:
        """Whether the field exists."""
        return name in self._fields

    def get_fields(self) -> dict[str, Any]:
        """Return the dict of fields itself, not a copy."""
        return self._fields

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """Return a copy in which every field that has ``to`` is moved."""
        fields = self._fields.items()
        moved = {n: v.to(*args, **kwargs) if hasattr(v, "to") else v for n, v in fields}
        return Instances(self._image_size, **moved)

    def __getitem__(self, item: int | slice | torch.Tensor) -> Instances:
        """Index every field; an int gives an Instances of length 1."""
        if isinstance(item, int):
            if not -len(self) <= item < len(self):
                raise IndexError(f"index {item} is out of range for {len(self)} instances")
            item = slice(item, None, len(self))  # one element, for negative indices too
        return Instances(self._image_size, **{n: v[item] for n, v in self._fields.items()})

    def __len__(self) -> int:
        for value in self._fields.values():
            return len(value)
        raise NotImplementedError("an Instances without fields has no length")

    def __iter__(self):
        raise NotImplementedError("Instances is not iterable; iterate over a field")

    def __repr__(self) -> str:
        return f"Instances(image_size={self._image_size}, fields={self._fields})"
