"""Files read with one clear error and written whole, and what says which files a run used."""

from __future__ import annotations

import gc
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import pickle
import platform
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import yaml

NUMPY_PARTS = frozenset(
    {
        ("collections", "OrderedDict"),
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
        ("numpy._core.multiarray", "scalar"),
        ("numpy._core.numeric", "_frombuffer"),  # of pickle protocol 5
        ("_codecs", "encode"),  # how old protocols store the bytes of an array
    }
)
"""What `read_pickle` has to allow for NumPy's arrays and scalars; none of it runs a file's code."""

# Keys that cannot change a score: where files go, and how the work is shared out.
_NO_MATTER = (
    *("OUTPUT_DIR", "VERSION", "VIS_PERIOD", "CUDNN_BENCHMARK"),
    *("MODEL.WEIGHTS", "MODEL.HUB", "MODEL.CLIP.NAME"),  # weights have a hash of their own
    *("MODEL.DEVICE", "DATALOADER.NUM_WORKERS", "TEST.IMS_PER_BATCH"),
    *("TEST.EXPECTED_RESULTS", "TEST.EVAL_PERIOD"),
    "TEST.CALIBRATION",  # the thresholds that it set count
)
# Distributions whose version can change a score.
_PACKAGES = ("gella", "torch", "transformers", "timm", "numpy", "pycocotools", "pillow")


