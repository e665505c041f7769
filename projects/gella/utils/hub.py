"""The Hugging Face hub: what its cache holds, and whether it answers."""

from __future__ import annotations

from pathlib import Path


def cached_models() -> dict[str, Path]:
    """The newest snapshot of every model in the hub's cache, by its name on the hub."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    newest = sorted(found, key=lambda folder: folder.stat().st_mtime)
    return {f.parents[1].name.removeprefix("models--").replace("--", "/"): f for f in newest}


def hub_options(name: str) -> dict[str, bool]:
    """What transformers' ``from_pretrained`` has to be told besides a folder or a hub's name.

    Transformers asks a hub that does not answer six times for each file, with two lines each time.
    Here it is asked once, and has the library's own time for it (``HF_HUB_ETAG_TIMEOUT`` of the
    environment, 10 s); where it does not answer, a model in its cache is taken from there.

    Raises:
        OSError: the hub does not answer, and its cache lacks the model.
    """
    from huggingface_hub import constants, get_session

    if Path(name).expanduser().is_dir() or constants.HF_HUB_OFFLINE:
        return {}
    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception as error:  # of whatever library asks for the hub
        if name in cached_models():
            return {"local_files_only": True}
        raise OSError(
            f"{constants.ENDPOINT} does not answer, and its cache on this machine has no {name}; "
            "name a folder of the model instead"
        ) from error
    return {}
