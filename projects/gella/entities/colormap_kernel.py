"""The colormap's inner loop, compiled by numba: from one number per pixel to planes of colour.

Byte-shuffle instructions look up 32 pixels at once in a small table, which is several times faster
than any loop that NumPy or numba's own vectoriser makes. LLVM uses them where it is given the
look-up as "extract element, insert element" (`_look_up`) and the processor has AVX2 or AVX-512;
elsewhere it makes plain loads of the same code: many times slower, never different.

Importing this module imports numba and compiles: a second, and 110 to 160 MiB of memory, which
forked processes share when it comes before the fork. So `entities.paint_colormap` imports it at
its first call. numba's cache on disk would save a third of that second; it is not used, since it
needs a folder that can be written.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

LANES = 32  # bytes of one look-up and rows of its table: a register of AVX2
TILE = 1 << 16  # pixels made in scratch memory (four bytes each) before they are copied out


def paint_planes(ids: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Colour every pixel by its number: uint8 (3, H, W), black where there is no colour.

    Args:
        ids: integers (H, W) that fit int32; k in 1..E gets colour k - 1, any other number black.
        colors: uint8 RGB (E, 3), any E. One pass over the picture serves 31 of them.
    """
    height, width = ids.shape
    flat = np.require(ids, np.int32, ["C", "A"]).reshape(-1)
    passes = max(1, -(-len(colors) // (LANES - 1)))
    padded = np.zeros((passes * (LANES - 1), 3), dtype=np.uint8)
    padded[: len(colors)] = colors
    tables = np.zeros((passes, 3, LANES), dtype=np.uint8)  # row 0 of each is black
    tables[:, :, 1:] = padded.reshape(passes, LANES - 1, 3).transpose(0, 2, 1)
    planes = np.empty((3, flat.size), dtype=np.uint8)
    _kernel(flat, tables, planes, np.empty((4, TILE), dtype=np.uint8))
    return planes.reshape(3, height, width)


def _make_look_up(typing_context: Any, places: Any, tables: Any, result: Any, add: Any) -> Any:
    # result[c * TILE + i] = tables[c * LANES + places[i]] for 3 channels and LANES pixels, all of
    # them bytes, from the addresses on; with `add`, |= instead of =. Places are below LANES.
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        row = ir.VectorType(ir.IntType(8), LANES)

        def at(address: Any, offset: int) -> Any:
            moved = builder.add(address, ir.Constant(address.type, offset))
            return builder.inttoptr(moved, row.as_pointer())

        picked = builder.load(at(arguments[0], 0), align=1)
        for channel in range(3):
            table = builder.load(at(arguments[1], channel * LANES), align=1)
            target = at(arguments[2], channel * TILE)
            found = ir.Constant(row, ir.Undefined)
            for lane in range(LANES):
                here = ir.Constant(ir.IntType(32), lane)
                value = builder.extract_element(table, builder.extract_element(picked, here))
                found = builder.insert_element(found, value, here)
            old = builder.load(target, align=1)
            base = builder.select(arguments[3], old, ir.Constant(row, None))
            builder.store(builder.or_(base, found), target, align=1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp, types.boolean), generate


_look_up: Any = intrinsic(_make_look_up)  # to numba a function of the last four arguments


def _make_copy(typing_context: Any, target: Any, source: Any, count: Any) -> Any:
    # memcpy between addresses. Painting where the colormap is to lie saves this copy, yet takes a
    # quarter longer on pictures that are in no cache: its stores wait for the target's lines.
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        to, from_ = (builder.inttoptr(address, byte) for address in arguments[:2])
        cgutils.raw_memcpy(builder, to, from_, arguments[2], 1)
        return context.get_dummy_value()

    return types.void(types.uintp, types.uintp, types.uintp), generate


_copy: Any = intrinsic(_make_copy)


def _paint(ids: np.ndarray, tables: np.ndarray, planes: np.ndarray, scratch: np.ndarray) -> None:
    # int32 (N,), uint8 (passes, 3, LANES), (3, N) and (4, TILE). `scratch` is the caller's, because
    # an array made here could be freed after its last use by name, while its address is in use.
    places = scratch[3]
    for start in range(0, ids.size, TILE):
        part = ids[start : start + TILE]
        for number in range(len(tables)):
            first = np.int32(number * (LANES - 1))
            for i in range(part.size):
                place = np.int32(part[i] - first)
                places[i] = np.uint8(place) if 0 < place < LANES else np.uint8(0)
            table = tables[number].ctypes.data
            # The last look-up may go over the part: rows of scratch are whole multiples of LANES.
            for i in range(0, part.size, LANES):
                _look_up(places.ctypes.data + i, table, scratch.ctypes.data + i, number > 0)
        for channel in range(3):
            target = planes[channel].ctypes.data + start
            _copy(target, scratch[channel].ctypes.data, part.size)


_SIGNATURE = types.void(
    types.Array(types.int32, 1, "C", readonly=True),  # writable ones are taken too
    types.Array(types.uint8, 3, "C"),
    types.Array(types.uint8, 2, "C"),
    types.Array(types.uint8, 2, "C"),
)
_kernel = njit(_SIGNATURE, nogil=True)(_paint)
