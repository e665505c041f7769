"""Weight files: safetensors, torch's files and NumPy pickles, in one piece or in shards.

Nothing here runs code from a file: torch's files are read with ``weights_only``, pickles by an
unpickler that makes NumPy arrays and nothing else. Tensors are mapped into memory, not read, where
the file allows it; a folder of shards is therefore opened without being held in memory.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gella.utils.io import NUMPY_PARTS, read_json, read_pickle, to_disk
from gella.weights.layout import some

# The names of transformers, then what else is found in a folder of weights.
_INDEX_NAMES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json"]  # patterns, as on the hub
_WEIGHT_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json"]
_SINGLE_NAMES = ("model.safetensors", "pytorch_model.bin")
_TORCH_SUFFIXES = (".bin", ".pth", ".pt", ".ckpt")
_SUFFIXES = (".safetensors", *_TORCH_SUFFIXES, ".pkl")


def main_file(path: str | Path) -> Path:
    """The file that stands for a path: itself, or of a folder its index or its only weight file.

    Raises:
        FileNotFoundError: no such path, or a folder without weights.
        ValueError: a folder with several weight files and no index.
    """
    path = Path(path)
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"weights {path} do not exist")
    for name in (*_INDEX_NAMES, *_SINGLE_NAMES):
        if (path / name).is_file():
            return path / name
    found = sorted(p for p in path.iterdir() if p.suffix in _SUFFIXES)
    if len(found) == 1:
        return found[0]
    if not found:
        raise FileNotFoundError(f"the folder {path} holds no weights ({', '.join(_SUFFIXES)})")
    raise ValueError(
        f"the folder {path} holds {len(found)} weight files ({some([p.name for p in found])}) and"
        f" no {_INDEX_NAMES[0]}: restore the index, or name one file"
    )


def weight_files(path: str | Path) -> list[Path]:
    """Every file that the weights of a path are made of, an index first."""
    first = main_file(path)
    if first.suffix != ".json":
        return [first]
    return [first, *(first.parent / name for name in sorted(set(_read_index(first).values())))]


def made_for(weights: str | Path) -> str:
    """What weights are for: the first paragraph of their card, the README.md in their folder.

    "" without a card of GELLA's (front matter with ``library_name: gella``).
    """
    folder = Path(weights) if Path(weights).is_dir() else Path(weights).parent
    card = folder / "README.md"
    if not str(weights) or not card.is_file():
        return ""
    _, front, body = (card.read_text("utf-8", "replace").split("---\n", 2) + ["", ""])[:3]
    texts = [" ".join(part.split()) for part in body.split("\n\n")]
    ours = "library_name: gella" in front
    # The title may stand right above it.
    lines = [text for text in texts if text and not text.startswith("#")] if ours else []
    return lines[0] if lines else ""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read tensors by key.

    Args:
        path: a ``.safetensors``, ``.bin``, ``.pth``, ``.pt``, ``.ckpt`` or ``.pkl`` file, an
            ``*.index.json`` of shards, or a folder with one of these. ``{"model": ...}``,
            ``{"state_dict": ...}`` and the prefix ``module.`` of a distributed wrapper are taken
            off.

    Raises:
        FileNotFoundError: no such path, or a shard that the index names is missing.
        ValueError: a damaged file, one that would need code to be run, or an index that its shards
            do not fit.
    """
    first = main_file(path)
    state = _read_shards(first) if first.suffix == ".json" else _read_file(first)
    wrapper = "module."
    if state and all(key.startswith(wrapper) for key in state):
        state = {key[len(wrapper) :]: tensor for key, tensor in state.items()}
    return state


