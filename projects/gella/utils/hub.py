"""The Hugging Face hub: what its cache holds, and whether it answers."""

from __future__ import annotations

from pathlib import Path


def cached_models() -> dict[str, Path]:
    """The newest snapshot of every model in the hub's cache, by its name on the hub."""
    from huggingface_hub import constants

    found = Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*")
    newest = sorted(found, key=lambda folder: folder.stat().st_mtime)
    return {f.parents[1].name.removeprefix("models--").replace("--", "/"): f for f in newest}


def model_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of that name, or a model of the hub, downloaded into its cache unless it is there.

    Raises:
        OSError: there is no such folder, and the hub does not have the model or does not answer.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    try:
        cached = bool(hub_options(str(name)))  # it does not answer
        others = ["*.h5", "*.msgpack"]  # the same weights for other frameworks
        return Path(
            snapshot_download(
                str(name), revision=revision, local_files_only=cached, ignore_patterns=others
            )
        )
    except HFValidationError as error:  # a ValueError about the form of names
        raise FileNotFoundError(f"{name} is no folder and no name on the hub: {error}") from error


def hub_options(name: str) -> dict[str, bool]:
    """What transformers' ``from_pretrained`` has to be told besides a folder or a hub's name.

    Transformers asks a hub that does not answer six times for each file, with two lines each time.
    Here it is asked once, and has the library's own time for it (``HF_HUB_ETAG_TIMEOUT`` of the
    environment, 10 s); where it does not answer, a model in its cache is taken from there.

    Raises:
        OSError: a path of no folder, or the hub does not answer, and its cache lacks the model.
    """
    from huggingface_hub import constants, get_session

    folder = Path(name).expanduser()
    if name and folder.is_dir():
        return {}
    # The hub's names are "owner/name"; anything else would be asked of it in vain.
    if not name or folder.exists() or name[0] in "./~" or name.count("/") > 1:
        raise FileNotFoundError(f"folder {name} does not exist; name one, or a model of the hub")
    if constants.HF_HUB_OFFLINE:
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
