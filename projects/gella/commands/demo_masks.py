"""Where the demo's entity masks come from: files beside pictures, a folder, a JSON, a segmenter.

A source gives a job's entities, and a key that changes when they would change, so that finished
pictures are known without decoding a mask.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import numpy as np

from gella.commands.demo_inputs import MASKS_BESIDE, Job, Picture
from gella.entities.entity_map import EntityMap
from gella.entities.sources import FileSource, load_entities, load_from_record
from gella.segmenters.segmenter import MaskLimits, load_segmenter
from gella.utils.io import file_hash, read_json

_SUFFIXES = (".npz", ".png")


class MaskSource(Protocol):
    """Gives the entities of jobs."""

    def key(self, job: Job) -> Any:
        """What JSON can hold, and changes when the entities would change; errors as `load`."""
        ...

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """The job's entities in the frame of its picture, uint8 (H, W, 3).

        Raises:
            FileNotFoundError, ValueError: there are none, or they are damaged or of another size.
        """
        ...


def _read(path: Path, job: Job, image: np.ndarray, **more: Any) -> EntityMap:
    height, width = image.shape[:2]
    return load_entities(path, height, width, image_id=job.picture.image_id, **more)


def find_segments(panoptic_json: str | Path, mask_name: str) -> list[dict[str, Any]]:
    """Return ``segments_info`` of the annotation whose PNG is ``mask_name``.

    Raises:
        FileNotFoundError: there is no such JSON file.
        ValueError: it is no COCO panoptic file, or knows no such PNG.
    """
    content = read_json(panoptic_json, "panoptic JSON")
    try:
        annotations = content["annotations"]
        return next(a["segments_info"] for a in annotations if a["file_name"] == mask_name)
    except StopIteration:
        raise ValueError(
            f"panoptic JSON {panoptic_json} has no annotation with file_name {mask_name}"
        ) from None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{panoptic_json} is no COCO panoptic file ({error!r})") from error


class OneFile:
    """The mask file of one picture."""

    def __init__(self, path: Path, format: str = "auto", panoptic_json: str | None = None) -> None:
        """Args: the file, its format, and the COCO panoptic file that says what is crowd."""
        self._path, self._format = path, format
        self._segments = panoptic_json and find_segments(panoptic_json, path.name)

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        return [_hash(self._path, job), self._format, self._segments]

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        more: dict[str, Any] = {"format": self._format, "segments_info": self._segments}
        return _read(self._path, job, image, **more)


class MaskFolder:
    """A folder with an ``.npz`` or ``.png`` per picture, in the input's subfolders or in none.

    For ``a/x.jpg`` it looks for ``a/x.npz``, ``a/x.png``, ``a/x.jpg.npz``, ..., ``x.npz``, ..., and
    for all of these with ``_masks`` before the suffix.
    """

    def __init__(self, folder: Path, pictures: Sequence[Picture], format: str = "auto") -> None:
        """Args: the folder, all pictures (a file that two could mean is an error), the format."""
        self._folder, self._format = folder, format
        forms = [_forms(picture.name) for picture in pictures]
        self._own = Counter(form for own, _ in forms for form in own)
        self._flat = Counter(form for _, flat in forms for form in flat)

    def find(self, job: Job) -> Path:
        """The job's mask file.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it could be another picture's as well.
        """
        own, flat = _forms(job.picture.name)
        # A file without folders belongs to a picture without folders, if there is one.
        claims = {form: self._own[form] for form in own}
        claims.update({form: self._flat[form] for form in flat if form not in self._own})
        for form in sorted(claims, key=lambda form: claims[form] > 1):
            for ending in (*_SUFFIXES, *(MASKS_BESIDE + suffix for suffix in _SUFFIXES)):
                path = self._folder / f"{form}{ending}"
                if path.is_file() and claims[form] == 1:
                    return path
                if path.is_file():
                    better = next((form for form in own if claims[form] == 1), own[0])
                    raise ValueError(
                        f"image {job.picture.name}: its masks {path} could be those of another "
                        f"picture, too; call them {better}{ending}"
                    )
        raise FileNotFoundError(
            f"image {job.picture.name}: no masks in {self._folder}, such as {own[0]}.png"
        )

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        return [_hash(self.find(job), job), self._format]

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        return _read(self.find(job), job, image, format=self._format)


def _forms(name: str) -> tuple[list[str], list[str]]:
    """Names of a picture's masks without their suffix: below its folders, and without folders."""
    path = PurePosixPath(name)
    own = [str(path.with_suffix("")), name]
    flat = [path.stem, path.name] if len(path.parts) > 1 else []
    return list(dict.fromkeys(own)), list(dict.fromkeys(flat))


