"""Helpers of the tests about datasets: where the files of a split are, names of a moment."""

from contextlib import contextmanager

from detectron2.data import DatasetCatalog, MetadataCatalog


def places(root, split):
    """Panoptic files and images of one split below a folder laid out as COCO's."""
    notes = root / "annotations"
    return {
        "panoptic_json": notes / f"panoptic_{split}.json",
        "panoptic_root": notes / f"panoptic_{split}",
        "image_root": root / split,
    }


@contextmanager
def registered(register, *args, **options):
    """Register a dataset under a name of its own, and forget it at the end."""
    name = f"gella_test_{register.__name__}"
    register(name, *args, **options)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)
