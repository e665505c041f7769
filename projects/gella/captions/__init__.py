"""Captions and their nouns from multimodal models: chat endpoints and local models.

    captioner = open_captioner("http://127.0.0.1:8000/v1", "some-model")
    caption = describe(captioner, load_picture("street.jpg", upright=True))
    print(caption.description, caption.nouns)

The demo and the web page get their captions so; ``tools/describe_images.py`` writes many.
"""

from __future__ import annotations

import os
from typing import Any

from gella.captions.captioner import describe, load_picture
from gella.captions.endpoint import EndpointCaptioner, EndpointSettings
from gella.captions.local import LocalCaptioner

__all__ = ["describe", "is_endpoint", "load_picture", "open_captioner"]


def is_endpoint(address: str) -> bool:
    """Whether a captioner's address is that of an endpoint, not a local model's path or name."""
    return address.lower().startswith(("http://", "https://"))


def open_captioner(
    address: str,
    model: str | None = None,
    *,
    device: str = "cpu",
    settings: EndpointSettings | None = None,
) -> Any:
    """Open the model that an address names; besides ``ask`` it has ``stop`` and ``abort``.

    Args:
        address: ``http://...`` or ``https://...`` of an OpenAI-compatible endpoint, such as
            ``https://host/v1``; else a folder of ``save_pretrained``, or a name on the Hugging Face
            hub, of an image-text model that runs in this process.
        model: the endpoint's model; None takes ``GELLA_API_MODEL``. Not for a local model.
        device: of the local model.
        settings: how patiently to ask the endpoint.

    The endpoint's key comes from the environment only (``GELLA_API_KEY``).

    Raises:
        ValueError: there is no model's name, or one too many, or the address or the key cannot be
            right; the key is not shown.
        FileNotFoundError: no local model can be read there.
        ImportError: the package that asks endpoints is missing.
    """
    if not is_endpoint(address):
        if model:
            raise ValueError(
                f"model {model!r} was given for {address}, which is no http:// or https:// address "
                "and so a local model; leave the model's name out, or give an endpoint's address"
            )
        return LocalCaptioner(address, device=device)
    if not model and not os.getenv("GELLA_API_MODEL"):
        raise ValueError(
            f"the endpoint {address} needs the name of a model: give it (--captioner-model NAME), "
            "or set GELLA_API_MODEL"
        )
    return EndpointCaptioner.from_environment(address, model, settings=settings)