def read_torch(path: str | Path, *, mmap: bool = False) -> Any:
    """What a file of ``torch.save`` holds, on the CPU; no code of it is run.

    Args:
        path: the file.
        mmap: map the tensors instead of reading them, if the file's layout allows it.

    Raises:
        ValueError: a TorchScript archive, a damaged file, or objects other than plain data.
    """
    zipped = zipfile.is_zipfile(path)
    if zipped and _is_torchscript(path):
        raise ValueError(
            f"weights {path} are a TorchScript archive, which is a program. If you trust it, write"
            " its weights alone: torch.save(torch.jit.load(FILE, map_location='cpu').state_dict(),"
            " 'weights.pth'), or take the same model from open_clip or transformers"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)
    except Exception as error:  # torch raises many types for a damaged file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"weights {path} cannot be read ({reason})") from error


def download(names: Mapping[str, str], output: Path, written: int) -> dict[str, Path]:
    """Bring models to the hub's cache (``HF_HOME``), and go on where a download was broken off.

    Args:
        names: by kind "owner/name@commit"; without a commit what ``main`` is now. Only the files
            that are needed are taken.
        output, written: what will be made of them, and its bytes: room for all is checked first.

    Returns:
        a folder by kind, whose name is the commit.
    """
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import DryRunError

    fetched, wanted = 0, []
    for kind, name in names.items():
        repository, _, commit = name.partition("@")
        patterns = TOKENIZER_FILES if kind == "tokenizer" else _WEIGHT_FILES
        # Not told, huggingface_hub 1 asks for the files of a commit offline too.
        options: Any = {"allow_patterns": patterns, "local_files_only": constants.HF_HUB_OFFLINE}
        get = functools.partial(snapshot_download, repository, **options)
        commit = commit or "main"
        with contextlib.suppress(DryRunError):  # offline: what is in the cache is all there is
            files: Any = get(revision=commit, dry_run=True)
            fetched += sum(file.file_size or 0 for file in files if file.will_download)
            commit = files[0].commit_hash if files else commit
        wanted.append((kind, functools.partial(get, revision=commit)))
    needed: Counter[int] = Counter()
    for place, size in ((Path(constants.HF_HUB_CACHE), fetched), (output, written)):
        there = next(p for p in (place.absolute(), *place.absolute().parents) if p.exists())
        disk, free = there.stat().st_dev, shutil.disk_usage(there).free
        needed[disk] += size
        if free < needed[disk]:
            raise OSError(
                f"{needed[disk] / 1e9:.1f} GB are needed on the disk of {there}, {free / 1e9:.1f}"
                " GB are free: make room, or set HF_HOME or MODEL.WEIGHTS to another disk"
            )
    folders = {}
    for kind, get in wanted:
        try:
            folders[kind] = Path(str(get()))
        except (OSError, ValueError) as error:
            raise OSError(f"{names[kind]} (MODEL.HUB) was not downloaded: {error}") from error
    return folders


def stored_dtypes(
    state: Mapping[str, Tensor], dtype: torch.dtype | Mapping[str, torch.dtype] | None
) -> dict[str, torch.dtype]:
    """What each tensor is written in, by key.

    ``dtype`` is of all floating-point tensors, or by the first word of their keys; tensors for
    which it has none keep their own.
    """
    kinds = {}
    for key, tensor in state.items():
        kind = dtype.get(key.split(".")[0]) if isinstance(dtype, Mapping) else dtype
        kinds[key] = kind if kind and tensor.is_floating_point() else tensor.dtype
    return kinds