class MaskJson:
    """One COCO JSON (results, instances or panoptic) for all pictures.

    A file with ``images`` is asked by their file names first, and by image id failing that.
    """

    def __init__(self, path: Path, pictures: Sequence[Picture], format: str = "auto") -> None:
        """Args: the file, all pictures (two of one id are an error), its format.

        Raises:
            FileNotFoundError, ValueError: as `FileSource`, or two pictures have one id.
        """
        self._path = path
        self._source = FileSource(path, format)
        names = _image_ids(path)
        owners: dict[str, Picture] = {}
        self._ids: dict[str, Any] = {}
        for picture in pictures:
            by_name = names.get(picture.name, names.get(PurePosixPath(picture.name).name))
            image_id = picture.image_id if by_name is None else by_name
            other = owners.setdefault(str(image_id), picture)
            if other is not picture:
                raise ValueError(
                    f"{other.name} and {picture.name} have one image id in {path}, {image_id}; "
                    "rename one, or give masks by a folder"
                )
            self._ids[picture.name] = image_id

    def _place(self, job: Job) -> dict[str, Any]:
        image_id = self._ids[job.picture.name]
        record = {"image_id": image_id, "file_name": str(job.picture.path), "entities": {}}
        return self._source.lead(record)["entities"]

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        place = self._place(job)
        picture = Path(place["file_name"])
        # The entries of the JSON say all, but in the panoptic form the masks lie in a PNG.
        masks = None if picture == self._path else _hash(picture, job)
        return [masks, place["format"], place["segments_info"]]

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        place = self._place(job)
        more = {"format": place["format"], "segments_info": place["segments_info"]}
        return _read(Path(place["file_name"]), job, image, **more)


def _image_ids(path: Path) -> dict[str, Any]:
    """Image ids by file name, by its last part too where that is enough; {} without ``images``."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    found: dict[str, Any] = {}
    last: Counter[str] = Counter()
    for image in images if isinstance(images, list) else ():
        if isinstance(image, dict) and isinstance(image.get("file_name"), str) and "id" in image:
            found[image["file_name"]] = image["id"]
            last[PurePosixPath(image["file_name"]).name] += 1
    short = {PurePosixPath(name).name: number for name, number in found.items()}
    return {**{name: number for name, number in short.items() if last[name] == 1}, **found}


class Live:
    """A segmenter that looks at each picture."""

    def __init__(
        self,
        spec: str,
        device: str | None = None,
        options: Mapping[str, str] | None = None,
        limits: MaskLimits | None = None,
    ) -> None:
        """Load it; arguments and errors as `load_segmenter`, and which masks are kept."""
        self._limits = limits or MaskLimits()
        self._key = [spec, sorted((options or {}).items()), vars(self._limits)]
        self._segmenter = load_segmenter(spec, device, options)

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        return self._key

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        entities = self._segmenter.segment(image, self._limits)
        if entities.num_entities == 0:
            raise ValueError(
                f"image {job.picture.name}: the segmenter found no entity; lower its thresholds "
                "(--segmenter-option) or --min-area"
            )
        return entities


class Whole:
    """One entity, the whole picture: for questions whose answer does not depend on masks."""

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        return "whole"

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        return EntityMap(np.ones(image.shape[:2], dtype=np.int32), [1])


class Records:
    """The masks that a dataset's records lead to."""

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        place = (job.record or {}).get("entities") or {}
        return {name: str(place.get(name)) for name in ("format", "file_name", "segments_info")}

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        return load_from_record(job.record or {}, image)


class Beside:
    """The file that the captions name, else ``x_masks.npz`` or ``x_masks.png`` beside ``x.jpg``."""

    def __init__(self, missing: MaskSource | None = None) -> None:
        """``missing``: asked for pictures without such a file; None: they are errors."""
        self._missing = missing

    def _find(self, job: Job) -> MaskSource:
        if job.masks is not None:
            return OneFile(job.masks)
        path = job.picture.path
        for suffix in _SUFFIXES:
            file = path.with_name(path.stem + MASKS_BESIDE + suffix)
            if file.is_file():
                return OneFile(file)
        if self._missing is not None:
            return self._missing
        raise FileNotFoundError(
            f"image {job.picture.name}: no masks; put {path.stem}{MASKS_BESIDE}.png beside it, or "
            "give --masks or --segmenter"
        )

    def key(self, job: Job) -> Any:
        """See `MaskSource.key`."""
        return self._find(job).key(job)

    def load(self, job: Job, image: np.ndarray) -> EntityMap:
        """See `MaskSource.load`."""
        return self._find(job).load(job, image)


def masks_from(
    path: Path, pictures: Sequence[Picture], format: str, panoptic_json: str | None
) -> MaskSource:
    """The source that ``--masks`` names: a folder, a JSON of many pictures, or one picture's file.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: one picture's file for several pictures, or a JSON that cannot be read.
    """
    if path.is_dir():
        return MaskFolder(path, pictures, format)
    if not path.exists():
        raise FileNotFoundError(f"mask file {path} does not exist; check --masks")
    if path.suffix.lower() == ".json":
        return MaskJson(path, pictures, format)
    if len(pictures) > 1:
        raise ValueError(
            f"masks {path} are one picture's file, but there are {len(pictures)} pictures; give "
            "a folder with a file per picture, or a COCO JSON"
        )
    return OneFile(path, format, panoptic_json)


def _hash(path: Path, job: Job) -> str:
    if not path.is_file():
        raise FileNotFoundError(f"image {job.picture.name}: masks {path} do not exist")
    return file_hash(path)
