"""Picture and mask files made to do harm: one clear error each, and never much memory."""

import io
import json
import struct
import subprocess
import sys
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from refusals import refused

from gella.entities.entity_map import MAX_ENTITIES, MAX_PIXELS, EntityMap, binary_masks, id_to_rgb
from gella.entities.files import MAX_MEMBERS
from gella.entities.rle import MAX_OUTLINE
from gella.entities.sources import FileSource, load_entities
from gella.entities.view import read_image

SIZE = (24, 30)
IDS = np.zeros(SIZE, np.int32)
IDS[3:9, 4:20], IDS[12:20, 2:9] = 5, 9
MASKS = np.stack([IDS == 5, IDS == 9])
MIB = 1 << 20


def png(width, height, *, depth=8, kind=2, rows=None):
    """A PNG of zeros, whole or with fewer rows than it declares, made without its pixels."""
    row = bytes(1 + (width * {0: 1, 2: 3}[kind] * depth + 7) // 8)
    packer = zlib.compressobj(1)
    pixels = b"".join(packer.compress(row) for _ in range(height if rows is None else rows))
    header = struct.pack(">2I5B", width, height, depth, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in ((b"IHDR", header), (b"IDAT", pixels + packer.flush()), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + name + body
        data += struct.pack(">I", zlib.crc32(name + body))
    return data


def saved(save, *args, **options):
    """The bytes that a function writes to the stream it is given first."""
    stream = io.BytesIO()
    save(stream, *args, **options)
    return stream.getvalue()


def encoded(picture, format, **options):
    return saved(picture.save, format, **options)


def npz(**arrays):
    return saved(np.savez_compressed, **arrays)


def npy_header(shape, kind="|b1"):
    described = {"descr": kind, "fortran_order": False, "shape": shape}
    return saved(np.lib.format.write_array_header_1_0, described)


def archive(members, method=zipfile.ZIP_DEFLATED):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method, compresslevel=1) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return stream.getvalue()


FRAMES = [Image.fromarray(np.full((*SIZE, 3), value, np.uint8)) for value in (0, 99, 200)]


def animated(format):
    return encoded(FRAMES[0], format, save_all=True, append_images=FRAMES[1:])


PICTURES = {
    "20,000 x 20,000 pixels, 50 kB": (
        rf"too large.*{MAX_PIXELS} pixels .*400000000 pixels",
        png(20000, 20000, depth=1, kind=0),
    ),
    "more than we read, less than Pillow refuses": (
        rf"13000x10000 = 130000000 pixels .* {MAX_PIXELS} .*max_pixels",
        png(13000, 10000, rows=1),
    ),
    "four billion squared": ("too large|damaged", png(2**31 - 1, 2**31 - 1, rows=1)),
    "ends early": ("truncated or damaged", png(300, 200)[:-40]),
    **{k: (f"more than 1 frame in the {k}", animated(k)) for k in ("GIF", "PNG", "TIFF")},
    "floats": ("mode F", encoded(Image.fromarray(np.ones(SIZE, np.float32)), "TIFF")),
    "32 bits": ("mode I", encoded(Image.fromarray(IDS), "TIFF")),
    "PostScript": ("no picture that Pillow can read", encoded(FRAMES[0], "EPS")),
    "a zip archive": ("no picture", npz(masks=MASKS)),
    "empty": ("no picture", b""),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_hostile_picture_is_one_clear_error(tmp_path, name):
    (message, data), path = PICTURES[name], tmp_path / "from_a_stranger.png"
    path.write_bytes(data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        text = refused(rf"from_a_stranger\.png.*({message})", read_image, path)
    assert len(text) < 500 + len(str(path))


def test_good_pictures_of_rare_kinds_are_read(tmp_path):
    path, pixels = (
        tmp_path / "a.png",
        np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8),
    )
    picture = Image.fromarray(pixels)
    # 16 bits: the high byte counts. Pillow alone clips everything over 255, so all would be white.
    Image.fromarray((pixels[..., 0].astype(np.uint16) << 8) + 77).save(path)
    np.testing.assert_array_equal(read_image(path), np.repeat(pixels[..., :1], 3, axis=2))
    # A wrong suffix, and a telephone's picture with previews behind it.
    path.write_bytes(encoded(picture, "BMP"))
    np.testing.assert_array_equal(read_image(path), pixels)
    path.write_bytes(encoded(picture, "MPO", save_all=True, append_images=[FRAMES[1]], quality=95))
    with Image.open(path) as opened:
        assert opened.format == "MPO" and opened.n_frames == 2
        np.testing.assert_array_equal(read_image(path), np.asarray(opened.convert("RGB")))
    smooth = np.tile(np.linspace(0, 255, 30, dtype=np.uint8)[None, :, None], (24, 1, 3))
    printed = Image.fromarray(smooth).convert("CMYK")
    path.write_bytes(encoded(printed, "JPEG", quality=95))
    assert np.abs(read_image(path).astype(int) - smooth).max() < 12


NEEDS = 2 * SIZE[0] * SIZE[1]


def npy(shape=(2, *SIZE), count=NEEDS, name="masks", **more):
    kind = "<i8" if name == "ids" else "|b1"
    return archive({f"{name}.npy": npy_header(shape, kind) + bytes(count)}, **more)


def with_end(data, change):
    place = data.rfind(b"PK\x05\x06")
    return data[:place] + change(data[place:])


def lying_size(size):
    """An archive whose directory declares fewer bytes of the array than its stream expands to."""
    data = npy(count=40 * MIB)
    place = data.rfind(b"PK\x01\x02") + 24
    return data[:place] + struct.pack("<I", size) + data[place + 4 :]


def results(**entry):
    code = EntityMap.from_masks(MASKS).to_rle()[0]
    return json.dumps([{"image_id": 1, "score": 0.5, "segmentation": code, **entry}]).encode()


def polygon(*points):
    return results(segmentation=[list(points)])


def panoptic(file_name, **more):
    annotation = {"image_id": 1, "file_name": file_name, "segments_info": [], **more}
    return json.dumps({"annotations": [annotation]}).encode()


FULL = MAX_ENTITIES + 1
NOISE = np.where(IDS == 9, np.uint64(2**63 + 5), IDS.astype(np.uint64))
SMALL = rf"ids \(24, 30\) needs {NEEDS * 4} bytes but the archive holds {NEEDS}"
ZEROS = rf"masks \(2, 24, 30\) needs {NEEDS} bytes but the archive holds {200 * MIB}"
DIRECTORY = {"n" * 60000 + str(n): b"" for n in range(300)}
MANY = json.dumps([{"image_id": 1}] * FULL).encode()


def coded(size, *counts):
    return results(segmentation={"size": size, "counts": counts})


# Name of the file: what its error says, how it is made.
MASK_FILES = {
    "zeros.png": ("too large to open safely", lambda: png(20000, 20000, depth=1, kind=0)),
    "declares.png": ("too large to open safely", lambda: png(60000, 60000, rows=1)),
    "frames.png": ("3 frames", lambda: animated("PNG")),
    "deep.png": ("16 bits", lambda: png(30, 24, depth=16)),  # Pillow would cut them without a word
    "cmyk.png": ("a TIFF picture", lambda: encoded(FRAMES[0].convert("CMYK"), "TIFF")),
    "zeros.npz": (ZEROS, lambda: npy(count=200 * MIB)),
    "lying.npz": ("truncated or damaged", lambda: lying_size(NEEDS + len(npy_header((2, *SIZE))))),
    "million.npz": (rf"holds 1000000 entities, more than the {MAX_ENTITIES}",
                    lambda: npy((1_000_000, *SIZE))),
    "huge.npz": ("masks are 1000000x1000000 pixels but the image is 30x24",
                 lambda: npy((1, 10**6, 10**6))),
    "numbers.npz": (SMALL, lambda: npy(SIZE, name="ids")),
    "negative.npz": ("needs -1440 bytes", lambda: npy((-2, *SIZE))),
    "members.npz": (f"holds 3000 arrays, more than the {MAX_MEMBERS}",
                    lambda: archive({f"{n}.npy": b"" for n in range(3000)})),
    "directory.npz": ("more than the 64", lambda: with_end(
        archive(DIRECTORY), lambda end: end[:8] + struct.pack("<2H", 2, 2) + end[12:])),
    "locator.npz": ("64-bit zip directory; at most 64", lambda: with_end(
        npz(masks=MASKS), lambda end: b"PK\x06\x07" + bytes(16) + end)),
    "bzip2.npz": ("compressed in way 12", lambda: npy(method=zipfile.ZIP_BZIP2)),
    "objects.npz": ("scores holds Python objects",
                    lambda: npz(masks=MASKS, scores=np.array([{}, {}], object))),
    "paths.npz": ("neither 'masks'", lambda: archive({"../masks.npy": b"x", "/etc/ids.npy": b"x"})),
    "headless.npz": ("damaged .the magic string", lambda: archive({"masks.npy": b"MZ" * 99})),
    "infinite.npz": ("score 0 is not", lambda: npz(masks=MASKS, scores=[np.inf, 1])),
    "soft.npz": ("mask 0 holds 35 beside 167.*threshold",
                 lambda: npz(masks=(MASKS * np.linspace(0, 255, 30)).astype(np.uint8))),
    "below.npz": ("mask 0 holds -1", lambda: npz(masks=-MASKS.astype(np.int8))),
    "over.npz": ("holds 16777216; ids are 0 .void. to 16777215",
                 lambda: npz(ids=np.where(IDS == 9, 1 << 24, IDS))),
    "unsigned.npz": ("holds 9223372036854775813", lambda: npz(ids=NOISE)),
    "size.json": ("masks are 1000000x1000000 pixels but the image is 30x24",
                  lambda: coded([10**6, 10**6], 10**12)),
    "runs.json": ("runs cover far more of 720 pixels", lambda: coded(SIZE, 10**400, 1)),
    "score.json": ("score is 1000.* not a finite", lambda: results(score=10**400)),
    "float.json": ("score is 1e.300, not a finite", lambda: results(score=1e300)),
    "corner.json": ("is not finite", lambda: polygon(0, 0, 10**400, 0, 5, 5)),
    "infinity.json": ("is not finite", lambda: polygon(0, 0, float("inf"), 0, 5, 5)),
    "outline.json": (rf"polygons are 5\d+ pixels long, more than {MAX_OUTLINE}",
                     lambda: polygon(*[0, 0, 29, 23] * 100_000)),
    "entries.json": (rf"holds {FULL} entities, more than the {MAX_ENTITIES}", lambda: MANY),
    "deep.json": ("nested too deeply", lambda: b"[" * 500_000),
    "objects.json": ("nested too deeply", lambda: b'{"a":' * 300_000),
    "long.json": (r"size 'xxx.*\.\.\..*', not", lambda: coded("x" * 10**6, 1)),
    "archive.json": ("not a JSON file", lambda: npz(masks=MASKS)),
    "elsewhere.json": (r"'\.\./m\.png' is no name in the folder", lambda: panoptic("../m.png")),
    "full.json": ("'/etc/m.png' is no name in the folder", lambda: panoptic("/etc/m.png")),
    "id.json": ("ids are whole numbers",
                lambda: panoptic("", id=10**400, segmentation=[[0, 0, 9, 0, 9, 9]])),
}  # fmt: skip


@pytest.mark.parametrize("name", MASK_FILES)
def test_a_hostile_mask_file_is_one_clear_error(tmp_path, name):
    (message, make), path = MASK_FILES[name], tmp_path / "folder" / name
    Image.fromarray(id_to_rgb(IDS)).save(tmp_path / "m.png")  # what paths would lead to
    path.parent.mkdir()
    path.write_bytes(make())
    text = refused(message, load_entities, path, *SIZE, image_id=1)
    assert f"image 1, entity file {path}: " in text and len(text) < 400 + 2 * len(str(path))
    assert len(list(tmp_path.rglob("*"))) == 3  # nothing was written anywhere


def test_the_bounds_are_arguments_and_exact(tmp_path):
    path, picture, masks = (tmp_path / name for name in ("m.npz", "a.png", "m.png"))
    path.write_bytes(npz(masks=MASKS))
    picture.write_bytes(png(40, 25))
    Image.fromarray(id_to_rgb(IDS)).save(masks)
    read, of_png = partial(load_entities, path, *SIZE), partial(load_entities, masks, *SIZE)
    length = path.stat().st_size
    assert read(max_pixels=720, max_entities=2, max_bytes=length).num_entities == 2
    assert read_image(picture, max_pixels=1000).shape == (25, 40, 3)
    refused("30x24 = 720 pixels are more than the 719", read, max_pixels=719)
    refused("holds 2 entities, more than the 1 ", read, max_entities=1)
    refused(f"{length} bytes, more than the {length - 1} ", read, max_bytes=length - 1)
    refused("holds 2 entities, more than the 1 ", of_png, max_entities=1)
    refused("40x25 = 1000 pixels are more than the 999", read_image, picture, max_pixels=999)
    refused("an image has at least one", load_entities, masks, 0, 30)


def test_noise_is_no_map_of_entities(tmp_path):
    noise = np.arange(200 * 200).reshape(200, 200)
    Image.fromarray(id_to_rgb(noise)).save(tmp_path / "noise.png")
    told = f"holds 39999 entities, more than the {MAX_ENTITIES}"
    refused(told, load_entities, tmp_path / "noise.png", 200, 200)
    told = f"number 2000000000, more than {MAX_ENTITIES}"
    refused(told, EntityMap, np.array([[2_000_000_000]]))


@pytest.mark.parametrize("make, array, told", [
    (EntityMap, np.array([[0.0, np.nan]]), "ids must be integers .*float64"),
    # In 32 bits these would be entity 1.
    (EntityMap, np.array([[2**32 + 1]]), "ids holds entity number 4294967297"),
    (EntityMap, np.array([[-(2**32) + 1]]), "ids holds -4294967295"),
    (EntityMap.from_masks, np.full((1, 2, 2), np.nan), "mask 0 holds nan"),
    (EntityMap.from_masks, np.array([[[0, 1.0]], [[0, np.inf]]]), "mask 1 holds inf"),
    (EntityMap.from_masks, np.array([[[0, 0.3, 0.9]]]), "mask 0 holds 0.3 beside 0.9"),
    (EntityMap.from_masks, np.array([[["a", "b"]]]), "must be bool"),
    (EntityMap.from_masks, np.zeros((2, 0, 5), bool), "at least a pixel"),
])  # fmt: skip
def test_arrays_that_are_no_ids_or_masks(make, array, told):
    refused(told, make, array)


def test_masks_of_any_one_value_are_masks():
    for masks in (MASKS, MASKS * 255, MASKS.astype(np.float32), MASKS * np.int64(7)):
        np.testing.assert_array_equal(binary_masks(masks), MASKS)
    assert binary_masks(MASKS) is MASKS  # no copy of what is right


def test_other_arrays_and_names_of_an_archive_are_not_touched(tmp_path):
    path = tmp_path / "deep" / "m.npz"
    path.parent.mkdir()
    masks = npy_header(MASKS.shape) + MASKS.tobytes()
    path.write_bytes(archive({"../out.npy": b"x", "a.npy": b"cos\nsystem\n", "masks.npy": masks}))
    assert load_entities(path, *SIZE).num_entities == 2
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["m.npz"]


def test_a_folder_of_masks_is_not_left_by_the_names_in_a_json(tmp_path):
    Image.fromarray(id_to_rgb(IDS)).save(tmp_path / "secret.png")
    (tmp_path / "masks").mkdir()
    path = tmp_path / "masks" / "panoptic.json"
    path.write_bytes(panoptic("../../secret.png", segments_info=[{"id": 5}, {"id": 9}]))
    with pytest.raises(ValueError, match=r"secret\.png' is no name"):
        FileSource(path).lead({"image_id": 1, "file_name": "1.jpg"})


MEASURE = """
import sys, warnings
warnings.simplefilter("ignore")
from gella.entities.sources import load_entities
from gella.entities.view import read_image
import numpy, PIL.Image, pycocotools.mask
PIL.Image.init()
def peak():  # getrusage would tell the peak of the process that started this one, if higher
    lines = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(lines["VmHWM"].split()[0]) / 1024
for path in sys.argv[1:]:
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak()
    told = "read"
    try:
        size = (1000, 1000) if "many" in path else (24, 30)
        read_image(path) if "picture" in path else load_entities(path, *size, image_id=1)
    except ValueError as error:
        told = "refused"
    print(told, round(peak() - before))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no /proc of Linux")
def test_no_bomb_takes_memory(tmp_path):
    bombs = {
        "picture_20000.png": png(20000, 20000, depth=1, kind=0),  # 400 MiB of grey
        "picture_13000.png": png(13000, 10000, depth=1, kind=0),
        "ids_20000.png": png(20000, 20000, depth=1, kind=0),
        "zeros.npz": MASK_FILES["zeros.npz"][1](),
        "aside.npz": npy((200 * MIB,), 200 * MIB, "aside"),
        "lying.npz": MASK_FILES["lying.npz"][1](),
        "runs.json": coded([10**5, 10**5], 10**10),
        "outline.json": MASK_FILES["outline.json"][1](),
    }
    # Small and no bombs: masks of 1 megapixel, 290 MiB if all were decoded at once.
    runs = [[k * 3000, 2000, 10**6 - k * 3000 - 2000] for k in range(300)]
    many = [{"image_id": 1, "segmentation": {"size": [1000] * 2, "counts": r}} for r in runs]
    bombs["many.json"] = json.dumps(many).encode()
    for name, data in bombs.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 2 * MIB, name
    command = [sys.executable, "-c", MEASURE, *(str(tmp_path / name) for name in bombs)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    told = dict(zip(bombs, (line.split() for line in done.stdout.splitlines()), strict=True))
    word, mib = told.pop("many.json")
    assert word == "read" and int(mib) < 120
    assert load_entities(tmp_path / "many.json", 1000, 1000, image_id=1).num_entities == 300
    assert {word for word, _ in told.values()} == {"refused"}
    # A JSON of 1 MiB is 30 MiB of Python's numbers; each bomb would take 150 MiB or far more.
    assert {name: int(mib) for name, (_, mib) in told.items() if int(mib) > 60} == {}


def spoiled(data, rng):
    """The data cut, or with some bytes changed, or with some put in."""
    way = rng.random()
    if 0.3 <= way < 0.8:
        spoilt = bytearray(data)
        for place in rng.integers(len(spoilt), size=rng.integers(1, 8)):
            spoilt[place] = rng.integers(256)
        return bytes(spoilt)
    place = int(rng.integers(len(data)))
    return data[:place] + (b"" if way < 0.3 else rng.bytes(rng.integers(1, 20)) + data[place:])


NOISY = Image.fromarray(np.random.default_rng(3).integers(0, 256, (*SIZE, 3), dtype=np.uint8))
SOUND = {kind: encoded(NOISY, kind) for kind in "PNG JPEG GIF TIFF WEBP BMP PPM".split()} | {
    "png": encoded(Image.fromarray(id_to_rgb(IDS)), "PNG"),
    "npz": npz(masks=MASKS, scores=[0.5, 0.6]),
    "json": results(),
}


@pytest.mark.parametrize("kind", SOUND)
def test_spoiled_files_are_read_or_refused_by_one_line(tmp_path, kind, capfd):
    path, rng, picture = tmp_path / f"spoiled.{kind}", np.random.default_rng(3), kind.isupper()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(60 if picture else 300):
            path.write_bytes(spoiled(SOUND[kind], rng))
            try:
                if picture:
                    assert read_image(path, max_pixels=10**6).dtype == np.uint8
                else:
                    assert load_entities(path, *SIZE, image_id=1).num_entities > 0
            except ValueError as error:
                text = str(error)
                assert str(path) in text and "\n" not in text and len(text) < 500 + len(str(path))