def write_shards(
    state: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_size: str = "5GB",
    dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
) -> list[str]:
    """Write safetensors shards and ``model.safetensors.index.json``; return the shards' names.

    Only the shard that is being written is copied.

    Args:
        state: tensors by key.
        folder: an existing folder; see :func:`new_folder`.
        max_shard_size: such as "5GB", else ValueError; a larger tensor gets a shard of its own.
        dtype: in the files, see :func:`stored_dtypes`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from tqdm import tqdm

    kinds = stored_dtypes(state, dtype)
    # Planned on empty tensors: what shares memory here is written twice, as two plain tensors.
    plan = split_torch_state_dict_into_shards(
        {k: torch.empty(t.shape, dtype=kinds[k], device="meta") for k, t in state.items()},
        max_shard_size=max_shard_size,
    )
    for name, keys in tqdm(plan.filename_to_tensors.items(), "shards", leave=False):
        shard = {
            k: state[k].to(kinds[k], copy=True, memory_format=torch.contiguous_format) for k in keys
        }
        save_file(shard, folder / name, metadata={"format": "pt"})
        to_disk(folder / name)
    size = sum(t.numel() * kinds[k].itemsize for k, t in state.items())
    weight_map = dict(sorted(plan.tensor_to_filename.items()))
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / _INDEX_NAMES[0]).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    to_disk(folder / _INDEX_NAMES[0])
    return list(plan.filename_to_tensors)


@contextlib.contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder that becomes ``path`` when the block ends well, and vanishes otherwise.

    Raises:
        ValueError: ``path`` is there already and not an empty folder.
        FileNotFoundError: the folder it lies in does not exist.
    """
    path = Path(os.path.abspath(path))
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path} exists already: name a new folder, or remove it first")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"the folder {path.parent} does not exist: make it first")
    # Only the owner may read what tempfile makes; the folder in it is as any other.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        os.replace(folder, path)


def _read_file(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".pkl":
        try:
            # Detectron2's model zoo has files of Python 2, whose strings are bytes.
            return _tensors(read_pickle(path, NUMPY_PARTS, encoding="latin1"), path)
        except ValueError as error:
            raise ValueError(f"weights {path} cannot be read ({error})") from error
    if path.suffix in _TORCH_SUFFIXES:
        return _tensors(read_torch(path, mmap=True), path)
    known = ", ".join((*_SUFFIXES, ".index.json"))
    raise ValueError(f"weights {path} have an unknown suffix {path.suffix!r}; known: {known}")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            return {key: stream.get_tensor(key) for key in stream.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"weights {path} cannot be read ({error}); the file has {path.stat().st_size} bytes."
            " Its copying or download may have been cut short: get it again"
        ) from error


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = read_json(path)["weight_map"]
        names = set(weight_map.values())
        # Shards lie beside their index; anything else would let a file reach into other folders.
        odd = [n for n in names if not isinstance(n, str) or os.path.basename(n) != n or not n]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f'{path} is no index of shards: it needs {{"weight_map": ...}}') from error
    if odd or not names:
        raise ValueError(f"{path} names no shard, or one in another folder: {odd[:1]}")
    absent = sorted(name for name in names if not (path.parent / name).is_file())
    if absent:
        raise FileNotFoundError(
            f"{path} names {len(names)} shards, {len(absent)} are missing: {some(absent)}"
        )
    return weight_map


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map = _read_index(index)
    state: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        shard = _read_file(index.parent / name)
        named = {key for key, file in weight_map.items() if file == name}
        absent, extra = sorted(named - shard.keys()), sorted(shard.keys() - named)
        if absent or extra:
            raise ValueError(
                f"{index} and its shard {name} do not fit: {len(absent)} keys of the index are not"
                f" in the shard ({some(absent)}), {len(extra)} of the shard are not in the index"
                f" ({some(extra)}). Take both from the same model"
            )
        state.update(shard)
    return state


def _tensors(loaded: Any, path: Path) -> dict[str, Tensor]:
    for name in ("model", "state_dict"):
        if isinstance(loaded, dict) and isinstance(loaded.get(name), dict):
            loaded = loaded[name]
            break
    if not isinstance(loaded, dict) or not loaded:
        raise ValueError(f"weights {path} hold no dictionary of tensors by key")
    state = {}
    for key, value in loaded.items():
        if isinstance(value, np.ndarray) and value.dtype != object:
            value = torch.from_numpy(np.array(value))  # a copy: pickled arrays may be read-only
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"weights {path}: key {key} is a {type(value).__name__}, no tensor")
        state[key] = value
    return state


def _is_torchscript(path: str | Path) -> bool:
    with zipfile.ZipFile(path) as archive:
        return any(n.endswith("/constants.pkl") or "/code/" in n for n in archive.namelist())