def write_atomically(path: str | Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a file so that readers, and a kill at any moment, see the old one or the whole new one.

    ``write`` is called once with a binary stream. Raises whatever it raises; the temporary file is
    then removed and ``path``, whose folder must exist, is untouched.
    """
    folder, name = os.path.split(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())  # a rename must not overtake the data on a power failure
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp makes files that only the owner may read
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def to_disk(path: str | Path) -> None:
    """Return when a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY if os.path.isdir(path) else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text as `write_atomically` does, making the folder."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda stream: stream.write(text.encode()))


def write_json(path: str | Path, content: Any) -> None:
    """Write JSON as `write_text` does, of `plain` values; NaN and infinity become null."""
    write_text(path, json.dumps(_finite(plain(content)), indent=1, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def plain(value: Any) -> Any:
    """The value in Python's own types, nested too: no number, array or path of another library."""
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return (tuple if isinstance(value, tuple) else list)(map(plain, value))
    if hasattr(value, "tolist"):  # NumPy's and torch's scalars and arrays, pandas' columns
        inner = value.tolist()  # a long double stays itself
        return plain(float(inner) if type(inner) is type(value) else inner)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def image_key(image_id: Any) -> str:
    """An image's id as all files are joined by it: 139, 139.0, "139", "000000000139" are one."""
    if isinstance(image_id, float) and image_id.is_integer():
        image_id = int(image_id)
    text = str(image_id)
    return (text.lstrip("0") or "0") if text.isdecimal() else text


def few(ids: Iterable[Any]) -> str:
    """The first three of some ids, for messages that show both sides."""
    first = list(itertools.islice(ids, 4))
    return ", ".join([*map(str, first[:3]), *(["..."] if len(first) > 3 else [])]) or "none"


def read_text(path: str | Path) -> str:
    """A text file in UTF-8, with a byte-order mark, as editors on Windows write it, or without.

    ValueError for another encoding.
    """
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text ({error}); save it so") from error


def read_json(path: str | Path, what: str = "", advice: str = "check the path") -> Any:
    """Return the content of a JSON file.

    Args:
        path: the file, in UTF-8.
        what: what the errors call the file, for instance the config key that names it.
        advice: how to get the file; stands behind the semicolon of both errors.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no JSON, for instance because it is cut short.
    """
    path, called = Path(path), f"{what} {path}".strip()
    if not path.is_file():
        raise FileNotFoundError(f"{called} does not exist; {advice}")
    collecting = gc.isenabled()
    gc.disable()  # it would walk millions of fresh dicts again and again
    try:
        return json.loads(read_text(path))
    except RecursionError as error:
        raise ValueError(f"{called} is not a JSON file (nested too deeply); {advice}") from error
    except ValueError as error:  # of the text's encoding or of JSON
        raise ValueError(f"{called} is not a JSON file ({error}); {advice}") from error
    finally:
        if collecting:
            gc.enable()


def json_lines(path: str | Path, advice: str = "check the path") -> Iterator[tuple[int, Any]]:
    """Yield number, from 1, and value of every line that is not blank.

    The value of a line that is no JSON is a ValueError, which is not raised. A missing file raises
    FileNotFoundError, and one that is no UTF-8 ValueError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} does not exist; {advice}")
    # Not splitlines(): it also splits at line separators that may stand inside JSON text.
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, ValueError(f"{path}: line {number} is no JSON ({error})")


class _Unpickler(pickle.Unpickler):
    """Makes plain values; every class and function is refused before it is made, but allowed ones.

    Whatever else a pickle names could run any code.
    """

    allowed: Collection[tuple[str, str]] = ()

    def find_class(self, module: str, name: str) -> Any:
        """Import an allowed name; UnpicklingError for any other."""
        # NumPy 2 renamed numpy.core; the old name still works but warns.
        module = module.replace("numpy.core.", "numpy._core.")
        if (module, name) not in self.allowed:
            read = "plain data and NumPy arrays are" if self.allowed else "plain data is"
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, but only {read} read")
        if importlib.metadata.version("numpy") < "2":  # has the old names only
            module = module.replace("numpy._core.", "numpy.core.")
        return super().find_class(module, name)


def read_pickle(
    path: str | Path, allowed: Collection[tuple[str, str]] = (), *, encoding: str = "utf-8"
) -> Any:
    """Return the content of a pickle, running nothing of it.

    Args:
        path: the file.
        allowed: (module, name) of classes and functions that it may ask for, for instance
            `NUMPY_PARTS`; none: only containers, numbers and text.
        encoding: of Python 2's strings; "latin1" where they hold the bytes of arrays.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or asks for anything else. The message does not name the file.
    """
    with open(path, "rb") as stream:
        unpickler = _Unpickler(stream, encoding=encoding, errors="replace")
        unpickler.allowed = allowed
        try:
            return unpickler.load()
        except Exception as error:  # a damaged pickle may raise nearly anything
            reason = " ".join(str(error).split())[:300] or type(error).__name__
            raise ValueError(f"no pickle that is read: {reason}") from error


def file_hash(path: str | Path, on_block: Callable[[int], object] = lambda size: None) -> str:
    """SHA-256 of a file's bytes, or of the names and hashes of a folder's files; "" for neither.

    ``on_block`` is called with the bytes that were read since the last call, for progress bars.
    """
    if Path(path).is_dir():
        files = sorted(p for p in Path(path).rglob("*") if p.is_file())
        lines = [f"{file.relative_to(path)} {file_hash(file, on_block)}" for file in files]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
    if not Path(path).is_file():
        return ""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
            on_block(len(block))
    return digest.hexdigest()


def config_hash(cfg: Any) -> str:
    """SHA-256 of a config (a ``CfgNode``) without the keys that cannot change a score."""
    tree = yaml.safe_load(cfg.dump())
    for key in _NO_MATTER:
        *parents, last = key.split(".")
        node = tree
        for name in parents:
            node = node.get(name, {})
        node.pop(last, None)
    return hashlib.sha256(yaml.safe_dump(tree, sort_keys=True).encode()).hexdigest()


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Versions of Python, of Detectron2 and of installed distributions; by default scores' own."""
    import detectron2  # a checkout on the path is no distribution

    result = {"python": platform.python_version(), "detectron2": str(detectron2.__version__)}
    for name in packages:
        try:
            result[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            result[name] = "not installed"
    return result
